import importlib
import importlib.util
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from allocation import Allocated
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from maect_fast.kernels import residual_norm, residual_norm_int8
from maect_fast.kernels._common import gpu
from maect_fast.kernels.residual_norm import op
from maect_fast.testing import assert_quantized, assert_within_budget

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
EPS = 1e-6


@pytest.fixture(params=["auto", pytest.param("triton", marks=needs_triton)])
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


# Of tests that take seconds: the kernels are the same, compiled around or not.
slow_if_interpreted = pytest.mark.parametrize(
    "backend", ["auto", pytest.param("triton", marks=[needs_triton, pytest.mark.slow])]
)


def skip_unless_interpreted(backend: str, device: torch.device, *dtypes: torch.dtype) -> None:
    if backend == "triton" and device.type == "cpu" and torch.bfloat16 in dtypes:
        pytest.skip("Triton's interpreter has no bf16 arithmetic")


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


class Inputs(NamedTuple):
    """In the order of the op's arguments."""

    r: Tensor
    branch: Tensor | None
    branch_bias: Tensor | None
    weight: Tensor
    bias: Tensor

    def double(self) -> "Inputs":
        return Inputs(*(None if x is None else x.double() for x in self))  # type: ignore[arg-type]


def inputs_of(
    leading: tuple[int, ...],
    D: int,
    stream: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    *,
    has: str = "branch bias",
    device: torch.device | str = "cpu",
) -> Inputs:
    """A stream far from zero, as a ViT's is, with parameters in fp32; `has` names what is there."""
    r = (randn(*leading, D, device=device) * 2 + 1.5).to(stream)
    branch = randn(*leading, D, device=device, dtype=dtype, seed=1) if "branch" in has else None
    branch_bias = randn(D, device=device, seed=2) if "bias" in has else None
    weight = 1 + 0.3 * randn(D, device=device, seed=3)
    return Inputs(r, branch, branch_bias, weight, randn(D, device=device, seed=4))


def naive(
    r: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """A block's way: the linear layer's bias is in the branch, the norm's result is cast."""
    if branch is not None:
        if branch_bias is not None:
            branch = (branch + branch_bias).to(branch.dtype)
        r = r + branch.to(r.dtype)
    wide = torch.promote_types(r.dtype, torch.float32)
    y = F.layer_norm(r.to(wide), r.shape[-1:], weight.to(wide), bias.to(wide), EPS)
    return r, y.to(dtype)


def fused(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    *tensors, weight, bias, dtype = inputs
    return residual_norm(*tensors, weight=weight, bias=bias, eps=EPS, dtype=dtype, **options)


NAMES = ("dr", "dbranch", "dbranch_bias", "dweight", "dbias")


def differentiate(
    function: Any, inputs: Inputs, dr_out: Tensor, dy: Tensor, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out, y = function(*leaves, dtype, **options)
    given = {name: x for name, x in zip(NAMES, leaves, strict=True) if x is not None}
    upstream = [dr_out.to(out.dtype), dy.to(y.dtype)]
    grads = torch.autograd.grad([out, y], list(given.values()), upstream)
    return {"out": out.detach(), "y": y.detach(), **dict(zip(given, grads, strict=True))}


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Of stream, and of branch and y.
DTYPES = [(FP32, FP32), (FP32, FP16), (FP16, FP16), (FP32, BF16), (BF16, BF16)]
# One row, tiles with a masked row, a chunk alone, two and three of them, odd widths.
SHAPES = [
    ((1,), 64),
    ((7,), 48),
    ((3,), 200),
    ((2, 2), 384),
    ((3,), 1280),
    pytest.param((2,), 768, marks=pytest.mark.slow),
    pytest.param((3,), 1024, marks=pytest.mark.slow),
    pytest.param((3,), 2050, marks=pytest.mark.slow),
    pytest.param((197,), 64, marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "has", ["branch bias", pytest.param("branch", marks=pytest.mark.slow), "nothing"]
)
@pytest.mark.parametrize(("stream", "dtype"), DTYPES)
@pytest.mark.parametrize(("leading", "D"), SHAPES)
def test_results_and_gradients_against_fp64(
    leading: tuple[int, ...],
    D: int,
    stream: torch.dtype,
    dtype: torch.dtype,
    has: str,
    backend: Any,
    device: torch.device,
) -> None:
    skip_unless_interpreted(backend, device, stream, dtype)
    inputs = inputs_of(leading, D, stream, dtype, has=has, device=device)
    dr_out = randn(*leading, D, device=device, dtype=stream, seed=5)
    dy = randn(*leading, D, device=device, dtype=dtype, seed=6)
    found = differentiate(fused, inputs, dr_out, dy, dtype, backend=backend)
    eager = differentiate(naive, inputs, dr_out, dy, dtype)
    ref64 = differentiate(naive, inputs.double(), dr_out, dy, torch.float64)
    for name, value in found.items():
        assert_within_budget(value, eager[name], ref64[name], name=name)
    assert found["y"].is_contiguous()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("stream", "dtype"), [(FP32, FP16), (FP16, FP16), (BF16, BF16)])
def test_what_the_backward_emits(
    stream: torch.dtype, dtype: torch.dtype, backend: Any, device: torch.device
) -> None:
    """Y again by the same formula; without dr two sums; without an upstream gradient of r_out."""
    skip_unless_interpreted(backend, device, stream, dtype)
    x = inputs_of((3,), 200, stream, dtype, device=device)
    out, y, mean, rstd = op.residual_norm_fwd(*x, EPS, dtype, backend)
    assert mean.dtype == rstd.dtype == FP32
    dr_out = randn(3, 200, device=device, dtype=stream, seed=5)
    dy = randn(3, 200, device=device, dtype=dtype, seed=6)
    saved = (out, mean, rstd, x.weight, x.bias)
    dr, again, sums = op.residual_norm_bwd(dy, dr_out, *saved, True, True, backend)
    # PyTorch forms the product with rstd in another order.
    torch.testing.assert_close(again.float(), y.float(), atol=1e-6, rtol=torch.finfo(dtype).eps)
    assert sums.shape == (3, 200)
    no_dr, same, two = op.residual_norm_bwd(dy, None, *saved, False, True, backend)
    assert no_dr.numel() == 0
    assert torch.equal(same, again)
    assert torch.equal(two, sums[:2])
    alone, no_y, _ = op.residual_norm_bwd(dy, None, *saved, True, False, backend)
    assert no_y.numel() == 0
    error = (dr.double() - (alone.double() + dr_out.double())).abs()
    # Each was rounded once.
    assert (error <= torch.finfo(stream).eps / 2 * (alone.abs() + dr.abs()) + 1e-6).all()


def test_the_norm_reads_the_rounded_stream(backend: Any, device: torch.device) -> None:
    """The statistics that the backward gets are those of what it reads."""
    x = inputs_of((2,), 48, FP16, FP16, device=device)
    out, _, mean, rstd = op.residual_norm_fwd(*x, EPS, FP16, backend)
    rounded = out.double()
    torch.testing.assert_close(mean.double(), rounded.mean(-1), rtol=1e-6, atol=1e-6)
    var = rounded.var(-1, unbiased=False)
    torch.testing.assert_close(rstd.double(), (var + EPS).rsqrt(), rtol=1e-6, atol=0)
    # And not those of the sum before it is rounded.
    exact = x.r.double() + x.branch.double() + x.branch_bias.double()  # type: ignore[union-attr]
    assert ((exact.mean(-1) - rounded.mean(-1)).abs() > 1e-5).any()


def test_values_by_hand(backend: Any, device: torch.device) -> None:
    """The row 1, 3 has mean 2 and variance 1; eps 3 makes the deviation 2."""
    r = torch.tensor([[0.0, 1.0]], device=device)
    branch, branch_bias = torch.ones_like(r), torch.tensor([0.0, 1.0], device=device)
    weight, bias = (
        torch.tensor([2.0, 4.0], device=device),
        torch.tensor([10.0, 20.0], device=device),
    )
    out, y = residual_norm(
        r, branch, branch_bias, weight=weight, bias=bias, eps=3.0, backend=backend
    )
    assert out.tolist() == [[1, 3]]
    torch.testing.assert_close(y, torch.tensor([[9.0, 22.0]], device=device))


def test_without_a_branch_the_stream_is_the_input(backend: Any, device: torch.device) -> None:
    x = inputs_of((3,), 16, has="nothing", device=device)
    out, y = fused(*x, FP32, backend=backend)
    assert out is x.r
    assert y.dtype == FP32
    _, half = fused(*x, FP16, backend=backend)
    assert half.dtype == FP16
    assert torch.equal(half, y.half())


def test_dtype_of_y(device: torch.device) -> None:
    x = inputs_of((2,), 16, FP32, BF16, device=device)
    call = partial(residual_norm, weight=x.weight, bias=x.bias)
    assert [t.dtype for t in call(x.r, x.branch)] == [FP32, BF16]
    assert call(x.r, x.branch, dtype=FP32)[1].dtype == FP32
    assert call(x.r, dtype=BF16)[1].dtype == BF16


def test_gradcheck() -> None:
    x = inputs_of((2, 3), 5).double()
    leaves = [t.requires_grad_() for t in x if t is not None]
    assert torch.autograd.gradcheck(lambda *a: fused(*a, torch.float64), leaves)
    alone = [leaves[0], *leaves[3:]]
    call = lambda r, w, b: residual_norm(r, weight=w, bias=b)[1]  # noqa: E731
    assert torch.autograd.gradcheck(call, alone)


@pytest.mark.parametrize("wanted", range(5))
def test_gradients_of_some_inputs_alone(wanted: int, backend: Any) -> None:
    x = inputs_of((3,), 16)
    dr_out, dy = randn(3, 16, seed=5), randn(3, 16, seed=6)
    every = differentiate(fused, x, dr_out, dy, FP32, backend=backend)
    leaves = [t.detach() for t in x]  # type: ignore[union-attr]
    leaves[wanted].requires_grad_()
    out, y = fused(*leaves, FP32, backend=backend)
    (found,) = torch.autograd.grad([out, y], leaves[wanted], [dr_out, dy])
    assert torch.equal(found, every[NAMES[wanted]])


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_may_be_unused(used: int, backend: Any) -> None:
    x = inputs_of((3,), 16)
    leaves = [t.detach().requires_grad_() for t in x]  # type: ignore[union-attr]

    def grads(function: Any, **options: Any) -> tuple[Tensor, ...]:
        result = function(*leaves, FP32, **options)[used]
        upstream = randn(3, 16, seed=5)
        return torch.autograd.grad(result, leaves, upstream, materialize_grads=True)

    found, expected = grads(fused, backend=backend), grads(naive)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_strided_inputs_and_gradients(backend: Any, device: torch.device) -> None:
    """Rows with gaps are read in place; upstream gradients of any layout are copied."""
    wide = randn(4, 6, 96, device=device)
    for r, branch in (
        (wide[:, 0, 48:], wide[:, 1, :48]),
        (wide[..., :48], wide[..., 48:].contiguous()),
        (wide[0, 0, :48], wide[0, 1, 48:]),
    ):
        D = r.shape[-1]
        x = inputs_of((1,), D, device=device)._replace(r=r, branch=branch)
        dy = torch.ones((), device=device).expand_as(r)
        dr_out = randn(*reversed(r.shape), device=device).permute(*reversed(range(r.ndim)))
        found = differentiate(fused, x, dr_out, dy, FP32, backend=backend)
        expected = differentiate(naive, x, dr_out, dy, FP32)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_rows(backend: Any, device: torch.device) -> None:
    x = inputs_of((3, 0), 8, device=device)
    assert x.branch is not None
    found = differentiate(fused, x, x.branch, x.branch, FP32, backend=backend)
    assert found["out"].shape == found["y"].shape == found["dr"].shape == (3, 0, 8)
    assert not any(found[name].any() for name in ("dbranch_bias", "dweight", "dbias"))


@needs_triton
@pytest.mark.usefixtures("poison")
def test_two_runs_are_bitwise_equal_and_programs_have_many_tiles(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """On a small device a part of the columns' sums has many rows."""
    kernel = importlib.import_module("maect_fast.kernels.residual_norm.triton_kernel")
    x = inputs_of((9,), 48, device=device)
    dr_out, dy = randn(9, 48, device=device, seed=5), randn(9, 48, device=device, seed=6)
    many = differentiate(fused, x, dr_out, dy, FP32, backend="triton")
    monkeypatch.setattr(kernel, "num_multiprocessors", lambda _: 1)
    monkeypatch.setattr(kernel, "WARPS", 2)
    first, second = (differentiate(fused, x, dr_out, dy, FP32, backend="triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name])
        torch.testing.assert_close(value, many[name])
        assert torch.equal(value, many[name]) or name in NAMES[2:]


@needs_triton
def test_chunks_hold_every_width() -> None:
    """Up to the largest that the op admits, in at most three."""
    kernel = importlib.import_module("maect_fast.kernels.residual_norm.triton_kernel")
    for table in (kernel.FORWARD, kernel.FORWARD_INT8, kernel.BACKWARD, kernel.BACKWARD_FP32):
        assert max(table) == op.MAX_FEATURES
        for D in range(1, op.MAX_FEATURES + 1):
            row = kernel.launch_config(table, D)
            assert -(-D // row.blocks["BLOCK_D"]) <= 3
        assert kernel.launch_config(table, 1024).label == "up to 1024"
        assert kernel.launch_config(table, 1280).label == "up to 1536"


# In int8.


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("has", ["", "branch", "branch bias"])
@pytest.mark.parametrize("stream", [FP32, FP16, BF16])
@pytest.mark.parametrize(
    ("leading", "D"),
    [
        ((1,), 64),
        ((7,), 384),
        ((2, 3), 200),
        ((5,), 1024),
        ((3,), 1280),
        pytest.param((197,), 384, marks=pytest.mark.slow),
        pytest.param((257,), 1280, marks=pytest.mark.slow),
    ],
)
def test_int8_against_fp64(
    leading: tuple[int, ...],
    D: int,
    stream: torch.dtype,
    has: str,
    backend: Any,
    device: torch.device,
) -> None:
    skip_unless_interpreted(backend, device, stream)
    x = inputs_of(leading, D, stream, stream, has=has, device=device)
    weight, bias = x.weight, x.bias
    columns: Any = {"weight": weight, "bias": bias, "backend": backend}
    found, y, scale = residual_norm_int8(*x[:3], **columns)
    # The same stream, and its norm before it is rounded to anything else.
    out, _ = residual_norm(*x[:3], **columns)
    assert torch.equal(found, out)
    assert (found is x.r) == (x.branch is None)
    eager = F.layer_norm(out.float(), [D], weight, bias, EPS)
    exact = F.layer_norm(out.double(), [D], weight.double(), bias.double(), EPS)
    assert_quantized(y, scale, eager, exact)
    again = residual_norm_int8(*x[:3], **columns)
    assert torch.equal(again[1], y)
    assert torch.equal(again[2], scale)


def test_int8_of_strided_rows_and_of_none(backend: Any, device: torch.device) -> None:
    wide, weight = randn(5, 96, device=device), randn(48, device=device, seed=1)
    columns: Any = {"weight": weight, "bias": weight, "backend": backend}
    for r, branch in ((wide[:, :48], wide[:, 48:]), (wide[::2, 16:64], None), (wide[3, :48], None)):
        copy = None if branch is None else branch.clone()
        found = residual_norm_int8(r, branch, **columns)
        expected = residual_norm_int8(r.clone(), copy, **columns)
        assert all(map(torch.equal, found, expected))
    _, y, scale = residual_norm_int8(wide[:0, :48], **columns)
    assert (y.shape, scale.shape) == ((0, 48), (0,))


def test_int8_of_special_rows(backend: Any, device: torch.device) -> None:
    """NaN and infinity show in the scale; a row of zeros is zeros."""
    r = randn(4, 48, device=device)
    r[0, 3], r[1, 5], r[2] = float("nan"), float("inf"), 1.0
    zero = torch.zeros(48, device=device)
    one = zero + 1
    _, y, scale = residual_norm_int8(r, weight=one, bias=zero, backend=backend)
    assert scale.isfinite().tolist() == [False, False, True, True]
    assert not y[2].any()
    assert y[3].any()


# What runs, and what it allocates.


@pytest.mark.parametrize(
    ("arch", "dtype", "D", "is_triton"),
    [
        (90, FP32, 8, True),
        (80, BF16, 3072, True),
        (80, BF16, 3073, False),
        (75, FP16, 8, False),
        (90, torch.float64, 8, False),
    ],
)
def test_auto_on_cuda_is_triton(
    arch: int, dtype: torch.dtype, D: int, is_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "sm_arch", lambda device: arch)
    with FakeTensorMode():
        r, weight = (torch.empty(*s, D, device="cuda", dtype=dtype) for s in ((2,), ()))
        assert op._is_triton("auto", r, None, None, weight, dtype=dtype) == is_triton
        assert not op._is_triton("auto", r, r, None, weight, dtype=torch.float64)
        assert not op._is_triton("auto", torch.empty(2, D), None, dtype=dtype)


@needs_triton
def test_triton_launches_on_the_inputs_device_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may not be the current one."""
    kernel = importlib.import_module("maect_fast.kernels.residual_norm.triton_kernel")
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
    x = inputs_of((2,), 8)
    assert x.branch is not None
    differentiate(fused, x, x.branch, x.branch, FP32, backend="triton")
    assert devices == [torch.device("cpu")] * 2
    assert launched == ["fwd_kernel", "bwd_kernel"]


class NoKernel:
    """Stands for a kernel where only what a launcher allocates counts."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


@needs_triton
def test_triton_allocates_results_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-L/16, batch 256: no fp32 copy of the stream; statistics and 7 MB of parts."""
    kernel = importlib.import_module("maect_fast.kernels.residual_norm.triton_kernel")
    for name in ("fwd_kernel", "bwd_kernel"):
        monkeypatch.setattr(kernel, name, NoKernel())
    M, D = 256 * 197, 1024
    r = torch.empty(M, D, dtype=BF16, device="meta")
    row, column = torch.empty(M, device="meta"), torch.empty(D, device="meta")
    parameters = (column, column)
    saved = (r, row, row, *parameters)
    for call, num_results in (
        (lambda: kernel.forward(r, r, column, *parameters, EPS, BF16), 2),
        (lambda: kernel.forward(r, None, None, *parameters, EPS, BF16), 1),
        (lambda: kernel.forward(r, r, column, *parameters, EPS, torch.int8), 1.5),
        (lambda: kernel.backward(r, r, *saved, True, True), 2),
        (lambda: kernel.backward(r, None, *saved, False, True), 1),
    ):
        with Allocated() as allocated:  # type: ignore[no-untyped-call]
            call()  # type: ignore[no-untyped-call]
        size = num_results * 2 * M * D
        assert size <= allocated.num_bytes <= size + 7 * 2**20


def test_no_second_derivative(backend: Any) -> None:
    r = randn(2, 8).requires_grad_()
    _, y = residual_norm(r, weight=torch.ones(8), bias=torch.zeros(8), backend=backend)
    upstream = torch.ones_like(y).requires_grad_()
    (dr,) = torch.autograd.grad(y, r, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dr.sum().backward()  # type: ignore[no-untyped-call]


# Errors.

R, W = torch.zeros(2, 3, 8), torch.zeros(8)


def call(
    r: Tensor = R,
    branch: Tensor | None = R,
    branch_bias: Tensor | None = None,
    weight: Tensor = W,
    **options: Any,
) -> Any:
    return residual_norm(r, branch, branch_bias, weight=weight, bias=W.to(r.dtype), **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r": R.long()}, TypeError, "r: expected torch.float16"),
        ({"r": R[0, 0, 0], "branch": None}, ValueError, "r: expected at least one dimension"),
        ({"r": R.mT}, ValueError, "r: expected a last stride of 1"),
        ({"r": R.transpose(0, 1)}, ValueError, "r: expected rows of one stride"),
        ({"branch": R[:1]}, ValueError, r"branch: expected shape \[2, 3, 8\], got \[1, 3, 8\]"),
        ({"branch": R.long()}, TypeError, "branch: expected torch.float16"),
        ({"branch": R.to("meta")}, ValueError, "branch: expected cpu, got meta"),
        ({"branch": None, "branch_bias": W}, ValueError, "branch: expected one, with branch_bias"),
        ({"branch_bias": W[:4]}, ValueError, r"branch_bias: expected shape \[8\], got \[4\]"),
        ({"weight": W[:4]}, ValueError, r"weight: expected shape \[8\], got \[4\]"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected a float, got torch.int32"),
        ({"backend": "cpp"}, RuntimeError, "residual_norm: backend 'cpp' is not built here"),
        ({"backend": "cuda"}, ValueError, "residual_norm: expected backend to be one of"),
        (
            {"r": R.double(), "backend": "triton"},
            RuntimeError,
            "residual_norm: backend 'triton' takes .*got float64",
        ),
        (
            {"dtype": torch.float64, "backend": "triton"},
            RuntimeError,
            "'triton' makes float32, bfloat16 and float16, got float64",
        ),
        (
            {"r": torch.zeros(1, 3073), "branch": None, "backend": "triton"},
            RuntimeError,
            "'triton' takes up to 3072 features, got 3073",
        ),
        (
            {"r": R.to("meta"), "backend": "triton"},
            RuntimeError,
            "'triton' runs on CUDA, got a tensor on meta",
        ),
    ],
)
def test_errors(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**arguments)


# Registration.


@pytest.mark.parametrize("has", ["branch bias", "nothing"])
def test_opcheck(has: str, backend: Any, device: torch.device) -> None:
    x = inputs_of((2, 3), 8, FP32, FP16, has=has, device=device)
    torch.library.opcheck(op.residual_norm_fwd, (*x, EPS, FP16, backend))
    torch.library.opcheck(op.residual_norm_int8, (*x, EPS, backend))
    _, y, mean, rstd = op.residual_norm_fwd(*x, EPS, FP16, backend)
    is_first = has == "nothing"
    dr_out = None if is_first else x.r
    saved = (x.r, mean, rstd, x.weight, x.bias)
    arguments = (y, dr_out, *saved, not is_first, is_first, backend)
    torch.library.opcheck(op.residual_norm_bwd, arguments)


@slow_if_interpreted
# Dynamo instantiates torch.autograd.Function, of which torch itself warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks(backend: Any, device: torch.device) -> None:
    """With and without a branch, and with a smaller last batch."""

    def two(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, y = fused(*inputs, **options)
        _, again = residual_norm(out, weight=inputs[3], bias=inputs[4], backend=backend)
        return out, y + again

    torch.compiler.reset()
    compiled = torch.compile(two, fullgraph=True, backend="aot_eager")
    for B in (4, 4, 3):
        x = inputs_of((B, 3), 8, device=device)
        dr_out, dy = randn(B, 3, 8, device=device, seed=5), randn(B, 3, 8, device=device, seed=6)
        found = differentiate(compiled, x, dr_out, dy, FP32, backend=backend)
        expected = differentiate(two, x, dr_out, dy, FP32, backend=backend)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    x = inputs_of((4, 3), 8)
    assert x.branch is not None
    compiled = torch.compile(fused, fullgraph=True)
    found, expected = (differentiate(f, x, x.r, x.branch, FP32) for f in (compiled, fused))
    torch.testing.assert_close(found, expected)


def test_autocast_changes_nothing(device: torch.device) -> None:
    x = inputs_of((3,), 8, BF16, BF16, device=device)
    dy = randn(3, 8, device=device, seed=5)
    expected = differentiate(fused, x, dy, dy, BF16)
    with torch.autocast(device.type, torch.bfloat16):
        found = differentiate(fused, x, dy, dy, BF16)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
