import importlib
import importlib.util
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from allocation import Allocated
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from maect_fast.kernels import gelu, gelu_int8
from maect_fast.kernels._common import gpu
from maect_fast.kernels.gelu import op
from maect_fast.testing import assert_quantized, assert_within_budget, error_budget

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(params=["auto", pytest.param("triton", marks=needs_triton)])
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


# Of tests that take seconds: the kernels are the same, compiled around or not.
slow_if_interpreted = pytest.mark.parametrize(
    "backend", ["auto", pytest.param("triton", marks=[needs_triton, pytest.mark.slow])]
)


def skip_unless_interpreted(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bf16 arithmetic")


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def naive(h: Tensor, bias: Tensor | None) -> Tensor:
    """What a block computes today, rounded to the dtype of h after the bias as addmm does."""
    return F.gelu(h if bias is None else (h + bias).to(h.dtype))


def differentiate(
    function: Any, h: Tensor, bias: Tensor | None, dg: Tensor, **options: Any
) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (h, bias) if x is not None]
    g = function(*leaves, *[None] * (2 - len(leaves)), **options)
    grads = torch.autograd.grad(g, leaves, dg.to(g.dtype))
    return dict(zip(("g", "dh", "dbias"), (g.detach(), *grads), strict=False))


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Leading dimensions and D: one token, odd widths, one of each program's edges.
SHAPES = [
    ((1,), 64),
    ((7,), 48),
    ((2, 3), 200),
    ((5,), 1024),
    ((3,), 1280),
    pytest.param((197,), 384, marks=pytest.mark.slow),
    pytest.param((7,), 4096, marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("leading", "D"), SHAPES)
def test_results_and_gradients_against_fp64(
    leading: tuple[int, ...],
    D: int,
    dtype: torch.dtype,
    has_bias: bool,
    backend: Any,
    device: torch.device,
) -> None:
    skip_unless_interpreted(backend, dtype, device)
    h = (randn(*leading, D, device=device) * 2).to(dtype)
    bias = randn(D, device=device, seed=1) if has_bias else None
    dg = randn(*leading, D, device=device, dtype=dtype, seed=2)
    found = differentiate(gelu, h, bias, dg, backend=backend)
    eager = differentiate(naive, h, bias, dg)
    wide = None if bias is None else bias.double()
    ref64 = differentiate(naive, h.double(), wide, dg)
    for name, value in found.items():
        assert_within_budget(value, eager[name], ref64[name], name=name)
    assert found["g"].is_contiguous()
    # The backward writes g again, for the gradient of the next weight: the same bits.
    dh, g, dbias = op.gelu_bwd(h, bias, dg, True, backend)
    assert torch.equal(g, found["g"])
    assert torch.equal(dh, found["dh"])
    assert dbias.shape == ((D,) if has_bias else (0,))


def every_half(dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """All 65,536 bit patterns, NaN and infinities among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(dtype)


# The polynomial as the kernels have it; the interpreter has no bf16, so its values are computed in
# fp32 here, operation by operation, and rounded.
COEFFICIENTS = (
    *(-1.00002575, -1.15085435, -0.45939937, -0.0531104952, 0.00813639816),
    *(-0.000846781651, 5.22219998e-5, -1.42216426e-6),
)


def emulated(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its derivative, fp32; x fp32."""
    t = x.abs().clamp(max=40.0)
    p = torch.full_like(t, COEFFICIENTS[-1])
    for c in COEFFICIENTS[-2::-1]:
        # One rounding, as a fused multiply-add.
        p = (p.double() * t.double() + c).float()
    q = p.exp2()
    density = (-0.72134752 * t * t - 1.32574806).exp2()
    left = q - t * density
    return x.clamp(min=0.0) - t * q, torch.where(x >= 0, 1 - left, left)


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its derivative in fp64, without the cancellation of 1 + erf; finite x."""
    x = x.double()
    cdf = torch.special.erfc(-x / math.sqrt(2)) / 2
    return x * cdf, cdf + x * (-x * x / 2).exp() / math.sqrt(2 * math.pi)


def test_every_bf16_input_is_rounded_rightly_but_for_a_few() -> None:
    """Of the 32,994 above -6 nine are not: 0.03 %, each by one unit in the last place."""
    x = every_half(torch.bfloat16, "cpu").float()
    x = x[x.isfinite()]
    (g, derivative), (exact_g, exact_derivative) = emulated(x), exact(x)
    # The device has no denormals, and their last place is no relative one.
    normal = (x > -6) & (exact_g.abs() >= 2**-126)
    found, rounded = g[normal].bfloat16(), exact_g[normal].bfloat16()
    assert (found != rounded).float().mean() < 3e-4
    steps = found.view(torch.int16).int() - rounded.view(torch.int16).int()
    assert steps.abs().max() == 1
    # Correct rounding is within 0.5 units.
    unit = torch.exp2(exact_g[normal].abs().log2().floor() - 7)
    assert ((found.double() - exact_g[normal]).abs() / unit).max() < 0.504
    assert (g.double() - exact_g)[x <= -6].abs().max() < 1e-13
    assert (derivative.double() - exact_derivative).abs().max() < 1e-5


@needs_triton
def test_the_emulated_polynomial_is_the_kernels() -> None:
    kernel = importlib.import_module("maect_fast.kernels.gelu.triton_kernel")
    constants = [getattr(kernel, f"C{i}").value for i in range(8)]
    assert constants == list(COEFFICIENTS)
    assert kernel.LARGEST.value == 40
    assert (kernel.DENSITY_SLOPE.value, kernel.DENSITY_OFFSET.value) == (-0.72134752, -1.32574806)


@needs_triton
@pytest.mark.usefixtures("poison")
def test_every_half_input_through_the_kernels(device: torch.device) -> None:
    """fp16 interpreted; on a GPU bf16 too."""
    for dtype in (torch.float16, torch.bfloat16)[: 2 if device.type == "cuda" else 1]:
        x = every_half(dtype, device).view(64, 1024)
        dg = torch.ones_like(x)
        found = dict(zip(("dh", "g"), op.gelu_bwd(x, None, dg, True, "triton"), strict=False))
        forward = gelu(x, backend="triton")
        assert torch.equal(forward.view(torch.int16), found["g"].view(torch.int16))
        for value in found.values():
            assert torch.equal(value.isnan(), x.isnan())
        finite = x[x.isfinite()]
        eager = differentiate(naive, finite, None, torch.ones_like(finite))
        exact_g, exact_derivative = exact(finite)
        for name, ref64 in (("g", exact_g), ("dh", exact_derivative)):
            value = found[name][x.isfinite()]
            assert_within_budget(value, eager[name], ref64, name=f"{name} of {dtype}")
        # Nor is it less exact where the function is small.
        small = finite.abs() < 8
        error = (forward[x.isfinite()][small].double() - exact_g[small]).abs().max()
        assert error <= error_budget(eager["g"][small], exact_g[small]) / 2


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_infinities_and_nan(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 6e4, -6e4, 0], dtype=dtype, device=device)
    g = gelu(x, backend="triton")
    dh, again, _ = op.gelu_bwd(x, None, torch.ones_like(x), True, "triton")
    for found, expected in ((g, [math.inf, 0, math.nan, x[3].item(), 0, 0]), (again, g.tolist())):
        wanted = torch.tensor(expected, dtype=dtype, device=device)
        torch.testing.assert_close(found, wanted, equal_nan=True)
    derivative = torch.tensor([1, 0, math.nan, 1, 0, 0.5], dtype=dtype, device=device)
    torch.testing.assert_close(dh, derivative, equal_nan=True)


def test_values_by_hand(backend: Any, device: torch.device) -> None:
    """Phi(1) = 0.8413447, phi(1) = 0.2419707."""
    h = torch.tensor([[0.0, 1.0, -1.0]], device=device)
    bias = torch.tensor([0.0, 0.0, 2.0], device=device)
    found = differentiate(gelu, h, bias, torch.ones_like(h), backend=backend)
    expected = torch.tensor([[0.0, 0.8413447, 0.8413447]], device=device)
    torch.testing.assert_close(found["g"], expected)
    slope = torch.tensor([[0.5, 1.0833155, 1.0833155]], device=device)
    torch.testing.assert_close(found["dh"], slope)
    torch.testing.assert_close(found["dbias"], slope[0])


def test_gradcheck() -> None:
    h, bias = (randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 5), (5,)))
    assert torch.autograd.gradcheck(gelu, (h, bias))
    assert torch.autograd.gradcheck(gelu, (h,))


def test_strided_inputs_and_gradients(backend: Any, device: torch.device) -> None:
    """Rows with gaps are read in place; upstream gradients of any layout are copied."""
    wide = randn(4, 6, 96, device=device)
    bias = randn(48, device=device, seed=1)
    for h in (wide[..., :48], wide[:, 0, 48:], wide[0, ::2, 16:64], wide[0, 0, :48]):
        leaf = h.detach().requires_grad_()
        g = gelu(leaf, bias, backend=backend)
        torch.testing.assert_close(g, naive(h, bias))
        for dg in (
            torch.ones((), device=device).expand_as(g),
            randn(*reversed(g.shape), device=device).permute(*reversed(range(g.ndim))),
        ):
            (found,) = torch.autograd.grad(g, leaf, dg, retain_graph=True)
            again = h.detach().requires_grad_()
            (expected,) = torch.autograd.grad(naive(again, bias), again, dg)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_tokens(backend: Any, device: torch.device) -> None:
    h, bias = torch.zeros(3, 0, 8, device=device), randn(8, device=device)
    found = differentiate(gelu, h, bias, h, backend=backend)
    assert found["g"].shape == found["dh"].shape == (3, 0, 8)
    assert torch.equal(found["dbias"], torch.zeros_like(bias))


def test_fp64_stays_fp64() -> None:
    h, bias = randn(2, 5, dtype=torch.float64), randn(5)
    assert gelu(h, bias).dtype == torch.float64
    *_, dbias = op.gelu_bwd(h, bias, h, False, "auto")
    assert dbias.dtype == torch.float64


@needs_triton
@pytest.mark.usefixtures("poison")
def test_two_runs_are_bitwise_equal_and_programs_have_many_tiles(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """On a small device a part of the bias's sum has many tokens."""
    kernel = importlib.import_module("maect_fast.kernels.gelu.triton_kernel")
    h, bias, dg = (randn(*shape, device=device) for shape in ((13, 48), (48,), (13, 48)))
    many = op.gelu_bwd(h, bias, dg, False, "triton")
    monkeypatch.setattr(kernel, "num_multiprocessors", lambda _: 1)
    monkeypatch.setattr(kernel, "PROGRAMS", 3)
    first, second = (op.gelu_bwd(h, bias, dg, False, "triton") for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert torch.equal(first[0], many[0])
    torch.testing.assert_close(first[2], many[2])


# In int8.


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("leading", "D"), [*SHAPES, pytest.param((257,), 1280, marks=pytest.mark.slow)]
)
def test_int8_against_fp64(
    leading: tuple[int, ...],
    D: int,
    dtype: torch.dtype,
    has_bias: bool,
    backend: Any,
    device: torch.device,
) -> None:
    skip_unless_interpreted(backend, dtype, device)
    h = (randn(*leading, D, device=device) * 2).to(dtype)
    bias = randn(D, device=device, seed=1) if has_bias else None
    g, scale = gelu_int8(h, bias, backend=backend)
    assert g.is_contiguous()
    x = h if bias is None else h.double() + bias.double()
    eager = F.gelu(x.float())
    # The polynomial is for halves: of fp16 or better, whatever the half.
    assert_quantized(g, scale, eager if dtype == torch.float32 else eager.half(), exact(x)[0])
    again, _ = gelu_int8(h, bias, backend=backend)
    assert torch.equal(again, g)


def test_int8_of_strided_rows_and_of_none(backend: Any, device: torch.device) -> None:
    wide, bias = randn(4, 6, 96, device=device), randn(48, device=device, seed=1)
    for h in (wide[..., :48], wide[:, 0, 48:], wide[0, ::2, 16:64], wide[0, 0, :48]):
        found = gelu_int8(h, bias, backend=backend)
        assert all(map(torch.equal, found, gelu_int8(h.clone(), bias, backend=backend)))
    g, scale = gelu_int8(wide[:, :0], backend=backend)
    assert (g.shape, scale.shape) == ((4, 0, 96), (4, 0))


def test_int8_of_special_rows(backend: Any, device: torch.device) -> None:
    """NaN and infinity show in the scale; a row of zeros is zeros."""
    h = randn(4, 1500, device=device)
    h[0, 1200], h[1, 5], h[2] = math.nan, math.inf, 0.0
    g, scale = gelu_int8(h, backend=backend)
    assert scale.isfinite().tolist() == [False, False, True, True]
    assert not g[2].any()
    assert g[3].any()


# What runs, and what it allocates.


@pytest.mark.parametrize(
    ("arch", "dtype", "is_triton"),
    [
        (90, torch.float32, True),
        (80, torch.bfloat16, True),
        (75, torch.float16, False),
        (90, torch.float64, False),
    ],
)
def test_auto_on_cuda_is_triton(
    arch: int, dtype: torch.dtype, is_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "sm_arch", lambda device: arch)
    with FakeTensorMode():
        h = torch.empty(2, 8, device="cuda", dtype=dtype)
        assert op._is_triton("auto", h, None) == is_triton
        assert op._is_triton("auto", h, h[0]) == is_triton
        assert not op._is_triton("auto", torch.empty(2, 8), None)


@needs_triton
def test_triton_launches_on_the_inputs_device_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may not be the current one."""
    kernel = importlib.import_module("maect_fast.kernels.gelu.triton_kernel")
    devices: list[torch.device] = []
    launched: list[str] = []

    def current(x: Tensor) -> Any:
        devices.append(x.device)
        return nullcontext()

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernel, name)

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    monkeypatch.setattr(gpu, "current", current)
    for name in ("fwd_kernel", "bwd_kernel"):
        monkeypatch.setattr(kernel, name, Counted(name))
    h, bias = randn(2, 3, 8), randn(8)
    differentiate(gelu, h, bias, h, backend="triton")
    assert devices == [torch.device("cpu")] * 2
    assert launched == ["fwd_kernel", "bwd_kernel"]


class NoKernel:
    """Stands for a kernel where only what a launcher allocates counts."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


@needs_triton
def test_triton_allocates_results_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-L/16, batch 256: no sum with the bias, no fp32 copy; 5 MB of parts."""
    kernel = importlib.import_module("maect_fast.kernels.gelu.triton_kernel")
    for name in ("fwd_kernel", "int8_kernel", "bwd_kernel"):
        monkeypatch.setattr(kernel, name, NoKernel())
    M, D = 256 * 197, 4096
    h = torch.empty(M, D, dtype=torch.bfloat16, device="meta")
    bias = torch.empty(D, device="meta")
    for call, num_results in (
        (lambda: kernel.forward(h, bias), 1),
        (lambda: kernel.forward_int8(h, bias), 0.5),
        (lambda: kernel.backward(h, bias, h, True), 2),
        (lambda: kernel.backward(h, bias, h, False), 1),
    ):
        with Allocated() as allocated:  # type: ignore[no-untyped-call]
            call()  # type: ignore[no-untyped-call]
        size = num_results * 2 * M * D
        assert size <= allocated.num_bytes <= size + 5 * 2**20


# Forward mode compiles decompositions with torch.jit at its first use.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_no_second_derivative_and_no_forward_mode(backend: Any) -> None:
    h = randn(2, 8).requires_grad_()
    g = gelu(h, torch.ones(8), backend=backend)
    upstream = torch.ones_like(g).requires_grad_()
    (dh,) = torch.autograd.grad(g, h, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dh.sum().backward()  # type: ignore[no-untyped-call]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(h, h)  # type: ignore[no-untyped-call]
        with pytest.raises(NotImplementedError, match="jvp"):
            gelu(dual, backend=backend)


# Errors.

H, BIAS = torch.zeros(2, 3, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gelu(H.long()), TypeError, "h: expected torch.float16"),
        (lambda: gelu(H[0, 0, 0]), ValueError, "h: expected at least one dimension, got 0"),
        (lambda: gelu(H[..., ::2]), ValueError, "h: expected a last stride of 1"),
        (lambda: gelu(H.transpose(0, 1)), ValueError, r"h: expected rows of one stride, got \(8, "),
        (lambda: gelu(H, BIAS[:4]), ValueError, r"bias: expected shape \[8\], got \[4\]"),
        (lambda: gelu(H, BIAS.int()), TypeError, "bias: expected torch.float16"),
        (lambda: gelu(H, BIAS.to("meta")), ValueError, "bias: expected cpu, got meta"),
        (lambda: gelu(H, backend="cpp"), RuntimeError, "gelu: backend 'cpp' is not built here"),
        (lambda: gelu(H, backend="cuda"), ValueError, "gelu: expected backend to be one of"),  # type: ignore[arg-type]
        (
            lambda: gelu(H.double(), backend="triton"),
            RuntimeError,
            "gelu: backend 'triton' takes .*got float64",
        ),
        (
            lambda: gelu(H.to("meta"), backend="triton"),
            RuntimeError,
            "'triton' runs on CUDA, got a tensor on meta",
        ),
        (
            lambda: gelu_int8(torch.zeros(2, 8193), backend="triton"),
            RuntimeError,
            "gelu_int8: backend 'triton' takes up to 8192 features, got 8193",
        ),
        (lambda: gelu_int8(H[..., ::2]), ValueError, "h: expected a last stride of 1"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Registration.


def test_opcheck(backend: Any, device: torch.device) -> None:
    h, bias = randn(2, 3, 8, device=device), randn(8, device=device)
    for b in (bias, None):
        torch.library.opcheck(op.gelu_fwd, (h, b, backend))
        torch.library.opcheck(op.gelu_int8, (h, b, backend))
        torch.library.opcheck(op.gelu_bwd, (h, b, h, b is None, backend))


@slow_if_interpreted
# Dynamo instantiates torch.autograd.Function, of which torch itself warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks(backend: Any, device: torch.device) -> None:
    """With a smaller last batch."""
    torch.compiler.reset()
    compiled = torch.compile(gelu, fullgraph=True, backend="aot_eager")
    bias = randn(8, device=device, seed=1)
    for B in (4, 4, 3):
        h = randn(B, 3, 8, device=device)
        found = differentiate(compiled, h, bias, h, backend=backend)
        expected = differentiate(gelu, h, bias, h, backend=backend)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    h, bias = randn(4, 3, 8), randn(8, seed=1)
    compiled = torch.compile(gelu, fullgraph=True)
    found, expected = (differentiate(f, h, bias, h) for f in (compiled, gelu))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_autocast_changes_nothing(device: torch.device) -> None:
    h, bias = randn(2, 8, device=device, dtype=torch.bfloat16), randn(8, device=device)
    expected = differentiate(gelu, h, bias, h)
    with torch.autocast(device.type, torch.bfloat16):
        found = differentiate(gelu, h, bias, h)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
