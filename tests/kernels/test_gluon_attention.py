"""The warp-specialised attention kernels, emulated: no GPU has run them."""

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="Triton is not installed")

import gluon_emulator
from gluon_emulator import EmulationError

from maect_fast.kernels import attention, masked_attention
from maect_fast.kernels._common import gpu, launch
from maect_fast.kernels.masked_attention import gluon_kernel, op
from maect_fast.testing import assert_within_budget, random_qkv

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(
        launch.triton_minor() not in op.GLUON_RELEASES, reason="compiled with another Triton"
    ),
]

SIZES = [(257, 80), (197, 64), (65, 80), (50, 64)]
MODES = ["dense", "seqlens", "keep", "key_mask", "seqlens+key_mask", "keep+key_mask", "cu_seqlens"]
# Two programs take three heads each, so that buffers are used again.
B, H, PROGRAMS = 3, 2, 2
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]

Emulate = Callable[..., None]


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Emulate:
    """Let `backend="gluon"` run on the CPU; returns what sets the order of the roles."""
    monkeypatch.setattr(op, "gluon_obstacle", lambda *_: None)
    monkeypatch.setattr(gluon_kernel, "num_multiprocessors", lambda _: PROGRAMS)

    def order(seed: int = 0) -> None:
        monkeypatch.setattr(gluon_kernel, "launch", partial(gluon_emulator.launch, seed=seed))

    order()
    return order


def make_mode(mode: str, N: int) -> dict[str, Any]:
    """The first sample is whole, the second has no tokens or no keys."""
    generator = torch.Generator().manual_seed(N)
    made: dict[str, Any] = {}
    if "seqlens" in mode.split("+"):
        made["seqlens"] = torch.tensor([N + 3, -300, (N + 1) // 2])
    if "keep" in mode:
        orders = [torch.randperm(N, generator=generator) for _ in range(B)]
        made["keep"] = torch.stack(orders)[:, : max(1, 2 * N // 3)]
        if "+" in mode:
            made["keep"] = made["keep"].int()
    if "key_mask" in mode:
        key_mask = torch.rand(B, N, generator=generator) < 0.6
        key_mask[0], key_mask[1] = True, False
        made["key_mask"] = key_mask
    if mode == "cu_seqlens":
        # A whole segment, an empty one, a short one, and rows that belong to none.
        made["cu_seqlens"] = torch.tensor([0, N, N, N + N // 3], dtype=torch.int32)
        made["max_seqlen"] = N + 2
    return made


def make_qkv(mode: str, N: int, D: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    leading = (B * N,) if mode == "cu_seqlens" else (B, N)
    return random_qkv(*leading, heads=H, dim=D, dtype=dtype)


def run(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], **arguments: Any
) -> tuple[Tensor, ...]:
    """Output and gradients, for an upstream gradient that depends on nothing but the shape."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = function(*leaves, **arguments)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).to(o)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


def assert_right(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], **arguments: Any
) -> None:
    found = run(function, inputs, backend="gluon", **arguments)
    eager = run(function, inputs, backend="reference", **arguments)
    exact = run(function, tuple(x.double() for x in inputs), backend="reference", **arguments)
    names = ["o", *(f"gradient {i}" for i in range(len(inputs)))]
    for name, *values in zip(names, found, eager, exact, strict=True):
        assert_within_budget(*values, name=name)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("N", "D"), SIZES)
def test_matches_reference(N: int, D: int, mode: str, seed: int, emulate: Emulate) -> None:
    emulate(seed)
    assert_right(masked_attention, (make_qkv(mode, N, D),), **make_mode(mode, N))


@pytest.mark.parametrize("mode", ["dense", "seqlens+key_mask"])
@pytest.mark.parametrize("D", [8, 16, 40, 72])
def test_features_that_fill_no_block(D: int, mode: str, emulate: Emulate) -> None:
    qkv = make_qkv(mode, 70, D, torch.float16)
    assert_right(masked_attention, (qkv,), scale=0.3, **make_mode(mode, 70))


@pytest.mark.parametrize("mode", ["dense", "seqlens+key_mask"])
@pytest.mark.parametrize(("M", "N"), [(1, 197), (130, 7), (7, 130), (64, 64)])
def test_other_numbers_of_queries(M: int, N: int, mode: str, emulate: Emulate) -> None:
    """Projections of other layouts, too: keys and values lie heads first."""
    q = random_qkv(B, M, heads=H, dim=64, dtype=torch.bfloat16)[:, :, 0]
    kv = random_qkv(B, N, heads=H, dim=64, dtype=torch.bfloat16, seed=1)
    k, v = (kv[:, :, i].transpose(1, 2).contiguous().transpose(1, 2) for i in (1, 2))
    assert_right(attention, (q, k, v), **make_mode(mode, N))


@pytest.mark.parametrize("N", [1, 63, 64, 65, 128, 129, 192, 193, 256, 272])
def test_borders_of_tiles_and_slabs(N: int, emulate: Emulate) -> None:
    assert_right(masked_attention, (make_qkv("dense", N, 16),))


def test_what_takes_no_part_goes_nowhere(emulate: Emulate) -> None:
    """NaN in keys that are masked, in rows behind a length, in their upstream gradients."""
    arguments = make_mode("seqlens+key_mask", 130)
    qkv = make_qkv("", 130, 80)
    spoilt = qkv.clone()
    spoilt[2, 65:] = float("nan")
    spoilt[~arguments["key_mask"], 1:] = float("nan")
    clean, dirty = (
        run(masked_attention, (x,), backend="gluon", **arguments) for x in (qkv, spoilt)
    )
    for x, y in zip(clean, dirty, strict=True):
        assert torch.equal(x, y)


def test_the_order_of_the_roles_changes_no_bit(emulate: Emulate) -> None:
    runs = []
    for seed in range(3):
        emulate(seed)
        runs.append(run(masked_attention, (make_qkv("dense", 197, 64),), backend="gluon"))
    assert all(torch.equal(x, y) for other in runs[1:] for x, y in zip(runs[0], other, strict=True))


@pytest.mark.parametrize(("M", "N"), [(0, 3), (3, 0), (0, 0)])
def test_no_queries_or_no_keys(M: int, N: int, emulate: Emulate) -> None:
    q = random_qkv(B, M, heads=H, dim=16, dtype=torch.float16)[:, :, 0]
    _, k, v = random_qkv(B, N, heads=H, dim=16, dtype=torch.float16).unbind(2)
    for x in run(attention, (q, k, v), backend="gluon"):
        assert not x.any()


def test_one_launch_a_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors, with the grid of a machine of 132 multiprocessors."""
    launches: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(
        gluon_kernel,
        "launch",
        lambda kernel, grid, *_, **__: launches.append((kernel.__name__, grid)),
    )
    qkv = torch.empty(512, 257, 3, 16, 80, dtype=torch.bfloat16, device="meta")
    q, k, v = qkv.unbind(2)
    modes = (None, None, None, None, None)
    o, lse = gluon_kernel.forward(q, k, v, modes, 0.1, bound_queries=True, save_lse=True)
    gluon_kernel.backward(o, q, k, v, o, lse, modes, 0.1, bound_queries=True, is_packed=True)
    assert Counter(launches) == {("gluon_fwd_kernel", (132,)): 1, ("gluon_bwd_kernel", (132,)): 1}


# A line of the same block.
NEXT = "\n" + " " * 20
# A fault of each kind: of arithmetic, of order, of release. The others are planted as slow ones.
QUICK_FAULTS = (
    "dS lacks delta",
    "both consumers take the same tiles",
    "dP is used before it is there",
)
# What is planted: the file, what stands there, what is put in its place.
FAULTS: dict[str, tuple[str, str, str]] = {
    "queries are released before their products": (
        "forward",
        f"scores = wait_for(scores, 0){NEXT}mbarrier.arrive(q_empty.index(place), count=1)",
        f"mbarrier.arrive(q_empty.index(place), count=1){NEXT}scores = wait_for(scores, 0)",
    ),
    "the phase of values is the other": (
        "forward",
        "mbarrier.wait(v_full.index(stage), parity)",
        "mbarrier.wait(v_full.index(stage), parity ^ 1)",
    ),
    "keys are read before they are there": (
        "forward",
        "mbarrier.wait(k_full.index(stage), parity)",
        "pass",
    ),
    "keys are overwritten before they are free": (
        "forward",
        "mbarrier.wait(kv_empty.index(stage), ((step // STAGES) & 1) ^ 1)",
        "pass",
    ),
    "a consumer forgets to release keys": (
        "forward",
        "mbarrier.arrive(kv_empty.index(stage), count=1)",
        "pass",
    ),
    "one consumer completes the release of keys": (
        "forward",
        "barriers(STAGES, 2),",
        "barriers(STAGES, 1),",
    ),
    "the softmax is not shifted": (
        "forward",
        "* (scale * LOG2E) - shift[:, None])",
        "* (scale * LOG2E))",
    ),
    "both consumers take the same tiles": ("forward", "slot % 2 == number", "slot % 2 == 0"),
    "dS is free after two arrivals": ("backward", "barriers(2, 1),", "barriers(2, 2),"),
    "dS of the other consumer is not waited for": (
        "backward",
        "    mbarrier.wait(ds_full, parity)\n",
        "",
    ),
    "dS is overwritten before it is free": (
        "backward",
        "mbarrier.wait(ds_empty.index(buf), ((slot // 2) & 1) ^ 1)",
        "pass",
    ),
    "dS lacks delta": ("backward", "(p * (dp - delta[None, :]))", "(p * dp)"),
    "lse and delta are not waited for": (
        "backward",
        "barriers(SLOTS, 129),",
        "barriers(SLOTS, 128),",
    ),
    "rows of the head before are overwritten": (
        "backward",
        "(step % 2) * TILES + m // 64",
        "m // 64",
    ),
    "slabs of keys are never released": (
        "backward",
        "mbarrier.arrive(kv_empty.index(stage), count=1)",
        "pass",
    ),
    "slabs of keys are released by one consumer": (
        "backward",
        "barriers(STAGES, 2),",
        "barriers(STAGES, 1),",
    ),
    "a half without keys leaves its dS": (
        "backward",
        "gl.zeros([64, 64], dtype, row_copies(64))",
        "ds_smem.index(buf).slice(64 * number, 64).load(row_copies(64))",
    ),
    "parts of dQ start anew with each slab": ("backward", "if n > 0:", "if n < 0:"),
    "dP is used before it is there": ("backward", "dp = wait_for((dp,), COUNT)[0]", "pass"),
}


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a fault into a copy of a kernel's module and the copy in the launchers' hands."""

    def put(file: str, old: str, new: str) -> None:
        original = importlib.import_module(f"maect_fast.kernels.masked_attention.gluon_{file}")
        assert original.__file__ is not None
        source = Path(original.__file__).read_text()
        assert source.count(old) >= 1, f"{old!r} is not in gluon_{file}.py any more"
        (tmp_path / "faulty.py").write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location("faulty", tmp_path / "faulty.py")
        assert spec is not None
        assert spec.loader is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "faulty", module)
        spec.loader.exec_module(module)
        name = {"forward": "gluon_fwd_kernel", "backward": "gluon_bwd_kernel"}[file]
        monkeypatch.setattr(gluon_kernel, name, getattr(module, name))

    return put


@pytest.mark.parametrize(
    "fault",
    [f if f in QUICK_FAULTS else pytest.param(f, marks=pytest.mark.slow) for f in FAULTS],
)
def test_planted_faults_are_caught(fault: str, plant: Any, emulate: Emulate) -> None:
    """In dense samples of two slabs and a half, or of one tile, which leave the producer ahead."""
    plant(*FAULTS[fault])

    def try_all() -> None:
        for N in (257, 50):
            for seed in range(3):
                emulate(seed)
                assert_right(masked_attention, (make_qkv("dense", N, 64).repeat(2, 1, 1, 1, 1),))

    with pytest.raises((AssertionError, EmulationError, TypeError)):
        try_all()


@pytest.mark.parametrize(
    ("device", "arch", "release", "shape", "message"),
    [
        (
            "cpu",
            90,
            (3, 6),
            (1, 4, 3, 1, 16),
            "runs on CUDA, got a tensor on cpu: use backend='auto'",
        ),
        ("cuda", 80, (3, 6), (1, 4, 3, 1, 16), r"is for sm_90 .*got sm_80: use backend='triton'"),
        ("cuda", 90, (3, 9), (1, 4, 3, 1, 16), r"with Triton 3.6, got 3.9: use backend='triton'"),
        ("cuda", 90, (3, 6), (1, 273, 3, 1, 16), r"up to 272 tokens .*got 273 and 16"),
        ("cuda", 90, (3, 6), (1, 4, 3, 1, 96), r"D up to 80, got 4 and 96"),
    ],
)
def test_what_it_cannot_take_is_one_line(
    device: str,
    arch: int,
    release: tuple[int, int],
    shape: tuple[int, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "sm_arch", lambda _: arch)
    monkeypatch.setattr(gpu, "obstacle", lambda *_: None)
    monkeypatch.setattr(op, "triton_minor", lambda: release)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    qkv = torch.zeros(shape, dtype=torch.bfloat16)
    like = FakeCuda(qkv) if device == "cuda" else qkv
    found = op.gluon_obstacle((None,) * 5, 0.1, like)  # type: ignore[arg-type]
    assert found is not None
    assert re.search(message, found)
    assert "\n" not in found


class FakeCuda:
    """As much of a tensor on a GPU as is asked for."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.dtype, self.device = x.shape, x.dtype, torch.device("cuda")


def test_auto_never_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = make_qkv("dense", 4, 16, torch.float16)
    monkeypatch.setattr(gpu, "is_gpu", lambda _: True)
    monkeypatch.setattr(op, "triton_obstacle", lambda *_: None)
    found = op._implementation("auto", 0.1, qkv)
    assert found.__name__.endswith(".triton_kernel")


def test_rows_that_begin_between_addresses_are_refused(emulate: Emulate) -> None:
    qkv = torch.zeros(1, 4, 3, 1, 17, dtype=torch.float16)[..., 1:]
    with pytest.raises(RuntimeError, match="multiples of 16 bytes; copy the tensor, or use"):
        masked_attention(qkv, backend="gluon")
