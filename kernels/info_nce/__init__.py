"""InfoNCE losses without a logits matrix, forward and backward."""

from maect_fast.kernels._common.collectives import PendingRows
from maect_fast.kernels.info_nce.api import info_nce, info_nce_stats
from maect_fast.kernels.info_nce.gather import gather_neighbours, gather_with_neighbours
from maect_fast.kernels.info_nce.reference import InfoNCEStats
from maect_fast.kernels.info_nce.symmetric import symmetric_info_nce

__all__ = [
    "InfoNCEStats",
    "PendingRows",
    "gather_neighbours",
    "gather_with_neighbours",
    "info_nce",
    "info_nce_stats",
    "symmetric_info_nce",
]
