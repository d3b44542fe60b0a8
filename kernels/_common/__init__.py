"""What two ops use unchanged."""
