"""How fast the ops are, beside eager PyTorch."""
