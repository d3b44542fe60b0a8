"""What one update of MAE pre-training does with patches and tokens beside its blocks.

Three functions, one call: pixels of the kept patches for the embedding, the decoder's input from
the encoder's tokens, the loss on the removed patches. Tokens and predictions have the dtype of the
benchmark, images, parameters and the decoder's input are fp32, as under autocast. `maect-fast bench
trace --op mae_tokens` tells them apart.

B images of H x H pixels in three channels, N kept patches, D the decoder's width, K a patch's side.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial

import torch
from torch import Tensor

from maect_fast.benchmarks.registry import (
    EAGER,
    OURS,
    Call,
    Op,
    Outputs,
    Sizes,
    check_sums,
    compile_peer,
)
from maect_fast.kernels import gather_patches, masked_patch_mse, restore_tokens
from maect_fast.kernels.mae_tokens import reference

__all__ = ["OP"]

# (H, N, D, K) of MAE pre-training: 16 and 14 pixels (arXiv 2304.10520, appendix).
MAE = ((224, 49, 512, 16), (224, 64, 512, 14))
# One kept patch, all but one, widths that are no power of two, sides down to two pixels.
ODD = ((32, 1, 24, 16), (42, 8, 80, 14), (20, 6, 520, 4), (8, 5, 16, 2))


def _sizes(B: int, H: int, N: int, D: int, K: int) -> Sizes:
    return {"B": B, "H": H, "N": N, "D": D, "K": K}


@dataclass(frozen=True, slots=True)
class Inputs:
    images: Tensor
    """[B, 3, H, H] fp32."""
    tokens: Tensor
    """[B, 1 + N, D]."""
    mask_token: Tensor
    """[1, 1, D] fp32."""
    pos_embed: Tensor
    """[1, L, D] fp32."""
    predicted: Tensor
    """[B, L - N, 3 * K * K]."""
    grad: Tensor
    """[B, 1 + L, D] fp32, of the decoder's input."""
    ids: Tensor
    """[B, L] int64, the kept patches first."""
    ids_restore: Tensor
    """[B, L] int64."""
    patch_size: int

    @property
    def num_kept(self) -> int:
        """N."""
        return int(self.tokens.shape[1]) - 1

    def to(self, dtype: torch.dtype) -> "Inputs":
        """As under autocast to `dtype`; fp64: everything."""
        wide = torch.promote_types(dtype, torch.float32)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                values[name] = value.to(dtype if name in ("tokens", "predicted") else wide)
        return Inputs(**values)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    B, H, N, D, K = (sizes[letter] for letter in "BHNDK")
    L = (H // K) ** 2
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, generator=generator, device=device)
    ids = torch.rand(B, L, generator=generator, device=device).argsort(1)
    return Inputs(
        images=randn(B, 3, H, H),
        tokens=randn(B, 1 + N, D),
        mask_token=randn(1, 1, D),
        pos_embed=randn(1, L, D),
        predicted=randn(B, L - N, 3 * K * K),
        grad=randn(B, 1 + L, D),
        ids=ids,
        ids_restore=ids.argsort(1),
        patch_size=K,
    ).to(dtype)


def _definition(x: Inputs, mode: str, dtype: torch.dtype) -> Outputs:
    return _differentiate(x.to(dtype), mode, _plain)()


def _check(x: Inputs, found: Outputs, eager: Outputs, truth: Outputs) -> None:
    is_removed = (x.ids_restore >= x.num_kept)[..., None]
    # Thousands of them: a mask token has the gradients of all removed patches.
    terms = (x.grad[:, 1:].double() * is_removed).flatten(0, 1)
    check_sums(found, eager, truth, {"dmask": terms} if "dmask" in truth else {})


def _num_bytes(sizes: Sizes, mode: str, itemsize: int) -> int:
    B, H, N, D, K = (sizes[letter] for letter in "BHNDK")
    L, F = (H // K) ** 2, 3 * K * K
    # fp32 pixels to rows; tokens to the decoder's fp32 input; predictions and fp32 pixels.
    gather = (4 + itemsize) * N * F
    restore = itemsize * (1 + N) * D + 4 * (1 + L) * D
    loss = (itemsize + 4) * (L - N) * F
    # The same tensors again, and the predictions' gradient.
    fwd, bwd = gather + restore + loss, restore + loss + itemsize * (L - N) * F
    return B * {"fwd": fwd, "bwd": bwd, "full": fwd + bwd}[mode]


OP: Op[Inputs] = Op(
    name="mae_tokens",
    letters="BHNDK",
    modes=("fwd", "bwd", "full"),
    sizes={
        "cuda": tuple(_sizes(512, *shape) for shape in MAE),
        "cpu": tuple(_sizes(16, *shape) for shape in MAE),
        "check": tuple(_sizes(3, *shape) for shape in ODD),
        "quick": (_sizes(8, *MAE[0]),),
    },
    inputs=_inputs,
    definition=_definition,
    check=_check,
    num_bytes=_num_bytes,
    # No matrix product.
    num_flops=lambda sizes, mode: 0,
)

Forward = Callable[[Inputs, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(inputs, tokens, mask token, predictions) -> patches, decoder's input, loss."""


def _plain(
    x: Inputs, tokens: Tensor, mask_token: Tensor, predicted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch with its own autograd."""
    kept, removed, K = x.ids[:, : x.num_kept], x.ids[:, x.num_kept :], x.patch_size
    patches = reference.gather_patches(x.images, kept, K, tokens.dtype)
    restored = reference.restore_tokens(tokens, mask_token, x.pos_embed, x.ids_restore)
    loss, _ = reference.masked_patch_mse(predicted, x.images, removed, K, normalize=True)
    return patches, restored, loss


def _fused(
    x: Inputs, tokens: Tensor, mask_token: Tensor, predicted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kept, removed, K = x.ids[:, : x.num_kept], x.ids[:, x.num_kept :], x.patch_size
    patches = gather_patches(x.images, kept, K, dtype=tokens.dtype)
    restored = restore_tokens(tokens, mask_token, x.pos_embed, x.ids_restore)
    return patches, restored, masked_patch_mse(predicted, x.images, removed, K, normalize=True)


def _differentiate(x: Inputs, mode: str, forward: Forward) -> Call:
    """The call of a mode, for functions that autograd knows."""
    leaves = (x.tokens, x.mask_token, x.predicted)

    def fwd() -> Outputs:
        with torch.no_grad():
            return dict(zip(("patches", "restored", "loss"), forward(x, *leaves), strict=True))

    if mode == "fwd":
        return fwd
    tokens, mask_token, predicted = (leaf.detach().requires_grad_() for leaf in leaves)
    sources = (tokens, mask_token, predicted)

    def backward(restored: Tensor, loss: Tensor, *, again: bool) -> Outputs:
        one = torch.ones_like(loss)
        grads = torch.autograd.grad([restored, loss], sources, [x.grad, one], retain_graph=again)
        return dict(zip(("dtokens", "dmask", "dpredicted"), grads, strict=True))

    if mode == "bwd":
        _, *outputs = forward(x, *sources)
        return lambda: backward(*outputs, again=True)

    def full() -> Outputs:
        patches, restored, loss = forward(x, *sources)
        grads = backward(restored, loss, again=False)
        return {"patches": patches, "restored": restored.detach(), "loss": loss.detach(), **grads}

    return full


@OP.provider(OURS)
def ours(x: Inputs, mode: str) -> Call:
    return _differentiate(x, mode, _fused)


@OP.provider(EAGER)
def eager(x: Inputs, mode: str) -> Call:
    return _differentiate(x, mode, _plain)


@OP.provider("torch.compile")
def compiled(x: Inputs, mode: str) -> Call:
    return _differentiate(x, mode, _compile_plain())


@cache
def _compile_plain() -> Forward:
    return compile_peer(_plain)
