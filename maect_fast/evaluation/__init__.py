"""How good frozen features are: k-NN, linear probe, low-shot, clustering, and the report."""
