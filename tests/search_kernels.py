"""Kernels around parts of the search that no kernel of it runs alone."""

import triton
import triton.language as tl

from maect_fast.kernels.queue_topk.triton_exact import _exact
from maect_fast.kernels.queue_topk.triton_score import AGAIN_ROWS, _score_again

__all__ = ["exact_scores", "score_again"]


@triton.jit
def exact_scores(query_ptr, queue_ptr, score_ptr, Q, D: tl.constexpr, ROWS: tl.constexpr):
    """Scores [Q] of one row, so many slots at a time."""
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    norm = tl.full((), 1.0, tl.float32)
    exact = _exact(query_ptr, queue_ptr, slot, slot < Q, norm, D, D, ROWS)
    tl.store(score_ptr + slot, exact, slot < Q)


@triton.jit
def score_again(query_ptr, queue_ptr, first_ptr, second_ptr, norm_ptr, B, Q, G, D: tl.constexpr):
    """Group maxima of the first B of AGAIN_ROWS rows, in spans of 256 slots."""
    offs_b = tl.arange(0, AGAIN_ROWS)
    _score_again(
        query_ptr + offs_b * D,
        queue_ptr,
        first_ptr + offs_b * G,
        second_ptr + offs_b * G,
        tl.load(norm_ptr + offs_b),
        offs_b < B,
        0,
        Q,
        G,
        D,
        D,
        256,
    )
