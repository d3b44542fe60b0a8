import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from allocation import Allocated, NoSync, PeakMemory
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from maect_fast.kernels import Pick, QueueState, TopK, enqueue, queue_topk, with_shadow
from maect_fast.kernels._common import cpp, gpu
from maect_fast.kernels.queue_topk import op, reference
from maect_fast.testing import assert_within_budget, random_queue, unit_rows

pytestmark = pytest.mark.usefixtures("poison")

# "triton" is interpreted on the CPU.
BACKENDS = ["auto", "triton", "reference"]
SHADOWS = [None, torch.float16, torch.int8]
NO_LIBRARY = cpp.load()
needs_cpp = pytest.mark.skipif(NO_LIBRARY is not None, reason=f"C++ library: {NO_LIBRARY}")
SIMDS = [] if NO_LIBRARY else torch.ops.maect_fast.queue_topk_simd().split()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Exact scores -1, 0, 1 with many ties: every query and every entry is a signed unit vector.
AXES = torch.cat((torch.eye(4), -torch.eye(4)))


Search = partial[TopK]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(params=BACKENDS)
def search(request: pytest.FixtureRequest) -> Search:
    return partial(queue_topk, backend=request.param)


# For tests of several searches: interpreted, each takes seconds.
slow_if_interpreted = pytest.mark.parametrize(
    "search", [slow(b) if b == "triton" else b for b in BACKENDS], indirect=True
)


def in_blocks(*blocks: tuple[int, int]) -> list[tuple[str, tuple[int, int]]]:
    """Backends with the reference's blocks of queries and rows, of which others know nothing."""
    whole = 128, 16384
    return [(b, whole) for b in BACKENDS] + [("reference", size) for size in blocks]


def lexicographic(score: Tensor, own: Tensor, k: int) -> list[list[int]]:
    """The contract's order in plain Python: own slots last, score descending, slot ascending."""
    rows = zip(score.masked_fill(own > 0, -1).tolist(), own.tolist(), strict=True)
    return [sorted(range(len(s)), key=lambda slot: (o[slot], -s[slot], slot))[:k] for s, o in rows]


def shadowed(state: QueueState, dtype: torch.dtype | None) -> QueueState:
    """With a shadow, Triton kernels update the buffer, also on the CPU."""
    return state if dtype is None else with_shadow(state, dtype=dtype)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Both exist and are equal bit by bit."""
    return one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        # An interpreted kernel reads every dtype as fp32.
        slow(b, d) if b == "triton" and d != torch.float32 else (b, d)
        for b in BACKENDS
        for d in DTYPES
        if (b, d) != ("triton", torch.float64)
    ],
)
@pytest.mark.parametrize(
    ("batch", "n", "Q", "D", "k"),
    [
        ((), 1, 1, 4, 1),
        ((), 7, 33, 16, 5),
        ((2,), 3, 20, 48, 20),
        pytest.param((2,), 9, 1000, 256, 20, marks=pytest.mark.slow),
        pytest.param((), 131, 257, 37, 2, marks=pytest.mark.slow),
        pytest.param((1,), 5, 513, 8, 200, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value),
)
def test_values_against_fp64(
    batch: tuple[int, ...],
    n: int,
    Q: int,
    D: int,
    k: int,
    dtype: torch.dtype,
    backend: Any,
    device: torch.device,
) -> None:
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bf16 arithmetic")
    query = (3 * unit_rows(*batch, n, D, seed=1)).to(device, dtype)
    queue = unit_rows(Q, D, device=device, seed=2)
    found = queue_topk(query, queue, k=k, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    eager = normalize(query.to(wide), dim=-1) @ queue.to(wide).T
    ref64 = normalize(query.double(), dim=-1) @ queue.double().T
    assert_within_budget(found.values, eager.topk(k).values, ref64.topk(k).values, name="values")
    indices = found.indices
    gathered = eager.gather(-1, indices), ref64.gather(-1, indices)
    assert_within_budget(found.values, *gathered, name="values by index")
    assert (found.values.diff(dim=-1) <= 0).all()
    assert (indices.sort().values.diff(dim=-1) > 0).all()
    # Random scores this far apart have no ties, so the sets agree with fp64.
    if D >= 16:
        expected = ref64.topk(k).indices
        assert torch.equal(indices.sort().values, expected.sort().values)
    assert found[2:5] == (None, None, None)


@pytest.mark.parametrize(("backend", "blocks"), in_blocks((3, 7), (2, 2)), ids=str)
@pytest.mark.parametrize("k", [1, 4, 20, slow(45)])
@pytest.mark.parametrize("num_ids", [45, 6])
def test_ties_go_to_the_lowest_slot(
    k: int,
    num_ids: int,
    backend: Any,
    blocks: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    monkeypatch.setattr(reference, "BLOCK_B", blocks[0])
    monkeypatch.setattr(reference, "BLOCK_Q", blocks[1])
    generator = torch.Generator().manual_seed(k)
    query = AXES[torch.randint(8, (10,), generator=generator)].to(device)
    queue = AXES[torch.randint(8, (45,), generator=generator)].to(device)
    queue_id = (torch.arange(45) % num_ids).to(device)
    query_id = torch.tensor([0, 1, 2, 3, 4, 5, 44, -1, 99, 3], device=device)
    ids = {"query_id": query_id, "queue_id": queue_id}
    found = queue_topk(query, queue, k=k, backend=backend, **ids)
    own = query_id[:, None] == queue_id
    score = query @ queue.T
    assert found.indices.tolist() == lexicographic(score, own, k)
    expected = score.masked_fill(own, -1).gather(1, found.indices)
    assert torch.equal(found.values, expected)


def test_the_other_devices_path_to_ties_agrees() -> None:
    """On a GPU every row takes the path that the CPU takes only for ambiguous rows."""
    score = torch.randint(-3, 4, (50, 40)).float()
    slots = reference._lowest_slots(score, score.sort(descending=True).values[:, 6], 7)
    expected = lexicographic(score, torch.zeros_like(score), 7)
    assert slots.sort().values.tolist() == [sorted(row) for row in expected]


@slow_if_interpreted
@pytest.mark.parametrize("k", [1, 20, 64])
def test_collapse(k: int, search: Search, device: torch.device) -> None:
    """All entries and all queries alike: slots in order, without the own ones."""
    queue = torch.ones(100, 16, device=device) / 4
    ids = torch.arange(100, device=device)
    found = search(queue[:9] * 2, queue, k=k, query_id=ids[:9], queue_id=ids)
    expected = [[slot for slot in range(100) if slot != row][:k] for row in range(9)]
    assert found.indices.tolist() == expected
    assert torch.equal(found.values, torch.ones_like(found.values))


def test_duplicates_are_all_found(search: Search, device: torch.device) -> None:
    queue = unit_rows(64, 32, device=device)
    queue[[5, 17, 40]] = queue[9].clone()
    found = search(queue[9:10], queue, k=4)
    assert found.indices.tolist() == [[5, 9, 17, 40]]


@pytest.mark.parametrize("D", [37, 256])
def test_equal_rows_have_equal_scores_wherever_they_lie(D: int, device: torch.device) -> None:
    """Also at the end of a product and of a block, where a library sums in another order."""
    row, query = unit_rows(1, D, device=device), unit_rows(7, D, device=device, seed=1)
    for Q in (5, 9, 33, 1041, reference.BLOCK_Q + 5):
        found = queue_topk(query, row.expand(Q, D).contiguous(), k=5, backend="reference")
        assert found.indices.tolist() == [[0, 1, 2, 3, 4]] * 7
        assert torch.equal(found.values, found.values[:, :1].expand(7, 5))


@pytest.mark.parametrize(("backend", "blocks"), in_blocks((2, 3)), ids=str)
def test_nan_scores_rank_last(
    backend: Any, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    search = partial(queue_topk, backend=backend)
    monkeypatch.setattr(reference, "BLOCK_B", blocks[0])
    monkeypatch.setattr(reference, "BLOCK_Q", blocks[1])
    queue = unit_rows(10, 8, device=device)
    queue[[1, 4]] = torch.nan
    query = queue[[0, 1, 2]].clone()
    ids = torch.arange(10, device=device)
    found = search(query, queue, k=10, query_id=ids[:3], queue_id=ids)
    # A finite query: 7 finite entries, then the NaN entries in slot order, then the own one.
    assert found.indices[0, 7:].tolist() == [1, 4, 0]
    assert found.values[0, 7:].tolist() == [-torch.inf, -torch.inf, -1]
    assert found.values[0, :7].isfinite().all()
    # A NaN query: slots in order without the own one, which comes last.
    assert found.indices[1].tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9, 1]
    assert found.values[1].tolist() == [-torch.inf] * 9 + [-1]
    few = search(query, queue, k=7, query_id=ids[:3], queue_id=ids)
    assert few.values[[0, 2]].isfinite().all()


def test_infinite_entries_rank_by_sign(search: Search, device: torch.device) -> None:
    queue = torch.tensor([[-torch.inf], [0.5], [torch.inf], [torch.nan]], device=device)
    found = search(torch.ones(1, 1, device=device), queue, k=4)
    assert found.indices.tolist() == [[2, 1, 0, 3]]
    assert found.values.tolist() == [[torch.inf, 0.5, -torch.inf, -torch.inf]]


def test_both_zeros_are_one_score(search: Search, device: torch.device) -> None:
    """The first slot's score is -1e-46, which rounds to -0."""
    queue = torch.tensor([[0, 1e-40], [0, -1e-40], [0, 0], [-1, 0]], device=device)
    found = search(torch.tensor([[1, -1e-6]], device=device), queue, k=4)
    assert found.indices.tolist() == [[0, 1, 2, 3]]
    assert found.values.tolist() == [[0, 0, 0, -1]]


def test_zero_query_scores_zero(search: Search, device: torch.device) -> None:
    found = search(torch.zeros(2, 8, device=device), unit_rows(9, 8, device=device), k=3)
    assert found.indices.tolist() == [[0, 1, 2]] * 2
    assert torch.equal(found.values, torch.zeros_like(found.values))


def test_own_ids_more_often_than_the_queue_has_others(search: Search, device: torch.device) -> None:
    """A queue larger than the data set: each sample fills every third slot."""
    state = random_queue(12, 16, num_ids=3, num_classes=2, device=device)
    query_id = torch.arange(3, device=device)
    found = search(state.queue[:3], state, k=10, query_id=query_id)
    own = state.queue_id[found.indices] == query_id[:, None]
    assert own.tolist() == [[False] * 8 + [True] * 2] * 3
    assert found.values[own].tolist() == [-1.0] * 6
    assert found.indices[0, 8:].tolist() == [0, 3]
    excluded = search(state.queue[:3], state, k=8, query_id=query_id)
    assert torch.equal(excluded.indices, found.indices[:, :8])


def test_id_minus_one_excludes_nothing(search: Search, device: torch.device) -> None:
    queue = unit_rows(20, 8, device=device)
    nobody = torch.full((20,), -1, device=device)
    found = search(queue[:4], queue, k=5, query_id=nobody[:4], queue_id=nobody)
    assert torch.equal(found.indices, search(queue[:4], queue, k=5).indices)
    assert found.indices[:, 0].tolist() == [0, 1, 2, 3]


@slow_if_interpreted
def test_both_views_in_one_search(search: Search, device: torch.device) -> None:
    state = random_queue(300, 32, num_ids=40, num_classes=5, device=device)
    views = unit_rows(2, 10, 32, device=device, seed=7)
    ids = torch.arange(10, device=device)
    labels = ids % 5
    both = search(views, state, k=6, query_id=ids, query_label=labels, pick=Pick(1, 2, 0, row=9))
    for view in range(2):
        single = search(
            views[view], state, k=6, query_id=ids, query_label=labels, pick=Pick(1, 2, view, 9)
        )
        for name, together, alone in zip(both._fields, both, single, strict=True):
            assert together is not None
            if name == "values" and search.keywords["backend"] == "reference":
                # What a matrix product's rows are depends on how many it has, and on the threads.
                torch.testing.assert_close(together[view], alone)
            else:
                assert same(together[view], alone)


@slow_if_interpreted
@pytest.mark.parametrize("batch", [slow(()), (2,)])
def test_pick(batch: tuple[int, ...], search: Search, device: torch.device) -> None:
    state = random_queue(200, 16, num_ids=30, num_classes=3, device=device)
    query = unit_rows(*batch, 17, 16, device=device, seed=3)
    label = torch.arange(17, device=device) % 4 - 1
    found = search(query, state, k=20, query_label=label, pick=Pick(5, 6, 1, row=2))
    rank = reference.draw_ranks(Pick(5, 6, 1, row=2), query.shape[:-1], 20, device)
    assert len(set(rank.flatten().tolist())) > 10
    assert found.picked_index is not None
    assert torch.equal(found.picked_index, found.indices.gather(-1, rank[..., None])[..., 0])
    assert same(state.queue[found.picked_index], found.picked_neighbour)
    assert found.label_hit is not None
    assert torch.equal(found.label_hit, state.queue_y[found.picked_index] == label)
    assert found.label_hit.any()
    assert not found.label_hit.all()
    replayed = search(query, state, k=20, query_label=label, pick=rank.cpu())
    for mine, theirs in zip(found, replayed, strict=True):
        assert same(mine, theirs)


def test_missing_labels_never_hit(search: Search, device: torch.device) -> None:
    queue = unit_rows(6, 8, device=device)
    none = torch.full((6,), -1, device=device)
    found = search(queue, queue, k=1, queue_label=none, query_label=none, pick=Pick(0, 0, 0))
    assert found.label_hit is not None
    assert not found.label_hit.any()


@slow_if_interpreted
@pytest.mark.parametrize("num_ranks", [2, slow(4)])
def test_picks_do_not_depend_on_the_number_of_ranks(
    num_ranks: int, search: Search, device: torch.device
) -> None:
    state = random_queue(100, 16, num_ids=100, num_classes=3, device=device)
    query = unit_rows(2, 12, 16, device=device, seed=4)
    whole = search(query, state, k=7, pick=Pick(8, 9, 0))
    n = 12 // num_ranks
    for r in range(num_ranks):
        part = search(query[:, r * n : (r + 1) * n], state, k=7, pick=Pick(8, 9, 0, row=r * n))
        assert whole.picked_index is not None
        assert same(whole.picked_index[:, r * n : (r + 1) * n], part.picked_index)
        rows = torch.arange(r * n, (r + 1) * n, device=device)
        listed = search(query[:, rows], state, k=7, pick=Pick(8, 9, 0, row=rows))
        assert same(part.picked_index, listed.picked_index)


def official_find_nn(
    projected: Tensor, state: QueueState, ids: Tensor, k: int, dice: Tensor
) -> tuple[Tensor, Tensor]:
    """Source: ml-jku/MAE-CT: losses/nnclr_loss.py (find_nn), fp32, the dice given."""
    similarity = normalize(projected, dim=-1) @ state.queue.T
    similarity[state.queue_id[None] == ids[:, None]] = -1
    index = similarity.topk(k, dim=1).indices[torch.arange(len(ids)), dice]
    return index, state.queue[index]


@slow_if_interpreted
def test_replays_the_official_search(search: Search, device: torch.device) -> None:
    """Its dice come from the CPU generator, view 0 first."""
    state = random_queue(500, 32, num_ids=60, num_classes=3, device=device)
    views = unit_rows(2, 12, 32, device=device, seed=11)
    ids = torch.arange(12, device=device)
    torch.manual_seed(3)
    dice = torch.stack([torch.randint(size=(12,), high=20) for _ in range(2)])
    found = search(views, state, k=20, query_id=ids, pick=dice)
    assert found.picked_index is not None
    assert found.picked_neighbour is not None
    for view in range(2):
        index, row = official_find_nn(views[view], state, ids, 20, dice[view].to(device))
        assert torch.equal(found.picked_index[view], index)
        assert torch.equal(found.picked_neighbour[view], row)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_no_rows(batch: tuple[int, ...], search: Search, device: torch.device) -> None:
    state = random_queue(9, 8, num_ids=9, num_classes=2, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    found = search(
        torch.zeros(*batch, 0, 8, device=device),
        state,
        k=3,
        query_id=none,
        query_label=none,
        pick=Pick(0, 0, 0),
    )
    assert [x.shape for x in found[:5] if x is not None] == [
        (*batch, 0, 3),
        (*batch, 0, 3),
        (*batch, 0),
        (*batch, 0, 8),
        (*batch, 0),
    ]


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the size in bytes of the largest tensor that an operation allocates."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(out, Tensor) and not func.is_view:
                self.bytes = max(self.bytes, out.numel() * out.element_size())
        return result


def test_memory_does_not_grow_with_n_or_q(device: torch.device) -> None:
    """The gallery of a k-NN evaluation streams: 300 x 50,000 scores would be 60 MB."""
    gallery = unit_rows(50_000, 4, dtype=torch.float16, device=device)
    query = unit_rows(300, 4, device=device, seed=1)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        found = queue_topk(query, gallery, k=10, backend="reference")
    assert found.values.shape == (300, 10)
    assert 0 < largest.bytes <= reference.BLOCK_B * reference.BLOCK_Q * 4


def test_autocast_does_not_reach_the_scores(device: torch.device) -> None:
    query, queue = unit_rows(3, 64, device=device), unit_rows(90, 64, device=device, seed=1)
    for backend in BACKENDS:
        expected = queue_topk(query, queue, k=5, backend=backend)  # type: ignore[arg-type]
        with torch.autocast(device.type, torch.bfloat16):
            found = queue_topk(query, queue, k=5, backend=backend)  # type: ignore[arg-type]
        assert torch.equal(found.values, expected.values)


def test_two_runs_are_bitwise_equal_and_nothing_requires_grad(
    search: Search, device: torch.device
) -> None:
    state = random_queue(700, 32, num_ids=100, num_classes=3, device=device)
    query = unit_rows(9, 32, device=device, seed=1).requires_grad_()
    first, second = (search(query, state, k=20, pick=Pick(0, 0, 0)) for _ in range(2))
    for one, other in zip(first[:4], second[:4], strict=True):
        assert same(one, other)
        assert one is not None
        assert not one.requires_grad


def test_strided_query(search: Search, device: torch.device) -> None:
    wide = unit_rows(5, 2, 24, device=device)
    query = wide.transpose(0, 1)[..., ::2]
    queue = unit_rows(30, 12, device=device)
    found = search(query, queue, k=3)
    assert torch.equal(found.indices, search(query.contiguous(), queue, k=3).indices)


IDS = torch.arange(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k: expected 1 \.\. 9"),
        ({"k": 10}, r"k: expected 1 \.\. 9"),
        ({"query": torch.zeros(4)}, r"query, queue: expected \[n, D\]"),
        ({"query": torch.zeros(4, 7)}, r"query, queue: expected \[n, D\]"),
        ({"query": torch.zeros(4, 8).long()}, "expected floats"),
        ({"query_id": IDS}, "query_id, queue_id: expected both"),
        ({"queue_id": torch.arange(9)}, "query_id, queue_id: expected both"),
        ({"query_label": IDS, "pick": Pick(0, 0, 0)}, "query_label, queue_label: expected both"),
        ({"query_label": IDS, "queue_label": torch.arange(9)}, "query_label: expected a pick"),
        ({"query_id": IDS[:3], "queue_id": torch.arange(9)}, r"query_id: .*int64 \[4\]"),
        ({"query_id": IDS, "queue_id": torch.arange(8)}, r"queue_id: .*int64 \[9\]"),
        ({"query_id": IDS.int(), "queue_id": torch.arange(9)}, r"got torch\.int32"),
        ({"pick": torch.zeros(3, dtype=torch.int64)}, r"pick: expected torch\.int64 \[4\]"),
        ({"pick": torch.zeros(4)}, r"pick: expected torch\.int64 \[4\]"),
        ({"pick": torch.tensor([0, 1, 2, 3])}, r"pick: expected ranks in 0 \.\. 2"),
        ({"pick": torch.tensor([0, 1, 2, -1])}, r"pick: expected ranks in 0 \.\. 2"),
        ({"backend": "cuda"}, "expected backend to be one of"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    complete = {"query": torch.ones(4, 8), "queue": unit_rows(9, 8), "k": 3, **arguments}
    query, queue = complete.pop("query"), complete.pop("queue")
    with pytest.raises(ValueError, match=message):
        queue_topk(query, queue, **complete)


def test_state_brings_its_own_ids() -> None:
    state = random_queue(9, 8, num_ids=9, num_classes=2)
    with pytest.raises(ValueError, match="QueueState brings them"):
        queue_topk(torch.ones(4, 8), state, k=3, query_id=IDS, queue_id=state.queue_id)


def test_backends_that_cannot_run_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    query, queue = torch.ones(4, 8), unit_rows(9, 8)
    with pytest.raises(RuntimeError, match="backend 'triton' takes float32, bfloat16 and float16"):
        queue_topk(query.double(), queue, k=3, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'triton' takes k up to 200, got 201"):
        queue_topk(torch.ones(4, 8), unit_rows(201, 8), k=201, backend="triton")
    with pytest.raises(RuntimeError, match="'triton' takes rows of up to 8192 features, got 8193"):
        queue_topk(torch.ones(1, 8193), torch.ones(3, 8193), k=3, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'triton' runs on CUDA, got a tensor on meta"):
        queue_topk(query.to("meta"), queue, k=3, backend="triton")
    with monkeypatch.context() as compiled:
        compiled.setattr(gpu, "_interprets", lambda: False)
        with pytest.raises(RuntimeError, match="runs on CUDA, got a tensor on cpu"):
            queue_topk(query, queue, k=3, backend="triton")
    with pytest.raises(RuntimeError, match=r"backend 'cpp' takes float32, bfloat16 and float16"):
        queue_topk(query.double(), queue, k=3, backend="cpp")
    with pytest.raises(RuntimeError, match="backend 'cpp' runs on the CPU, got a tensor on meta"):
        queue_topk(query.to("meta"), queue, k=3, backend="cpp")
    monkeypatch.setattr(cpp, "LIBRARY", tmp_path / "none.so")
    cpp.load.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="queue_topk: backend 'cpp' not built: install"):
            queue_topk(query, queue, k=3, backend="cpp")
        assert queue_topk(query, queue, k=3).indices.shape == (4, 3)
    finally:
        cpp.load.cache_clear()


# The C++ search: every set of inner loops gives the same bits.


def definition(query: Tensor, queue: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """fp32 roundings of the scores in fp64, and their slots."""
    norm = query.double().square().sum(1, keepdim=True).sqrt().float()
    unit = query / norm.clamp_min(1e-12)
    score = (unit.double() @ queue.double().T).float()
    values, slots = score.sort(dim=1, descending=True, stable=True)
    return values[:, :k], slots[:, :k]


def clustered(num_rows: int, dim: int, num_clusters: int, spread: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centre = unit_rows(num_clusters, dim, seed=99)
    cluster = torch.randint(num_clusters, (num_rows,), generator=generator)
    noise = torch.randn(num_rows, dim, generator=generator)
    return normalize(centre[cluster] + spread * noise, dim=-1)


def growing_norms(num_rows: int, dim: int) -> Tensor:
    """Small rows, then unit rows that score about the same for the first of the plain queries."""
    direction = unit_rows(5, dim, seed=1)[0]
    small = 0.01 * unit_rows(num_rows // 2, dim, seed=2)
    large = unit_rows(num_rows - len(small), dim, seed=3)
    large -= (large @ direction)[:, None] * direction
    score = (small @ direction).sort().values[-20] + torch.linspace(1e-5, 0, len(large))
    return torch.cat((small, large + score[:, None] * direction))


QUEUES: dict[str, Callable[[int, int], Tensor]] = {
    "random": lambda Q, D: unit_rows(Q, D, seed=2),
    "clusters": lambda Q, D: clustered(Q, D, 10, 0.05, 2),
    "near duplicates": lambda Q, D: clustered(Q, D, 3, 1e-4, 2),
    "duplicates": lambda Q, D: unit_rows(Q, D, seed=2)[torch.arange(Q) % 7],
    "collapse": lambda Q, D: unit_rows(1, D).expand(Q, D),
    "sorted, the best last": lambda Q, D: (
        unit_rows(1, D, seed=1) * torch.linspace(-1, 1, Q)[:, None]
    ),
    "any norm": lambda Q, D: unit_rows(Q, D, seed=2) * torch.logspace(-20, 15, Q)[:, None],
    "growing norms": growing_norms,
    "tiny": lambda Q, D: unit_rows(Q, D, seed=2) * 1e-21,
    "zeros": lambda Q, D: torch.zeros(Q, D),
    "denormal": lambda Q, D: unit_rows(Q, D, seed=2) * 1e-41,
}


# The others' searches are slow ones where they are interpreted.
HARDEST = ["random", "clusters", "duplicates", "any norm", "growing norms"]


@needs_cpp
@pytest.mark.parametrize("simd", SIMDS)
@pytest.mark.parametrize("kind", QUEUES)
@pytest.mark.parametrize(("k", "D"), [(1, 256), (20, 256), (20, 37), (64, 5)])
def test_every_simd_gives_the_bits_of_fp64(simd: str, kind: str, k: int, D: int) -> None:
    """Whatever margin the rounded scores need; 1300 rows fill a reservoir several times."""
    queue = QUEUES[kind](1300, D)
    query = torch.cat((clustered(30, D, 10, 0.05, 3), 5 * unit_rows(5, D, seed=1)))
    values, indices, *_ = op.search_cpp(query, queue, k, None, None, None, None, None, simd)
    expected_values, expected_indices = definition(query, queue, k)
    assert torch.equal(values, expected_values)
    assert torch.equal(indices, expected_indices)


@needs_cpp
@pytest.mark.parametrize("simd", SIMDS)
@pytest.mark.parametrize(
    ("B", "Q", "D", "k"),
    [
        *((1, 1, 1, 1), (2, 2, 2, 2), (33, 191, 3, 64), (64, 193, 16, 100), (65, 500, 31, 500)),
        *((3, 700, 300, 20), (1, 999, 1030, 2), (70, 3000, 8, 3000)),
    ],
)
def test_every_simd_takes_any_size(simd: str, B: int, Q: int, D: int, k: int) -> None:
    query, queue = unit_rows(B, D, seed=1), unit_rows(Q, D, seed=2)
    values, indices, *_ = op.search_cpp(query, queue, k, None, None, None, None, None, simd)
    expected_values, expected_indices = definition(query, queue, k)
    assert torch.equal(values, expected_values)
    assert torch.equal(indices, expected_indices)


@needs_cpp
@pytest.mark.parametrize("simd", SIMDS)
def test_every_simd_agrees_on_ids_picks_and_odd_rows(simd: str) -> None:
    state = random_queue(3000, 64, num_ids=40, num_classes=3)
    state.queue[[7, 1999]] = torch.nan
    state.queue[70, 3] = torch.inf
    state.queue[71] = 1e30
    query = unit_rows(2, 40, 64, seed=1)
    query[0, 3], query[1, 4], query[1, 5, 6] = torch.nan, 0, torch.inf
    ids = torch.arange(40)
    rank = reference.draw_ranks(Pick(1, 2, 0), query.shape[:-1], 20, query.device)
    arguments = (query, state.queue, 20, ids, state.queue_id, ids % 3, state.queue_y, rank)
    found = op.search_cpp(*arguments, simd=simd)
    expected = reference.queue_topk(*arguments)
    # The reference sums in fp32.
    finite = expected.values.isfinite()
    assert torch.equal(found[0][~finite], expected.values[~finite])
    # Each by the norm of its row: one row of 1e30 would widen a budget of all values together.
    norm = state.queue.double().norm(dim=1)[expected.indices]
    error = (found[0].double() - expected.values.double()).abs() / norm
    assert error[finite].max() <= 4 * torch.finfo(torch.float32).eps
    for one, other in zip(found[1:5], expected[1:5], strict=True):
        assert other is not None
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@needs_cpp
@pytest.mark.parametrize("simd", SIMDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_simd_reads_any_layout(simd: str, dtype: torch.dtype) -> None:
    query, queue = unit_rows(9, 40, dtype=dtype, seed=1), unit_rows(400, 40, dtype=dtype, seed=2)
    expected = definition(query.float(), queue.float(), 6)
    every_second_row = queue.repeat_interleave(2, dim=0)[::2]
    left_half = queue.repeat(1, 2)[:, :40]
    transposed = queue.T.contiguous().T
    rank = torch.arange(9) % 6
    for layout in (queue, every_second_row, left_half, transposed):
        found = op.search_cpp(query, layout, 6, None, None, None, None, rank, simd)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[3], queue[found[1][torch.arange(9), rank]])


@needs_cpp
@pytest.mark.parametrize("num_queries", [40, 1100])
def test_the_number_of_threads_changes_no_bit(num_queries: int) -> None:
    """Threads share the queue from 16,384 rows and the queries from 512, here by 1024 at a time."""
    state = random_queue(20_000, 16, num_ids=300, num_classes=3)
    state.queue[[5, 19_999]] = torch.nan
    query, ids = unit_rows(num_queries, 16, seed=1), torch.arange(num_queries) % 300
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(queue_topk(query, state, k=9, query_id=ids, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0].values, other.values)
        assert torch.equal(found[0].indices, other.indices)


@needs_cpp
def test_auto_on_the_cpu_is_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(*arguments: Any) -> Any:
        calls.append(arguments)
        return search_cpp(*arguments)

    search_cpp = op.search_cpp
    monkeypatch.setattr(op, "search_cpp", spy)
    query, queue = unit_rows(4, 8), unit_rows(9, 8)
    for backend in ("auto", "cpp"):
        queue_topk(query, queue, k=3, backend=backend)
    assert len(calls) == 2
    queue_topk(query, queue, k=3, backend="reference")
    queue_topk(query.double(), queue, k=3)
    assert len(calls) == 2


@pytest.mark.skipif("avx512_bf16" not in SIMDS, reason="compares with AVX-512 BF16")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_amx_lists_the_hits_of_avx512(tmp_path: Path) -> None:
    """Over an emulation of the tile instructions, as few CPUs have them."""
    root = Path(cpp.__file__).resolve().parents[2]
    avx512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16"]
    common = ["c++", "-std=c++17", "-O1", "-w", *avx512, f"-I{root}"]
    source = root / "kernels/queue_topk/cpu_simd.cpp"
    avx512_object, program = tmp_path / "avx512.o", tmp_path / "compare"
    subprocess.run(
        [*common, "-DMAECT_SIMD=avx512_bf16", "-c", source, "-o", avx512_object], check=True
    )
    tiles = Path(__file__).parent / "emulated_tiles.cpp"
    subprocess.run([*common, tiles, avx512_object, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_cpp
def test_an_unknown_simd_is_an_error() -> None:
    none = (None,) * 5
    with pytest.raises(RuntimeError, match=r"simd: expected one of .*portable.*, got mmx"):
        op.search_cpp(unit_rows(2, 4), unit_rows(3, 4), 1, *none, "mmx")


@pytest.mark.parametrize("num_views", [0, 3])
def test_ranks_are_drawn_alike(num_views: int, device: torch.device) -> None:
    shape = torch.Size((num_views, 50) if num_views else (50,))
    rows = torch.randint(2**40, (50,))
    for pick in (
        Pick(0, 0, 0),
        Pick(2**64 - 1, 0, 0),
        Pick(2**40 + 5, torch.tensor(2**33 + 1), 2, row=511),
        Pick(torch.tensor(2**63 - 1), 7, torch.tensor(1), row=rows),
        Pick(3, 2**62, 0, row=torch.tensor(9)),
    ):
        for k in (1, 20, 1000):
            found = op.draw_ranks(pick, shape, k, device)
            expected = reference.draw_ranks(pick, shape, k, device)
            assert torch.equal(found, expected)


def test_known_ranks(device: torch.device) -> None:
    found = op.draw_ranks(Pick(0, 0, 0), torch.Size((8,)), 20, device)
    assert found.tolist() == [7, 19, 0, 15, 18, 9, 14, 13]
    pick = Pick(2**40 + 5, 2**33 + 1, 0, row=511)
    assert op.draw_ranks(pick, torch.Size((4,)), 20, device).tolist() == [10, 8, 13, 4]


# The Triton search: its result is exact whatever its shadow. On the CPU it is interpreted.

ROUNDINGS = [torch.float16, torch.int8]


def by_triton(
    query: Tensor,
    queue: Tensor,
    k: int,
    dtype: torch.dtype = torch.float16,
    *,
    ids: tuple[Tensor, Tensor] | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    rank: Tensor | None = None,
    shadow: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    shadow = shadow or op.make_shadow(queue, dtype)
    (query_id, queue_id), (query_label, queue_label) = ids or (None, None), labels or (None, None)
    return op.search_triton(
        query, queue, k, query_id, queue_id, query_label, queue_label, rank, [], shadow
    )


def assert_exact(found: tuple[Tensor, ...], query: Tensor, queue: Tensor, k: int) -> None:
    """Scores of the definition, bit by bit, and its slots."""
    values, indices = definition(query, queue, k)
    assert torch.equal(found[0], values)
    assert torch.equal(found[1], indices)


class Spy:
    """Calls a kernel, and tells before and after of its grid and arguments by name."""

    def __init__(
        self, kernel: Any, tell: Callable[[tuple[int, ...], dict[str, Any]], None]
    ) -> None:
        self.kernel, self.tell = kernel, tell

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            self.tell(grid, {**dict(zip(names, args, strict=False)), **kwargs})
            self.kernel[grid](*args, **kwargs)

        return launch


def spy_on(
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    tell: Callable[[tuple[int, ...], dict[str, Any]], None],
) -> None:
    from maect_fast.kernels.queue_topk import triton_kernel

    monkeypatch.setattr(triton_kernel, kernel, Spy(vars(triton_kernel)[kernel], tell))


def count_rescues(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the rows that each search by the certificate's verdict does by brute force."""
    rescues: list[int] = []

    def tell(grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        verdict = arguments["verdict_ptr"].view(-1, 5)[: grid[0], 0]
        rescues.append(int((verdict < torch.inf).sum()))

    spy_on(monkeypatch, "_rescue_kernel", tell)
    return rescues


def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen groups that a row may look into."""
    from maect_fast.kernels.queue_topk import triton_kernel

    for name in ("RANK", "RESCUE"):
        tables = vars(triton_kernel)[name]
        few = {
            dtype: tuple(replace(row, blocks={**row.blocks, "C": 16}) for row in rows)
            for dtype, rows in tables.items()
        }
        monkeypatch.setattr(triton_kernel, name, few)


@pytest.mark.parametrize(
    ("dtype", "is_large"), [*((dtype, False) for dtype in ROUNDINGS), (torch.float16, True)]
)
@pytest.mark.parametrize(("B", "Q", "D"), [(3, 500, 64), (1, 129, 37), (66, 300, 300)])
def test_group_maxima_are_those_of_the_scores(
    B: int, Q: int, D: int, dtype: torch.dtype, is_large: bool, device: torch.device
) -> None:
    """First and second maxima of strided groups of pairs, in spans of two tiles.

    The row for many queries has slices of its own for features and takes no more than 256.
    """
    from maect_fast.kernels.queue_topk import triton_score

    D = min(D, 256) if is_large else D

    query, queue = unit_rows(B, D, seed=1).to(device), unit_rows(Q, D, seed=2).to(device)
    rows, bound = op.make_shadow(queue, dtype)
    first = query.new_empty(B, triton_score.num_groups(Q, 256))
    second = torch.empty_like(first, dtype=torch.int16)
    reach = query.new_zeros(triton_score.MAX_PARTS, 2)
    row = triton_score.TWO_VIEWS if is_large else None
    arguments = (query, rows, bound, first, second, reach)
    parts = triton_score.score(*arguments, num_slots=Q, span=256, row=row)
    assert torch.equal(reach[:parts].amax(0), bound[:, :2].amax(0))
    if dtype == torch.int8:
        unit = query.double().abs().amax(1, keepdim=True) / 127
        rounded = (query / unit).round() * unit
    else:
        rounded = query.half().double()
    scale = bound[:, 2].repeat_interleave(128).double()
    score = rounded @ (rows[:, :D].double() * scale[:, None]).T
    # Behind the queue a program meets what is left of its last tile.
    tile = 64 if is_large else 128
    score = score[:, : -(-Q // tile) * tile]
    score = torch.nn.functional.pad(score, (0, -score.shape[1] % 256), value=-torch.inf)
    # [B, spans, pairs, pair, groups of a span] to maxima of pairs, and these by group.
    pairs = score.view(B, -1, 16, 2, 8).amax(3)
    first, second = first.view(B, -1, 8), (second.int() << 16).view(torch.float32).view(B, -1, 8)
    number = (first.view(torch.int32) & 15).long()
    # The query is normalised once more, so that a feature may be rounded otherwise.
    slack = 1e-5 if dtype == torch.float16 else 1e-3
    tagged = pairs.gather(2, number[:, :, None]).squeeze(2)
    for best in (tagged, pairs.amax(2)):
        assert torch.allclose(first.double(), best, rtol=2.0**-18, atol=slack)
    rest = pairs.scatter(2, number[:, :, None], -torch.inf).amax(2)
    assert (second >= rest - slack).all()
    assert (second <= rest + rest.abs() / 128 + slack).all()


@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.int8)], ids=str)
@pytest.mark.parametrize(
    "kind", [kind if kind in HARDEST else slow(kind) for kind in QUEUES], ids=list(QUEUES)
)
@pytest.mark.parametrize(("k", "D"), [(20, 37), slow(1, 64)])
def test_triton_gives_the_bits_of_fp64(
    kind: str, k: int, D: int, dtype: torch.dtype, device: torch.device
) -> None:
    queue = QUEUES[kind](700, D).contiguous().to(device)
    query = torch.cat((clustered(3, D, 10, 0.05, 3), 5 * unit_rows(2, D, seed=1))).to(device)
    assert_exact(by_triton(query, queue, k, dtype), query, queue, k)


@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.int8)], ids=str)
@pytest.mark.parametrize(
    "kind", [slow("random"), slow("clusters"), "near duplicates", slow("duplicates")]
)
def test_triton_is_right_where_its_candidates_are_not_enough(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    few_candidates(monkeypatch)
    rescues = count_rescues(monkeypatch)
    queue = QUEUES[kind](500, 32).contiguous().to(device)
    query = clustered(5, 32, 10, 0.05, 3).to(device)
    for k, shadow in ((4, None), (20, op.make_shadow(queue, dtype))):
        rescues.clear()
        assert_exact(by_triton(query, queue, k, dtype, shadow=shadow), query, queue, k)
    # Twenty of the first sixteen groups' pairs.
    assert rescues == [5]


@pytest.mark.parametrize("fails", ["margin", "own slots"])
def test_rows_that_fail_are_done_again(
    fails: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Nearly equal rows together, from fp32; rows with many own slots each by what it reaches."""
    few_candidates(monkeypatch)
    verdicts: list[Tensor] = []
    spy_on(monkeypatch, "_rescue_kernel", lambda _, x: verdicts.append(x["verdict_ptr"]))
    k, D, Q = 4, 32, 500
    ids = None
    *rows, centre = unit_rows(7, D, seed=1).to(device)
    query, queue = torch.stack(rows), unit_rows(Q, D, seed=2).to(device)
    if fails == "margin":
        # All scores of a row lie within twice what fp16 may err, and far apart in fp32.
        queue = normalize(centre + 1e-3 * queue, dim=-1)
        query = normalize(centre + query, dim=-1)
    else:
        queue[::7] = query[0]
        queue_id = torch.arange(Q, device=device).remainder(7)
        ids = torch.zeros(6, dtype=torch.int64, device=device), queue_id
    found = by_triton(query, queue, k, ids=ids)
    if ids is None:
        assert_exact(found, query, queue, k)
    else:
        expected = reference.queue_topk(query, queue, k, *ids, None, None, None)
        assert torch.equal(found[1], expected.indices)
    verdict = verdicts[0].view(-1, 5)[:6]
    wanted = verdict[:, 3].sum()
    if fails == "margin":
        assert found[5].all()
        # More than four times the 32 groups; and then nothing else mattered.
        assert wanted > 4 * 32
        assert (verdict[:, 0] == torch.inf).all()
    else:
        assert found[5][0]
        assert (verdict[found[5], 0] < torch.inf).all()


def test_scores_made_again_are_right_to_their_margin(device: torch.device) -> None:
    """Also between the groups' maxima that the certificate reads, tags included."""
    from search_kernels import score_again

    from maect_fast.kernels.queue_topk.triton_score import AGAIN_ERROR

    query, queue = 3 * unit_rows(16, 70, seed=1).to(device), unit_rows(300, 70, seed=2).to(device)
    norm = query.double().norm(dim=1).float()
    first = torch.full((16, 16), torch.nan, device=device)
    second = torch.zeros(16, 16, dtype=torch.int16, device=device)
    score_again[(1,)](query, queue, first, second, norm, 15, 300, 16, 70)
    score = (query / norm[:, None]).double() @ queue.double().T
    # Slots beyond the queue score 0.
    pairs = torch.nn.functional.pad(score, (0, 212)).view(16, 2, 16, 2, 8).amax(3)
    best = pairs.amax(2).view(16, 16)
    number = (first.view(torch.int32) & 15).long().view(16, 2, 1, 8)
    tagged = pairs.gather(2, number).view(16, 16)
    margin = float(AGAIN_ERROR.value) + 16 * 2.0**-23
    assert first[15].isnan().all()
    for score in (best, tagged):
        assert (first.double() - score)[:15].abs().max() <= margin
    rest = pairs.scatter(2, number, -torch.inf).amax(2).view(16, 16)
    bound = (second.int() << 16).view(torch.float32)
    assert (bound[:15] >= rest[:15] - margin).all()


def test_exact_scores_do_not_depend_on_how_many_are_made_at_a_time(device: torch.device) -> None:
    """Sums that cancel, where any other order of the features gives other bits."""
    from search_kernels import exact_scores

    for D in (37, 300):
        generator = torch.Generator().manual_seed(D)
        queue = torch.randn(64, D, generator=generator).to(device)
        query = torch.randn(D, generator=generator).to(device)
        # Terms of 2^40 that cancel in the end: until then, others lose most of their bits.
        half = D // 2
        queue[:, half : 2 * half] = queue[:, :half]
        query[:half:2] *= 2.0**40
        query[half : 2 * half : 2] = -query[:half:2]
        found = []
        for num_rows in (1, 2, 16, 64):
            found.append(torch.empty(64, device=device))
            exact_scores[(64 // num_rows,)](query, queue, found[-1], 64, D, num_rows)
        for other in found[1:]:
            assert torch.equal(found[0], other)
        product = query.double() * queue.double()
        in_order = torch.zeros(64, dtype=torch.float64, device=device)
        for d in range(D):
            in_order += product[:, d]
        assert not torch.equal(in_order.float(), found[0])


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
def test_triton_needs_no_rescue_of_usual_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    rescues = count_rescues(monkeypatch)
    queue, query = unit_rows(3000, 64, seed=2).to(device), unit_rows(9, 64, seed=1).to(device)
    assert_exact(by_triton(query, queue, 20, dtype), query, queue, 20)
    assert rescues == [0]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_triton_gives_the_bits_of_fp64_on_500_queues(part: int, device: torch.device) -> None:
    """Of any size, with equal and nearly equal rows, ids, missing numbers."""
    for seed in range(50 * part, 50 * part + 50):
        generator = torch.Generator().manual_seed(seed)
        sizes = [(1, 4), (1, 500), (1, 80), (1, 201 if seed % 5 == 0 else 31)]
        B, Q, D, k = (int(torch.randint(*size, (), generator=generator)) for size in sizes)
        k = min(k, Q)
        queue = normalize(torch.randn(Q, D, generator=generator), dim=-1)
        query = torch.randn(B, D, generator=generator)
        if seed % 3 == 1:
            queue = queue[torch.randint(1 + Q // 3, (Q,), generator=generator) % Q]
        elif seed % 3 == 2:
            queue = normalize(queue[:1] + 10.0 ** -(seed % 7) * queue, dim=-1)
        queue_id = torch.randint(-1, 1 + Q // 4, (Q,), generator=generator)
        ids = (torch.arange(B), queue_id) if seed % 2 else None
        if ids is not None:
            ids = ids[0].to(device), ids[1].to(device)
        query, queue = query.to(device), queue.to(device)
        found = by_triton(query, queue, k, ROUNDINGS[seed % 4 // 2], ids=ids)
        values, slots = definition(query, queue, Q)
        if ids is not None:
            own = ids[1] == ids[0][:, None]
            score = torch.empty_like(values).scatter(1, slots, values)
            score = score.masked_fill(own, -torch.inf)
            values, slots = score.sort(dim=1, descending=True, stable=True)
            values = values.masked_fill(own.gather(1, slots), -1)
        assert torch.equal(found[0], values[:, :k]), seed
        assert torch.equal(found[1], slots[:, :k]), seed


@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.int8)], ids=str)
@pytest.mark.parametrize(
    ("B", "Q", "D", "k"),
    [
        *((1, 1, 1, 1), (2, 2, 2, 2), (3, 191, 3, 64), (2, 193, 16, 100), (2, 500, 31, 200)),
        *(
            (3, 700, 300, 20),
            (1, 150, 1030, 2),
            (5, 50, 65, 7),
            (3, 197, 257, 9),
            (2, 1100, 8, 130),
        ),
    ],
    ids=str,
)
def test_triton_takes_any_size(
    B: int, Q: int, D: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    query, queue = unit_rows(B, D, seed=1).to(device), unit_rows(Q, D, seed=2).to(device)
    assert_exact(by_triton(query, queue, k, dtype), query, queue, k)


@pytest.mark.parametrize(
    "dtype", [torch.float32, slow(torch.bfloat16), slow(torch.float16)], ids=str
)
def test_triton_reads_any_layout(dtype: torch.dtype, device: torch.device) -> None:
    query = unit_rows(5, 40, dtype=dtype, seed=1).to(device)
    queue = unit_rows(300, 40, dtype=dtype, seed=2).to(device)
    rank = torch.arange(5, device=device)
    every_second_row = queue.repeat_interleave(2, dim=0)[::2]
    left_half = queue.repeat(1, 2)[:, :40]
    for rows in (query, query.repeat_interleave(2, dim=0)[::2], query.T.contiguous().T):
        for layout in (queue, every_second_row, left_half):
            found = by_triton(rows, layout, 6, rank=rank)
            assert_exact(found, query.float(), queue.float(), 6)
            assert torch.equal(found[3], queue[found[1][rank, rank]])
    with pytest.raises(RuntimeError, match="'triton' takes a queue whose last stride is 1"):
        queue_topk(query, queue.T.contiguous().T, k=6, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
def test_triton_agrees_on_ids_picks_and_odd_rows(dtype: torch.dtype, device: torch.device) -> None:
    state = random_queue(400, 32, num_ids=6, num_classes=3, device=device)
    query = unit_rows(2, 6, 32, seed=1).to(device)
    query[0, 3], query[1, 4], query[1, 5, 6] = torch.nan, 0, torch.inf
    ids = torch.arange(6, device=device)
    rank = torch.arange(12, device=device).view(2, 6)
    for spoil in ("nothing", "nan", "infinity"):
        if spoil == "nan":
            state.queue[[7, 199]] = torch.nan
        elif spoil == "infinity":
            state.queue[70, 3] = torch.inf
            state.queue[71] = 1e30
        both = {"ids": (ids, state.queue_id), "labels": (ids % 3, state.queue_y)}
        found = by_triton(query, state.queue, 20, dtype, **both, rank=rank)
        expected = reference.queue_topk(query, state.queue, 20, *both["ids"], *both["labels"], rank)
        # The reference sums in fp32.
        finite = expected.values.isfinite()
        assert torch.equal(found[0][~finite], expected.values[~finite])
        norm = state.queue.double().norm(dim=1)[expected.indices]
        error = (found[0].double() - expected.values.double()).abs() / norm
        assert error[finite].max() <= 4 * torch.finfo(torch.float32).eps
        for one, other in zip(found[1:5], expected[1:5], strict=True):
            assert other is not None
            assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.slow
def test_triton_searches_a_gallery_part_by_part(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Parts of the gallery and blocks of rows, as they come from the bounds on memory."""
    from maect_fast.kernels.queue_topk import triton_kernel

    state = random_queue(700, 16, num_ids=5, num_classes=3, device=device)
    # The best in every part, own slots and equal ones on both sides of their border.
    state.queue[[3, 255, 256, 699]] = state.queue[100].clone()
    query = torch.cat((state.queue[100:102], unit_rows(5, 16, seed=1).to(device))).expand(2, 7, 16)
    ids = torch.tensor([2, 0, 1, 2, -1, 9, 3], device=device)
    search = partial(
        queue_topk, query, state, k=30, query_id=ids, query_label=ids % 3, backend="triton"
    )
    whole = search(pick=Pick(1, 2, 0, row=9))
    monkeypatch.setattr(triton_kernel, "SHADOW_BYTES", 256 * 32 * 2)
    monkeypatch.setattr(triton_kernel, "ROW_BYTES", 3 * triton_kernel.row_bytes(16, C=256, N=512))
    grids: list[tuple[int, ...]] = []
    spy_on(monkeypatch, "_rank_kernel", lambda grid, _: grids.append(grid))
    parts = search(pick=Pick(1, 2, 0, row=9))
    assert grids == [(3,), (3,), (3,), (3,), (2,)] * 3
    for one, other in zip(whole, parts, strict=True):
        assert same(one, other)


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
def test_a_foreign_shadow_changes_no_result(dtype: torch.dtype, device: torch.device) -> None:
    """Another queue's, as after loading a checkpoint into the buffer behind its back."""
    queue, query = unit_rows(300, 32, seed=2).to(device), unit_rows(4, 32, seed=1).to(device)
    foreign = op.make_shadow(unit_rows(300, 32, seed=3).to(device), dtype)
    assert_exact(by_triton(query, queue, 9, shadow=foreign), query, queue, 9)


def test_triton_draws_the_same_ranks(device: torch.device) -> None:
    state = random_queue(60, 8, num_ids=60, num_classes=3, device=device)
    query = unit_rows(2, 5, 8, seed=1).to(device)
    rows = torch.randint(2**40, (5,), device=device)
    for pick in (
        Pick(2**64 - 1, 0, 0),
        Pick(2**40 + 5, torch.tensor(2**33 + 1, device=device), 2, row=511),
        Pick(torch.tensor(2**63 - 1, device=device), 2**62, torch.tensor(2), row=rows),
        Pick(3, 7, 0, row=torch.tensor(9, device=device)),
    ):
        found = queue_topk(query, state, k=20, pick=pick, backend="triton")
        rank = reference.draw_ranks(pick, query.shape[:-1], 20, device)
        assert same(found.picked_index, found.indices.gather(-1, rank[..., None])[..., 0])


def meta_search(monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[], object], list[str]]:
    """The search of a training step and its enqueue on tensors without values; their launches.

    Whatever asked for a value, as it would of a GPU, would fail.
    """
    from maect_fast.kernels.queue_topk import triton_kernel, triton_queue, triton_score

    launches: list[str] = []

    class Launch:
        def __init__(self, kernel: Any) -> None:
            self.name = kernel.fn.__name__

        def __getitem__(self, _: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: launches.append(self.name)

    for module in (triton_kernel, triton_queue, triton_score):
        for name in ("_tile", "_advance", "_score", "_rank", "_rescue"):
            if kernel := vars(module).get(f"{name}_kernel"):
                monkeypatch.setattr(module, f"{name}_kernel", Launch(kernel))
    n, Q, D, k = 512, 65_536, 256, 20
    empty = partial(torch.empty, device="meta")
    ids = partial(empty, dtype=torch.int64)
    shadow = empty(Q, D, dtype=torch.float16), empty(Q // 128, 3)
    queue, projected = empty(Q, D), empty(2, n, D, dtype=torch.bfloat16)
    draw = op.pick_arguments(Pick(0, ids(()), 0, row=n), queue.device)
    labels = (ids(n), ids(Q), ids(n), ids(Q))

    def step() -> object:
        found = op.search_triton(projected, queue, k, *labels, None, draw, shadow)
        triton_queue.enqueue(queue, ids(Q), ids(Q), ids(1), *shadow, projected[0], ids(n), ids(n))
        return found

    return step, launches


def test_a_step_takes_five_launches_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, launches = meta_search(monkeypatch)
    step()
    search, update = launches[:3], launches[3:]
    assert search == ["_score_kernel", "_rank_kernel", "_rescue_kernel"]
    assert update == ["_tile_kernel", "_advance_kernel"]


def test_a_search_of_both_views_takes_15_mb(monkeypatch: pytest.MonkeyPatch) -> None:
    step, _ = meta_search(monkeypatch)
    with Allocated() as allocated:  # type: ignore[no-untyped-call]
        found = step()
    assert isinstance(found, tuple)
    results = sum(x.numel() * x.element_size() for x in found)
    # The ids that the enqueue is called with are none of the search's.
    others = 8 * (2 * 65_536 + 1 + 2 * 512)
    assert 12e6 < allocated.num_bytes - results - others <= 15e6


@pytest.mark.parametrize("shadow", ROUNDINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_captured_step_draws_anew_in_every_replay(
    dtype: torch.dtype, shadow: torch.dtype, no_sync: NoSync, cuda: torch.device
) -> None:
    eager, replayed = (
        with_shadow(random_queue(3000, 64, num_ids=300, num_classes=3, device=cuda), dtype=shadow)
        for _ in range(2)
    )
    query = unit_rows(2, 100, 64, dtype=dtype, device=cuda, seed=1)
    step = torch.zeros((), dtype=torch.int64, device=cuda)
    step_once(query, eager, step)
    step_once(query, replayed, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), no_sync():
        found = step_once(query, replayed, step)
    picks = []
    for i in range(1, 4):
        step.fill_(i)
        graph.replay()
        expected = step_once(query, eager, step)
        for one, other in zip((*found, *replayed[:4]), (*expected, *eager[:4]), strict=True):
            assert same(one, other)
        assert found.picked_index is not None
        picks.append(found.picked_index.tolist())
    assert picks[0] != picks[1] != picks[2]


@pytest.mark.parametrize("shadow", ROUNDINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_runs_on_a_full_device_are_bitwise_equal(
    dtype: torch.dtype, shadow: torch.dtype, cuda: torch.device
) -> None:
    queue = normalize(torch.randn(65_536, 256, device=cuda), dim=-1)
    query = torch.randn(2, 512, 256, device=cuda, dtype=dtype)
    rows = op.make_shadow(queue, shadow)
    first, *others = (by_triton(query, queue, 20, shadow=rows) for _ in range(4))
    for other in others:
        assert all(map(torch.equal, first, other))
    for view in range(2):
        assert_exact(tuple(x[view] for x in first[:2]), query[view].float(), queue, 20)


def test_a_search_on_a_device_takes_16_mb(cuda: torch.device) -> None:
    """What the allocator says of the sizes of a step."""
    queue = normalize(torch.randn(65_536, 256, device=cuda), dim=-1)
    query = torch.randn(2, 512, 256, device=cuda, dtype=torch.bfloat16)
    rows = op.make_shadow(queue, torch.float16)
    by_triton(query, queue, 20, shadow=rows)
    with PeakMemory(cuda) as peak:
        by_triton(query, queue, 20, shadow=rows)
    assert 0 < peak.num_bytes <= 17e6


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_more_numbers_than_32_bits_count(
    dtype: torch.dtype, needs_gib: Callable[[float], None], cuda: torch.device
) -> None:
    needs_gib(24)
    check_large(8, 2**31 // 256 + 1000, 256, dtype, cuda)


def check_large(B: int, Q: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
    """Rows at the end of the queue are found, by parts and by a whole shadow, and replaced."""
    queue = torch.randn(Q, D, device=device, dtype=dtype).mul_(D**-0.5)
    query = torch.randn(B, D, device=device, dtype=dtype)
    # The last row is the first query's nearest, the first row the second's.
    queue[-1], queue[0] = 2 * query[0], 2 * query[1]
    values, slots = [], []
    for start in range(0, Q, 1 << 20):
        found = definition(query.float(), queue[start : start + (1 << 20)], min(9, Q - start))
        values.append(found[0])
        slots.append(found[1] + start)
    best, place = torch.cat(values, 1).sort(dim=1, descending=True, stable=True)
    expected = best[:, :9], torch.cat(slots, 1).gather(1, place)[:, :9]
    none = torch.full((Q,), -1, device=device)
    pointer = torch.full((1,), Q - 2, device=device)
    state = with_shadow(QueueState(queue, none.clone(), none, pointer), dtype=torch.float16)
    shadow = state.shadow
    assert shadow is not None
    assert expected[1][:2, 0].tolist() == [Q - 1, 0]
    by_parts = queue_topk(query, queue, k=9, backend="triton")
    for results in (by_parts[:2], by_triton(query, queue, 9, shadow=shadow)[:2]):
        assert same(results[0], expected[0])
        assert same(results[1], expected[1])
    enqueue(state, query[:4])
    for i, slot in enumerate((Q - 2, Q - 1, 0, 1)):
        unit = normalize(query[i].double(), dim=0)
        torch.testing.assert_close(queue[slot].double(), unit, rtol=0, atol=4e-3)
    tiles = slice(0, 128), slice((Q - 1) // 128 * 128, Q)
    for tile in tiles:
        anew = op.make_shadow(queue[tile], torch.float16)
        assert torch.equal(shadow[0][tile], anew[0][: len(queue[tile])])
        assert torch.equal(shadow[1][tile.start // 128], anew[1][0])


# The ring buffer.


def simulate(state: QueueState, batches: list[tuple[Tensor, Tensor, Tensor]]) -> QueueState:
    """Row by row, in plain Python."""
    queue, queue_y, queue_id, queue_ptr = (x.clone() for x in state[:4])
    for rows, ids, labels in batches:
        for row, sample, label in zip(rows, ids, labels, strict=True):
            slot = int(queue_ptr)
            queue[slot] = normalize(row.double(), dim=0, eps=1e-12)
            queue_id[slot], queue_y[slot] = sample, label
            queue_ptr[0] = (slot + 1) % len(queue)
    return QueueState(queue, queue_y, queue_id, queue_ptr)


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("master", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("Q", "sizes"), [(300, [7, 200, 150, 601, 1]), (129, [128, 3, 1, 130]), (256, [128, 128, 5])]
)
def test_enqueue_keeps_the_shadow(
    Q: int, sizes: list[int], master: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    """Bit by bit what is made anew, whatever tiles a batch ends in."""
    state = random_queue(Q, 40, num_ids=Q, num_classes=3, device=device)
    state = with_shadow(state._replace(queue=state.queue.to(master)), dtype=dtype)
    for i, B in enumerate(sizes):
        rows = 3 * unit_rows(B, 40, device=device, seed=i)
        if i == 1:
            rows[0], rows[1], rows[2, 5] = torch.nan, 0, torch.inf
        enqueue(state, rows)
        anew = op.make_shadow(state.queue, dtype)
        assert state.shadow is not None
        for one, other in zip(state.shadow, anew, strict=True):
            assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
def test_the_bounds_of_a_shadow_hold(dtype: torch.dtype, device: torch.device) -> None:
    queue = (unit_rows(300, 40, seed=2) * torch.logspace(-5, 2, 300)[:, None]).to(device)
    rows, bound = op.make_shadow(queue, dtype)
    furthest, longest, scale = bound.repeat_interleave(128, dim=0)[:300].double().unbind(1)
    rounded = rows[:300, :40].double() * scale[:, None]
    distance = (queue.double() - rounded).norm(dim=1)
    norm = queue.double().norm(dim=1)
    for largest, each in ((furthest, distance), (longest, norm)):
        assert (each <= largest * (1 + 1e-6)).all()
        per_tile = torch.stack([x.max() for x in each.split(128)])
        assert torch.allclose(per_tile, largest[[0, 128, 256]], rtol=1e-5)
    assert not rows[300:].any()
    assert not rows[:, 40:].any()


@pytest.mark.parametrize(
    "sizes", [[1, 1, 1], [4, 4, 4], [7, 7], [0, 3, 0], [10], [11], [25], [3, 37, 5], [9, 2, 20]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shadow", SHADOWS, ids=str)
def test_enqueue_wraps_round(
    sizes: list[int], dtype: torch.dtype, shadow: torch.dtype | None, device: torch.device
) -> None:
    state = shadowed(random_queue(10, 6, num_ids=10, num_classes=3, device=device), shadow)
    batches = [
        (
            (2 * unit_rows(B, 6, device=device, seed=i)).to(dtype),
            torch.arange(B, device=device) + 100 * i,
            torch.arange(B, device=device) % 3,
        )
        for i, B in enumerate(sizes)
    ]
    expected = simulate(state, batches)
    pointers = [x.data_ptr() for x in state[:4]]
    for rows, ids, labels in batches:
        enqueue(state, rows, sample_id=ids, label=labels)
    assert [x.data_ptr() for x in state[:4]] == pointers
    torch.testing.assert_close(state.queue, expected.queue, rtol=0, atol=1e-7)
    for mine, theirs in zip(state[1:4], expected[1:4], strict=True):
        assert torch.equal(mine, theirs)


class WrittenSlots(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the slots of every indexed write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots: list[list[int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.index_copy_.default:
            self.slots.append(args[2].tolist())
        return func(*args, **(kwargs or {}))


def test_each_slot_has_one_writer(device: torch.device) -> None:
    """Of more than Q rows; two writers of one slot would race on a GPU."""
    state = random_queue(7, 4, num_ids=7, num_classes=2, device=device)
    ids = torch.arange(19, device=device)
    with WrittenSlots() as written:
        reference.enqueue(*state[:4], unit_rows(19, 4, device=device), ids, ids)
    assert [sorted(slots) for slots in written.slots] == [list(range(7))] * 3


@pytest.mark.parametrize("shadow", SHADOWS, ids=str)
def test_enqueue_without_ids_and_labels_clears_them(
    shadow: torch.dtype | None, device: torch.device
) -> None:
    state = shadowed(random_queue(5, 4, num_ids=5, num_classes=2, device=device), shadow)
    kept = state.queue_y[3:].tolist()
    enqueue(state, torch.ones(3, 4, device=device))
    assert state.queue_id.tolist() == [-1, -1, -1, 3, 4]
    assert state.queue_y.tolist() == [-1, -1, -1, *kept]
    assert state.queue_ptr.tolist() == [3]


@pytest.mark.parametrize("shadow", SHADOWS, ids=str)
def test_enqueue_keeps_nan_and_zero_rows_as_they_come(
    shadow: torch.dtype | None, device: torch.device
) -> None:
    state = shadowed(random_queue(4, 4, num_ids=4, num_classes=2, device=device), shadow)
    rows = torch.zeros(2, 4, device=device)
    rows[1] = torch.nan
    enqueue(state, rows)
    assert torch.equal(state.queue[0], torch.zeros(4, device=device))
    assert state.queue[1].isnan().all()
    assert state.queue[2:].norm(dim=1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("shadow", SHADOWS, ids=str)
def test_enqueued_rows_are_found_and_expire(
    shadow: torch.dtype | None, device: torch.device
) -> None:
    state = shadowed(random_queue(8, 16, num_ids=8, num_classes=2, device=device), shadow)
    row = 5 * unit_rows(1, 16, device=device, seed=9)
    enqueue(state, row, sample_id=torch.tensor([77], device=device))
    found = queue_topk(row, state, k=1)
    assert found.indices.tolist() == [[0]]
    assert float(found.values) == pytest.approx(1)
    enqueue(state, unit_rows(7, 16, device=device, seed=10))
    assert 77 in state.queue_id
    enqueue(state, unit_rows(1, 16, device=device, seed=11))
    assert 77 not in state.queue_id


@pytest.mark.parametrize("shadow", SHADOWS, ids=str)
def test_the_same_rows_in_other_batches_give_the_same_bits(
    shadow: torch.dtype | None, device: torch.device
) -> None:
    """A resumed run or another world size may cut the stream elsewhere."""
    rows = unit_rows(23, 8, device=device, seed=5)
    states = [
        shadowed(random_queue(10, 8, num_ids=10, num_classes=2, device=device), shadow)
        for _ in range(2)
    ]
    for cuts, state in zip(([0, 23], [0, 1, 9, 12, 23]), states, strict=True):
        for start, stop in pairwise(cuts):
            enqueue(state, rows[start:stop], sample_id=torch.arange(start, stop, device=device))
    for one, other in zip(*(x[:4] for x in states), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("rows", "ids", "message"),
    [
        (torch.ones(3, 5), None, r"rows: expected floats \[B, 4\]"),
        (torch.ones(4), None, r"rows: expected floats \[B, 4\]"),
        (torch.ones(3, 4).long(), None, r"rows: expected floats \[B, 4\]"),
        (torch.ones(3, 4), torch.arange(2), r"sample_id: expected torch\.int64 \[3\]"),
        (torch.ones(3, 4), torch.ones(3), r"sample_id: expected torch\.int64 \[3\]"),
    ],
)
def test_enqueue_errors(rows: Tensor, ids: Tensor | None, message: str) -> None:
    state = random_queue(5, 4, num_ids=5, num_classes=2)
    with pytest.raises(ValueError, match=message):
        enqueue(state, rows, sample_id=ids)


def test_triton_launches_on_the_inputs_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may not be the current one: shadow, update, search."""
    devices: list[torch.device] = []

    def current(x: Tensor) -> Any:
        devices.append(x.device)
        return nullcontext()

    monkeypatch.setattr(gpu, "current", current)
    state = with_shadow(random_queue(5, 4, num_ids=5, num_classes=2))
    enqueue(state, state.queue[:2])
    queue_topk(state.queue[:1], state, k=2, backend="triton")
    assert devices == [state.queue.device] * 3


@pytest.mark.parametrize(
    ("arch", "dtype", "k", "backend"),
    [
        (90, torch.float32, 20, "triton"),
        (80, torch.bfloat16, 200, "triton"),
        (75, torch.float32, 20, "reference"),
        (90, torch.float64, 20, "reference"),
        (90, torch.float32, 201, "reference"),
    ],
)
def test_auto_on_cuda_is_triton(
    arch: int, dtype: torch.dtype, k: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "sm_arch", lambda device: arch)
    with FakeTensorMode():
        query, queue = (torch.empty(n, 8, device="cuda", dtype=dtype) for n in (3, 300))
        assert op._choose(query, queue, k) == backend


def test_a_shadow_is_made_where_triton_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_queue(5, 4, num_ids=5, num_classes=2)
    with pytest.raises(ValueError, match=r"dtype: expected torch\.float16 or torch\.int8, got"):
        with_shadow(state, dtype=torch.bfloat16)
    monkeypatch.setattr(gpu, "_interprets", lambda: False)
    assert with_shadow(state) is state


# Registration.


def op_arguments(device: torch.device, batch: tuple[int, ...]) -> list[tuple[Any, ...]]:
    state = random_queue(40, 16, num_ids=9, num_classes=3, device=device)
    query = unit_rows(*batch, 6, 16, device=device, seed=1)
    ids = torch.arange(6, device=device)
    rank = torch.randint(5, (*batch, 6)).to(device)
    draw = op.pick_arguments(Pick(1, torch.tensor(2, device=device), 0, ids), device)
    ids_and_labels = (ids, state.queue_id, ids, state.queue_y)
    return [
        (query, state.queue, 5, None, None, None, None, None, []),
        (query, state.queue, 5, *ids_and_labels[:2], None, None, rank, []),
        (query, state.queue, 5, *ids_and_labels, None, draw),
    ]


@pytest.mark.parametrize("batch", [(), slow((2,))])
def test_opcheck_search(batch: tuple[int, ...], device: torch.device) -> None:
    for arguments in op_arguments(device, batch):
        torch.library.opcheck(op.queue_topk, (*arguments, [], "auto"))
    shadow = op.make_shadow(arguments[1], torch.float16)
    torch.library.opcheck(op.queue_topk, (*arguments, shadow, "triton"))


@pytest.mark.parametrize("dtype", SHADOWS)
def test_opcheck_enqueue(dtype: torch.dtype | None, device: torch.device) -> None:
    state = shadowed(random_queue(10, 4, num_ids=10, num_classes=3, device=device), dtype)
    buffers = (*state[:4], *(state.shadow or (None, None)))
    rows, ids = unit_rows(13, 4, device=device), torch.arange(13, device=device)
    torch.library.opcheck(op.enqueue, (*buffers, rows, ids, None))
    torch.library.opcheck(op.enqueue, (*buffers, rows[:3], None, ids[:3]))


def step_once(query: Tensor, state: QueueState, step: int | Tensor) -> TopK:
    ids = torch.arange(query.shape[1], device=query.device)
    pick = Pick(3, step, 0)
    found = queue_topk(query, state, k=4, query_id=ids, query_label=ids, pick=pick)
    enqueue(state, query[0], sample_id=ids, label=ids)
    return found


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    compiled = torch.compile(step_once, fullgraph=True, backend="aot_eager")
    eager, other = (random_queue(30, 8, num_ids=9, num_classes=3, device=device) for _ in range(2))
    steps: list[int | Tensor] = [1, 2, torch.tensor(3, device=device)]
    for n, step in zip((7, 7, 5), steps, strict=True):
        query = unit_rows(2, n, 8, device=device, seed=n)
        found, expected = compiled(query, eager, step), step_once(query, other, step)
        for one, another in zip((*found, *eager[:4]), (*expected, *other[:4]), strict=True):
            assert same(one, another)
