"""The attention weights that fused models never hold, made beside the ops that leave them out."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from maect_fast.kernels._common.checks import check_tensors
from maect_fast.kernels.masked_attention import op, reference

__all__ = ["attention_maps"]


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Softmax weights of every fused attention in a model, ``softmax(scale * Q K^T)``.

    The model runs once, in eval mode, as ``model(images)``; its result is dropped. All maps are in
    memory at a time: 12 blocks of 12 heads on 197 tokens take 22 MB per image.

    Args:
        model: what `fuse` returned.
        images: what the model takes.

    Returns:
        [B, H, N, N] each, in the order in which the model attends; fp32 (fp64 for fp64 models).
        Rows sum to one; those of tokens without a key are zero, and so are columns of keys that a
        mask hides.

    Raises:
        ValueError: nothing in the model is fused.
    """
    check_tensors(images=images)
    recorder = _Recorder()
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with recorder:
            model(images)
    finally:
        # Layers may differ: a frozen one is not in the mode of the rest.
        for module, mode in training.items():
            module.training = mode
    if not recorder.maps:
        kind = type(model).__qualname__
        raise ValueError(f"model: expected one with fused attention, got {kind}: fuse(model) first")
    return recorder.maps


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Weights of every attention that runs inside, from the arguments of its op."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.maps: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is op.masked_attention_fwd:
            self.maps.append(_weights(*args[0].unbind(-3)[:2], *args[1:7]))
        elif func is op.attention_fwd:
            self.maps.append(_weights(*args[:2], *args[3:9]))
        return func(*args, **(kwargs or {}))


def _weights(
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """[B, H, M, N], packed [H, T, T]: attention to values that are one-hot."""
    N, H = k.shape[-3:-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    one_hot = torch.eye(N, dtype=wide, device=q.device)[:, None].expand(N, H, N)
    v = one_hot.expand(*k.shape[:-3], N, H, N)
    modes = (keep, seqlens, cu_seqlens, max_seqlen, key_mask)
    o, _ = reference.attention(q.to(wide), k.to(wide), v, *modes, scale)
    return o.transpose(-3, -2)
