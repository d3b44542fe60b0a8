import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode

from maect_fast.kernels import info_nce
from maect_fast.kernels._common import cpp
from maect_fast.kernels.info_nce import op, reference
from maect_fast.testing import assert_within_budget, unit_rows

NO_LIBRARY = cpp.load()
needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=f"C++ library: {NO_LIBRARY}")
SIMD = [] if NO_LIBRARY else torch.ops.maect_fast.info_nce_simd().split()
WORLD_SIZE = 2


@pytest.fixture(params=["auto", "reference", pytest.param("cpp", marks=needs_library)])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "cpp" and device.type != "cpu":
        pytest.skip("the C++ kernel takes CPU tensors")
    return str(request.param)


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


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("temperature", [0.02, 0.15, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "agreement"),
    [((2, 2, 8), 1.0), ((2, 33, 16), 0.0), ((65, 48), 1.0), ((2, 64, 256), 1.0), ((2, 7, 32), 50)],
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
    predicted, neighbour = inputs(*shape, dtype=dtype, device=device, agreement=agreement)
    found = loss_and_grad(
        info_nce,
        predicted,
        neighbour,
        temperature=temperature,
        transposed=transposed,
        backend=backend,
    )
    eager = loss_and_grad(naive, predicted, neighbour, temperature, transposed)
    ref64 = loss_and_grad(naive, predicted.double(), neighbour.double(), temperature, transposed)
    assert_within_budget(found[0], eager[0].float(), ref64[0], name="loss")
    assert_within_budget(found[1], eager[1], ref64[1], name="gradient")


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
    eye = torch.eye(2, device=device)
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
    neighbour = torch.eye(2, device=device)
    predicted = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=device)
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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("first", [0, 4, 8])
@pytest.mark.parametrize("block", [1 << 22, 30])
def test_gradient_on_any_rank_is_that_of_the_definition(
    first: int,
    transposed: bool,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """The op's hand-written gradient, where the own rows are only a part of the gathered ones."""
    monkeypatch.setattr(reference, "BLOCK", block)
    predicted, _ = inputs(2, 4, 8, dtype=torch.float64, device=device)
    gathered = unit_rows(2, 12, 8, device=device, seed=3)
    temperature = torch.tensor(0.3)
    predicted.requires_grad_()
    grads = []
    for row_stats in (op.row_stats, reference.row_stats):
        row_max, row_sum, positive = row_stats(predicted, gathered, temperature, first, transposed)
        score = (row_sum.log() + row_max.detach()).square().sum() + positive.exp().sum()
        grads.append(torch.autograd.grad(score, predicted)[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    pairs = normalize(predicted, dim=-1) * gathered.flip(0)[:, first : first + 4] / 0.3
    torch.testing.assert_close(positive, pairs.sum(-1), rtol=1e-6, atol=1e-6)


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
        row_max, row_sum, positive = reference.row_stats(
            predicted, neighbour, temperature, 0, transposed
        )
        reference.row_stats_backward(
            row_sum, positive, predicted, neighbour, temperature, row_max, 0, transposed
        )
    assert 0 < largest.numel <= 2 * 400 * 4


def test_gradient_goes_to_the_predictions_alone(backend: Any, device: torch.device) -> None:
    predicted, neighbour = inputs(2, 5, 8, dtype=torch.bfloat16, device=device)
    predicted.requires_grad_()
    neighbour.requires_grad_()
    torch.autograd.backward(info_nce(predicted, neighbour, temperature=0.2, backend=backend))
    assert predicted.grad is not None
    assert predicted.grad.dtype == torch.bfloat16
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
    predicted, neighbour = inputs(2, 5, 8, device=device)
    predicted[0, 3, 1] = torch.nan
    arguments: dict[str, Any] = {"temperature": 0.2, "transposed": transposed, "backend": backend}
    loss, grad = loss_and_grad(info_nce, predicted, neighbour, **arguments)
    assert loss.isnan()
    assert grad[0, 3].isnan().all()


def test_strided_predictions(backend: Any, device: torch.device) -> None:
    predicted, neighbour = inputs(2, 6, 8, device=device)
    wide = torch.zeros(6, 2, 16, device=device)
    strided = wide.transpose(0, 1)[..., ::2]
    strided.copy_(predicted)
    arguments: dict[str, Any] = {"temperature": 0.2, "backend": backend}
    found = loss_and_grad(info_nce, strided, neighbour, **arguments)
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


def test_temperature_may_be_a_tensor(device: torch.device) -> None:
    predicted, neighbour = inputs(2, 5, 8, device=device)
    expected = info_nce(predicted, neighbour, temperature=0.25)
    for temperature in (torch.tensor(0.25), torch.tensor(0.25, device=device)):
        assert torch.equal(info_nce(predicted, neighbour, temperature=temperature), expected)


def test_two_runs_are_bitwise_equal(device: torch.device) -> None:
    predicted, neighbour = inputs(2, 130, 64, device=device)
    first, second = (
        loss_and_grad(info_nce, predicted, neighbour, temperature=0.1) for _ in range(2)
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

    with pytest.raises(RuntimeError, match="info_nce: backend 'triton' is not built"):
        call(PAIR, "triton")
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
    """logsumexp of the softmax rows and logits of the positive pairs; all logits at once."""
    logits = neighbour.flip(0) @ normalize(predicted, dim=-1, eps=1e-12).mT / temperature
    positive = logits.diagonal(-first, dim1=1, dim2=2)
    return torch.logsumexp(logits, 1 if transposed else 2), positive


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
    grad = op.row_stats_backward_cpp(
        weights[0] / row_sum, weights[1], *arguments, row_max, first, transposed, simd
    )
    return [row_sum.log() + row_max, positive, grad]


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
        (1, 1, 1, 1, 0),
        (2, 1, 131, 5, 130),
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
    """Every view is one pair, whose gradient across the prediction is exp(logit) alone."""
    logits = torch.cat((-torch.logspace(-8, math.log10(87), 3000), torch.linspace(-87, 80, 3000)))
    outside = torch.tensor([0, -88.1, -1e3, -3e38, math.nan])
    logits = torch.cat((logits, outside))
    V = len(logits)
    neighbour = torch.stack((logits, torch.ones(V)), 1)[:, None].flip(0)
    predicted = torch.tensor([1.0, 0.0]).expand(V, 1, 2)
    one, zero = torch.ones(V, 1), torch.zeros(V, 1)
    temperature = torch.tensor(1.0)
    grad = op.row_stats_backward_cpp(
        one, zero, predicted, neighbour, temperature, zero, 0, False, simd
    )
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
    stats = [torch.zeros(1, n if transposed else neighbour.shape[1]) for _ in range(2)]
    stats.append(torch.zeros(1, n))
    grad = torch.zeros_like(predicted)
    before = resident("VmRSS")
    ops.info_nce_fwd_cpp(predicted, neighbour, 0.2, 0, transposed, "", *stats)
    inputs = predicted, neighbour, 0.2, stats[0]
    ops.info_nce_bwd_cpp(*stats[1:], *inputs, 0, transposed, "", grad)
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


# Registration.


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed: bool, device: torch.device) -> None:
    predicted, _ = inputs(2, 4, 8, device=device)
    gathered = unit_rows(2, 12, 8, device=device, seed=3)
    temperature = torch.tensor(0.2, dtype=torch.float64)
    arguments = (predicted, gathered, temperature, 4, transposed)
    row_max, row_sum, positive = op.row_stats(*arguments)
    torch.library.opcheck(op.row_stats, (predicted.clone().requires_grad_(), *arguments[1:]))
    torch.library.opcheck(
        op.row_stats_backward,
        (row_sum, positive, predicted, gathered, temperature, row_max, 4, transposed),
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_compiles_without_graph_breaks(transposed: bool, device: torch.device) -> None:
    compiled = torch.compile(info_nce, fullgraph=True, backend="aot_eager")
    temperatures = (0.2, 0.3, torch.tensor(0.4, device=device))
    for n, temperature in zip((6, 6, 5), temperatures, strict=True):
        predicted, neighbour = inputs(2, n, 8, device=device)
        arguments: dict[str, Any] = {"temperature": temperature, "transposed": transposed}
        found = loss_and_grad(compiled, predicted, neighbour, **arguments)
        expected = loss_and_grad(info_nce, predicted, neighbour, **arguments)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


# Several ranks. Rank r weighs its loss by r + 1: a gradient that assumes equal weights would fail.

CASES = [
    (shape, dtype, transposed)
    for shape in ((2, 6, 8), (6, 8))
    for dtype in (torch.float64, torch.float32)
    for transposed in (False, True)
]


def rank_main(rank: int, folder: Path) -> None:
    """One rank's share of every case: [loss, gradient of the weighted sum over ranks]."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=WORLD_SIZE
    )
    results = []
    for shape, dtype, transposed in CASES:
        predicted, neighbour = (
            x.chunk(WORLD_SIZE, dim=-2)[rank] for x in inputs(*shape, dtype=dtype)
        )
        predicted = predicted.clone().requires_grad_()
        loss = info_nce(
            predicted,
            neighbour,
            temperature=0.1,
            transposed=transposed,
            group=dist.group.WORLD,
            # Spares each rank the seconds that a first custom op takes; test_nn_nnclr.py has it.
            backend="reference",
        )
        results.append([loss.detach(), *torch.autograd.grad(loss * (rank + 1), predicted)])
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def rank_results(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[Tensor]]]:
    """Of all ranks, each a process of its own running this file."""
    folder = tmp_path_factory.mktemp("ranks")
    path = str(Path(__file__).parents[2])
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": path},
        )
        for rank in range(WORLD_SIZE)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * WORLD_SIZE
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: str(CASES[case]))
def test_ranks_together_equal_one_process(
    case: int, rank_results: list[list[list[Tensor]]]
) -> None:
    shape, dtype, transposed = CASES[case]
    predicted, neighbour = (x.double() for x in inputs(*shape, dtype=dtype))
    predicted.requires_grad_()
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5

    whole = info_nce(predicted, neighbour, temperature=0.1, transposed=transposed)
    losses = torch.stack([result[case][0] for result in rank_results])
    torch.testing.assert_close(losses.double().mean(), whole, rtol=tolerance, atol=0)
    assert losses.dtype == dtype
    assert abs(losses[0] - losses[1]) > 0.01

    # The same in one process: rows of both directions belong to the rank that holds them.
    views = predicted.view(-1, *shape[-2:])
    crossed = neighbour.view(-1, *shape[-2:]).flip(0)
    logits = normalize(views, dim=-1) @ crossed.mT / 0.1  # [V, predictions, neighbours] fp64
    softmax = logits.log_softmax(-1 if transposed else -2)
    rows = softmax.diagonal(dim1=-2, dim2=-1)
    weight = torch.arange(1, WORLD_SIZE + 1).repeat_interleave(shape[-2] // WORLD_SIZE)
    (expected,) = torch.autograd.grad(-(rows * weight).mean() * WORLD_SIZE, predicted)
    found = torch.cat([result[case][1] for result in rank_results], dim=-2).double()
    band = tolerance * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=band)


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
