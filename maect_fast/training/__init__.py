"""The tuning loop and what it is made of."""
