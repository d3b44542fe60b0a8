"""The ops, one folder each.

=====================  ============================================================================
`masked_attention`     short-sequence attention for (masked) ViTs; `attention` takes q, k, v apart
`queue_topk`           exact top-k nearest neighbours in a ring-buffer queue; `enqueue` updates it
`info_nce`             the NNCLR InfoNCE loss without a logits matrix; `symmetric_info_nce`, CLIP's
                       and SimCLR's; `info_nce_stats`; `gather_neighbours`, `gather_with_neighbours`
`mae_tokens`           of masked autoencoders: `gather_patches` before the embedding,
                       `restore_tokens` before the decoder, the loss `masked_patch_mse`
`residual_norm`        of a transformer block: the residual sum with the layer norm that reads it
`gelu`                 the exact GELU with the bias of the linear layer before it
`int8_linear`          a linear layer on int8 rows with a scale each, which `residual_norm_int8`,
                       `gelu_int8` and, of weights, `quantize_rows` make
=====================  ============================================================================

Each folder has a README with the maths, a `reference.py` that defines the op, an `op.py` that
registers it with torch.library, and an `api.py` with the public function.
"""

from maect_fast.kernels.gelu import gelu, gelu_int8
from maect_fast.kernels.info_nce import (
    InfoNCEStats,
    PendingRows,
    gather_neighbours,
    gather_with_neighbours,
    info_nce,
    info_nce_stats,
    symmetric_info_nce,
)
from maect_fast.kernels.int8_linear import int8_linear, quantize_rows
from maect_fast.kernels.mae_tokens import (
    gather_patches,
    masked_patch_mse,
    patch_targets,
    patch_view,
    restore_tokens,
)
from maect_fast.kernels.masked_attention import attention, masked_attention
from maect_fast.kernels.queue_topk import (
    Pick,
    QueueState,
    Shadow,
    TopK,
    enqueue,
    queue_topk,
    with_shadow,
)
from maect_fast.kernels.residual_norm import residual_norm, residual_norm_int8

__all__ = [
    "InfoNCEStats",
    "PendingRows",
    "Pick",
    "QueueState",
    "Shadow",
    "TopK",
    "attention",
    "enqueue",
    "gather_neighbours",
    "gather_patches",
    "gather_with_neighbours",
    "gelu",
    "gelu_int8",
    "info_nce",
    "info_nce_stats",
    "int8_linear",
    "masked_attention",
    "masked_patch_mse",
    "patch_targets",
    "patch_view",
    "quantize_rows",
    "queue_topk",
    "residual_norm",
    "residual_norm_int8",
    "restore_tokens",
    "symmetric_info_nce",
    "with_shadow",
]
