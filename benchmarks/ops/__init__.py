"""One module per op; `OPS` lists them."""

from typing import Any

from maect_fast.benchmarks.ops import (
    gelu,
    info_nce,
    int8_linear,
    mae_tokens,
    masked_attention,
    queue_topk,
    residual_norm,
)
from maect_fast.benchmarks.registry import Op

__all__ = ["OPS"]

OPS: dict[str, Op[Any]] = {
    module.OP.name: module.OP
    for module in (
        *(masked_attention, queue_topk, info_nce, mae_tokens, residual_norm, gelu),
        int8_linear,
    )
}
