"""The networks: encoder, MAE decoder, NNCLR head, and the three stages' models."""
