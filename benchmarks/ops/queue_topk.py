"""Nearest neighbours of B queries in a queue of Q rows, own samples excluded.

`topk` gives the K best scores and their slots. `find_nn` is what a training step needs of them:
one of the K neighbours per query, its row, and whether its label is the query's; the random choice
is part of the call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maect_fast.benchmarks.registry import (
    EAGER,
    OURS,
    Call,
    Op,
    Outputs,
    Sizes,
    UnavailableError,
    compile_peer,
    import_peer,
    judged_samples,
)
from maect_fast.kernels import Pick, QueueState, TopK, queue_topk, with_shadow
from maect_fast.kernels._common import cpp
from maect_fast.kernels.queue_topk import op
from maect_fast.testing import error_budget, random_queue, unit_rows

__all__ = ["OP"]

# (B, Q, K), D = 256, the usual step first: B 1024 is both views of 512 images.
CPU = (
    *((512, 65_536, 20), (1024, 65_536, 20), (64, 65_536, 20), (16, 65_536, 20)),
    *((512, 65_536, 1), (512, 65_536, 100), (512, 8192, 20), (256, 8192, 20)),
    (512, 1_048_576, 20),
)
CUDA = (*CPU, (4096, 65_536, 20), (256, 65_536, 20), (512, 262_144, 20))
# Sizes that are no multiples of anything; (B, Q, K, D).
ODD = ((1, 1, 1), (3, 65, 64), (65, 1000, 20), (129, 8191, 1), (33, 4097, 20, 64))


def _sizes(B: int, Q: int, K: int, D: int = 256) -> Sizes:
    return {"B": B, "Q": Q, "D": D, "K": K}


@dataclass(frozen=True, slots=True)
class Inputs:
    query: Tensor
    """[B, D], unit rows."""
    query_id: Tensor
    """[B] int64; each sample has exactly one slot in the queue."""
    query_label: Tensor
    """[B] int64."""
    state: QueueState
    """The queue is the fp32 master copy, whatever the queries' dtype."""
    k: int

    @property
    def judged(self) -> Tensor:
        """Queries that the gate looks at."""
        return judged_samples(len(self.query), len(self.state.queue), self.query.device)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    B, Q, D = sizes["B"], sizes["Q"], sizes["D"]
    generator = torch.Generator(device).manual_seed(2)
    randint = partial(torch.randint, size=(B,), generator=generator, device=device)
    return Inputs(
        query=unit_rows(B, D, dtype=dtype, device=device, seed=1),
        query_id=randint(Q),
        query_label=randint(10),
        state=random_queue(Q, D, num_ids=Q, num_classes=10, device=device),
        k=sizes["K"],
    )


def _definition(x: Inputs, mode: str, dtype: torch.dtype) -> Outputs:
    """All scores of the judged queries: normalised, the fp32 masters, own slots -1."""
    query, query_id = x.query[x.judged], x.query_id[x.judged]
    scores = F.normalize(query.to(dtype), dim=-1) @ x.state.queue.to(dtype).T
    return {"scores": scores.masked_fill_(x.state.queue_id == query_id[:, None], -1)}


def _check(x: Inputs, found: Outputs, eager: Outputs, truth: Outputs) -> None:
    """By value: the k best scores within the budget, and the slots have the scores they claim."""
    scores = truth["scores"]
    best = scores.topk(x.k).values
    budget = error_budget(eager["scores"].topk(x.k).values, best)
    if "picked_index" in found:
        _check_picks(x, found, scores, best, budget)
        return
    values, indices = (found[name].to(scores.device) for name in ("values", "indices"))
    expected = (len(x.query), x.k)
    assert indices.shape == values.shape == expected, f"shape {list(indices.shape)}"
    values, indices = values[x.judged].double(), indices[x.judged]
    repeated = (indices.sort(-1).values.diff(dim=-1) == 0).any()
    assert not repeated, "a slot occurs twice"
    for name, error in (
        ("values", values - best),
        ("scores of indices", scores.gather(1, indices) - best),
    ):
        worst = error.abs().max().item()
        assert worst <= budget, f"{name}: error {worst:.3g}, budget {budget:.3g}"


def _check_picks(x: Inputs, found: Outputs, scores: Tensor, best: Tensor, budget: float) -> None:
    """Each pick is one of the k nearest, within the budget of their scores."""
    index = found["picked_index"]
    picked = scores.gather(1, index[x.judged, None])
    assert (picked >= best[:, -1:] - budget).all(), "a picked neighbour is not among the k nearest"
    row = x.state.queue[index].to(found["picked_neighbour"].dtype)
    assert torch.equal(found["picked_neighbour"], row), "picked_neighbour is another row"
    hits = x.state.queue_y[index] == x.query_label
    assert int(found["num_hits"]) == int(hits.sum()), "num_hits is wrong"


def _num_bytes(sizes: Sizes, mode: str, itemsize: int) -> int:
    B, Q, D, K = (sizes[letter] for letter in "BQDK")
    rows = (B + Q) * D * itemsize
    # topk: fp32 scores and int64 slots; find_nn: one slot and one fp32 row read and written.
    return rows + (12 * B * K if mode == "topk" else B * (8 + 2 * 4 * D))


def _num_flops(sizes: Sizes, mode: str) -> int:
    return 2 * sizes["B"] * sizes["Q"] * sizes["D"]


OP: Op[Inputs] = Op(
    name="queue_topk",
    letters="BQDK",
    modes=("topk", "find_nn"),
    sizes={
        "cuda": tuple(_sizes(*shape) for shape in CUDA),
        "cpu": tuple(_sizes(*shape) for shape in CPU),
        "check": tuple(_sizes(*shape) for shape in ODD),
        "quick": (_sizes(64, 8192, 20),),
    },
    inputs=_inputs,
    definition=_definition,
    check=_check,
    num_bytes=_num_bytes,
    num_flops=_num_flops,
    products_dtype=torch.bfloat16,
)

Search = Callable[[], tuple[Tensor, Tensor]]


def _finish(x: Inputs, mode: str, search: Search) -> Call:
    """The call of a mode, for a program that only searches."""

    def topk() -> Outputs:
        values, indices = search()
        return {"values": values, "indices": indices}

    def find_nn() -> Outputs:
        _, indices = search()
        rank = torch.randint(x.k, (len(indices), 1), device=indices.device)
        index = indices.gather(1, rank)[:, 0]
        return {
            "picked_index": index,
            "picked_neighbour": x.state.queue[index],
            "num_hits": (x.state.queue_y[index] == x.query_label).sum(),
        }

    return topk if mode == "topk" else find_nn


@OP.provider(OURS)
def ours(x: Inputs, mode: str) -> Call:
    return _ours(x, mode, with_shadow(x.state) if x.query.is_cuda else x.state)


def _ours(x: Inputs, mode: str, state: QueueState) -> Call:
    def topk() -> TopK:
        return queue_topk(x.query, state, k=x.k, query_id=x.query_id)

    # On the device, as a captured step needs it.
    step = torch.zeros((), dtype=torch.int64, device=x.query.device)

    def find_nn() -> TopK:
        return queue_topk(
            x.query,
            state,
            k=x.k,
            query_id=x.query_id,
            query_label=x.query_label,
            pick=Pick(seed=0, step=step, view=0),
        )

    return _outputs(mode, topk if mode == "topk" else find_nn)


@OP.provider(f"{OURS} int8")
def ours_int8(x: Inputs, mode: str) -> Call:
    """The candidates scored in int8; the result is the same."""
    if x.query.is_cuda:
        return _ours(x, mode, with_shadow(x.state, dtype=torch.int8))
    return _ours_by(x, mode, [name for name in _simds(x) if name.endswith("vnni")])


@OP.provider(f"{OURS} fp32")
def ours_fp32(x: Inputs, mode: str) -> Call:
    return _ours_by(x, mode, [name for name in _simds(x) if "_" not in name])


def _simds(x: Inputs) -> list[str]:
    obstacle = cpp.obstacle(x.query)
    if obstacle is not None:
        raise UnavailableError(f"the C++ search {obstacle}")
    names: str = torch.ops.maect_fast.queue_topk_simd()
    return names.split()


def _ours_by(x: Inputs, mode: str, simds: list[str]) -> Call:
    if not simds:
        raise UnavailableError("this CPU has no instructions for it")
    state, pick = x.state, Pick(seed=0, step=0, view=0)

    def call() -> TopK:
        rank = label = None
        if mode == "find_nn":
            label = x.query_label
            rank = op.draw_ranks(pick, x.query.shape[:-1], x.k, x.query.device)
        ids = (x.query_id, state.queue_id, label, None if label is None else state.queue_y)
        return TopK(*op.search_cpp(x.query, state.queue, x.k, *ids, rank, simd=simds[0]))

    return _outputs(mode, call)


def _outputs(mode: str, call: Callable[[], TopK]) -> Call:
    def topk() -> Outputs:
        found = call()
        return {"values": found.values, "indices": found.indices}

    def find_nn() -> Outputs:
        found = call()
        assert found.picked_index is not None
        assert found.picked_neighbour is not None
        assert found.label_hit is not None
        return {
            "picked_index": found.picked_index,
            "picked_neighbour": found.picked_neighbour,
            "num_hits": found.label_hit.sum(),
        }

    return topk if mode == "topk" else find_nn


def _scores_topk(
    query: Tensor, queue: Tensor, query_id: Tensor, queue_id: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The whole score matrix, in the dtype of the queries, then torch.topk."""
    scores = query @ queue.to(query.dtype).T
    scores = scores.masked_fill(queue_id == query_id[:, None], -1)
    values, indices = scores.topk(k)
    return values, indices


@OP.provider(EAGER)
def eager(x: Inputs, mode: str) -> Call:
    arguments = (x.query, x.state.queue, x.query_id, x.state.queue_id, x.k)
    return _finish(x, mode, lambda: _scores_topk(*arguments))


@OP.provider("official", capturable=False)
def official(x: Inputs, mode: str) -> Call:
    """find_nn and calculate_nn_accuracy of models/contrastive_heads/base, in its casts and order.

    Its queue is fp32; under autocast it is cast to bf16 in every call. The dice are thrown on the
    CPU, and the accuracy is read on the host.
    """
    autocast = torch.autocast(x.query.device.type, x.query.dtype, enabled=_is_half(x.query))
    # Its queries come out of F.normalize, which autocast keeps in fp32.
    query = x.query.float()

    def search() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), autocast:
            similarity_matrix = query @ x.state.queue.T
            is_own_id = x.state.queue_id[None, :] == x.query_id[:, None]
            similarity_matrix[is_own_id] = -1.0
            values, indices = similarity_matrix.topk(x.k, dim=1)
        return values, indices

    def find_nn() -> Outputs:
        candidate_idx = search()[1]
        n = len(candidate_idx)
        dice = torch.randint(size=(n,), high=x.k)
        idx = candidate_idx[torch.arange(n), dice]
        nearest_neighbor = x.state.queue[idx]
        nn_accuracy = ((x.query_label == x.state.queue_y[idx]).sum() / n).item()
        return {
            "picked_index": idx,
            "picked_neighbour": nearest_neighbor,
            "num_hits": torch.tensor(round(nn_accuracy * n)),
        }

    return _finish(x, mode, search) if mode == "topk" else find_nn


@OP.provider("torch.compile")
def compiled(x: Inputs, mode: str) -> Call:
    search = _compile_topk()
    arguments = (x.query, x.state.queue, x.query_id, x.state.queue_id, x.k)
    return _finish(x, mode, lambda: search(*arguments))


@cache
def _compile_topk() -> Callable[..., tuple[Tensor, Tensor]]:
    return compile_peer(_scores_topk)


@OP.provider("faiss-cpu")
def faiss_cpu(x: Inputs, mode: str) -> Call:
    if x.query.is_cuda:
        raise UnavailableError("searches on the CPU only")
    faiss = import_peer("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(x.state.queue.shape[1])
    index.add(x.state.queue.numpy())
    return _faiss_call(x, mode, index)


@OP.provider("faiss-gpu", capturable=False)
def faiss_gpu(x: Inputs, mode: str) -> Call:
    if not x.query.is_cuda:
        raise UnavailableError("needs CUDA")
    faiss = import_peer("faiss")
    import_peer("faiss.contrib.torch_utils")
    if not hasattr(faiss, "StandardGpuResources"):
        raise UnavailableError("faiss is built without GPU support")
    config = faiss.GpuIndexFlatConfig()
    config.useFloat16 = _is_half(x.query)
    resources = faiss.StandardGpuResources()
    # Its own stream would not wait for torch's.
    resources.setDefaultNullStreamAllDevices()
    index = faiss.GpuIndexFlatIP(resources, x.state.queue.shape[1], config)
    index.add(x.state.queue)
    return _faiss_call(x, mode, index)


def _faiss_call(x: Inputs, mode: str, index: Any) -> Call:
    """faiss excludes nothing, so one slot more is searched and the own one dropped."""

    def search() -> tuple[Tensor, Tensor]:
        query = x.query.float()
        count = min(x.k + 1, len(x.state.queue))
        values, indices = index.search(query if query.is_cuda else query.numpy(), count)
        if isinstance(values, np.ndarray):
            values, indices = torch.from_numpy(values), torch.from_numpy(indices)
        own = x.state.queue_id[indices] == x.query_id[:, None]
        # A stable sort of the own slot to the end keeps the others in order.
        order = own.to(torch.int8).argsort(dim=1, stable=True)[:, : x.k]
        return values.masked_fill(own, -1).gather(1, order), indices.gather(1, order)

    return _finish(x, mode, search)


def _is_half(query: Tensor) -> bool:
    return query.dtype in (torch.float16, torch.bfloat16)
