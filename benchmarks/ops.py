"""What is timed: for each op and shape, eager PyTorch first, then our op."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maect_fast.kernels import info_nce, masked_attention, queue_topk
from maect_fast.testing import random_qkv, random_queue, unit_rows

Providers = dict[str, Callable[[], tuple[Tensor, ...]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One op at one shape."""

    op: str
    shape: str
    make: Callable[[torch.device], Providers]
    """Providers by name, the baseline first; each call returns the tensors that must agree."""
    tolerance: float = 1e-4
    """Largest difference from the baseline, relative to its largest value."""


def attention_case(B: int, N: int, H: int, D: int) -> Case:
    """Forward and backward of dense self-attention on the packed tensor."""

    def make(device: torch.device) -> Providers:
        qkv = random_qkv(B, N, heads=H, dim=D, device=device).requires_grad_()
        grad = random_qkv(B, N, heads=H, dim=D, device=device, seed=1)[:, :, 0]

        def eager() -> tuple[Tensor, ...]:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            weights = (q @ k.mT * D**-0.5).softmax(dim=-1)
            o = (weights @ v).transpose(1, 2)
            return o.detach(), *torch.autograd.grad(o, qkv, grad)

        def sdpa() -> tuple[Tensor, ...]:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return o.detach(), *torch.autograd.grad(o, qkv, grad)

        def ours() -> tuple[Tensor, ...]:
            o = masked_attention(qkv)
            return o.detach(), *torch.autograd.grad(o, qkv, grad)

        return {"eager": eager, "SDPA": sdpa, "maect-fast": ours}

    return Case(op="masked_attention", shape=f"B{B} N{N} H{H} D{D} fwd+bwd", make=make)


def search_case(B: int, Q: int, D: int, k: int) -> Case:
    """Top-k of one view's queries, own ids excluded."""

    def make(device: torch.device) -> Providers:
        state = random_queue(Q, D, num_ids=2 * Q, num_classes=10, device=device)
        query = unit_rows(B, D, device=device, seed=1)
        ids = torch.arange(B, device=device)

        def eager() -> tuple[Tensor, ...]:
            score = query @ state.queue.T
            score[state.queue_id == ids[:, None]] = -1
            return (score.topk(k).values,)

        def ours() -> tuple[Tensor, ...]:
            return (queue_topk(query, state, k=k, query_id=ids).values,)

        return {"eager": eager, "maect-fast": ours}

    return Case(op="queue_topk", shape=f"B{B} Q{Q} D{D} k{k}", make=make)


def loss_case(n: int, D: int) -> Case:
    """Both views' loss, forward and backward."""

    def make(device: torch.device) -> Providers:
        predicted = unit_rows(2, n, D, device=device).requires_grad_()
        neighbour = unit_rows(2, n, D, device=device, seed=1)
        target = torch.arange(n, device=device)

        def eager() -> tuple[Tensor, ...]:
            unit = F.normalize(predicted, dim=-1)
            logits = neighbour.flip(0) @ unit.mT / 0.2
            loss = F.cross_entropy(logits.flatten(0, 1), target.repeat(2))
            return loss.detach(), *torch.autograd.grad(loss, predicted)

        def ours() -> tuple[Tensor, ...]:
            loss = info_nce(predicted, neighbour, temperature=0.2)
            return loss.detach(), *torch.autograd.grad(loss, predicted)

        return {"eager": eager, "maect-fast": ours}

    return Case(op="info_nce", shape=f"2 x {n} x {D} fwd+bwd", make=make)


CASES = [
    attention_case(16, 50, 12, 64),
    attention_case(16, 197, 12, 64),
    attention_case(8, 257, 16, 80),
    search_case(128, 65_536, 256, 1),
    search_case(128, 65_536, 256, 20),
    loss_case(512, 256),
    loss_case(2048, 256),
]
