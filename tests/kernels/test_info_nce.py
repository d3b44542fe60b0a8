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
from maect_fast.kernels.info_nce import op, reference
from maect_fast.testing import assert_within_budget, unit_rows

BACKENDS = ["auto", "reference"]
WORLD_SIZE = 2


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
@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


def test_hand_made_numbers(device: torch.device) -> None:
    eye = torch.eye(2, device=device)
    loss = info_nce(5 * eye, eye, temperature=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert loss.dtype == torch.float32
    swapped = info_nce(5 * eye, eye.flip(0), temperature=0.5)
    assert swapped.item() == pytest.approx(math.log(1 + math.exp(2)))
    alone, grad = loss_and_grad(info_nce, eye[:1], eye[1:], temperature=0.1)
    assert alone.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_rows_are_neighbours_unless_transposed(device: torch.device) -> None:
    """One prediction near both neighbours makes one direction's softmax differ from the other's."""
    neighbour = torch.eye(2, device=device)
    predicted = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=device)
    by_neighbour = info_nce(predicted, neighbour, temperature=1.0)
    assert by_neighbour.item() == pytest.approx(math.log(2))
    by_prediction = info_nce(predicted, neighbour, temperature=1.0, transposed=True)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


def test_nan_prediction_makes_the_loss_nan(device: torch.device) -> None:
    predicted, neighbour = inputs(2, 5, 8, device=device)
    predicted[0, 3, 1] = torch.nan
    assert info_nce(predicted, neighbour, temperature=0.2).isnan()


def test_strided_predictions(device: torch.device) -> None:
    predicted, neighbour = inputs(2, 6, 8, device=device)
    wide = torch.zeros(6, 2, 16, device=device)
    strided = wide.transpose(0, 1)[..., ::2]
    strided.copy_(predicted)
    found = loss_and_grad(info_nce, strided, neighbour, temperature=0.2)
    expected = loss_and_grad(info_nce, predicted, neighbour, temperature=0.2)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_autocast_does_not_reach_the_logits(device: torch.device) -> None:
    predicted, neighbour = inputs(2, 40, 64, device=device)
    expected = loss_and_grad(info_nce, predicted, neighbour, temperature=0.05)
    with torch.autocast(device.type, torch.bfloat16):
        found = loss_and_grad(info_nce, predicted, neighbour, temperature=0.05)
        defined = info_nce(predicted, neighbour, temperature=0.05, backend="reference")
    for one, other in zip((*found, defined), (*expected, expected[0]), strict=True):
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


@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_backends_that_are_not_built_say_so(backend: Any) -> None:
    with pytest.raises(RuntimeError, match=f"info_nce: backend '{backend}' is not built"):
        info_nce(PAIR, PAIR, temperature=0.2, backend=backend)


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
