import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from allocation import Allocated, NoSync, PeakMemory
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from maect_fast.kernels import attention, masked_attention
from maect_fast.kernels._common import gpu, launch
from maect_fast.kernels._common.plan import Plans
from maect_fast.kernels.masked_attention import op, padded, reference
from maect_fast.testing import assert_within_budget, random_qkv

pytestmark = pytest.mark.usefixtures("poison")

NAN, INF = float("nan"), float("inf")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
TRITON = pytest.param("triton", marks=needs_triton)
KERNELS = ["auto", TRITON]
BACKENDS = [*KERNELS, "reference"]
MODES = ["dense", "seqlens", "keep", "key_mask", "seqlens+key_mask", "keep+key_mask", "cu_seqlens"]
NAMES = ["keep", "seqlens", "cu_seqlens", "max_seqlen", "key_mask"]
SCALE = 0.3


def make_mode(mode: str, B: int, N: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Arguments of a mode; the first sample is whole, the second has no tokens or no keys."""
    generator = torch.Generator().manual_seed(N)
    made: dict[str, Any] = {}
    if "seqlens" in mode.split("+"):
        # Beyond both ends, so that the clamp is seen.
        lengths = [N + 3, -300, *torch.randint(1, max(2, N), (B,), generator=generator).tolist()]
        made["seqlens"] = torch.tensor(lengths[:B], device=device)
    if "keep" in mode:
        orders = [torch.randperm(N, generator=generator) for _ in range(B)]
        kept = torch.stack(orders)[:, : max(1, N // 4)]
        made["keep"] = kept.to(device, torch.int32 if "+" in mode else torch.int64)
    if "key_mask" in mode:
        key_mask = torch.rand(B, N, generator=generator) < 0.6
        key_mask[0], key_mask[1] = True, False
        made["key_mask"] = key_mask.to(device)
    if mode == "cu_seqlens":
        # A whole segment, an empty one, the others shorter, and rows that belong to none.
        lengths = [N, 0, *torch.randint(1, N + 1, (B,), generator=generator).tolist()][:B]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        made["cu_seqlens"] = bounds.to(device, torch.int32)
        made["max_seqlen"] = N + 2
    return made


def make_qkv(mode: str, B: int, N: int, **options: Any) -> Tensor:
    leading = (B * N,) if mode == "cu_seqlens" else (B, N)
    return random_qkv(*leading, **{"heads": 2, "dim": 16} | options)


def modes_of(arguments: dict[str, Any], scale: float = SCALE) -> tuple[Any, ...]:
    return *(arguments.get(name) for name in NAMES), scale


def forward_arguments(arguments: dict[str, Any], backend: str = "auto") -> tuple[Any, ...]:
    """With lse."""
    return *modes_of(arguments), True, backend


def backward_arguments(arguments: dict[str, Any], backend: str = "auto") -> tuple[Any, ...]:
    return *modes_of(arguments), backend


def run(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], **arguments: Any
) -> tuple[Tensor, ...]:
    """Output and gradients, for an upstream gradient that depends on nothing but the shape."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = function(*leaves, **arguments)
    return o.detach(), *torch.autograd.grad(o, leaves, upstream(o))


def upstream(o: Tensor) -> Tensor:
    return torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).to(o)


def run_in_orders(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], **arguments: Any
) -> list[tuple[Tensor, ...]]:
    """`run`, then four times with permuted features: the same numbers from other sums."""
    runs = [run(function, inputs, **arguments)]
    D = inputs[0].shape[-1]
    for seed in range(4):
        order = torch.randperm(D, generator=torch.Generator().manual_seed(seed))
        order, back = (x.to(inputs[0].device) for x in (order, order.argsort()))
        leaves = [x.detach()[..., order].requires_grad_() for x in inputs]
        o = function(*leaves, **arguments)
        gradients = torch.autograd.grad(o, leaves, upstream(o)[..., order])
        runs.append(tuple(x.detach()[..., back] for x in (o, *gradients)))
    return runs


def assert_matches_reference(
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    backend: str = "auto",
    **arguments: Any,
) -> None:
    results = run(function, inputs, backend=backend, **arguments)
    eager = zip(*run_in_orders(function, inputs, backend="reference", **arguments), strict=True)
    ref64 = run(function, tuple(x.double() for x in inputs), backend="reference", **arguments)
    names = ["o", *(f"gradient {i}" for i in range(len(inputs)))]
    for name, kernel, same_dtype, exact in zip(names, results, eager, ref64, strict=True):
        assert_within_budget(kernel, same_dtype, exact, name=name)


def outside(mode: str, arguments: dict[str, Any], rows: tuple[int, ...]) -> Tensor:
    """True where a row of the input belongs to no sample."""
    result = torch.zeros(rows, dtype=torch.bool)
    if "cu_seqlens" in arguments:
        result[arguments["cu_seqlens"][-1] :] = True
    elif "keep" in arguments:
        result = torch.ones(rows, dtype=torch.bool)
        result.scatter_(1, arguments["keep"].cpu().long(), False)
    elif "seqlens" in arguments:
        result = torch.arange(rows[1]) >= arguments["seqlens"].cpu()[:, None]
    return result


def dtypes(backend: str, device: torch.device) -> list[torch.dtype]:
    """Halves for Triton's kernels on CUDA, which take no others; else fp32."""
    is_compiled = backend == "triton" and device.type == "cuda"
    return [torch.bfloat16, torch.float16] if is_compiled else [torch.float32]


def skip_unless_interpreted(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    if backend != "triton":
        return
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bf16 arithmetic")
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("on CUDA the Triton kernels take halves")


def use_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "auto" run on the CPU what it runs elsewhere without Triton."""
    monkeypatch.setattr(padded, "_sdpa_forward", padded._math_forward)
    monkeypatch.setattr(padded, "_sdpa_backward", padded._math_backward)


def triton_kernel() -> Any:
    return importlib.import_module("maect_fast.kernels.masked_attention.triton_kernel")


def use_rows(monkeypatch: pytest.MonkeyPatch, **rows: Any) -> None:
    """Launch by these rows of the tables, whatever the sizes."""
    kernel = triton_kernel()
    choose = kernel.launch_config

    def launch_config(table: Any, *sizes: Any) -> Any:
        forced = [row for name, row in rows.items() if table is getattr(kernel, name)]
        return forced[0] if forced else choose(table, *sizes)

    monkeypatch.setattr(kernel, "launch_config", launch_config)
    for plans in ("PACKED_FORWARD", "PACKED_BACKWARD", "FORWARD", "BACKWARD"):
        monkeypatch.setattr(op, plans, Plans())


def use_long_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let short sequences take the forms of long ones."""
    kernel = triton_kernel()
    streams = next(row for row in kernel.FORWARD if row.blocks.get("BLOCK_N") == 64)
    long = next(row for row in kernel.BACKWARD if "KEYS_N" in row.blocks and row.sizes["M"] > 1)
    use_rows(monkeypatch, FORWARD=streams, BACKWARD=long)


LONG = pytest.param("two-phase", marks=needs_triton)


@pytest.fixture(params=["sdpa", "math", "reference", TRITON, LONG])
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> str:
    """The backend of the CPU's kernels, of plain products (forced), the definition, Triton."""
    if request.param in ("sdpa", "math", "reference"):
        if request.param == "math":
            use_products(monkeypatch)
        return "reference" if request.param == "reference" else "auto"
    if request.param != "triton":
        use_long_forms(monkeypatch)
    return "triton"


# Numbers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, None])
def test_hand_made_numbers(backend: str, scale: float | None, device: torch.device) -> None:
    log3 = math.log(3) * (1 if scale == 1.0 else math.sqrt(8))
    q = [[1.0, 0.0], [0.0, 1.0]]
    k = [[log3, 0.0], [0.0, 0.0]]
    v = [[4.0, 0.0], [0.0, 8.0]]
    qkv = torch.tensor([q, k, v], device=device).transpose(0, 1)[None, :, :, None]
    qkv = nn.functional.pad(qkv, (0, 6))
    # Row 0 has weights 3/4 and 1/4, row 1 equal ones.
    expected = torch.tensor([[3.0, 2.0], [2.0, 4.0]], device=device)[None, :, None]
    mask = torch.tensor([[False, True]], device=device)
    masked = torch.tensor([0.0, 8.0], device=device).expand(1, 2, 1, 2)
    arguments: dict[str, Any] = {"scale": scale, "backend": backend}
    for dtype in dtypes(backend, device):
        result = masked_attention(qkv.to(dtype), **arguments)
        torch.testing.assert_close(result[..., :2], expected.to(dtype))
        assert not result[..., 2:].any()
        result = masked_attention(qkv.to(dtype), key_mask=mask, **arguments)
        torch.testing.assert_close(result[..., :2], masked.to(dtype))


def test_lse_by_hand() -> None:
    qkv = torch.zeros(2, 3, 3, 1, 8)
    qkv[:, :, :2] = 1  # every score is 8 * scale
    seqlens = torch.tensor([3, 2])
    key_mask = torch.tensor([[True, True, True], [False, False, True]])
    expected = torch.tensor([[[2 + math.log(3)] * 3], [[-INF] * 3]])
    modes = (None, seqlens, None, None, key_mask, 0.25)
    torch.testing.assert_close(reference.masked_attention(qkv, *modes)[1], expected)
    torch.testing.assert_close(op.masked_attention_fwd(qkv, *modes, True, "auto")[1], expected)


def sizes_and_modes() -> Iterator[Any]:
    """Interpreted kernels take long sequences in one mode, in the others slowly."""
    for N in (1, 50, 65, 197, 257):
        for mode in MODES:
            yield "auto", N, mode
            takes_long = N > 65 and mode != "seqlens+key_mask"
            marks = [needs_triton, *([pytest.mark.slow] if takes_long else [])]
            yield pytest.param("triton", N, mode, marks=marks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "N", "mode"), list(sizes_and_modes()))
def test_matches_reference(
    backend: str, N: int, mode: str, dtype: torch.dtype, device: torch.device
) -> None:
    skip_unless_interpreted(backend, dtype, device)
    qkv = make_qkv(mode, 3, N, dtype=dtype, device=device)
    arguments = make_mode(mode, 3, N, device) | {"scale": SCALE}
    assert_matches_reference(masked_attention, (qkv,), backend, **arguments)


SLOW_MODES = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("seqlens", "key_mask")]
DIMS = [
    8,
    24,
    80,
    112,
    *(pytest.param(d, marks=pytest.mark.slow) for d in (16, 64, 72, 88, 96, 128)),
]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("backend", KERNELS)
def test_head_dims_with_the_default_scale(backend: Any, dim: int, device: torch.device) -> None:
    for dtype in dtypes(backend, device):
        qkv = make_qkv("dense", 2, 17, dim=dim, heads=3, device=device, dtype=dtype)
        assert_matches_reference(masked_attention, (qkv,), backend)
        expected = masked_attention(qkv, scale=dim**-0.5, backend=backend)
        assert torch.equal(masked_attention(qkv, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [1, 33])
@pytest.mark.parametrize("mode", MODES)
def test_kernels_of_other_devices_match_reference(
    mode: str, N: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_products(monkeypatch)
    qkv = make_qkv(mode, 3, N, dtype=dtype)
    assert_matches_reference(masked_attention, (qkv,), scale=SCALE, **make_mode(mode, 3, N))


def test_one_key_leaves_queries_and_keys_no_gradient(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Its probability is 1 whatever they are: dp - delta must cancel to the last bit."""
    use_products(monkeypatch)
    for dtype in (torch.float32, torch.float64):
        qkv = make_qkv("dense", 3, 1, dim=80, dtype=dtype, device=device)
        _, gradient = run(masked_attention, (qkv,))
        assert not gradient[:, :, :2].any()
        assert gradient[:, :, 2].all()


def test_autocast_changes_nothing(implementation: str, device: torch.device) -> None:
    for dtype in dtypes(implementation, device):
        qkv = make_qkv("dense", 2, 5, device=device, dtype=dtype)
        expected = run(masked_attention, (qkv,), backend=implementation)
        is_on = implementation != "reference"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_on):
            result = run(masked_attention, (qkv,), backend=implementation)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", KERNELS)
def test_separate_equals_packed(backend: str, mode: str, device: torch.device) -> None:
    # Where lengths bound the queries the two differ, and so do rows beyond them.
    arguments = make_mode(mode, 3, 9, device) | {"scale": SCALE, "backend": backend}
    for dtype in dtypes(backend, device):
        qkv = make_qkv(mode, 3, 9, device=device, dtype=dtype)
        o, dqkv = run(masked_attention, (qkv,), **arguments)
        o3, *gradients = run(attention, qkv.unbind(-3), **arguments)
        if "seqlens" in mode.split("+"):
            padding = outside(mode, arguments, (3, 9)).to(device)
            assert padding.any()
            assert o3[padding].any()
            assert torch.equal(o[~padding], o3[~padding])
        else:
            assert torch.equal(o, o3)
            assert torch.equal(dqkv, torch.stack(gradients, -3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["dense", "seqlens+key_mask", *SLOW_MODES])
@pytest.mark.parametrize(("M", "N"), [(1, 65), (1, 2), (7, 50), (50, 7)])
@pytest.mark.parametrize("backend", KERNELS)
def test_other_numbers_of_queries(
    backend: str, M: int, N: int, mode: str, dtype: torch.dtype, device: torch.device
) -> None:
    skip_unless_interpreted(backend, dtype, device)
    q = random_qkv(3, M, heads=2, dim=16, dtype=dtype, device=device, seed=1)[:, :, 0]
    _, k, v = random_qkv(3, N, heads=2, dim=16, dtype=dtype, device=device).unbind(2)
    arguments = make_mode(mode, 3, N, device) | {"scale": SCALE}
    assert_matches_reference(attention, (q, k, v), backend, **arguments)


@pytest.mark.parametrize("mode", ["dense", "key_mask"])
def test_class_token_query_is_the_first_row(mode: str, device: torch.device) -> None:
    qkv = make_qkv(mode, 3, 50, device=device, dtype=torch.float64)
    arguments = make_mode(mode, 3, 50, device)

    def class_token(x: Tensor, **modes: Any) -> Tensor:
        return attention(x[:, :1, 0], x[:, :, 1], x[:, :, 2], **modes)

    def first_row(x: Tensor, **modes: Any) -> Tensor:
        return masked_attention(x, **modes)[:, :1]

    expected = run(first_row, (qkv,), **arguments)
    torch.testing.assert_close(run(class_token, (qkv,), **arguments), expected)


def test_dense_on_cpu_is_sdpa_bit_for_bit() -> None:
    qkv = make_qkv("dense", 2, 65, heads=3)

    def sdpa(x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE).transpose(1, 2)

    for ours, theirs in zip(
        run(masked_attention, (qkv,), scale=SCALE), run(sdpa, (qkv,)), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str, implementation: str, device: torch.device) -> None:
    if implementation == "triton":
        pytest.skip("the Triton kernels have no fp64")
    options: dict[str, Any] = {"dtype": torch.float64, "device": device}
    qkv = make_qkv(mode, 3, 3, heads=1, dim=2, **options).requires_grad_()
    arguments = make_mode(mode, 3, 3, device) | {"scale": SCALE, "backend": implementation}
    assert torch.autograd.gradcheck(lambda x: masked_attention(x, **arguments), qkv)
    separate = [x.detach().clone().requires_grad_() for x in qkv.unbind(-3)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **arguments), separate)


# Edge cases


@pytest.mark.parametrize("mode", MODES[1:])
def test_what_takes_no_part_goes_nowhere(
    mode: str, implementation: str, device: torch.device
) -> None:
    for dtype in dtypes(implementation, device):
        check_what_takes_no_part(mode, implementation, dtype, device)


def check_what_takes_no_part(
    mode: str, implementation: str, dtype: torch.dtype, device: torch.device
) -> None:
    B, N = 4, 9
    clean = make_qkv(mode, B, N, device=device, dtype=dtype)
    arguments = make_mode(mode, B, N, device) | {"scale": SCALE, "backend": implementation}
    rows = outside(mode, arguments, clean.shape[:-3]).to(device)
    unused = rows | ~arguments["key_mask"] if "key_mask" in arguments else rows
    assert unused.any()
    garbage = torch.tensor([NAN, INF, -INF, 1e30], device=device, dtype=dtype).repeat(4)
    dirty = clean.clone()
    dirty[rows] = garbage
    dirty[..., 1:, :, :][unused] = garbage
    do = torch.randn_like(clean.select(-3, 0))
    do[rows] = NAN

    results = []
    for x in (clean, dirty):
        x.requires_grad_()
        o = masked_attention(x, **arguments)
        results.append((o.detach(), *torch.autograd.grad(o, x, do)))
    (o_clean, d_clean), (o, d) = results
    assert torch.equal(o, o_clean)
    assert torch.equal(d, d_clean)
    assert o.isfinite().all()
    assert d.isfinite().all()
    assert not o[rows].any()
    assert not d[rows].any()
    assert not d[..., 1:, :, :][unused].any()


@pytest.mark.parametrize("backend", KERNELS)
def test_a_segment_does_not_see_its_neighbours(backend: str, device: torch.device) -> None:
    arguments: dict[str, Any] = {"max_seqlen": 5, "backend": backend}
    arguments["cu_seqlens"] = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    for dtype in dtypes(backend, device):
        qkv = make_qkv("cu_seqlens", 1, 9, device=device, dtype=dtype)
        dirty = qkv.clone()
        dirty[4:] = NAN
        for clean, spoilt in zip(
            run(masked_attention, (qkv,), **arguments),
            run(masked_attention, (dirty,), **arguments),
            strict=True,
        ):
            assert torch.equal(clean[:4], spoilt[:4])
            assert spoilt[4:].isnan().all()


@pytest.mark.parametrize("mode", MODES[1:])
def test_rows_outside_are_zero_beside_spoilt_ones(
    mode: str, implementation: str, device: torch.device
) -> None:
    arguments = make_mode(mode, 4, 9, device)
    for dtype in dtypes(implementation, device):
        qkv = make_qkv(mode, 4, 9, device=device, dtype=dtype)
        rows = outside(mode, arguments, qkv.shape[:-3]).to(device)
        unused = rows | ~arguments["key_mask"] if "key_mask" in arguments else rows
        qkv[~unused] = NAN
        o, d = run(masked_attention, (qkv,), backend=implementation, **arguments)
        assert o.isnan().any()
        assert not o[rows].any()
        assert not d[rows].any()
        assert not d[..., 1:, :, :][unused].any()


@pytest.mark.parametrize("mode", ["seqlens", "key_mask", "keep+key_mask"])
def test_fully_masked_rows(mode: str, implementation: str, device: torch.device) -> None:
    for dtype in dtypes(implementation, device):
        check_fully_masked_rows(mode, implementation, dtype, device)


def check_fully_masked_rows(
    mode: str, implementation: str, dtype: torch.dtype, device: torch.device
) -> None:
    qkv = make_qkv(mode, 3, 6, device=device, dtype=dtype)
    # The second sample has no keys, so its queries do not matter either.
    qkv[1] = NAN
    arguments = make_mode(mode, 3, 6, device)
    leaf = qkv.clone().requires_grad_()
    o = masked_attention(leaf, backend=implementation, **arguments)  # type: ignore[arg-type]
    do = torch.randn_like(o)
    do[1] = NAN
    (d,) = torch.autograd.grad(o, leaf, do)
    assert not o[1].any()
    assert not d[1].any()
    assert d[0].any()
    assert o[0].any()
    if implementation == "reference":
        lse = reference.masked_attention(qkv, *modes_of(arguments))[1]
    else:
        lse = op.masked_attention_fwd(qkv, *forward_arguments(arguments, implementation))[1]
    assert (lse[1] == -INF).all()
    # The rectangle has them, too.
    if "keep" not in arguments:
        o, *gradients = run(attention, qkv.unbind(2), backend=implementation, **arguments)
        assert not any(x[1].any() for x in (o, *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["dense", "seqlens", "key_mask", "seqlens+key_mask"])
@pytest.mark.parametrize("backend", KERNELS)
def test_lse(backend: str, mode: str, dtype: torch.dtype, device: torch.device) -> None:
    skip_unless_interpreted(backend, dtype, device)
    qkv = make_qkv(mode, 3, 65, device=device, dtype=dtype)
    arguments = make_mode(mode, 3, 65, device)
    lse = op.masked_attention_fwd(qkv, *forward_arguments(arguments, backend))[1]
    # Triton's is to base 2, and "auto" takes Triton for halves on CUDA.
    if backend == "triton" or (qkv.is_cuda and qkv.itemsize == 2):
        lse = (lse.double() * math.log(2)).float()
    eager = reference.masked_attention(qkv, *modes_of(arguments))[1]
    exact = reference.masked_attention(qkv.double(), *modes_of(arguments))[1]
    assert lse.dtype == torch.float32
    assert_within_budget(lse, eager, exact)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", KERNELS)
def test_lse_is_stored_for_a_backward_only(
    backend: str, mode: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    qkv = make_qkv(mode, 3, 9, device=device, dtype=dtypes(backend, device)[0])
    arguments = make_mode(mode, 3, 9, device)
    found = op.masked_attention_fwd(qkv, *modes_of(arguments), False, backend)
    assert found[1].numel() == 0
    expected = op.masked_attention_fwd(qkv, *forward_arguments(arguments, backend))
    assert torch.equal(found[0], expected[0])
    saved: list[bool] = []
    real = op.masked_attention_fwd

    def forward(*arguments: Any) -> Any:
        saved.append(arguments[-2])
        return real(*arguments)

    monkeypatch.setattr(op, "masked_attention_fwd", forward)
    masked_attention(qkv, backend=backend, **arguments)  # type: ignore[arg-type]
    masked_attention(qkv.requires_grad_(), backend=backend, **arguments)  # type: ignore[arg-type]
    with torch.no_grad():
        masked_attention(qkv, backend=backend, **arguments)  # type: ignore[arg-type]
    assert saved == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((0, 5), {}),
        ((0, 5), {"seqlens": torch.zeros(0, dtype=torch.int64)}),
        ((0, 5), {"keep": torch.zeros(0, 3, dtype=torch.int64)}),
        ((0, 5), {"key_mask": torch.zeros(0, 5, dtype=torch.bool)}),
        ((2, 5), {"keep": torch.zeros(2, 0, dtype=torch.int64)}),
        ((2, 0), {}),
        ((0,), {"cu_seqlens": torch.tensor([0, 0, 0], dtype=torch.int32), "max_seqlen": 4}),
        ((4,), {"cu_seqlens": torch.tensor([0, 0], dtype=torch.int32), "max_seqlen": 0}),
        ((4,), {"cu_seqlens": torch.tensor([0], dtype=torch.int32), "max_seqlen": 3}),
    ],
)
def test_nothing_in_nothing_out(
    shape: tuple[int, ...], arguments: dict[str, Any], backend: str, device: torch.device
) -> None:
    qkv = random_qkv(*shape, heads=2, dim=8, device=device, dtype=dtypes(backend, device)[0])
    arguments = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in arguments.items()}
    o, d = run(masked_attention, (qkv,), backend=backend, **arguments)
    assert o.shape == (*shape, 2, 8)
    assert d.shape == qkv.shape
    assert not o.any()
    assert not d.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("M", "N"), [(0, 3), (3, 0)])
def test_no_queries_or_no_keys(M: int, N: int, backend: str, device: torch.device) -> None:
    dtype = dtypes(backend, device)[0]
    q, k, v = (torch.randn(2, x, 1, 8, device=device, dtype=dtype) for x in (M, N, N))
    o, *gradients = run(attention, (q, k, v), backend=backend)
    assert o.shape == q.shape
    assert not o.any()
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_zero_length_tail_changes_nothing(backend: str) -> None:
    qkv = make_qkv("cu_seqlens", 2, 8)
    short = torch.tensor([0, 8, 12], dtype=torch.int32)
    long = torch.tensor([0, 8, 12, 12, 12], dtype=torch.int32)
    arguments: dict[str, Any] = {"max_seqlen": 8, "backend": backend}
    expected = run(masked_attention, (qkv,), cu_seqlens=short, **arguments)
    result = run(masked_attention, (qkv,), cu_seqlens=long, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


# Layout


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["3BHND", "every other token", "column slice"])
@pytest.mark.parametrize("mode", ["dense", "keep+key_mask", "seqlens"])
def test_strided_inputs(mode: str, layout: str, backend: str, device: torch.device) -> None:
    qkv = make_qkv(mode, 3, 8, device=device, dtype=dtypes(backend, device)[0])
    if layout == "3BHND":
        view = qkv.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
    elif layout == "every other token":
        view = qkv.repeat_interleave(2, dim=1)[:, ::2]
    else:
        view = nn.functional.pad(qkv, (3, 5))[..., 3:-5]
    assert not view.is_contiguous()
    before = view.clone()
    arguments = make_mode(mode, 3, 8, device) | {"backend": backend}
    (o, d), expected = (
        run(masked_attention, (view,), **arguments),
        run(masked_attention, (qkv,), **arguments),
    )
    torch.testing.assert_close((o, d), expected)
    assert torch.equal(view, before)
    assert o.is_contiguous()


@needs_triton
@pytest.mark.parametrize("blocks", [{"BLOCK_M": 64, "LICM": False}, {"BLOCK_M": 64, "BLOCK_N": 64}])
def test_each_of_q_k_v_may_have_strides_of_its_own(
    blocks: dict[str, int], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Both forward kernels are compiled for one set and for three, and add up the same numbers."""
    kernel = triton_kernel()
    row = next(row for row in kernel.FORWARD if row.blocks == blocks)
    use_rows(monkeypatch, FORWARD=row)
    launched: list[bool] = []
    make = kernel.launch

    def launch(function: Any, *arguments: Any, **options: Any) -> None:
        if "IS_PACKED_QKV" in options:
            launched.append(options["IS_PACKED_QKV"])
        make(function, *arguments, **options)

    monkeypatch.setattr(kernel, "launch", launch)
    qkv = make_qkv("dense", 2, 9, device=device, dtype=dtypes("triton", device)[0])
    q, k, v = qkv.unbind(2)
    # Batches, rows and heads lie differently.
    own = q.contiguous(), k.contiguous(), v.transpose(1, 2).contiguous().transpose(1, 2)
    expected = attention(q, k, v, backend="triton")
    for scattered in ((q, own[1], v), (own[0], k, v), (q, k, own[2]), own):
        assert torch.equal(attention(*scattered, backend="triton"), expected)
    assert launched == [True, False, False, False, False]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", KERNELS)
def test_the_gradient_is_one_contiguous_buffer(
    backend: str, mode: str, device: torch.device
) -> None:
    qkv = make_qkv(mode, 3, 8, device=device, dtype=dtypes(backend, device)[0])
    qkv = qkv.transpose(-3, -2).contiguous().transpose(-3, -2)
    arguments = make_mode(mode, 3, 8, device)
    o, lse = op.masked_attention_fwd(qkv, *forward_arguments(arguments, backend))
    do = torch.ones_like(o)
    dqkv = op.masked_attention_bwd(do, qkv, o, lse, *backward_arguments(arguments, backend))
    assert not qkv.is_contiguous()
    assert dqkv.is_contiguous()
    assert dqkv.shape == qkv.shape


@pytest.mark.parametrize("backend", KERNELS)
def test_an_upstream_gradient_that_is_one_number(backend: str, device: torch.device) -> None:
    """As that of a sum, which has no strides."""
    leaf = make_qkv("dense", 2, 9, device=device, dtype=dtypes(backend, device)[0]).requires_grad_()
    o = masked_attention(leaf, backend=backend)  # type: ignore[arg-type]
    (expected,) = torch.autograd.grad(o, leaf, torch.ones_like(o), retain_graph=True)
    assert torch.equal(torch.autograd.grad(o.sum(), leaf)[0], expected)


# Every argument is honoured


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_argument_is_dropped(backend: str, device: torch.device) -> None:
    qkv = make_qkv("dense", 8, 8, device=device, dtype=dtypes(backend, device)[0])
    arguments: dict[str, dict[str, Any]] = {
        name: make_mode(name, 8, 8, device) for name in ("keep", "seqlens", "key_mask")
    }
    arguments["scale"] = {"scale": SCALE}
    whole = run(masked_attention, (qkv,), backend=backend)
    for name, given in arguments.items():
        for dense, result in zip(
            whole, run(masked_attention, (qkv,), backend=backend, **given), strict=True
        ):
            assert not torch.allclose(dense, result), name
    for mode in ("seqlens", "keep"):
        both = make_mode(f"{mode}+key_mask", 8, 8, device)
        without_mask = {name: x for name, x in both.items() if name != "key_mask"}
        for with_mask, result in zip(
            run(masked_attention, (qkv,), backend=backend, **both),
            run(masked_attention, (qkv,), backend=backend, **without_mask),
            strict=True,
        ):
            assert not torch.allclose(with_mask, result), mode


@pytest.mark.parametrize("backend", BACKENDS)
def test_cu_seqlens_is_not_dropped(backend: str) -> None:
    qkv = make_qkv("cu_seqlens", 1, 8)
    results = []
    for bounds in ([0, 8], [0, 3, 8], [0, 3, 6]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        results.append(
            masked_attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=8, backend=backend)  # type: ignore[arg-type]
        )
    one, two, cut = results
    torch.testing.assert_close(one[None], masked_attention(qkv[None]))
    torch.testing.assert_close(two[None, :3], masked_attention(qkv[None, :3]))
    torch.testing.assert_close(two[None, 3:], masked_attention(qkv[None, 3:]))
    torch.testing.assert_close(cut[None, 3:6], masked_attention(qkv[None, 3:6]))
    assert not cut[6:].any()


def test_max_seqlen_is_the_padded_length() -> None:
    qkv = make_qkv("cu_seqlens", 1, 8)
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    for max_seqlen in (5, 9):
        modes = (None, None, cu_seqlens, max_seqlen, None, SCALE)
        assert op.masked_attention_fwd(qkv, *modes, True, "auto")[1].shape == (2, 2, max_seqlen)


def test_the_rectangle_drops_no_argument() -> None:
    q, k, v = make_qkv("dense", 3, 8).unbind(2)
    whole = run(attention, (q[:, :2], k, v))
    for given in (make_mode("seqlens", 3, 8), make_mode("key_mask", 3, 8), {"scale": SCALE}):
        for dense, result in zip(whole, run(attention, (q[:, :2], k, v), **given), strict=True):
            assert not torch.allclose(dense, result), given


# Errors


def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BOUNDS = torch.tensor([0, 2, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("rows", "arguments", "error", "message"),
    [
        (
            (2, 4),
            {"keep": integers(2, 1), "seqlens": integers(2)},
            ValueError,
            "at most one, got 2",
        ),
        (
            (4,),
            {"cu_seqlens": BOUNDS, "max_seqlen": 2, "seqlens": integers(2)},
            ValueError,
            "keep, seqlens, cu_seqlens: expected at most one, got 2",
        ),
        (
            (4,),
            {"cu_seqlens": BOUNDS[:0], "max_seqlen": 2},
            ValueError,
            "cu_seqlens: expected at least one bound, got 0",
        ),
        ((4,), {"cu_seqlens": BOUNDS}, ValueError, "max_seqlen: expected an int with cu_seqlens"),
        ((2, 4), {"max_seqlen": 4}, ValueError, "max_seqlen: expected None without cu_seqlens"),
        (
            (4,),
            {"cu_seqlens": BOUNDS, "max_seqlen": 2, "key_mask": integers(1, 4).bool()},
            ValueError,
            r"key_mask: expected None with cu_seqlens \(use lengths\)",
        ),
        (
            (4,),
            {"cu_seqlens": BOUNDS, "max_seqlen": torch.tensor(2)},
            TypeError,
            r"max_seqlen: expected an int, got tensor\(2\)",
        ),
        (
            (4,),
            {"cu_seqlens": BOUNDS.long(), "max_seqlen": 2},
            TypeError,
            "cu_seqlens: expected torch.int32, got torch.int64",
        ),
        (
            (2, 4),
            {"cu_seqlens": BOUNDS, "max_seqlen": 2},
            ValueError,
            r"qkv: expected shape \[any, 3, any, any\], got \[2, 4, 3, 2, 8\]",
        ),
        (
            (4,),
            {},
            ValueError,
            r"qkv: expected shape \[any, any, 3, any, any\], got \[4, 3, 2, 8\]",
        ),
        (
            (2, 4),
            {"keep": integers(2, 1).float()},
            TypeError,
            "keep: expected torch.int32 or torch.int64, got torch.float32",
        ),
        ((2, 4), {"keep": integers(2)}, ValueError, r"keep: expected shape \[2, any\], got \[2\]"),
        ((2, 4), {"keep": integers(3, 1)}, ValueError, r"keep: expected shape \[2, any\]"),
        ((2, 4), {"seqlens": integers(3)}, ValueError, r"seqlens: expected shape \[2\], got \[3\]"),
        (
            (2, 4),
            {"seqlens": integers(2, dtype=torch.int16)},
            TypeError,
            "seqlens: expected torch.int32 or torch.int64, got torch.int16",
        ),
        (
            (2, 4),
            {"key_mask": integers(2, 4)},
            TypeError,
            "key_mask: expected torch.bool, got torch.int64",
        ),
        (
            (2, 4),
            {"key_mask": integers(2, 3).bool()},
            ValueError,
            r"key_mask: expected shape \[2, 4\], got \[2, 3\]",
        ),
        (
            (2, 4),
            {"seqlens": integers(2).to("meta")},
            ValueError,
            "seqlens: expected cpu, got meta",
        ),
    ],
)
def test_errors(
    rows: tuple[int, ...], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    qkv = random_qkv(*rows, heads=2, dim=8)
    with pytest.raises(error, match=message) as caught:
        masked_attention(qkv, **arguments)
    assert "\n" not in str(caught.value)
    if not message.startswith("qkv"):
        with pytest.raises(error, match=message):
            attention(*qkv.unbind(-3), **arguments)


def test_errors_of_the_inputs() -> None:
    qkv = make_qkv("dense", 2, 4)
    with pytest.raises(TypeError, match=r"qkv: expected torch.float16 or .*, got torch.int64"):
        masked_attention(qkv.long())
    with pytest.raises(ValueError, match=r"qkv: expected a last stride of 1, got \(.*, 2\)"):
        masked_attention(qkv.repeat(1, 1, 1, 1, 2)[..., ::2])
    with pytest.raises(ValueError, match=r"qkv: expected shape .*, got \[2, 4, 2, 2, 16\]"):
        masked_attention(qkv[:, :, :2])
    q, k, v = qkv.unbind(2)
    with pytest.raises(TypeError, match=r"q: expected torch.float32, got torch.float64"):
        attention(q.double(), k, v)
    with pytest.raises(ValueError, match=r"k: expected shape \[2, 4, 2, 16\], got \[2, 3, 2, 16\]"):
        attention(q, k[:, :3], v)
    with pytest.raises(ValueError, match=r"q: expected shape \[2, any, 2, 16\], got \[1, 4, 2, 16"):
        attention(q[:1], k, v)
    with pytest.raises(ValueError, match=r"v: expected shape \[any, any, any, any\], got \[4, 2,"):
        attention(q[0], k[0], v[0])


@pytest.mark.parametrize("mode", ["keep", "cu_seqlens"])
def test_some_modes_need_as_many_queries_as_keys(mode: str) -> None:
    q, k, v = make_qkv(mode, 2, 4).unbind(-3)
    fewer = q[:3] if mode == "cu_seqlens" else q[:, :3]
    with pytest.raises(ValueError, match="q: expected shape"):
        attention(fewer, k, v, **make_mode(mode, 2, 4))


def test_backends_that_cannot_run() -> None:
    qkv = make_qkv("dense", 2, 4)
    expected = "'cpp' is not built here; use one of 'auto', 'triton', 'gluon', 'reference'"
    with pytest.raises(RuntimeError, match=expected):
        masked_attention(qkv, backend="cpp")
    with pytest.raises(RuntimeError, match=expected):
        attention(*qkv.unbind(2), backend="cpp")
    with pytest.raises(ValueError, match="got 'cuda'"):
        masked_attention(qkv, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ((2, 4), {"keep": torch.tensor([[0, 1], [1, 4]])}, r"keep: .* \[0, 4\), got 0 to 4"),
        ((2, 4), {"keep": torch.tensor([[0, 1], [1, -1]])}, r"keep: .* got -1 to 1"),
        ((2, 4), {"keep": torch.tensor([[0, 1], [2, 2]])}, "keep: expected unique indices"),
        ((4,), {"cu_seqlens": [1, 4], "max_seqlen": 4}, r"cu_seqlens: .* got \[1, 4\]"),
        ((4,), {"cu_seqlens": [0, 3, 2], "max_seqlen": 4}, "cu_seqlens: expected to rise"),
        ((4,), {"cu_seqlens": [0, 5], "max_seqlen": 5}, "cu_seqlens: .* at most 4 rows"),
        ((4,), {"cu_seqlens": [0, 1, 4], "max_seqlen": 2}, "max_seqlen: .* 3, got 2"),
    ],
)
def test_the_reference_checks_values(
    rows: tuple[int, ...], arguments: dict[str, Any], message: str
) -> None:
    if "cu_seqlens" in arguments:
        bounds = torch.tensor(arguments["cu_seqlens"], dtype=torch.int32)
        arguments = arguments | {"cu_seqlens": bounds}
    with pytest.raises(ValueError, match=message):
        masked_attention(random_qkv(*rows, heads=1, dim=8), backend="reference", **arguments)


# The Triton kernels


def launch_rows() -> Iterator[Any]:
    """Every launch row of both directions, dense and masked; those of D 80 in all modes.

    Of D 80 and 64 the dense ones and the backward's masked ones are quick enough, the rest is slow.
    """
    if importlib.util.find_spec("triton") is None:
        return
    kernel = triton_kernel()
    for name in ("FORWARD", "BACKWARD"):
        for row in getattr(kernel, name):
            for mode in MODES:
                is_masked = mode == "seqlens+key_mask"
                is_dense = mode == "dense"
                is_fast = row.sizes["D"] in (64, 80) and (
                    is_dense or (is_masked and "KEYS_N" in row.blocks)
                )
                slow = [] if is_fast else [pytest.mark.slow]
                if row.sizes["D"] == 80 or is_dense or is_masked:
                    archs = "".join(map(str, row.archs))
                    label = f"{name}-{row.label}-{row.blocks}-{archs}-{mode}"
                    yield pytest.param(name, row, mode, marks=slow, id=label.replace(" ", ""))


@needs_triton
@pytest.mark.parametrize(("table", "row", "mode"), list(launch_rows()))
def test_every_launch_row(
    table: str, row: Any, mode: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Three blocks, a last one that is not full; features that fill no block.

    On CUDA also at the row's own sizes.
    """
    if device.type == "cuda" and gpu.table_arch(device) not in row.archs:
        pytest.skip("a row for another architecture")
    use_rows(monkeypatch, **{table: row})
    N = min(row.blocks.get("BLOCK", 150), row.sizes["N"]) - 3
    sizes = [(N, 24 if row.sizes["D"] == 32 else 40)]
    if device.type == "cuda":
        sizes.append((row.sizes["N"], row.sizes["D"]))
    for dtype in dtypes("triton", device):
        for N, D in sizes:
            qkv = make_qkv(mode, 2, N, heads=1, dim=D, dtype=dtype, device=device)
            arguments = make_mode(mode, 2, N, device)
            assert_matches_reference(masked_attention, (qkv,), "triton", **arguments)


@needs_triton
@pytest.mark.parametrize(
    ("table", "N", "blocks"),
    [
        ("FORWARD", 80, {"BLOCK_M": 64, "LICM": True}),
        ("FORWARD", 208, {"BLOCK_M": 64, "BLOCK_N": 32}),
        ("FORWARD", 209, {"BLOCK_M": 64, "LICM": False}),
        ("FORWARD", 577, {"BLOCK_M": 64, "BLOCK_N": 64}),
        ("BACKWARD", 80, {"KEYS_M": 32, "KEYS_N": 64, "QUERIES_M": 64, "QUERIES_N": 32}),
        ("BACKWARD", 81, {"BLOCK": 128}),
        ("BACKWARD", 577, {"KEYS_M": 32, "KEYS_N": 64, "QUERIES_M": 64, "QUERIES_N": 64}),
    ],
)
def test_a_row_for_few_keys_leaves_many_to_others(
    table: str, N: int, blocks: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forms that stream could take any number of keys, and only rows made for many do."""
    tables = importlib.import_module("maect_fast.kernels.masked_attention.triton_table")
    monkeypatch.setattr(tables, "table_arch", lambda device: 90)
    monkeypatch.setattr(launch, "triton_minor", lambda: (3, 6))
    q = torch.empty(1, N, 2, 80, dtype=torch.bfloat16, device="meta")
    assert tables.launch_config(getattr(tables, table), q, N, N).blocks == blocks


@pytest.mark.parametrize("mode", ["dense", "key_mask"])
def test_scores_far_below_zero(mode: str, implementation: str, device: torch.device) -> None:
    """Where exp(-lse) overflows, which the zeros of absent keys must not meet."""
    wide = make_qkv(mode, 2, 9, device=device)
    wide[:, :, 0], wide[:, :, 1] = 10 + wide[:, :, 0], -10 - wide[:, :, 1]
    arguments = make_mode(mode, 2, 9, device) | {"scale": SCALE}
    largest = reference.masked_attention(wide, *modes_of(arguments))[1][0].abs().max()
    assert largest > 200
    for dtype in dtypes(implementation, device):
        qkv = wide.to(dtype)
        if dtype != torch.float32:
            assert_matches_reference(masked_attention, (qkv,), implementation, **arguments)
            continue
        found = run(masked_attention, (qkv,), backend=implementation, **arguments)
        exact = run(masked_attention, (qkv.double(),), backend="reference", **arguments)
        for one, truth in zip(found, exact, strict=True):
            # Exponents s - lse are as wrong as scores are large.
            band = 4 * torch.finfo(dtype).eps * largest * truth.abs().max()
            assert (one.double() - truth).abs().max() <= band


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", range(1, 301, 30))
def test_every_number_of_tokens(first: int, dtype: torch.dtype, device: torch.device) -> None:
    skip_unless_interpreted("triton", dtype, device)
    for N in range(first, first + 30):
        qkv = make_qkv("dense", 1, N, heads=1, dtype=dtype, device=device)
        assert_matches_reference(masked_attention, (qkv,), "triton")
        if dtype != torch.float16:
            mode = MODES[1 + N % (len(MODES) - 1)]
            qkv = make_qkv(mode, 2, N, heads=1, dtype=dtype, device=device)
            arguments = make_mode(mode, 2, N, device) | {"scale": SCALE}
            assert_matches_reference(masked_attention, (qkv,), "triton", **arguments)


@pytest.mark.parametrize(
    ("arch", "dtype", "D", "scale", "takes"),
    [
        (90, torch.bfloat16, 80, 0.1, True),
        (80, torch.float16, 8, 0.1, True),
        (120, torch.bfloat16, 128, 0.1, True),
        (75, torch.float16, 64, 0.1, False),
        (90, torch.float32, 64, 0.1, False),
        (90, torch.float64, 64, 0.1, False),
        (90, torch.bfloat16, 136, 0.1, False),
        (90, torch.bfloat16, 20, 0.1, False),
        (90, torch.bfloat16, 64, 0.0, False),
        (90, torch.bfloat16, 64, -0.1, False),
    ],
)
@needs_triton
def test_auto_on_cuda_is_triton_for_halves(
    arch: int,
    dtype: torch.dtype,
    D: int,
    scale: float,
    takes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "sm_arch", lambda device: arch)
    with FakeTensorMode():
        qkv = torch.empty(2, 5, 3, 2, D, device="cuda", dtype=dtype)
        name = op._implementation("auto", scale, *qkv.unbind(2)).__name__
    assert name.endswith("triton_kernel" if takes else "padded")


@needs_triton
def test_what_the_triton_kernels_do_not_take() -> None:
    qkv = make_qkv("dense", 2, 4)
    with pytest.raises(RuntimeError, match=r"'triton' takes a scale above 0, got -1\.0"):
        masked_attention(qkv, scale=-1.0, backend="triton")
    with pytest.raises(RuntimeError, match="'triton' takes D a multiple of 8 up to 128, got 12"):
        masked_attention(qkv[..., :12], backend="triton")
    with pytest.raises(RuntimeError, match=r"'triton' takes float32, .* got float64"):
        masked_attention(qkv.double(), backend="triton")
    far = torch.empty(1, device="meta").as_strided((1, 3, 1, 8), (0, 2**30, 8, 1))
    assert "span fewer than 2147483648" in str(op.triton_obstacle(1.0, far))


@needs_triton
def test_triton_launches_on_the_inputs_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may not be the current one: forward, backward."""
    devices: list[torch.device] = []

    def current(x: Tensor) -> Any:
        devices.append(x.device)
        return nullcontext()

    monkeypatch.setattr(gpu, "current", current)
    qkv = make_qkv("dense", 2, 4)
    run(masked_attention, (qkv,), backend="triton")
    run(attention, qkv.unbind(2), backend="triton")
    assert devices == [qkv.device] * 4


class Launches:
    """Stands for kernels, remembers which were launched and with how many programs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, int]] = []
        self.kernel = triton_kernel()
        for name in vars(self.kernel).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(self.kernel, name, _Recorder(name, self.made))


class _Recorder:
    def __init__(self, name: str, made: list[tuple[str, int]]) -> None:
        self.name, self.made = name, made

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **__: self.made.append((self.name, grid[0]))


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("N", "D"),
    [
        (257, 80),
        (197, 80),
        (197, 64),
        (65, 80),
        (50, 80),
        (50, 64),
        (257, 32),
        (197, 32),
        (400, 128),
    ],
)
def test_one_launch_and_no_buffers_in_each_direction(
    N: int, D: int, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta tensors, of which the host can read nothing; 512 samples of 16 heads."""
    launches = Launches(monkeypatch)
    monkeypatch.setattr(gpu, "sm_arch", lambda device: arch)
    qkv = torch.empty(512, N, 3, 16, D, dtype=torch.bfloat16, device="meta")
    q, k, v = qkv.unbind(2)
    modes = (None,) * 5
    with Allocated() as forward:  # type: ignore[no-untyped-call]
        o, lse = launches.kernel.forward(q, k, v, modes, 0.1, bound_queries=True, save_lse=True)
    with Allocated() as backward:  # type: ignore[no-untyped-call]
        (dqkv,) = launches.kernel.backward(
            o, q, k, v, o, lse, modes, 0.1, bound_queries=True, is_packed=True
        )
    assert [name[:3] for name, _ in launches.made] == ["fwd", "bwd"]
    assert forward.num_bytes == 2 * o.numel() + 4 * lse.numel()
    assert backward.num_bytes == 2 * dqkv.numel()


@needs_triton
def test_frozen_rows_of_one_query_launch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    qkv = torch.empty(512, 257, 3, 16, 80, dtype=torch.bfloat16, device="meta")
    q, k, v = qkv[:, :1, 0], qkv[:, :, 1], qkv[:, :, 2]
    with Allocated() as allocated:  # type: ignore[no-untyped-call]
        o, _ = launches.kernel.forward(
            q, k, v, (None,) * 5, 0.1, bound_queries=False, save_lse=False
        )
    # One block of queries a head, not the blocks of 257.
    assert launches.made == [("fwd_streaming_kernel", 512 * 16)]
    assert allocated.num_bytes == 2 * o.numel()


# What only a GPU shows

HALVES = [torch.bfloat16, torch.float16]


def capture(
    no_sync: NoSync, leaf: Tensor, do: Tensor, **arguments: Any
) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    """A graph of forward and backward, and what its replays write."""
    run(masked_attention, (leaf,), **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), no_sync():
        o = masked_attention(leaf, **arguments)
        (gradient,) = torch.autograd.grad(o, leaf, do)
    return graph, o, gradient


@needs_triton
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_captured_graph_takes_other_segments(
    dtype: torch.dtype, no_sync: NoSync, cuda: torch.device
) -> None:
    leaf = make_qkv("cu_seqlens", 4, 65, device=cuda, dtype=dtype).requires_grad_()
    do = torch.randn_like(leaf.detach().select(-3, 0))
    bounds, others = (
        torch.tensor(x, dtype=torch.int32, device=cuda)
        for x in ([0, 65, 100, 100, 260], [0, 3, 90, 200, 200])
    )
    arguments: dict[str, Any] = {"cu_seqlens": bounds, "max_seqlen": 160}
    graph, o, gradient = capture(no_sync, leaf, do, **arguments)
    bounds.copy_(others)
    graph.replay()
    expected = masked_attention(leaf, **arguments)
    assert torch.equal(o, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, leaf, do)[0])


@needs_triton
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("N", [50, 197, 257])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_captured(
    mode: str, N: int, dtype: torch.dtype, no_sync: NoSync, cuda: torch.device
) -> None:
    leaf = make_qkv(mode, 3, N, device=cuda, dtype=dtype, dim=80).requires_grad_()
    do = torch.randn_like(leaf.detach().select(-3, 0))
    arguments = make_mode(mode, 3, N, cuda)
    graph, o, gradient = capture(no_sync, leaf, do, **arguments)
    with torch.no_grad():
        leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    expected = masked_attention(leaf, **arguments)
    assert torch.equal(o, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, leaf, do)[0])


@needs_triton
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("N", "D"), [(50, 64), (65, 80), (197, 80), (257, 80), (257, 32)])
@pytest.mark.parametrize("mode", MODES)
def test_runs_on_a_full_device_are_bitwise_equal(
    mode: str, N: int, D: int, dtype: torch.dtype, cuda: torch.device
) -> None:
    """Programs on all multiprocessors, in whatever order they come."""
    B = 64
    rows = (B * N,) if mode == "cu_seqlens" else (B, N)
    leaf = torch.randn(*rows, 3, 16, D, device=cuda, dtype=dtype).requires_grad_()
    do = torch.randn(*rows, 16, D, device=cuda, dtype=dtype)
    arguments = make_mode(mode, B, N, cuda)
    o = masked_attention(leaf, **arguments)
    (gradient,) = torch.autograd.grad(o, leaf, do)
    for _ in range(3):
        again = masked_attention(leaf, **arguments)
        assert torch.equal(again, o)
        assert torch.equal(torch.autograd.grad(again, leaf, do)[0], gradient)


@needs_triton
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("N", "D"), [(257, 80), (197, 64), (50, 64)])
def test_a_device_holds_results_and_little_else(
    N: int, D: int, dtype: torch.dtype, cuda: torch.device
) -> None:
    """What the allocator says of both directions."""
    leaf = torch.randn(64, N, 3, 16, D, device=cuda, dtype=dtype).requires_grad_()
    do = torch.randn(64, N, 16, D, device=cuda, dtype=dtype)
    torch.autograd.grad(masked_attention(leaf), leaf, do)
    with PeakMemory(cuda) as forward:
        o = masked_attention(leaf)
    with PeakMemory(cuda) as backward:
        (gradient,) = torch.autograd.grad(o, leaf, do)
    lse = 4 * 64 * 16 * N
    assert 0 <= forward.num_bytes - 2 * o.numel() - lse <= 2**20
    assert 0 <= backward.num_bytes - 2 * gradient.numel() <= 25e6


@needs_triton
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mode", ["dense", "key_mask", "keep", "cu_seqlens"])
def test_more_numbers_than_32_bits_count(
    mode: str, dtype: torch.dtype, needs_gib: Callable[[float], None], cuda: torch.device
) -> None:
    """Samples at both ends of more than 2^31 numbers give what they give alone."""
    needs_gib(20)
    check_large(mode, 2**31 // (197 * 3 * 16 * 80) + 4, 197, 16, 80, dtype, cuda)


def check_large(
    mode: str, B: int, N: int, H: int, D: int, dtype: torch.dtype, device: torch.device
) -> None:
    qkv = torch.randn(B, N, 3, H, D, device=device, dtype=dtype)
    do = torch.randn(B, N, H, D, device=device, dtype=dtype)
    modes: dict[str, Tensor] = {}
    if mode == "key_mask":
        modes["key_mask"] = torch.rand(B, N, device=device) < 0.6
    elif mode == "keep":
        modes["keep"] = torch.rand(B, N, device=device).argsort(1)[:, : N // 4]

    def differentiate(samples: slice) -> tuple[Tensor, Tensor]:
        leaf = qkv[samples].requires_grad_()
        x, grad = leaf, do[samples]
        arguments: dict[str, Any] = {name: value[samples] for name, value in modes.items()}
        if mode == "cu_seqlens":
            x, grad = x.flatten(0, 1), grad.flatten(0, 1)
            bounds = torch.arange(len(leaf) + 1, device=device, dtype=torch.int32) * N
            arguments = {"cu_seqlens": bounds, "max_seqlen": N}
        o = masked_attention(x, backend="triton", **arguments)
        (gradient,) = torch.autograd.grad(o, leaf, grad)
        return o.detach().view(-1, N, H, D), gradient

    o, gradient = differentiate(slice(None))
    for ends in (slice(2), slice(B // 2, B // 2 + 2), slice(B - 2, None)):
        expected = differentiate(ends)
        assert torch.equal(o[ends], expected[0])
        assert torch.equal(gradient[ends], expected[1])


# Registration


def layouts_to_check() -> Iterator[Any]:
    for mode in MODES:
        for layout in ("contiguous", "permuted"):
            yield "auto", mode, layout
            is_fast = layout == "permuted" and mode in ("keep+key_mask", "cu_seqlens")
            marks = [needs_triton, *([] if is_fast else [pytest.mark.slow])]
            yield pytest.param("triton", mode, layout, marks=marks)


@pytest.mark.parametrize(("backend", "mode", "layout"), list(layouts_to_check()))
def test_opcheck(backend: str, mode: str, layout: str, device: torch.device) -> None:
    qkv = make_qkv(mode, 3, 5, device=device, dtype=dtypes(backend, device)[0])
    if layout == "permuted":
        qkv = qkv.movedim(-3, 0).contiguous().movedim(0, -3)
    arguments = forward_arguments(make_mode(mode, 3, 5, device), backend)
    torch.library.opcheck(op.masked_attention_fwd, (qkv, *arguments))
    if layout == "permuted":
        torch.library.opcheck(op.attention_fwd, (*qkv.unbind(-3), *arguments))


@pytest.mark.parametrize("mode", ["dense", "keep+key_mask", "cu_seqlens"])
@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck_of_the_backward(backend: str, mode: str, device: torch.device) -> None:
    qkv = make_qkv(mode, 3, 5, device=device, dtype=dtypes(backend, device)[0])
    modes = make_mode(mode, 3, 5, device)
    arguments = backward_arguments(modes, backend)
    o, lse = op.masked_attention_fwd(qkv, *forward_arguments(modes, backend))
    torch.library.opcheck(op.masked_attention_bwd, (torch.ones_like(o), qkv, o, lse, *arguments))
    separate = qkv.unbind(-3)
    o, lse = op.attention_fwd(*separate, *forward_arguments(modes, backend))
    torch.library.opcheck(op.attention_bwd, (torch.ones_like(o), *separate, o, lse, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_compiles_whole(mode: str, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("only on CUDA has it a kernel of its own")
    qkv = make_qkv(mode, 3, 5, device=device, dtype=dtype)
    arguments = make_mode(mode, 3, 5, device) | {"scale": SCALE}

    def packed(x: Tensor, **modes: Any) -> Tensor:
        return masked_attention(x * 2, **modes).sin()

    def separate(x: Tensor, **modes: Any) -> Tensor:
        return attention(*(x * 2).unbind(-3), **modes).sin()

    for function in (packed, separate):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(
            run(compiled, (qkv,), **arguments), run(function, (qkv,), **arguments), strict=True
        ):
            assert torch.equal(ours, eager)


def test_a_smaller_batch_does_not_recompile() -> None:
    compiled = torch.compile(masked_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B in (4, 3):
            qkv, seqlens = make_qkv("seqlens", B, 6), torch.arange(2, 2 + B)
            expected = masked_attention(qkv, seqlens=seqlens)
            assert torch.equal(compiled(qkv, seqlens=seqlens), expected)


def test_flop_counter() -> None:
    B, N, H, D = 2, 8, 2, 16
    counter = FlopCounterMode(display=False)
    with counter:
        run(masked_attention, (make_qkv("dense", B, N),))
    assert counter.get_total_flops() == (4 + 10) * B * H * N * N * D
    q, k, v = make_qkv("dense", B, N).unbind(2)
    with counter:
        run(attention, (q[:, :3], k, v))
    assert counter.get_total_flops() == (4 + 10) * B * H * 3 * N * D
    with counter:
        run(masked_attention, (make_qkv("keep", B, N),), **make_mode("keep", B, N))
    assert counter.get_total_flops() == (4 + 10) * B * H * (N // 4) ** 2 * D
    packed = {"cu_seqlens": torch.tensor([0, 5, 9], dtype=torch.int32), "max_seqlen": 6}
    with counter:
        run(masked_attention, (make_qkv("cu_seqlens", B, N),), **packed)
    assert counter.get_total_flops() == (4 + 10) * H * (B * N) * 6 * D


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", KERNELS)
def test_two_runs_are_bitwise_equal(backend: str, mode: str, device: torch.device) -> None:
    qkv = make_qkv(mode, 3, 65, device=device, dtype=dtypes(backend, device)[0])
    arguments = make_mode(mode, 3, 65, device) | {"backend": backend}
    first, second = (run(masked_attention, (qkv,), **arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_masks_get_no_gradient_and_lse_neither() -> None:
    qkv = make_qkv("dense", 2, 4).requires_grad_()
    o, lse = op._MaskedAttention.call(qkv, *modes_of({}), "auto")
    assert o.requires_grad
    assert not lse.requires_grad
    assert not reference.masked_attention(qkv)[1].requires_grad


def test_a_second_derivative_is_an_error() -> None:
    qkv = make_qkv("dense", 2, 4).requires_grad_()
    o = masked_attention(qkv)
    (gradient,) = torch.autograd.grad(o.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_attention has no second derivative"):
        torch.autograd.grad(gradient.sum(), qkv)


def test_forward_mode_is_an_error() -> None:
    qkv = make_qkv("dense", 2, 4)
    with pytest.raises(NotImplementedError, match=r"masked_attention: expected .* in reverse"):
        torch.func.jvp(masked_attention, (qkv,), (torch.ones_like(qkv),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(qkv, torch.ones_like(qkv))  # type: ignore[no-untyped-call]
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            masked_attention(dual)
        o = masked_attention(dual, backend="reference")
        tangent = forward_ad.unpack_dual(o).tangent  # type: ignore[no-untyped-call]
        assert tangent.any()


@pytest.mark.filterwarnings("error:There is a performance drop:UserWarning")
def test_functional_gradients() -> None:
    qkv = make_qkv("dense", 3, 4)
    leaf = qkv.clone().requires_grad_()
    (expected,) = torch.autograd.grad(masked_attention(leaf).square().sum(), leaf)
    gradient = torch.func.grad(lambda x: masked_attention(x).square().sum())
    torch.testing.assert_close(gradient(qkv), expected)
    per_sample = torch.func.vmap(lambda x: gradient(x[None])[0])(qkv)
    torch.testing.assert_close(per_sample, expected)


@pytest.mark.filterwarnings("error:There is a performance drop:UserWarning")
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_vmap_is_call_after_call(mode: str, dim: int) -> None:
    """Of both ops, forward and backward; modes are the same in all calls."""
    arguments = make_mode(mode, 3, 5)
    calls = [make_qkv(mode, 3, 5, seed=seed) for seed in range(2)]
    batch = torch.stack(calls, dim=dim)

    def packed(x: Tensor) -> Tensor:
        return masked_attention(x, **arguments)

    def separate(x: Tensor) -> Tensor:
        q, k, v = x.unbind(-3)
        return attention(q, k, v, **arguments)

    for function in (packed, separate):
        gradient = torch.func.grad(lambda x, f=function: f(x).square().sum())
        for transformed in (function, gradient):
            expected = torch.stack([transformed(x) for x in calls])
            assert torch.equal(torch.func.vmap(transformed, in_dims=dim)(batch), expected)


def test_vmap_over_masks() -> None:
    qkv = make_qkv("dense", 3, 5)
    masks = torch.rand(2, 3, 5) < 0.6
    found = torch.func.vmap(lambda mask: masked_attention(qkv, key_mask=mask))(masks)
    expected = torch.stack([masked_attention(qkv, key_mask=mask) for mask in masks])
    assert torch.equal(found, expected)
