"""Input makers and error budgets shared by the tests and the benchmarks.

Every maker takes a seed and draws in fp32 on the device of its result from a generator of its own,
so that one seed gives the same numbers on every device of a kind and, up to rounding, in every
dtype. A GPU draws in milliseconds what takes a CPU a minute and half.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from maect_fast.kernels import QueueState

__all__ = [
    "assert_quantized",
    "assert_within_budget",
    "error_budget",
    "random_qkv",
    "random_queue",
    "unit_rows",
]


def error_budget(eager: Tensor | Sequence[Tensor], ref64: Tensor) -> float:
    """The largest error a kernel may have: ``2 * (max|eager - ref64| + eps * max|ref64|)``.

    A kernel may be at most twice as wrong as eager PyTorch in the same dtype, each plus one
    rounding (eps of the dtype of `eager`). Entries where `ref64` is not finite do not count.

    Args:
        eager: the computation in plain PyTorch, in the dtype of the kernel; several: with its sums
            taken in several orders, of which the worst counts. Of few numbers one order's error
            says little: it may be nearly zero by chance.
        ref64: the same on the same quantised inputs promoted to fp64.
    """
    finite = ref64.isfinite()
    if not finite.any():
        return 0.0
    expected = ref64[finite]
    runs = [eager] if isinstance(eager, Tensor) else eager
    error = torch.stack([(x[finite].double() - expected).abs().max() for x in runs]).max()
    return 2 * (error + torch.finfo(runs[0].dtype).eps * expected.abs().max()).item()


def assert_within_budget(
    kernel: Tensor, eager: Tensor | Sequence[Tensor], ref64: Tensor, *, name: str = "result"
) -> None:
    """Assert that `kernel` is within `error_budget(eager, ref64)` of `ref64`.

    Shape and device must be those of `ref64`, the dtype that of `eager`. Entries that are not
    finite in `ref64` (lse = -inf of a row without keys) must be exactly the same in `kernel`.

    Args:
        kernel: what is tested.
        eager: as for `error_budget`.
        ref64: the same on the same quantised inputs promoted to fp64.
        name: how the message calls the tensor.
    """
    assert ref64.dtype == torch.float64, f"{name}: the reference is {ref64.dtype}, not float64"
    found = (kernel.dtype, kernel.shape, kernel.device)
    dtype = eager.dtype if isinstance(eager, Tensor) else eager[0].dtype
    expected = (dtype, ref64.shape, ref64.device)
    assert found == expected, f"{name}: expected {expected}, got {found}"
    budget = error_budget(eager, ref64)
    assert budget < float("inf"), f"{name}: eager PyTorch is not finite, nothing to compare with"
    finite = ref64.isfinite()
    assert torch.equal(kernel[~finite].double(), ref64[~finite]), f"{name}: wrong at infinities"
    if finite.any():
        error = (kernel[finite].double() - ref64[finite]).abs().max().item()
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"


def assert_quantized(q: Tensor, scale: Tensor, eager: Tensor, ref64: Tensor) -> None:
    """Assert that rows [..., K] are those of `ref64` in int8, with their scales.

    A number may be off by half a step and `error_budget(eager, ref64)`.

    Args:
        q: int8.
        scale: [...] fp32, a step of each row.
        eager: the numbers by plain PyTorch, before they are quantised.
        ref64: the same in fp64; no row is zero.
    """
    assert (q.dtype, q.shape, q.device) == (torch.int8, ref64.shape, ref64.device)
    assert (scale.dtype, scale.shape) == (torch.float32, ref64.shape[:-1])
    budget, largest = error_budget(eager, ref64), ref64.abs().amax(-1)
    assert (q.int().abs().amax(-1) == 127).all(), "a row does not use all steps, or -128"
    assert ((127 * scale.double() - largest).abs() <= budget).all(), "wrong scales"
    error = (q * scale.double()[..., None] - ref64).abs() - 0.5 * scale.double()[..., None]
    assert error.max() <= budget, f"{error.max():.3g} beyond half a step, budget {budget:.3g}"


def random_qkv(
    *leading: int,
    heads: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Packed standard-normal q, k, v: [*leading, 3, heads, dim], contiguous.

    Args:
        leading: B, N for samples of one length; T for packed segments.
        heads: number of heads.
        dim: features of a head.
        dtype: of the result.
        device: of the result.
        seed: of the draw.
    """
    generator = torch.Generator(device).manual_seed(seed)
    qkv = torch.randn(*leading, 3, heads, dim, generator=generator, device=device)
    return qkv.to(dtype)


def unit_rows(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Random directions, uniform on the sphere; their norm is 1 before rounding to `dtype`.

    Args:
        shape: [..., D].
        dtype: of the result.
        device: of the result.
        seed: of the draw.
    """
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(*shape, generator=generator, device=device)
    return torch.nn.functional.normalize(rows, dim=-1).to(dtype)


def random_queue(
    size: int,
    dim: int,
    *,
    num_ids: int,
    num_classes: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> QueueState:
    """A full ring buffer of random directions: ids 0 .. num_ids - 1 in turn, random labels.

    Args:
        size: Q, number of entries.
        dim: D, length of an entry.
        num_ids: below `size`, some sample fills several entries.
        num_classes: labels are 0 .. num_classes - 1.
        device: of the result.
        seed: of the draw.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return QueueState(
        queue=unit_rows(size, dim, device=device, seed=seed),
        queue_y=torch.randint(num_classes, (size,), generator=generator, device=device),
        queue_id=torch.arange(size, device=device) % num_ids,
        queue_ptr=torch.zeros(1, dtype=torch.int64, device=device),
    )
