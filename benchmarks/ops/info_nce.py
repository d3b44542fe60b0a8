"""The two-view NNCLR loss of B rows per view against N columns, and its gradient.

With N > B the call is one rank's share of a batch of N over N / B ranks, without the exchange. Two
programs divide that work differently. By rows (the original): B neighbours against all N
predictions, each of which gets a part of its gradient. By columns (ours): B predictions against
all N neighbours, with the other ranks' row sums given, and their gradient is complete. The matrix
products have the same size; the outputs have different names, and each has its own truth.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from maect_fast.benchmarks.registry import (
    EAGER,
    OURS,
    Call,
    Op,
    Outputs,
    Sizes,
    UnavailableError,
    check_budget,
    compile_peer,
    import_peer,
)
from maect_fast.kernels import info_nce
from maect_fast.kernels.info_nce import op
from maect_fast.testing import unit_rows

__all__ = ["OP"]

TEMPERATURE = 0.2
# (B, N, D).
ODD = ((1, 1), (2, 2), (65, 65), (200, 200), (63, 1000), (128, 512, 64))


def _sizes(B: int, N: int, D: int = 256) -> Sizes:
    return {"B": B, "N": N, "D": D}


@dataclass(frozen=True, slots=True)
class Inputs:
    predicted: Tensor
    """[2, N, D] of the whole batch, not normalised."""
    neighbour: Tensor
    """[2, N, D] of the whole batch, unit rows."""
    B: int
    """Rows of this rank, the first ones of the batch."""

    @property
    def is_square(self) -> bool:
        """One rank has the whole batch."""
        num_columns: int = self.predicted.shape[1]
        return num_columns == self.B


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    N, D = sizes["N"], sizes["D"]
    # Raw predictions have no unit length.
    predicted = 3 * unit_rows(2, N, D, dtype=dtype, device=device)
    neighbour = unit_rows(2, N, D, dtype=dtype, device=device, seed=1)
    return Inputs(predicted, neighbour, sizes["B"])


def _definition(x: Inputs, mode: str, dtype: torch.dtype) -> Outputs:
    cast = Inputs(x.predicted.to(dtype), x.neighbour.to(dtype), x.B)
    by_columns = {} if x.is_square else _by_columns(cast, mode, _columns_loss)()
    return _by_rows(cast, mode, _rows_loss)() | by_columns


def _num_bytes(sizes: Sizes, mode: str, itemsize: int) -> int:
    # Both views' predictions and neighbours, of which one side is local; the local gradient.
    read, written = 2 * (sizes["B"] + sizes["N"]) * sizes["D"], 2 * sizes["B"] * sizes["D"]
    return itemsize * {"fwd": read, "bwd": read + written, "full": 2 * read + written}[mode]


def _num_flops(sizes: Sizes, mode: str) -> int:
    # Per view one product forward; backward it is computed again, and one more gives the gradient.
    products = {"fwd": 1, "bwd": 2, "full": 3}[mode]
    return 2 * products * 2 * sizes["B"] * sizes["N"] * sizes["D"]


OP: Op[Inputs] = Op(
    name="info_nce",
    letters="BND",
    modes=("fwd", "bwd", "full"),
    sizes={
        "cuda": tuple(_sizes(512, 512 << i) for i in range(7)),
        "cpu": tuple(_sizes(512, N) for N in (512, 1024, 4096, 32_768)),
        "check": tuple(_sizes(*shape) for shape in ODD),
        "quick": (_sizes(128, 128), _sizes(128, 512)),
    },
    inputs=_inputs,
    definition=_definition,
    check=lambda x, found, eager, truth: check_budget(found, eager, truth),
    num_bytes=_num_bytes,
    num_flops=_num_flops,
    row_letters={"n": "B", "P": "N"},
)


def _by_rows(x: Inputs, mode: str, loss: Callable[[Tensor, Tensor], Tensor]) -> Call:
    """`loss(predicted [2, N, D], neighbour [2, B, D])`, differentiated to all predictions."""
    suffix = "" if x.is_square else " by rows"
    return _differentiate(x.predicted, x.neighbour[:, : x.B], mode, loss, suffix)


def _by_columns(x: Inputs, mode: str, loss: Callable[[Tensor, Tensor], Tensor]) -> Call:
    """`loss(predicted [2, B, D], neighbour [2, N, D])`, differentiated to local predictions."""
    suffix = "" if x.is_square else " by columns"
    return _differentiate(x.predicted[:, : x.B], x.neighbour, mode, loss, suffix)


def _differentiate(
    predicted: Tensor,
    neighbour: Tensor,
    mode: str,
    loss: Callable[[Tensor, Tensor], Tensor],
    suffix: str,
) -> Call:
    """The call of a mode, for a loss that autograd knows."""

    def fwd() -> Outputs:
        with torch.no_grad():
            return {f"loss{suffix}": loss(predicted, neighbour)}

    if mode == "fwd":
        return fwd
    leaf = predicted.detach().requires_grad_()
    if mode == "bwd":
        value = loss(leaf, neighbour)

        def bwd() -> Outputs:
            return {f"gradient{suffix}": torch.autograd.grad(value, leaf, retain_graph=True)[0]}

        return bwd

    def full() -> Outputs:
        value = loss(leaf, neighbour)
        (grad,) = torch.autograd.grad(value, leaf)
        return {f"loss{suffix}": value.detach(), f"gradient{suffix}": grad}

    return full


def _rows_loss(predicted: Tensor, neighbour: Tensor) -> Tensor:
    """Plain PyTorch: the whole matrix of logits, both views in one product."""
    logits = neighbour.flip(0) @ F.normalize(predicted, dim=-1).mT / TEMPERATURE
    target = torch.arange(neighbour.shape[1], device=predicted.device).repeat(2)
    return _at_least_fp32(F.cross_entropy(logits.flatten(0, 1), target))


def _others_sum(x: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """[2, N] what the other ranks' columns add to a row's sum of exponentials, some constant.

    Of the size that it has for random directions: a column adds exp(0) or a little more.
    """
    others = float(num_rows - num_columns)
    return torch.full((2, num_rows), others, dtype=x.dtype, device=x.device)


def _columns_loss(predicted: Tensor, neighbour: Tensor) -> Tensor:
    """The sum over ranks of their losses, without what no local prediction enters."""
    B, N = predicted.shape[1], neighbour.shape[1]
    logits = neighbour.flip(0) @ F.normalize(predicted, dim=-1).mT / TEMPERATURE  # [2, N, B]
    row_sum = logits.exp().sum(-1) + _others_sum(logits, N, B)
    positive = logits.diagonal(dim1=1, dim2=2)
    return _at_least_fp32((row_sum.log().sum() - positive.sum()) / (2 * B))


def _at_least_fp32(loss: Tensor) -> Tensor:
    return loss.to(torch.promote_types(loss.dtype, torch.float32))


@OP.provider(OURS)
def ours(x: Inputs, mode: str) -> Call:
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64)

    def whole(predicted: Tensor, neighbour: Tensor) -> Tensor:
        return info_nce(predicted, neighbour, temperature=TEMPERATURE)

    def share(predicted: Tensor, neighbour: Tensor) -> Tensor:
        # What the public function does with a group, but for the exchange of sums. Of a row whose
        # positive is elsewhere, that is one of the others' columns, with the logit 0.
        B, N = predicted.shape[1], neighbour.shape[1]
        inputs = predicted.detach(), neighbour, temperature
        row_max, row_sum, positive, inverse = op.row_stats(*inputs, 0, False, False, "auto")
        others = _others_sum(row_sum[0], N, B)
        others[:, B:] -= 1
        zero = torch.zeros_like(others)
        row_max, row_sum = (
            torch.cat((parts, one[None]))
            for parts, one in ((row_max, zero), (row_sum, others.clamp_min(0)))
        )
        of_all = F.pad(positive, (0, N - B))
        _, lse, weight, normaliser = op.finish(row_max, row_sum, of_all, 0, N, "auto")
        mean = (lse.sum() - positive.sum()) / (2 * B)
        constants = neighbour, weight[:, :B], normaliser, None, 0, 2 * B, 1, "auto"
        return op.mean_loss(mean, predicted, inverse, temperature, *constants)

    return _by_columns(x, mode, whole if x.is_square else share)


@OP.provider(EAGER)
def eager(x: Inputs, mode: str) -> Call:
    return _by_rows(x, mode, _rows_loss)


@OP.provider("official")
def official(x: Inputs, mode: str) -> Call:
    """nnclr_loss_fn of losses/nnclr_loss.py, once per direction, under autocast for half inputs."""
    is_half = x.predicted.dtype in (torch.float16, torch.bfloat16)
    autocast = torch.autocast(x.predicted.device.type, x.predicted.dtype, enabled=is_half)

    def one_way(predicted: Tensor, nn: Tensor) -> Tensor:
        normed_predicted = F.normalize(predicted, dim=-1)
        logits = nn @ normed_predicted.T / TEMPERATURE
        labels = torch.arange(nn.size(0), device=predicted.device)
        return F.cross_entropy(logits, labels)

    def loss(predicted: Tensor, neighbour: Tensor) -> Tensor:
        with autocast:
            losses = one_way(predicted[0], neighbour[1]), one_way(predicted[1], neighbour[0])
            return _at_least_fp32((losses[0] + losses[1]) / 2)

    return _by_rows(x, mode, loss)


@OP.provider("torch.compile")
def compiled(x: Inputs, mode: str) -> Call:
    return _by_rows(x, mode, _compile_rows_loss())


@cache
def _compile_rows_loss() -> Callable[[Tensor, Tensor], Tensor]:
    return compile_peer(_rows_loss)


Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


def _by_linear_cross_entropy(x: Inputs, mode: str, one_way: Linear) -> Call:
    """For fused losses of language models: neighbours are tokens, predictions the vocabulary.

    `one_way(input [B, D], weight [N, D], target [B])`.
    """
    target = torch.arange(x.B, device=x.predicted.device)

    def loss(predicted: Tensor, neighbour: Tensor) -> Tensor:
        unit = F.normalize(predicted, dim=-1) / TEMPERATURE
        first, second = (one_way(neighbour[1 - v], unit[v], target) for v in range(2))
        return _at_least_fp32((first + second) / 2)

    return _by_rows(x, mode, loss)


@OP.provider("linear_cross_entropy")
def linear_cross_entropy(x: Inputs, mode: str) -> Call:
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return _by_linear_cross_entropy(x, mode, F.linear_cross_entropy)


@OP.provider("Liger", capturable=False)
def liger(x: Inputs, mode: str) -> Call:
    if not x.predicted.is_cuda:
        raise UnavailableError("needs CUDA")
    functional = import_peer("liger_kernel.transformers.functional")
    return _by_linear_cross_entropy(x, mode, functional.liger_fused_linear_cross_entropy)


@OP.provider("cut-cross-entropy")
def cut_cross_entropy(x: Inputs, mode: str) -> Call:
    """Its Triton kernels without gradient filter; on a CPU, or for fp32, its compiled version."""
    module = import_peer("cut_cross_entropy")
    is_half = x.predicted.dtype in (torch.float16, torch.bfloat16)
    implementation = "cce_exact" if x.predicted.is_cuda and is_half else "torch_compile"
    if implementation == "torch_compile" and mode == "bwd":
        raise UnavailableError("its compiled backward runs only once per forward")

    def one_way(tokens: Tensor, vocabulary: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = module.linear_cross_entropy(tokens, vocabulary, target, impl=implementation)
        return loss

    return _by_linear_cross_entropy(x, mode, one_way)
