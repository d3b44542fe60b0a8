import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from allocation import Allocated, NoSync, PeakMemory
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode

from maect_fast.kernels import (
    gather_neighbours,
    info_nce,
    info_nce_stats,
    symmetric_info_nce,
)
from maect_fast.kernels._common import cpp, gpu
from maect_fast.kernels.info_nce import op, reference
from maect_fast.testing import assert_within_budget, unit_rows

NO_LIBRARY = cpp.load()
needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=f"C++ library: {NO_LIBRARY}")
SIMD = [] if NO_LIBRARY else torch.ops.maect_fast.info_nce_simd().split()


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(
    params=[
        "auto",
        "reference",
        pytest.param("cpp", marks=needs_library),
        pytest.param("triton", marks=needs_triton),
    ]
)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "cpp" and device.type != "cpu":
        pytest.skip("the C++ kernel takes CPU tensors")
    return str(request.param)


def skip_unless_interpreted(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bf16 arithmetic")


def naive(predicted: Tensor, neighbour: Tensor, temperature: float, transposed: bool) -> Tensor:
    """All logits at once; source: ml-jku/MAE-CT: losses/nnclr_loss.py."""
    if predicted.ndim == 3:
        first = naive(predicted[0], neighbour[1], temperature, transposed)
        return (first + naive(predicted[1], neighbour[0], temperature, transposed)) / 2
    unit = normalize(predicted, dim=-1, eps=1e-12)
    logits = unit @ neighbour.T if transposed else neighbour @ unit.T
    return cross_entropy(logits / temperature, torch.arange(len(unit), device=unit.device))


def inputs(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    agreement: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Predictions of norm about 3, as correlated with their neighbours as a trained head's."""
    neighbour = unit_rows(*shape, device=device, seed=1)
    predicted = 3 * (agreement * neighbour.flip(0) + unit_rows(*shape, device=device, seed=2))
    if len(shape) == 2:
        predicted = 3 * (agreement * neighbour + unit_rows(*shape, device=device, seed=2))
    return predicted.to(dtype), neighbour.to(dtype)


def loss_and_grad(function: Any, predicted: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    leaf = predicted.detach().clone().requires_grad_()
    loss = function(leaf, *args, **kwargs)
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


def naive_in_orders(
    predicted: Tensor, neighbour: Tensor, temperature: float, transposed: bool
) -> list[list[Tensor]]:
    """Losses and gradients of `naive`, also for permuted features: the same numbers, other sums.

    Where a softmax is sharp, the rounding of a few logits decides the gradient's error.
    """
    runs = [loss_and_grad(naive, predicted, neighbour, temperature, transposed)]
    for seed in range(4):
        order = torch.randperm(predicted.shape[-1], generator=torch.Generator().manual_seed(seed))
        order, back = (x.to(predicted.device) for x in (order, order.argsort()))
        rows = (x[..., order] for x in (predicted, neighbour))
        loss, grad = loss_and_grad(naive, *rows, temperature, transposed)
        runs.append([loss, grad[..., back]])
    return [list(x) for x in zip(*runs, strict=True)]


def gradient_of(grad: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    """`op.gradient` with what the forward leaves it, where `grad` is that of a sum of losses."""
    predicted, neighbour, temperature, weight, by_neighbour, by_predicted, first, backend = inputs
    forward = (predicted, neighbour, temperature, first, False, False, backend)
    inverse = op.row_stats(*forward)[3]
    rows = (neighbour, temperature, weight, by_neighbour, by_predicted)
    # A power of two: exact.
    return op.gradient(4 * grad, predicted, inverse, *rows, first, 4, backend)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("temperature", [0.02, 0.15, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "agreement"),
    [((2, 2, 16), 1.0), ((2, 33, 16), 0.0), ((65, 48), 1.0), ((2, 64, 256), 1.0), ((2, 7, 32), 50)],
    ids=str,
)
def test_loss_and_gradient_against_fp64(
    shape: tuple[int, ...],
    agreement: float,
    dtype: torch.dtype,
    temperature: float,
    transposed: bool,
    backend: str,
    device: torch.device,
) -> None:
    skip_unless_interpreted(backend, dtype, device)
    predicted, neighbour = inputs(*shape, dtype=dtype, device=device, agreement=agreement)
    found = loss_and_grad(
        info_nce,
        predicted,
        neighbour,
        temperature=temperature,
        transposed=transposed,
        backend=backend,
    )
    eager = naive_in_orders(predicted, neighbour, temperature, transposed)
    ref64 = loss_and_grad(naive, predicted.double(), neighbour.double(), temperature, transposed)
    assert_within_budget(found[0], [x.float() for x in eager[0]], ref64[0], name="loss")
    assert_within_budget(found[1], eager[1], ref64[1], name="gradient")


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float16)])
@pytest.mark.parametrize(
    ("n", "D", "temperature"),
    [
        (1, 16, 0.1),
        (50, 1024, 0.07),
        (65, 272, 0.01),
        (197, 64, 0.025),
        (257, 32, 0.3),
        (130, 80, 1.0),
    ],
)
def test_triton_at_the_edges_of_its_tiles(
    n: int,
    D: int,
    temperature: float,
    dtype: torch.dtype,
    transposed: bool,
    device: torch.device,
) -> None:
    predicted, neighbour = inputs(n, D, dtype=dtype, device=device, agreement=0.1)
    arguments: dict[str, Any] = {"temperature": temperature, "transposed": transposed}
    found = loss_and_grad(info_nce, predicted, neighbour, **arguments, backend="triton")
    eager = naive_in_orders(predicted, neighbour, temperature, transposed)
    ref64 = loss_and_grad(naive, predicted.double(), neighbour.double(), temperature, transposed)
    assert_within_budget(found[0], [x.float() for x in eager[0]], ref64[0], name="loss")
    assert_within_budget(found[1], eager[1], ref64[1], name="gradient")


@pytest.mark.parametrize(
    ("arch", "dtype", "D", "backend"),
    [
        (90, torch.float32, 256, "triton"),
        (80, torch.bfloat16, 1024, "triton"),
        (75, torch.float32, 256, "reference"),
        (90, torch.float64, 256, "reference"),
        (90, torch.float32, 1040, "reference"),
        (90, torch.float32, 40, "reference"),
    ],
)
def test_auto_on_cuda_is_triton(
    arch: int, dtype: torch.dtype, D: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "sm_arch", lambda device: arch)
    with FakeTensorMode():
        predicted, neighbour = (torch.empty(2, 4, D, device="cuda", dtype=dtype) for _ in range(2))
        assert op._choose("auto", predicted, neighbour) == backend


@needs_triton
def test_triton_launches_on_the_inputs_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may not be the current one: forward, finish, backward."""
    devices: list[torch.device] = []

    def current(x: Tensor) -> Any:
        devices.append(x.device)
        return nullcontext()

    monkeypatch.setattr(gpu, "current", current)
    predicted, neighbour = inputs(2, 3, 16)
    loss_and_grad(info_nce, predicted, neighbour, temperature=0.2, backend="triton")
    assert devices == [predicted.device] * 2  # forward and backward


LARGE = [pytest.param("cpp", marks=needs_library), pytest.param("triton", marks=needs_triton)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float32, False), (torch.float16, True)])
def test_large_batches(dtype: torch.dtype, transposed: bool, backend: Any) -> None:
    predicted, neighbour = inputs(4096, 32, dtype=dtype, agreement=0.5)
    arguments: dict[str, Any] = {"temperature": 0.15, "transposed": transposed}
    found = loss_and_grad(info_nce, predicted, neighbour, **arguments, backend=backend)
    eager = loss_and_grad(naive, predicted, neighbour, 0.15, transposed)
    ref64 = loss_and_grad(naive, predicted.double(), neighbour.double(), 0.15, transposed)
    assert_within_budget(found[0], eager[0].float(), ref64[0], name="loss")
    assert_within_budget(found[1], eager[1], ref64[1], name="gradient")


@pytest.mark.slow
@pytest.mark.parametrize("backend", LARGE)
def test_one_rank_of_64(backend: Any) -> None:
    """512 predictions meet 32,768 neighbours: statistics of the rows, and the gradient."""
    n, P, T = 512, 32_768, torch.tensor(0.15, dtype=torch.float64)
    predicted = inputs(n, 32)[0][None]
    neighbour = unit_rows(P, 32, seed=3)[None]

    def stats(function: Any, dtype: torch.dtype, *more: Any) -> tuple[Tensor, Tensor]:
        arguments = (predicted.to(dtype), neighbour.to(dtype), T, 1024, False, *more)
        row_max, row_sum, positive = function(*arguments)[:3]
        return (row_max + row_sum.log()).logsumexp(0), positive

    found = stats(op.row_stats, torch.float32, False, backend)
    eager, ref64 = (stats(reference.row_stats, x) for x in (torch.float32, torch.float64))
    for name, one, other, truth in zip(("lse", "positive"), found, eager, ref64, strict=True):
        assert_within_budget(one, other, truth, name=name)

    weight = -torch.rand(1, n)
    by_neighbour = torch.stack((ref64[0], torch.ones_like(ref64[0]))).float()

    def gradient(dtype: torch.dtype) -> Tensor:
        p, nn, w, by = (x.to(dtype) for x in (predicted, neighbour, weight, by_neighbour))
        return reference.gradient(torch.tensor(1.0), p, nn, T, w, by, None, 1024)[0]

    found_grad = gradient_of(
        torch.tensor(1.0), predicted, neighbour, T, weight, by_neighbour, None, 1024, backend
    )[0]
    eager_grad, ref64_grad = (gradient(x) for x in (torch.float32, torch.float64))
    assert_within_budget(found_grad, eager_grad, ref64_grad, name="gradient")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_identical_opposite_and_zero_rows(
    temperature: float, transposed: bool, backend: Any, device: torch.device
) -> None:
    """Logits of 1 / T and -1 / T, and shared maxima; nothing that is not a number.

    Products of these rows are exact: ties are ties, in whatever order they are added up.
    """
    neighbour = unit_rows(40, 16, device=device, seed=1).sign() / 4
    neighbour[20:30] = neighbour[20]
    predicted = neighbour.clone()
    predicted[3:6] *= -1
    predicted[7:9] *= 2**30
    arguments: dict[str, Any] = {"temperature": temperature, "transposed": transposed}
    found = loss_and_grad(info_nce, predicted, neighbour, **arguments, backend=backend)
    eager = naive_in_orders(predicted, neighbour, temperature, transposed)
    ref64 = loss_and_grad(naive, predicted.double(), neighbour.double(), temperature, transposed)
    assert_within_budget(found[0], [x.float() for x in eager[0]], ref64[0], name="loss")
    assert_within_budget(found[1], eager[1], ref64[1], name="gradient")
    predicted[5] = 0
    zero = loss_and_grad(info_nce, predicted, neighbour, **arguments, backend=backend)
    assert all(x.isfinite().all() for x in zero)


@needs_triton
@pytest.mark.parametrize("scale", [1e-30, 1e-14, 1e25])
def test_triton_takes_norms_whose_squares_leave_fp32(scale: float, device: torch.device) -> None:
    predicted, neighbour = inputs(7, 16, device=device)
    predicted[2] *= scale
    found = loss_and_grad(info_nce, predicted, neighbour, temperature=0.3, backend="triton")
    expected = loss_and_grad(naive, predicted.double(), neighbour.double(), 0.3, False)
    torch.testing.assert_close(found[0], expected[0].float())
    for row, other in zip(found[1], expected[1].float(), strict=True):
        torch.testing.assert_close(row, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [(torch.float32, 0.06), slow(torch.float16, 0.02)],
)
def test_triton_schedule_of_a_full_device(
    temperature: float,
    dtype: torch.dtype,
    transposed: bool,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """Where programs are enough, each goes through all neighbours, block by block."""
    kernel = importlib.import_module("maect_fast.kernels.info_nce.triton_kernel")
    monkeypatch.setattr(kernel, "num_multiprocessors", lambda _: 1)
    # By rows of neighbours, each block of predictions is a part of the columns.
    num_parts = kernel.num_parts(torch.empty(2, 150, 32, dtype=dtype), 150, transposed)
    assert num_parts == (1 if transposed else 3)
    predicted, neighbour = inputs(2, 150, 32, dtype=dtype, device=device, agreement=0.1)
    arguments: dict[str, Any] = {"temperature": temperature, "transposed": transposed}
    found = loss_and_grad(info_nce, predicted, neighbour, **arguments, backend="triton")
    eager = naive_in_orders(predicted, neighbour, temperature, transposed)
    ref64 = loss_and_grad(naive, predicted.double(), neighbour.double(), temperature, transposed)
    assert_within_budget(found[0], [x.float() for x in eager[0]], ref64[0], name="loss")
    assert_within_budget(found[1], eager[1], ref64[1], name="gradient")


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("online", [False, True])
def test_triton_schedule_of_many_neighbours(
    online: bool, transposed: bool, device: torch.device
) -> None:
    """256 predictions stay; both sizes leave the last tiles unfilled."""
    n, P, first, T = 300, 8200, 4000, torch.tensor(0.1, dtype=torch.float64)
    predicted = inputs(n, 32, dtype=torch.float16, device=device)[0][None]
    neighbour = unit_rows(1, P, 32, dtype=torch.float16, device=device, seed=3)
    found = op.row_stats(predicted, neighbour, T, first, transposed, online, "triton")
    wide = predicted.double(), neighbour.double()
    row_max, row_sum, positive = reference.row_stats(*wide, T, first, transposed)
    lse, expected = ((m + s.log()).logsumexp(0) for m, s in (found[:2], (row_max, row_sum)))
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2].double(), positive, rtol=0, atol=1e-5)
    if online:
        highest = found[0].amax(0).double()
        torch.testing.assert_close(highest, row_max[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[3].double(), 1 / wide[0].norm(dim=-1), rtol=1e-6, atol=0)


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("most", [700, 4096])
@pytest.mark.parametrize(
    ("S", "V", "R", "first", "n"),
    [(1, 1, 1, 0, 1), (3, 2, 50, 20, 30), (9, 2, 1500, 100, 1200), (2, 1, 3000, 0, 3000)],
)
def test_triton_closes_rows(
    S: int,
    V: int,
    R: int,
    first: int,
    n: int,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """With own rows of one program or several, and rows whose losses are others'."""
    kernel = importlib.import_module("maect_fast.kernels.info_nce.triton_kernel")
    monkeypatch.setattr(kernel, "MAX_OWN", most)
    row_max = 5 * torch.rand(S, V, R, device=device)
    row_sum, positive = torch.rand(S, V, R, device=device), 5 * torch.rand(V, R, device=device)
    # A row without another column.
    row_sum[:, -1, -1] = 0
    inputs = (row_max, row_sum, positive)
    found = op.finish(*inputs, first, n, "triton")
    expected = op.finish(*(x.double() for x in inputs), first, n, "reference")
    # Which has no probability for this factor.
    expected[3][1, -1, -1] = 0
    for one, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["neighbours", "predictions"])
def test_fp16_has_the_probabilities_of_large_batches(
    kind: str, backend: Any, device: torch.device
) -> None:
    """Of which one in 30 million is no number of fp16."""
    predicted, neighbour = inputs(1, 70, 16, dtype=torch.float16, device=device)
    rows = torch.stack((torch.zeros(1, 70), torch.full((1, 70), 3e-8))).to(device)
    by = (rows, None) if kind == "neighbours" else (None, rows)
    one, zero = torch.tensor(1.0, dtype=torch.float64), torch.zeros(1, 70, device=device)
    grad = torch.tensor(1e6, device=device)
    found, _ = gradient_of(grad, predicted, neighbour, one, zero, by[0], by[1], 0, backend)
    a, b = (None if x is None else x.double() for x in by)
    wide = predicted.double(), neighbour.double()
    expected, _ = reference.gradient(grad.double(), *wide, one, zero.double(), a, b, 0)
    band = 4e-3 * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=band)


@needs_triton
@pytest.mark.parametrize("transposed", [False, True])
def test_both_shifts_give_the_same(transposed: bool, device: torch.device) -> None:
    predicted, neighbour = inputs(2, 70, 32, device=device)
    results = []
    for online in (False, True):
        temperature = torch.tensor(0.025, dtype=torch.float64)
        stats = op.row_stats(predicted, neighbour, temperature, 0, transposed, online, "triton")
        results.append(op.finish(*stats[:3], 0, 70, "triton"))
        assert (stats[0].amax() == stats[0].amin()) != online
    torch.testing.assert_close(results[0][:3], results[1][:3], rtol=2e-5, atol=1e-6)


@needs_triton
def test_neighbours_far_from_unit_norm_overflow_loudly(device: torch.device) -> None:
    """As the fixed shift is made for unit rows; up to a norm of 1 + 78 * T they are fine."""
    predicted, neighbour = inputs(40, 16, device=device, agreement=0.1)
    arguments: dict[str, Any] = {"temperature": 0.2, "backend": "triton"}
    expected = naive(predicted.double(), 16 * neighbour.double(), 0.2, False)
    found = info_nce(predicted, 16 * neighbour, **arguments)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    with np.errstate(over="ignore"):
        assert info_nce(predicted, 60 * neighbour, **arguments).isinf()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("transposed", [False, True])
def test_fp64_stays_fp64(transposed: bool, backend: str, device: torch.device) -> None:
    predicted, neighbour = inputs(2, 9, 12, dtype=torch.float64, device=device)
    found = loss_and_grad(
        info_nce, predicted, neighbour, temperature=0.1, transposed=transposed, backend=backend
    )
    expected = loss_and_grad(naive, predicted, neighbour, 0.1, transposed)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(transposed: bool) -> None:
    predicted, neighbour = inputs(2, 3, 4, dtype=torch.float64)

    def loss(leaf: Tensor) -> Tensor:
        return info_nce(leaf, neighbour, temperature=0.5, transposed=transposed)

    assert torch.autograd.gradcheck(loss, (predicted.requires_grad_(),))


def test_hand_made_numbers(backend: Any, device: torch.device) -> None:
    eye = torch.eye(2, 16, device=device)
    loss = info_nce(5 * eye, eye, temperature=0.5, backend=backend)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert loss.dtype == torch.float32
    swapped = info_nce(5 * eye, eye.flip(0), temperature=0.5, backend=backend)
    assert swapped.item() == pytest.approx(math.log(1 + math.exp(2)))
    alone, grad = loss_and_grad(info_nce, eye[:1], eye[1:], temperature=0.1, backend=backend)
    assert alone.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_rows_are_neighbours_unless_transposed(backend: Any, device: torch.device) -> None:
    """One prediction near both neighbours makes one direction's softmax differ from the other's."""
    neighbour = torch.eye(2, 16, device=device)
    predicted = neighbour[:1].expand(2, 16)
    by_neighbour = info_nce(predicted, neighbour, temperature=1.0, backend=backend)
    assert by_neighbour.item() == pytest.approx(math.log(2))
    by_prediction = info_nce(
        predicted, neighbour, temperature=1.0, transposed=True, backend=backend
    )
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    assert by_prediction.item() == pytest.approx(expected)


def test_two_views_are_crossed(device: torch.device) -> None:
    predicted, neighbour = inputs(2, 6, 8, device=device)
    both = info_nce(predicted, neighbour, temperature=0.2)
    one = info_nce(predicted[0], neighbour[1], temperature=0.2)
    other = info_nce(predicted[1], neighbour[0], temperature=0.2)
    assert both.item() == pytest.approx((one.item() + other.item()) / 2)
    straight = info_nce(predicted[0], neighbour[0], temperature=0.2)
    assert abs(straight.item() - one.item()) > 0.1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", [1, 20, 45])
def test_any_number_of_blocks_gives_the_same(
    block: int, transposed: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    predicted, neighbour = inputs(2, 11, 8, dtype=torch.float64, device=device)
    arguments: dict[str, Any] = {"temperature": 0.1, "transposed": transposed}
    whole = loss_and_grad(info_nce, predicted, neighbour, **arguments)
    monkeypatch.setattr(reference, "BLOCK", block)
    parts = loss_and_grad(info_nce, predicted, neighbour, **arguments)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["neighbours", "predictions", "both"])
@pytest.mark.parametrize("first", [0, 4, 8])
@pytest.mark.parametrize("block", [1 << 22, 30])
def test_gradient_on_any_rank_is_that_of_the_definition(
    first: int,
    kind: str,
    block: int,
    backend: Any,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """The hand-written gradient, where the own rows are only a part of the gathered ones."""
    monkeypatch.setattr(reference, "BLOCK", block)
    dtype = torch.float64 if backend in ("auto", "reference") else torch.float32
    predicted, _ = inputs(2, 4, 16, dtype=dtype, device=device)
    gathered = unit_rows(2, 12, 16, dtype=dtype, device=device, seed=3)
    leaf = predicted.double().requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    logits = gathered.double().flip(0) @ normalize(leaf, dim=-1).mT / temperature
    # What the neighbours' rows get from columns and positives of other ranks.
    others = torch.linspace(-2, 2, 12, device=device).double().expand(2, 12)
    of_neighbours = torch.logaddexp(logits.logsumexp(2), others)
    of_predictions = logits.logsumexp(1)
    weight = torch.linspace(-1, 0, 4, device=device).double().expand(2, 4)
    positive = logits.diagonal(-first, dim1=1, dim2=2)
    own = torch.zeros_like(logits).diagonal_scatter(positive, -first, 1, 2)
    score = (weight * positive).sum()
    parts = {"neighbours": [of_neighbours], "predictions": [of_predictions]}
    for lse in parts.get(kind, [of_neighbours, of_predictions]):
        by_row = lse[..., None] if lse is of_neighbours else lse[:, None]
        # The probability of a positive pair belongs to its weight.
        constant = (own - by_row).exp().detach().diagonal(-first, dim1=1, dim2=2)
        score = score + lse.sum() - (constant * positive).sum()
    expected = torch.autograd.grad(3 * score, (leaf, temperature))
    rows = [
        None if kind == other else torch.stack((lse - 0.5, torch.full_like(lse, math.exp(-0.5))))
        for other, lse in (("predictions", of_neighbours), ("neighbours", of_predictions))
    ]
    by_neighbour, by_predicted = (None if x is None else x.detach().to(dtype) for x in rows)
    found, radial = gradient_of(
        torch.tensor(3.0, dtype=dtype, device=device),
        predicted,
        gathered,
        temperature.detach(),
        weight.to(dtype),
        by_neighbour,
        by_predicted,
        first,
        backend,
    )
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    scale = float(expected[0].abs().max())
    torch.testing.assert_close(found.double(), expected[0], rtol=0, atol=tolerance * scale)
    total = -radial.double().sum() / 0.3
    torch.testing.assert_close(total, expected[1].to(total), rtol=10 * tolerance, atol=0)


class NoKernel:
    """Stands for a kernel where only what a launcher allocates counts."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


@needs_triton
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("V", [1, 2])
def test_triton_never_holds_the_logits(
    V: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of n 512, P 32,768 a view's 64 MiB never exist; the gradient's parts are 8 MiB."""
    kernel = importlib.import_module("maect_fast.kernels.info_nce.triton_kernel")
    for name in ("sums", "close", "bwd", "normalize_backward"):
        monkeypatch.setattr(kernel, f"{name}_kernel", NoKernel())
    predicted, neighbour = (
        torch.empty(V, rows, 256, dtype=torch.bfloat16, device="meta") for rows in (512, 32_768)
    )
    with Allocated() as forward:  # type: ignore[no-untyped-call]
        *stats, inverse = kernel.row_stats(predicted, neighbour, 0.2, 0, transposed, False)
        rows = stats[2] if transposed else stats[0][0]
        mean, _, weight, normaliser = kernel.finish(*stats[:2], rows, 0, 512)
    with Allocated() as backward:  # type: ignore[no-untyped-call]
        by = (None, normaliser) if transposed else (normaliser, None)
        kernel.gradient(mean, predicted, inverse, neighbour, 0.2, weight, *by, 0, V * 512)
    # What the forward leaves for the backward is in both.
    saved = 4 * (weight.numel() + normaliser.numel() + inverse.numel())
    assert 0 < forward.num_bytes <= V * 2 * 2**20
    assert 0 < backward.num_bytes + saved <= V * 9_000_000


class NoLaunch(NoKernel):
    """Of these, also which are launched."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(self.name)
        return super().__getitem__(grid)


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the operators that are neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and "empty" not in func._schema.name:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize("transposed", [False, True])
def test_two_launches_a_direction(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One op each way and nothing beside it; in each, two kernels. Counted on meta tensors."""
    kernel = importlib.import_module("maect_fast.kernels.info_nce.triton_kernel")
    launched: list[str] = []
    for name in ("sums", "close", "bwd", "normalize_backward"):
        monkeypatch.setattr(kernel, f"{name}_kernel", NoLaunch(name, launched))
    predicted, neighbour = (
        torch.empty(2, 512, 256, dtype=torch.bfloat16, device="meta") for _ in range(2)
    )
    numbers = (0, transposed, False)
    mean, _, _, weight, rows, inverse = kernel.row_losses(predicted, neighbour, 0.2, *numbers)
    assert launched == ["sums", "close"]
    by = (None, rows) if transposed else (rows, None)
    kernel.gradient(mean, predicted, inverse, neighbour, 0.2, weight, *by, 0, 1024)
    assert launched[2:] == ["bwd", "normalize_backward"]

    predicted.requires_grad_()
    temperature = torch.tensor(0.2, dtype=torch.float64)
    with Operators() as operators:
        found = op.loss(
            predicted,
            neighbour,
            temperature,
            first=0,
            transposed=transposed,
            online=False,
            group=None,
            backend="triton",
        )
        torch.autograd.grad(found.loss, predicted, mean)
    assert operators.names == ["maect_fast::info_nce_fwd", "maect_fast::info_nce_bwd"]


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the number of elements of the largest tensor that an operation allocates."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(out, Tensor) and not func.is_view:
                self.numel = max(self.numel, out.numel())
        return result


@pytest.mark.parametrize("transposed", [False, True])
def test_logits_never_exist_as_a_whole(
    transposed: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(reference, "BLOCK", 2000)
    predicted, neighbour = inputs(2, 400, 4, device=device)
    temperature = torch.tensor(0.2)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        stats = reference.row_stats(predicted, neighbour, temperature, 0, transposed)
        loss, _, weight, rows = reference.finish(*stats)
        a, b = (None, rows) if transposed else (rows, None)
        reference.gradient(loss[0, 0], predicted, neighbour, temperature, weight, a, b, 0)
    assert 0 < largest.numel <= 2 * 400 * 4


def test_gradient_goes_to_the_predictions_alone(backend: Any, device: torch.device) -> None:
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    predicted, neighbour = inputs(2, 5, 16, dtype=dtype, device=device)
    predicted.requires_grad_()
    neighbour.requires_grad_()
    torch.autograd.backward(info_nce(predicted, neighbour, temperature=0.2, backend=backend))
    assert predicted.grad is not None
    assert predicted.grad.dtype == dtype
    assert neighbour.grad is None


def test_zero_and_tiny_predictions_follow_the_formula(device: torch.device) -> None:
    """Below a norm of 1e-12 the divisor is the constant 1e-12, as in torch's normalize."""
    predicted, neighbour = inputs(5, 8, dtype=torch.float64, device=device)
    predicted[0] = 0
    predicted[1] *= 1e-14
    found = loss_and_grad(info_nce, predicted, neighbour, temperature=0.3)
    expected = loss_and_grad(naive, predicted, neighbour, 0.3, False)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("transposed", [False, True])
def test_nan_prediction_makes_the_loss_nan(
    transposed: bool, backend: Any, device: torch.device
) -> None:
    predicted, neighbour = inputs(2, 5, 16, device=device)
    predicted[0, 3, 1] = torch.nan
    arguments: dict[str, Any] = {"temperature": 0.2, "transposed": transposed, "backend": backend}
    loss, grad = loss_and_grad(info_nce, predicted, neighbour, **arguments)
    assert loss.isnan()
    assert grad[0, 3].isnan().all()


def test_strided_inputs(backend: Any, device: torch.device) -> None:
    predicted, neighbour = inputs(2, 6, 16, device=device)
    wide = torch.zeros(2, 6, 2, 32, device=device).transpose(1, 2)[..., ::2]
    strided, other = wide
    strided.copy_(predicted)
    other.copy_(neighbour)
    arguments: dict[str, Any] = {"temperature": 0.2, "backend": backend}
    found = loss_and_grad(info_nce, strided, other, **arguments)
    expected = loss_and_grad(info_nce, predicted, neighbour, **arguments)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_autocast_does_not_reach_the_logits(device: torch.device) -> None:
    predicted, neighbour = inputs(2, 40, 64, device=device)
    arguments: dict[str, Any] = {"temperature": 0.05}
    expected = loss_and_grad(info_nce, predicted, neighbour, **arguments)
    expected.append(info_nce(predicted, neighbour, **arguments, backend="reference"))
    with torch.autocast(device.type, torch.bfloat16):
        found = loss_and_grad(info_nce, predicted, neighbour, **arguments)
        found.append(info_nce(predicted, neighbour, **arguments, backend="reference"))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_temperature_may_be_a_tensor(backend: Any, device: torch.device) -> None:
    predicted, neighbour = inputs(2, 5, 16, device=device)
    expected = info_nce(predicted, neighbour, temperature=0.25, backend=backend)
    for temperature in (torch.tensor(0.25), torch.tensor(0.25, device=device)):
        found = info_nce(predicted, neighbour, temperature=temperature, backend=backend)
        # Not knowing it, the Triton kernel shifts each row by its own maximum.
        rtol = 1e-6 if backend == "triton" or device.type == "cuda" else 0
        torch.testing.assert_close(found, expected, rtol=rtol, atol=0)


def test_two_runs_are_bitwise_equal(backend: Any, device: torch.device) -> None:
    predicted, neighbour = inputs(2, 70, 64, device=device)
    first, second = (
        loss_and_grad(info_nce, predicted, neighbour, temperature=0.1, backend=backend)
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_no_second_derivative(device: torch.device) -> None:
    predicted, neighbour = inputs(2, 5, 8, device=device)
    predicted.requires_grad_()
    loss = info_nce(predicted, neighbour, temperature=0.2)
    (grad,) = torch.autograd.grad(loss, predicted, create_graph=True)
    with pytest.raises(RuntimeError, match="info_nce has no second derivative"):
        torch.autograd.grad(grad.square().sum(), predicted)


PAIR = torch.ones(2, 4, 8)


@pytest.mark.parametrize(
    ("predicted", "neighbour", "temperature", "message"),
    [
        (PAIR, PAIR[:, :3], 0.2, r"predicted, neighbour: expected both \[2, n, D\]"),
        (PAIR[0], PAIR, 0.2, r"predicted, neighbour: expected both \[2, n, D\]"),
        (PAIR[:1], PAIR[:1], 0.2, r"predicted, neighbour: expected both \[2, n, D\]"),
        (PAIR[0, 0], PAIR[0, 0], 0.2, r"predicted, neighbour: expected both \[2, n, D\]"),
        (PAIR[:, :0], PAIR[:, :0], 0.2, "predicted: expected at least one row"),
        (PAIR, PAIR.long(), 0.2, "expected floats"),
        (PAIR, PAIR, 0.0, "temperature: expected a finite number above 0, got 0"),
        (PAIR, PAIR, -1.0, "temperature: expected a finite number above 0, got -1"),
        (PAIR, PAIR, math.nan, "temperature: expected a finite number above 0, got nan"),
        (PAIR, PAIR, math.inf, "temperature: expected a finite number above 0, got inf"),
        (PAIR, PAIR, torch.ones(1), r"temperature: .*0-d tensor.*shape \[1\]"),
        (PAIR, PAIR, torch.tensor(0.2, requires_grad=True), "requires_grad True"),
    ],
)
def test_errors(
    predicted: Tensor, neighbour: Tensor, temperature: float | Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        info_nce(predicted, neighbour, temperature=temperature)


def test_backends_that_do_not_run_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(pair: Tensor, backend: Any) -> None:
        info_nce(pair, pair, temperature=0.2, backend=backend)

    wide = torch.ones(2, 4, 1040)
    for pair, reason in (
        (PAIR, "takes D a multiple of 16 up to 1024, got 8"),
        (wide, "takes D a multiple of 16 up to 1024, got 1040"),
        (wide[..., :16].double(), "takes float32, bfloat16 and float16, got float64"),
        (wide[..., :16].to("meta"), "runs on CUDA, got a tensor on meta"),
    ):
        with pytest.raises(RuntimeError, match=f"info_nce: backend 'triton' {reason}"):
            call(pair, "triton")
    with pytest.raises(RuntimeError, match=r"info_nce: backend 'cpp' .*float16, got float64"):
        call(PAIR.double(), "cpp")
    with pytest.raises(RuntimeError, match=r"info_nce: backend 'cpp' .*CPU, got .* meta"):
        call(PAIR.to("meta"), "cpp")
    monkeypatch.setattr(cpp, "load", lambda: "not built: no compiler")
    with pytest.raises(RuntimeError, match="info_nce: backend 'cpp' not built: no compiler"):
        call(PAIR, "cpp")


def test_without_the_library_the_cpu_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted, neighbour = inputs(2, 9, 12)
    expected = loss_and_grad(info_nce, predicted, neighbour, temperature=0.1, backend="reference")
    monkeypatch.setattr(cpp, "load", lambda: "not built: no compiler")
    found = loss_and_grad(info_nce, predicted, neighbour, temperature=0.1)
    torch.testing.assert_close(found, expected)


# The C++ kernel, with the inner loops of each instruction set.


def naive_stats(
    predicted: Tensor, neighbour: Tensor, temperature: float, first: int, transposed: bool
) -> tuple[Tensor, Tensor]:
    """logsumexp of the softmax rows without positives, and logits of those; all at once."""
    logits = neighbour.flip(0) @ normalize(predicted, dim=-1, eps=1e-12).mT / temperature
    positive = logits.diagonal(-first, dim1=1, dim2=2)
    negative = logits.diagonal_scatter(torch.full_like(positive, -torch.inf), -first, 1, 2)
    return torch.logsumexp(negative, 1 if transposed else 2), positive


def naive_stats_and_grad(
    weights: tuple[Tensor, Tensor], predicted: Tensor, *arguments: Any
) -> list[Tensor]:
    """Also the gradient of the statistics' weighted sum."""
    leaf = predicted.detach().clone().requires_grad_()
    stats = naive_stats(leaf, *arguments)
    grads = [w.to(x.dtype) for x, w in zip(stats, weights, strict=True)]
    return [*(x.detach() for x in stats), *torch.autograd.grad(stats, leaf, grads)]


def cpp_stats_and_grad(
    weights: tuple[Tensor, Tensor],
    predicted: Tensor,
    neighbour: Tensor,
    temperature: float,
    first: int,
    transposed: bool,
    simd: str = "",
) -> list[Tensor]:
    arguments = (predicted, neighbour, torch.tensor(temperature, dtype=torch.float64))
    row_max, row_sum, positive = op.row_stats_cpp(*arguments, first, transposed, simd)
    rows = torch.cat((row_max, weights[0] / row_sum))
    a, b = (None, rows) if transposed else (rows, None)
    grad, _ = op.gradient_cpp(torch.ones(()), *arguments, weights[1], a, b, first, simd)
    return [row_sum[0].log() + row_max[0], positive, grad]


def stats_inputs(
    V: int, n: int, P: int, D: int, first: int, transposed: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Predictions, neighbours, and the statistics' weights in a loss.

    Agreement is low: where a softmax is nearly one-hot, one rounding decides the gradient's error.
    """
    neighbour = unit_rows(V, P, D, seed=1)
    predicted = 3 * (0.1 * neighbour.flip(0)[:, first : first + n] + unit_rows(V, n, D, seed=2))
    weights = torch.full((V, n if transposed else P), 1 / n), torch.full((V, n), -1 / n)
    return predicted.to(dtype), neighbour.to(dtype), weights


def fits(simd: str, dtype: torch.dtype) -> bool:
    return simd != "avx512_bf16" or dtype == torch.bfloat16


def assert_cpp_within_budget(
    found: list[Tensor], eager: list[Tensor], ref64: list[Tensor], simd: str
) -> None:
    """Statistics in the type of the kernel's products, the gradient in that of the predictions."""
    dtype = torch.bfloat16 if simd == "avx512_bf16" else torch.float32
    for i, name in enumerate(("logsumexp", "positive")):
        assert_within_budget(found[i].to(dtype), eager[i].to(dtype), ref64[i], name=name)
    assert_within_budget(found[2], eager[2], ref64[2], name="gradient")


CPP_CASES = [
    (simd, dtype, transposed)
    for simd in SIMD
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for transposed in (False, True)
    if fits(simd, dtype)
]


@needs_library
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("temperature", [0.01, 0.2, 1.0])
@pytest.mark.parametrize(
    ("V", "n", "P", "D", "first"),
    [
        (1, 2, 2, 1, 0),
        (2, 2, 131, 5, 129),
        (2, 33, 33, 31, 0),
        (1, 65, 257, 257, 100),
        (2, 300, 385, 48, 85),
        (1, 512, 513, 16, 1),
        (1, 40, 50, 3000, 7),
    ],
)
@pytest.mark.parametrize(("simd", "dtype", "transposed"), CPP_CASES, ids=str)
def test_cpp_statistics_and_gradient_against_fp64(
    simd: str,
    dtype: torch.dtype,
    transposed: bool,
    V: int,
    n: int,
    P: int,
    D: int,
    first: int,
    temperature: float,
) -> None:
    predicted, neighbour, weights = stats_inputs(V, n, P, D, first, transposed, dtype)
    arguments = (temperature, first, transposed)
    found = cpp_stats_and_grad(weights, predicted, neighbour, *arguments, simd)
    eager = naive_stats_and_grad(weights, predicted, neighbour, *arguments)
    ref64 = naive_stats_and_grad(weights, predicted.double(), neighbour.double(), *arguments)
    assert_cpp_within_budget(found, eager, ref64, simd)


@needs_library
@pytest.mark.parametrize(("simd", "dtype", "transposed"), CPP_CASES, ids=str)
def test_cpp_takes_any_strides(simd: str, dtype: torch.dtype, transposed: bool) -> None:
    predicted, neighbour, weights = stats_inputs(2, 35, 150, 21, 3, transposed, dtype)
    expected = cpp_stats_and_grad(weights, predicted, neighbour, 0.2, 3, transposed, simd)
    for order in ((2, 1, 0), (1, 2, 0), (2, 0, 1)):
        strided = in_order(predicted, order), in_order(neighbour, order)
        found = cpp_stats_and_grad(weights, *strided, 0.2, 3, transposed, simd)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers with every other place of memory unused, dimensions stored in `order`."""
    stored = torch.full((*(x.shape[dim] for dim in order), 2), torch.nan, dtype=x.dtype)[..., 0]
    permuted = stored.permute([order.index(dim) for dim in range(x.ndim)])
    return permuted.copy_(x)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_cpp_gives_the_same_bits_with_any_number_of_threads(
    transposed: bool, dtype: torch.dtype
) -> None:
    predicted, neighbour, weights = stats_inputs(2, 150, 700, 40, 9, transposed, dtype)
    num_threads = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(cpp_stats_and_grad(weights, predicted, neighbour, 0.1, 9, transposed))
    torch.set_num_threads(num_threads)
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            assert torch.equal(one, other)


@needs_library
@pytest.mark.parametrize(("simd", "dtype", "transposed"), CPP_CASES, ids=str)
def test_cpp_identical_and_opposite_rows(simd: str, dtype: torch.dtype, transposed: bool) -> None:
    """Logits of 100 and -100, and shared maxima."""
    neighbour = unit_rows(1, 40, 24, dtype=dtype, seed=1)
    neighbour[:, 20:30] = neighbour[:, 20:21]
    predicted = neighbour[:, :33].clone()
    predicted[:, 3:6] *= -1
    predicted[:, 7:9] *= 64
    weights = torch.full((1, 33 if transposed else 40), 1 / 33), torch.full((1, 33), -1 / 33)
    arguments = (0.01, 0, transposed)
    found = cpp_stats_and_grad(weights, predicted, neighbour, *arguments, simd)
    eager = naive_stats_and_grad(weights, predicted, neighbour, *arguments)
    ref64 = naive_stats_and_grad(weights, predicted.double(), neighbour.double(), *arguments)
    assert_cpp_within_budget(found, eager, ref64, simd)


@needs_library
@pytest.mark.parametrize(("simd", "dtype", "transposed"), CPP_CASES, ids=str)
def test_cpp_zero_tiny_and_huge_predictions(
    simd: str, dtype: torch.dtype, transposed: bool
) -> None:
    """Norms are summed in double: squares may leave the range of fp32."""
    predicted, neighbour, weights = stats_inputs(1, 7, 9, 8, 1, transposed, dtype)
    scales = [0, 1, 1e-3, 1e3] if dtype == torch.float16 else [0, 1e-14, 1e-9, 1e25]
    predicted[0, :4] *= torch.tensor(scales, dtype=dtype)[:, None]
    arguments = (0.3, 1, transposed)
    found = cpp_stats_and_grad(weights, predicted, neighbour, *arguments, simd)
    expected = naive_stats_and_grad(weights, predicted.double(), neighbour.double(), *arguments)
    eps = torch.finfo(torch.bfloat16 if simd == "avx512_bf16" else torch.float32).eps
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert (one - other).abs().max() <= 8 * eps
    # The zero row's gradient is divided by 1e-12, beyond fp16, and there infinite in both.
    eps = max(eps, torch.finfo(dtype).eps)
    for row, other in zip(found[2][0], expected[2][0].to(dtype), strict=True):
        band = 8 * eps * other.double().abs().max()
        assert (row == other).all() or (row.double() - other.double()).abs().max() <= band


@needs_library
@pytest.mark.parametrize("simd", [simd for simd in SIMD if fits(simd, torch.float32)])
def test_cpp_exponential_is_within_units_in_the_last_place(simd: str) -> None:
    """Every view has one logit, whose gradient across the prediction is its exponential."""
    logits = torch.cat((-torch.logspace(-8, math.log10(87), 3000), torch.linspace(-87, 80, 3000)))
    outside = torch.tensor([0, -88.1, -1e3, -3e38, math.nan])
    logits = torch.cat((logits, outside))
    V = len(logits)
    neighbour = torch.stack((logits, torch.ones(V)), 1)[:, None].flip(0)
    neighbour = torch.cat((torch.zeros(V, 1, 2), neighbour), 1)
    predicted = torch.tensor([1.0, 0.0]).expand(V, 1, 2)
    rows = torch.stack((torch.zeros(V, 2), torch.ones(V, 2)))
    one, zero = torch.tensor(1.0), torch.zeros(V, 1)
    grad, _ = op.gradient_cpp(one, predicted, neighbour, one, zero, rows, None, 0, simd)
    found, expected = grad[:, 0, 1], logits.double().exp()
    ulp = torch.nextafter(expected.float(), torch.tensor(math.inf)) - expected.float()
    error = (found - expected).abs() / ulp
    assert error[:-5].max() <= 1.5
    assert found[-5:-1].tolist() == [1, 0, 0, 0]
    assert found[-1].isnan()


@needs_library
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_cpp_rows_without_an_order_are_as_in_the_definition(value: float, transposed: bool) -> None:
    predicted, neighbour, _ = stats_inputs(1, 5, 140, 8, 1, transposed, torch.float32)
    neighbour[0, 70, 3] = value
    if math.isnan(value):
        predicted[0, 4, 1] = value
    arguments = (predicted, neighbour, torch.tensor(0.2), 1, transposed)
    for one, other in zip(
        op.row_stats_cpp(*arguments), reference.row_stats(*arguments), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)


@needs_library
def test_cpp_takes_half_predictions_with_wide_neighbours(device: torch.device) -> None:
    """As autocast leaves them; eager PyTorch would round the neighbours."""
    predicted, neighbour = inputs(2, 70, 48, device=device)
    predicted = predicted.bfloat16()
    found = loss_and_grad(info_nce, predicted, neighbour, temperature=0.1)
    eager = loss_and_grad(naive, predicted, neighbour.bfloat16(), 0.1, False)
    ref64 = loss_and_grad(naive, predicted.double(), neighbour.double(), 0.1, False)
    assert_within_budget(found[0], eager[0].float(), ref64[0], name="loss")
    assert_within_budget(found[1], eager[1], ref64[1], name="gradient")


MEMORY = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ops, n, P, D = torch.ops.maect_fast, 512, 32768, 256
def resident(key):
    (line,) = (x for x in open("/proc/self/status") if x.startswith(key))
    return int(line.split()[1])
def call(predicted, neighbour, transposed):
    rows = torch.zeros(2, 1, n if transposed else neighbour.shape[1])
    weight, grad, none = torch.zeros(1, n), torch.zeros_like(predicted), torch.zeros(0)
    before = resident("VmRSS")
    ops.info_nce_fwd_cpp(predicted, neighbour, 0.2, 0, transposed, "", *rows, weight)
    by = (none, rows) if transposed else (rows, none)
    inputs = predicted, neighbour, 0.2, weight, *by
    ops.info_nce_bwd_cpp(1.0, *inputs, 0, "", grad, torch.zeros(1, n))
    print(resident("VmHWM") - before)
predicted = torch.randn(1, n, D, dtype=getattr(torch, sys.argv[2]))
neighbour = torch.randn(1, P, D, dtype=predicted.dtype).div_(D**0.5)
call(predicted, neighbour, sys.argv[3] == "True")
"""


@needs_library
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cpp_never_holds_the_logits(transposed: bool, dtype: str) -> None:
    """Their 64 MiB would show in the process's peak."""
    command = [sys.executable, "-c", MEMORY, str(cpp.LIBRARY), dtype, str(transposed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(out.stdout) <= 4 * 1024


# What only a GPU shows.

GPU_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@needs_triton
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_a_captured_graph_takes_other_rows(
    dtype: torch.dtype, transposed: bool, no_sync: NoSync, cuda: torch.device
) -> None:
    leaf, neighbour = inputs(2, 300, 64, dtype=dtype, device=cuda)
    leaf.requires_grad_()
    arguments: dict[str, Any] = {"temperature": 0.2, "transposed": transposed}
    torch.autograd.grad(info_nce(leaf, neighbour, **arguments), leaf)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), no_sync():
        loss = info_nce(leaf, neighbour, **arguments)
        (grad,) = torch.autograd.grad(loss, leaf)
    with torch.no_grad():
        leaf.copy_(leaf.flip(1))
    graph.replay()
    expected = info_nce(leaf, neighbour, **arguments)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, torch.autograd.grad(expected, leaf)[0])


@needs_triton
@pytest.mark.parametrize("same_view", [False, True])
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_a_captured_symmetric_loss_takes_another_temperature(
    dtype: torch.dtype, same_view: bool, no_sync: NoSync, cuda: torch.device
) -> None:
    leaves = [x.requires_grad_() for x in both_views(120, 64, dtype=dtype, device=cuda)]
    temperature = torch.tensor(0.2, device=cuda, requires_grad=True)
    leaves.append(temperature)

    def call() -> list[Tensor]:
        first, second, T = leaves
        loss = symmetric_info_nce(first, second, temperature=T, same_view=same_view)
        return [loss, *torch.autograd.grad(loss, leaves)]

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), no_sync():
        found = call()
    with torch.no_grad():
        temperature.fill_(0.1)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(found, call(), strict=True))


@needs_triton
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("n", [512, 4096])
def test_runs_on_a_full_device_are_bitwise_equal_and_small(
    n: int, dtype: torch.dtype, transposed: bool, cuda: torch.device
) -> None:
    """Programs on all multiprocessors; of 4,096 rows, the logits of a view alone are 64 MiB."""
    neighbour = normalize(torch.randn(2, n, 256, device=cuda), dim=-1).to(dtype)
    leaf = torch.randn(2, n, 256, device=cuda, dtype=dtype).requires_grad_()

    def call() -> list[Tensor]:
        loss = info_nce(leaf, neighbour, temperature=0.15, transposed=transposed)
        return [loss, *torch.autograd.grad(loss, leaf)]

    first = call()
    for _ in range(3):
        assert all(torch.equal(*pair) for pair in zip(first, call(), strict=True))
    with PeakMemory(cuda) as peak:
        call()
    assert 0 < peak.num_bytes <= 4 * leaf.numel() * leaf.itemsize + 16 * 2**20


@needs_triton
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_more_numbers_than_32_bits_count(
    dtype: torch.dtype, needs_gib: Callable[[float], None], cuda: torch.device
) -> None:
    needs_gib(16)
    check_large(64, 2**31 // 256 + 1000, 256, dtype, cuda)


def check_large(n: int, P: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
    """The last of P neighbours are the positives: both directions' statistics, the gradient."""
    neighbour = torch.randn(1, P, D, device=device, dtype=dtype).mul_(D**-0.5)
    predicted = 3 * neighbour[:, -n:] + torch.randn(1, n, D, device=device, dtype=dtype) / 4
    temperature, first = torch.tensor(0.2, dtype=torch.float64), P - n
    inputs = (predicted, neighbour, temperature, first)
    unit = normalize(predicted[0].float(), dim=-1).to(dtype).double()
    chunks = [neighbour[0, start : start + (1 << 20)] for start in range(0, P, 1 << 20)]
    # By rows of predictions: logits of all neighbours but their own.
    parts, start = [], 0
    for chunk in chunks:
        logits = unit @ chunk.double().T / 0.2
        own = first + torch.arange(n, device=device)[:, None] - start
        is_own = torch.arange(len(chunk), device=device) == own
        parts.append(logits.masked_fill(is_own, -torch.inf).logsumexp(1))
        start += len(chunk)
    expected = torch.stack(parts).logsumexp(0)
    row_max, row_sum, positive, _ = op.row_stats(*inputs, True, False, "triton")
    lse = (row_max + row_sum.log()).logsumexp(0)
    own_logits = (unit * neighbour[0, first:].double()).sum(1) / 0.2
    torch.testing.assert_close(lse[0].double(), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(positive[0].double(), own_logits, rtol=0, atol=2e-2)
    # By rows of neighbours, at both ends.
    row_max, row_sum, *_ = op.row_stats(*inputs, False, False, "triton")
    lse = (row_max + row_sum.log()).logsumexp(0)[0]
    for rows in (slice(500), slice(first - 500, first)):
        logits = neighbour[0, rows].double() @ unit.T / 0.2
        torch.testing.assert_close(lse[rows].double(), logits.logsumexp(1), rtol=0, atol=2e-2)
    # The gradient of the first direction's loss.
    stats = op.row_stats(*inputs, True, False, "triton")[:3]
    _, _, weight, normaliser = op.finish(*stats, 0, n, "triton")
    grad, _ = gradient_of(
        torch.tensor(1.0, device=device), *inputs[:3], weight, None, normaliser, first, "triton"
    )
    total = weight[0, :, None].double() * neighbour[0, first:].double()
    denominator = torch.logaddexp(expected, own_logits)[:, None]
    start = 0
    for chunk in chunks:
        p = (unit @ chunk.double().T / 0.2 - denominator).exp()
        own = first + torch.arange(n, device=device)[:, None] - start
        is_own = torch.arange(len(chunk), device=device) == own
        total += p.masked_fill(is_own, 0) @ chunk.double()
        start += len(chunk)
    leaf = predicted[0].double().requires_grad_()
    (exact,) = torch.autograd.grad(normalize(leaf, dim=-1), leaf, total / 0.2)
    band = 0.02 * float(exact.abs().max())
    torch.testing.assert_close(grad[0].double(), exact, rtol=0, atol=band)


# Registration.


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed: bool, backend: Any, device: torch.device) -> None:
    predicted, _ = inputs(2, 4, 16, device=device)
    gathered = unit_rows(2, 12, 16, device=device, seed=3)
    temperature = torch.tensor(0.2, dtype=torch.float64)
    arguments = (predicted, gathered, temperature, 4, transposed, False, backend)
    torch.library.opcheck(op.row_stats, arguments)
    row_max, row_sum, positive, inverse = op.row_stats(*arguments)
    if not transposed:
        positive = torch.nn.functional.pad(positive, (4, 4))
    inputs_of_finish = (row_max, row_sum, positive, 0 if transposed else 4, 4, backend)
    torch.library.opcheck(op.finish, inputs_of_finish)
    mean, _, weight, rows = op.finish(*inputs_of_finish)
    assert weight.shape == (2, 4)
    by = (None, rows) if transposed else (rows, None)
    square = (predicted, gathered[:, :4], temperature, 0, transposed, False, backend)
    torch.library.opcheck(op.row_losses, square)
    assert op.row_losses(*square)[0].shape == ()
    rows_of_gradient = (gathered, temperature, weight, *by)
    inputs_of_gradient = (mean, predicted, inverse, *rows_of_gradient, 4, 8, backend)
    torch.library.opcheck(op.gradient, inputs_of_gradient)


@pytest.mark.parametrize("transposed", [False, True])
def test_compiles_without_graph_breaks(
    transposed: bool, backend: Any, device: torch.device
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(info_nce, fullgraph=True, backend="aot_eager")
    temperatures = (0.2, 0.3, torch.tensor(0.4, device=device))
    for n, temperature in zip((6, 6, 5), temperatures, strict=True):
        predicted, neighbour = inputs(2, n, 16, device=device)
        arguments: dict[str, Any] = {
            "temperature": temperature,
            "transposed": transposed,
            "backend": backend,
        }
        found = loss_and_grad(compiled, predicted, neighbour, **arguments)
        expected = loss_and_grad(info_nce, predicted, neighbour, **arguments)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


# Statistics.


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_stats(temperature: float, transposed: bool, backend: Any, device: torch.device) -> None:
    predicted, neighbour = inputs(2, 50, 32, device=device, agreement=0.4)
    arguments: dict[str, Any] = {
        "temperature": temperature,
        "transposed": transposed,
        "backend": backend,
    }
    found = info_nce_stats(predicted.requires_grad_(), neighbour, **arguments)
    cosines = normalize(predicted.detach().double(), dim=-1) @ neighbour.double().flip(0).mT
    logits = (cosines if transposed else cosines.mT) / temperature
    target = torch.arange(50, device=device)
    hits = logits.argmax(-1) == target
    assert 0.2 < hits.double().mean() < 0.98
    assert found.accuracy.item() == pytest.approx(hits.double().mean().item())
    mean = cosines.diagonal(dim1=1, dim2=2).mean()
    assert found.similarity.item() == pytest.approx(mean.item(), rel=1e-5)
    torch.testing.assert_close(found.lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    grad, expected = (
        torch.autograd.grad(x, predicted)[0]
        for x in (found.loss, info_nce(predicted, neighbour, **arguments))
    )
    torch.testing.assert_close(grad, expected)
    assert not any(x.requires_grad for x in found[1:])


def test_stats_of_one_pair(backend: Any, device: torch.device) -> None:
    row = unit_rows(1, 16, device=device)
    found = info_nce_stats(-row, row, temperature=0.1, backend=backend)
    assert found.accuracy.item() == 1
    assert found.loss.item() == 0
    assert found.similarity.item() == pytest.approx(-1)
    assert found.lse.item() == pytest.approx(-10)


# The symmetric loss.


def clip(first: Tensor, second: Tensor, temperature: Tensor | float) -> Tensor:
    """open_clip's ClipLoss with logit_scale = 1 / T; source: mlfoundations/open_clip: loss.py."""
    image, text = normalize(first, dim=-1), normalize(second, dim=-1)
    logits = image @ text.T / temperature
    target = torch.arange(len(first), device=first.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def nt_xent(first: Tensor, second: Tensor, temperature: Tensor | float) -> Tensor:
    """lightly's NTXentLoss without a memory bank; source: lightly: loss/ntx_ent_loss.py."""
    n = len(first)
    rows = normalize(torch.cat((first, second)), dim=-1)
    logits = rows @ rows.T / temperature
    logits = logits[~torch.eye(2 * n, dtype=torch.bool, device=rows.device)].view(2 * n, -1)
    target = torch.arange(n, device=rows.device)
    return cross_entropy(logits, torch.cat((target + n - 1, target)))


def both_views(n: int, D: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Embeddings of norm about 3 and 4, which agree a little."""
    first, second = inputs(n, D, agreement=0.2, **options)
    return first, 4 * second


def check_symmetric(
    same_view: bool,
    n: int,
    D: int,
    dtype: torch.dtype,
    temperature: float,
    backend: Any,
    device: torch.device,
) -> None:
    """Loss and all gradients against the libraries' definitions."""
    definition: Any = nt_xent if same_view else clip

    def all_of(function: Any, dtype: torch.dtype) -> list[Tensor]:
        views = both_views(n, D, device=device)
        leaves = [x.to(quantised).to(dtype).requires_grad_() for x in views]
        # A learned temperature is fp32, whatever the embeddings are.
        wide = torch.promote_types(dtype, torch.float32)
        leaves.append(torch.tensor(temperature, device=device).to(wide).requires_grad_())
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    quantised = dtype
    found = all_of(
        lambda first, second, T: symmetric_info_nce(
            first, second, temperature=T, same_view=same_view, backend=backend
        ),
        dtype,
    )
    eager, ref64 = all_of(definition, dtype), all_of(definition, torch.float64)
    assert_within_budget(found[0], eager[0].float(), ref64[0], name="loss")
    for name, one, other, truth in zip(
        ("first", "second"), found[1:], eager[1:], ref64[1:], strict=False
    ):
        assert_within_budget(one, other, truth, name=name)
    # A sum over all pairs, which may cancel: its terms' sizes say how well it can be known. The
    # roundings of logits, which in half precision are of the products, mostly cancel.
    first, second = (x.to(dtype).double() for x in both_views(n, D, device=device))
    rows = 2 * n if same_view else n
    pairs = torch.full((rows, rows), temperature, dtype=torch.float64, device=device)
    (terms,) = torch.autograd.grad(definition(first, second, pairs.requires_grad_()), pairs)
    share = 1 if dtype == torch.float32 else 1 / 8
    band = share * torch.finfo(dtype).eps * terms.abs().sum()
    assert abs(found[3] - ref64[3]) <= band


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("temperature", [0.05, 0.1, pytest.param(0.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "D"), [(1, 16), (33, 48), pytest.param(70, 64, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("same_view", [False, True])
def test_symmetric_loss_against_the_libraries_definitions(
    same_view: bool,
    n: int,
    D: int,
    dtype: torch.dtype,
    temperature: float,
    backend: Any,
    device: torch.device,
) -> None:
    skip_unless_interpreted(backend, dtype, device)
    check_symmetric(same_view, n, D, dtype, temperature, backend, device)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "D"), [(33, 48), (70, 64)])
def test_clip_at_the_temperature_where_it_ends(
    n: int, D: int, dtype: torch.dtype, backend: Any, device: torch.device
) -> None:
    """Its logit scale is held to 100."""
    skip_unless_interpreted(backend, dtype, device)
    check_symmetric(False, n, D, dtype, 0.01, backend, device)


@pytest.mark.parametrize("same_view", [False, True])
def test_symmetric_loss_in_fp64_is_the_definition(same_view: bool) -> None:
    leaves = [x.requires_grad_() for x in both_views(9, 12, dtype=torch.float64)]
    leaves.append(torch.tensor(0.2, dtype=torch.float64, requires_grad=True))
    first, second, temperature = leaves
    found = symmetric_info_nce(first, second, temperature=temperature, same_view=same_view)
    expected = (nt_xent if same_view else clip)(first, second, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    grads = (torch.autograd.grad(x, leaves) for x in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("same_view", [False, True])
def test_symmetric_loss_compiles(same_view: bool, device: torch.device) -> None:
    torch.compiler.reset()

    def call(first: Tensor, scale: Tensor) -> Tensor:
        return symmetric_info_nce(first, second, temperature=1 / scale, same_view=same_view)

    first, second = both_views(12, 16, device=device)
    leaves = first.requires_grad_(), torch.tensor(14.0, device=device, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        *(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, call)), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("first", "second", "temperature", "message"),
    [
        (PAIR, PAIR, 0.2, r"first, second: expected both \[n, D\], got \[2, 4, 8\]"),
        (PAIR[0], PAIR[0, :3], 0.2, r"first, second: .*got \[4, 8\] and \[3, 8\]"),
        (PAIR[0, :0], PAIR[0, :0], 0.2, "first: expected at least one row"),
        (PAIR[0], PAIR[0].half(), 0.2, "first, second: expected floats of one dtype"),
        (PAIR[0], PAIR[0], 0.0, "temperature: expected a finite number above 0"),
        (PAIR[0], PAIR[0], torch.ones(1), r"temperature: .*0-d tensor, got shape \[1\]"),
    ],
)
def test_symmetric_errors(
    first: Tensor, second: Tensor, temperature: float | Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        symmetric_info_nce(first, second, temperature=temperature)


# Several ranks.

NUM_ROWS, WIDTH = 8, 16
COLLECTIVES = [
    name
    for name in dir(dist)
    if name.startswith(
        ("all_", "reduce", "broadcast", "gather", "scatter", "send", "isend", "recv")
    )
    and callable(getattr(dist, name))
]
BACKENDS = ["auto", "reference", *(["triton"] if importlib.util.find_spec("triton") else [])]
CASES = [
    (shape, dtype, transposed, temperature, backend)
    for shape in ((2, NUM_ROWS, WIDTH), (NUM_ROWS, WIDTH))
    for dtype in (torch.float64, torch.float32, torch.float16)
    for transposed in (False, True)
    for temperature in (0.02, 0.1)
    for backend in BACKENDS
    if dtype != torch.float64 or backend == "auto"
    # An interpreted kernel is slow.
    if backend != "triton" or (len(shape) == 3 and temperature == 0.1)
    if backend != "reference" or len(shape) == 2
    if len(shape) == 3 or dtype == torch.float32
]
SYMMETRIC_CASES: list[tuple[bool, Any]] = [
    (same_view, backend) for same_view in (False, True) for backend in BACKENDS
]


class Counter:
    """Counts what is sent."""

    def __init__(self) -> None:
        self.names: list[str] = []
        for name in COLLECTIVES:
            setattr(dist, name, self.counted(name, getattr(dist, name)))

    def counted(self, name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.names.append(name)
            return function(*arguments, **options)

        return call

    def take(self) -> list[str]:
        names, self.names = self.names, []
        return names


def rank_main(rank: int, world_size: int, folder: Path) -> None:
    """One rank's share of everything that `rank_results` names."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world_size
    )
    group, counter = dist.group.WORLD, Counter()
    results: dict[str, Any] = {"cases": [], "symmetric": [], "sent": []}
    for shape, dtype, transposed, temperature, backend in CASES:
        predicted, neighbour = (
            x.chunk(world_size, dim=-2)[rank] for x in inputs(*shape, dtype=dtype, agreement=0.3)
        )
        predicted = predicted.clone().requires_grad_()
        arguments: dict[str, Any] = {
            "temperature": temperature,
            "transposed": transposed,
            "group": group,
            "backend": backend,
        }
        loss = info_nce(predicted, neighbour, **arguments)
        forward = counter.take()
        (grad,) = torch.autograd.grad(3 * loss, predicted)
        results["sent"].append((forward, counter.take()))
        handle = gather_neighbours(neighbour, group=group, dtype=dtype)
        assert torch.equal(info_nce(predicted, handle, **arguments), loss)
        stats = info_nce_stats(predicted, neighbour, **arguments)
        results["cases"].append([loss.detach(), grad, *(x.detach() for x in stats)])
        counter.take()
    for same_view, backend in SYMMETRIC_CASES:
        leaves = [
            x.chunk(world_size)[rank].clone().requires_grad_() for x in both_views(NUM_ROWS, WIDTH)
        ]
        leaves.append(torch.tensor(0.2, requires_grad=True))
        loss = symmetric_info_nce(
            *leaves[:2],
            temperature=leaves[2],
            same_view=same_view,
            group=group,
            backend=backend,
        )
        counter.take()
        results["symmetric"].append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        results["sent"].append(([], counter.take()))
    half = inputs(4, WIDTH, dtype=torch.bfloat16)[0]
    assert gather_neighbours(half.float(), group=group, dtype=half.dtype).wait().dtype == half.dtype
    results["errors"] = []
    uneven = unit_rows(3 + (rank == 1), WIDTH)
    for call in (info_nce, symmetric_info_nce):
        try:
            # Ranks compare their rows the first time that they meet in a group.
            call(uneven, uneven, temperature=0.2, group=dist.new_group())
        except ValueError as error:
            results["errors"].append(str(error))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, slow(4)], ids="{} ranks".format)
def rank_results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Of all ranks, each a process of its own running this file."""
    folder = tmp_path_factory.mktemp("ranks")
    tests = Path(__file__).parents[1]
    path = os.pathsep.join((str(tests.parent), str(tests)))
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(request.param), str(folder)],
            env={**os.environ, "PYTHONPATH": path},
        )
        for rank in range(request.param)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0] * request.param
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: str(CASES[case]))
def test_ranks_together_equal_one_process(case: int, rank_results: list[dict[str, Any]]) -> None:
    """Also where all scale their losses, here by 3."""
    shape, dtype, transposed, temperature, _ = CASES[case]
    predicted, neighbour = (x.double() for x in inputs(*shape, dtype=dtype, agreement=0.3))
    predicted.requires_grad_()
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 4e-3}[dtype]
    arguments: dict[str, Any] = {"temperature": temperature, "transposed": transposed}
    whole = info_nce_stats(predicted, neighbour, **arguments)
    results = [result["cases"][case] for result in rank_results]
    losses = torch.stack([result[0] for result in results])
    torch.testing.assert_close(losses.double().mean(), whole.loss, rtol=tolerance, atol=0)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(losses[0] - losses[1]) > 0.01
    expected = torch.autograd.grad(3 * whole.loss, predicted)[0] * len(results)
    found = torch.cat([result[1] for result in results], dim=-2).double()
    band = tolerance * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=band)

    torch.testing.assert_close(torch.stack([result[2] for result in results]), losses)
    for i, name in ((3, "accuracy"), (4, "similarity")):
        mean = torch.stack([result[i] for result in results]).double().mean()
        torch.testing.assert_close(mean, getattr(whole, name), rtol=max(1e-5, tolerance), atol=0)
    lse = torch.cat([result[5] for result in results], dim=-1).double()
    torch.testing.assert_close(lse, whole.lse, rtol=max(1e-5, tolerance), atol=max(1e-5, tolerance))


@pytest.mark.parametrize("case", range(len(SYMMETRIC_CASES)))
def test_ranks_share_the_symmetric_loss(case: int, rank_results: list[dict[str, Any]]) -> None:
    leaves = [x.double().requires_grad_() for x in both_views(NUM_ROWS, WIDTH)]
    leaves.append(torch.tensor(0.2).double().requires_grad_())
    first, second, T = leaves
    whole = (nt_xent if SYMMETRIC_CASES[case][0] else clip)(first, second, T)
    results = [result["symmetric"][case] for result in rank_results]
    losses = torch.stack([result[0] for result in results])
    torch.testing.assert_close(losses.double().mean(), whole, rtol=1e-5, atol=0)
    *views, temperature = (x * len(results) for x in torch.autograd.grad(whole, leaves))
    for i, expected in enumerate(views):
        found = torch.cat([result[1 + i] for result in results]).double()
        band = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=band)
    total = torch.stack([result[3] for result in results]).double().sum()
    torch.testing.assert_close(total, temperature, rtol=1e-5, atol=0)


def test_the_backward_pass_sends_nothing(rank_results: list[dict[str, Any]]) -> None:
    for result in rank_results:
        assert all(backward == [] for _, backward in result["sent"])
        for i, ((_, _, transposed, temperature, _), (forward, _)) in enumerate(
            zip(CASES, result["sent"], strict=False)
        ):
            # Numbers of rows, once; neighbours; maxima, where one shift will not do, and sums.
            gathers = ["all_gather_into_tensor"] * (2 if i == 0 else 1)
            num_sums = 1 if temperature == 0.1 else 2
            assert forward == gathers + ["all_reduce"] * (0 if transposed else num_sums)


def test_uneven_batches_are_the_same_error_everywhere(rank_results: list[dict[str, Any]]) -> None:
    sizes = [3 + (rank == 1) for rank in range(len(rank_results))]
    for result in rank_results:
        assert result["errors"] == [
            f"{name}: expected equally many rows on every rank, got {sizes}"
            for name in ("neighbour", "first")
        ]


if __name__ == "__main__":
    # Sets Triton's interpreter up.
    importlib.import_module("conftest")
    rank_main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
