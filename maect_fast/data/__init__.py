"""Images in, augmented batches out."""
