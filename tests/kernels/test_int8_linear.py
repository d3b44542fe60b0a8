import importlib
import importlib.util
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from allocation import Allocated
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from maect_fast.kernels import int8_linear, quantize_rows
from maect_fast.kernels._common import gpu
from maect_fast.kernels.int8_linear import op
from maect_fast.testing import assert_quantized, assert_within_budget

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(params=["auto", pytest.param("triton", marks=needs_triton)])
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


def skip_unless_interpreted(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    if backend == "triton" and device.type == "cpu" and dtype == BF16:
        pytest.skip("Triton's interpreter has no bf16 arithmetic")


def randint(*shape: int, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(device)


def rand(*shape: int, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Scales, of size and sign as others."""
    generator = torch.Generator().manual_seed(seed)
    return (0.01 + torch.rand(shape, generator=generator)).to(device)


Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def operands(
    *leading: int, N: int, K: int, has_bias: bool = True, device: torch.device | str = "cpu"
) -> Operands:
    x, weight = randint(*leading, K, device=device), randint(N, K, device=device, seed=1)
    bias = 1000 * rand(N, device=device, seed=4) if has_bias else None
    scales = rand(*leading, device=device, seed=2), rand(N, device=device, seed=3)
    return x, scales[0], weight, scales[1], bias


def in_floats(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The same product of the operands as they were before: in a float dtype throughout."""
    wide, rows = (
        q.to(dtype) * s.to(dtype)[..., None] for q, s in ((x, x_scale), (weight, weight_scale))
    )
    y = wide @ rows.T
    return y if bias is None else y + bias.to(dtype)


# M, N and K: one row, odd sizes, edges of tiles, widths of the models.
SHAPES = [
    ((1,), 5, 64),
    ((7,), 40, 384),
    ((2, 3), 300, 72),
    ((5,), 8, 1000),
    ((130,), 33, 64),
    pytest.param((197,), 257, 384, marks=pytest.mark.slow),
    pytest.param((257,), 384, 1280, marks=pytest.mark.slow),
    pytest.param((7,), 1024, 1024, marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(("leading", "N", "K"), SHAPES)
def test_against_fp64(
    leading: tuple[int, ...],
    N: int,
    K: int,
    dtype: torch.dtype,
    has_bias: bool,
    backend: Any,
    device: torch.device,
) -> None:
    skip_unless_interpreted(backend, dtype, device)
    x, x_scale, weight, weight_scale, bias = operands(
        *leading, N=N, K=K, has_bias=has_bias, device=device
    )
    # Into fp16's range.
    weight_scale = weight_scale / 1000
    inputs = (x, x_scale, weight, weight_scale, bias)
    y = int8_linear(*inputs, dtype=dtype, backend=backend)
    assert y.is_contiguous()
    ref64 = in_floats(*inputs, torch.float64)
    # Eager PyTorch without int8; the sums' order is no matter of ours, which are exact.
    eager = in_floats(*inputs, FP32).to(dtype)
    assert_within_budget(y, eager, ref64)
    assert torch.equal(int8_linear(*inputs, dtype=dtype, backend=backend), y)


def test_sums_are_exact(backend: Any, device: torch.device) -> None:
    """Beyond 2^24, where a sum in fp32 would depend on its order."""
    K = 1281
    x = torch.full((2, K), 127, dtype=torch.int8, device=device)
    weight = x.clone()
    x[0, 0] = weight[1, 0] = 1
    one = torch.ones(2, device=device)
    y = int8_linear(x, one, weight, one, dtype=FP32, backend=backend)
    rest = (K - 1) * 127**2
    exact = [[rest + 127, rest + 1], [rest + 127**2, rest + 127]]
    assert torch.equal(y.cpu(), torch.tensor(exact).float())


def test_values_by_hand(backend: Any, device: torch.device) -> None:
    x = torch.tensor([[1, -2, 127]], dtype=torch.int8, device=device)
    weight = torch.tensor([[3, 4, 0], [0, 1, -127]], dtype=torch.int8, device=device)
    scales = torch.tensor([0.5], device=device), torch.tensor([2.0, 1.0], device=device)
    bias = torch.tensor([1.0, 0.5], device=device)
    y = int8_linear(x, scales[0], weight, scales[1], bias, dtype=FP32, backend=backend)
    # 3 - 8 = -5, times 1, plus 1; -2 - 16129 = -16131, times a half, plus a half.
    assert y.tolist() == [[-4.0, -8065.0]]


def test_rows_with_gaps_are_read_in_place(backend: Any, device: torch.device) -> None:
    wide = randint(4, 6, 96, device=device)
    _, _, weight, weight_scale, bias = operands(1, N=9, K=48, device=device)
    for x in (wide[..., :48], wide[:, 0, 48:], wide[0, ::2, 16:64], wide[0, 0, :48]):
        scale = rand(*x.shape[:-1], device=device)
        arguments = (weight, weight_scale, bias)
        found = int8_linear(x, scale, *arguments, dtype=FP32, backend=backend)
        assert torch.equal(
            found, int8_linear(x.clone(), scale, *arguments, dtype=FP32, backend=backend)
        )


def test_no_rows(backend: Any, device: torch.device) -> None:
    inputs = operands(3, 0, N=5, K=8, device=device)
    assert int8_linear(*inputs, backend=backend).shape == (3, 0, 5)


def test_a_scale_that_is_no_number_shows(backend: Any, device: torch.device) -> None:
    """What `quantize_rows` makes of a row with NaN or infinity."""
    x, x_scale, weight, weight_scale, _ = operands(3, N=5, K=8, device=device)
    x_scale[0], x_scale[1] = math.nan, math.inf
    y = int8_linear(x, x_scale, weight, weight_scale, dtype=FP32, backend=backend)
    assert y.isfinite().all(1).tolist() == [False, False, True]
    assert not y[:2].isfinite().any()


# Quantised rows.


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, torch.float64])
def test_quantized_rows(dtype: torch.dtype, device: torch.device) -> None:
    x = (torch.randn(3, 5, 70, device=device) * torch.rand(3, 5, 1, device=device)).to(dtype)
    q, scale = quantize_rows(x)
    assert_quantized(q, scale, x.float(), x.double())


def test_quantized_rows_by_hand() -> None:
    x = torch.tensor([[1.27, -0.1, 0.004, 0.006], [0, 0, 0, 0], [0, math.nan, 1, 2]])
    q, scale = quantize_rows(x)
    assert q[:2].tolist() == [[127, -10, 0, 1], [0, 0, 0, 0]]
    torch.testing.assert_close(scale[0], torch.tensor(0.01))
    assert 0 < scale[1] < 1e-30
    assert scale[2].isnan()


def test_a_quantized_linear_layer_is_close_to_the_layer(backend: Any, device: torch.device) -> None:
    """Rows of 384 normal numbers: 1.0 % of the result's size."""
    x, weight = torch.randn(64, 384, device=device), torch.randn(48, 384, device=device)
    y = int8_linear(*quantize_rows(x), *quantize_rows(weight), dtype=FP32, backend=backend)
    exact = x.double() @ weight.double().T
    error = (y.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0.005 < error < 0.015


# What runs, and what it allocates.


@pytest.mark.parametrize(
    ("arch", "dtype", "is_triton"),
    [(90, FP32, True), (80, BF16, True), (75, FP16, False), (90, torch.float64, False)],
)
def test_auto_on_cuda_is_triton(
    arch: int, dtype: torch.dtype, is_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "sm_arch", lambda device: arch)
    with FakeTensorMode():
        scale = torch.empty(2, device="cuda")
        assert op._is_triton("auto", scale, None, dtype) == is_triton
        assert op._is_triton("auto", scale, scale, dtype) == is_triton
        assert not op._is_triton("auto", torch.empty(2), None, dtype)


@needs_triton
def test_triton_launches_once_on_the_inputs_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may not be the current one."""
    kernel = importlib.import_module("maect_fast.kernels.int8_linear.triton_kernel")
    devices: list[torch.device] = []
    grids: list[Any] = []
    interpreted = kernel.fwd_kernel

    def current(x: Tensor) -> Any:
        devices.append(x.device)
        return nullcontext()

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return interpreted[grid]

    monkeypatch.setattr(gpu, "current", current)
    monkeypatch.setattr(kernel, "fwd_kernel", Counted())
    int8_linear(*operands(130, N=8, K=16), dtype=FP32, backend="triton")
    assert devices == [torch.device("cpu")]
    assert grids == [(2,)]


class NoKernel:
    """Stands for a kernel where only what a launcher allocates counts."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


@needs_triton
def test_triton_allocates_the_result_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("maect_fast.kernels.int8_linear.triton_kernel")
    monkeypatch.setattr(kernel, "fwd_kernel", NoKernel())
    M, N, K = 256 * 197, 4096, 1024
    x, weight = (torch.empty(n, K, dtype=torch.int8, device="meta") for n in (M, N))
    scales = [torch.empty(n, device="meta") for n in (M, N)]
    with Allocated() as allocated:  # type: ignore[no-untyped-call]
        kernel.forward(x, scales[0], weight, scales[1], None, BF16)
    assert allocated.num_bytes == 2 * M * N


@needs_triton
@pytest.mark.parametrize("num_rows", [1, 1025, 2305])
def test_every_tile_belongs_to_one_program(num_rows: int, device: torch.device) -> None:
    """More tiles of rows than a group has, the last group with fewer."""
    inputs = operands(num_rows, N=600, K=16, device=device)
    found = int8_linear(*inputs, dtype=FP32, backend="triton")
    assert torch.equal(found, int8_linear(*inputs, dtype=FP32, backend="reference"))


@needs_triton
@pytest.mark.parametrize("arch", [80, 86, 90])
def test_every_architecture_has_a_row(arch: int) -> None:
    kernel = importlib.import_module("maect_fast.kernels.int8_linear.triton_kernel")
    assert arch in kernel.launch_config(arch).archs


def test_flops() -> None:
    with FlopCounterMode(display=False) as flops:
        int8_linear(*operands(2, 3, N=5, K=8))
    assert flops.get_total_flops() == 2 * 6 * 5 * 8


# Errors.

X, S, W, WS, BIAS = operands(2, 3, N=4, K=8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: int8_linear(X.float(), S, W, WS), TypeError, "x: expected torch.int8"),
        (lambda: int8_linear(X[0, 0, 0], S, W, WS), ValueError, "x: expected at least one dim"),
        (lambda: int8_linear(X[..., :0], S, W, WS), ValueError, "x: expected 1 to 131072 features"),
        (lambda: int8_linear(X[..., ::2], S, W, WS), ValueError, "x: expected a last stride of 1"),
        (
            lambda: int8_linear(X.transpose(0, 1), S.T, W, WS),
            ValueError,
            "x: expected rows of one stride",
        ),
        (lambda: int8_linear(X, S[0], W, WS), ValueError, r"x_scale: expected shape \[2, 3\]"),
        (
            lambda: int8_linear(X, torch.zeros(2, 6)[:, :3], W, WS),
            ValueError,
            "x_scale: expected a cont",
        ),
        (lambda: int8_linear(X, S.half(), W, WS), TypeError, "x_scale: expected torch.float32"),
        (lambda: int8_linear(X, S, W[:, :4], WS), ValueError, r"weight: expected shape \[any, 8\]"),
        (
            lambda: int8_linear(X, S, W.T.contiguous().T, WS),
            ValueError,
            "weight: expected a contig",
        ),
        (lambda: int8_linear(X, S, W, WS[:3]), ValueError, r"weight_scale: expected shape \[4\]"),
        (lambda: int8_linear(X, S, W, WS, WS[:3]), ValueError, r"bias: expected shape \[4\]"),
        (lambda: int8_linear(X, S, W, WS.to("meta")), ValueError, "weight_scale: expected cpu"),
        (
            lambda: int8_linear(X, S, W, WS, dtype=torch.int8),
            TypeError,
            "dtype: expected a float",
        ),
        (
            lambda: int8_linear(X, S, W, WS, backend="cpp"),
            RuntimeError,
            "int8_linear: backend 'cpp' is not built here",
        ),
        (
            lambda: int8_linear(X, S, W, WS, dtype=torch.float64, backend="triton"),
            RuntimeError,
            "int8_linear: backend 'triton' makes .*got float64",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Registration.


def test_opcheck(backend: Any, device: torch.device) -> None:
    for has_bias in (True, False):
        inputs = operands(2, 3, N=5, K=16, has_bias=has_bias, device=device)
        torch.library.opcheck(op.int8_linear, (*inputs, FP32, backend))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks(device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(int8_linear, fullgraph=True, backend="aot_eager")
    for B in (4, 4, 3):
        inputs = operands(B, N=5, K=16, device=device)
        assert torch.equal(compiled(*inputs, dtype=FP32), int8_linear(*inputs, dtype=FP32))
