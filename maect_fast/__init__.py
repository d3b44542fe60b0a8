"""maect-fast: fused ops and a tuning program for MAE-CT (arXiv 2304.10520)."""

__version__ = "0.1.0"
