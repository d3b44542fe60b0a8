import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from maect_fast import nn
from maect_fast.kernels import Pick, info_nce, queue_topk, with_shadow
from maect_fast.nn import FeatureQueue, NNCLRLoss
from maect_fast.testing import unit_rows
from maect_fast.training.ranks import messages_of

N, D, Q, K = 6, 16, 40, 5
STEPS = 9
WORLD_SIZE = 2


def batch(step: int, n: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """projected, predicted, ids, labels; ids return after a few steps, some labels are missing."""
    projected = 4 * unit_rows(2, n, D, seed=2 * step)
    predicted = projected + 4 * unit_rows(2, n, D, seed=2 * step + 1)
    sample_id = (torch.arange(n) + n * step) % 20
    return projected, predicted, sample_id, sample_id % 5 - 1


def make_loss(**changes: object) -> NNCLRLoss:
    arguments = {"queue_size": Q, "dim": D, "topk": K, "temperature": 0.2, "seed": 5, **changes}
    return NNCLRLoss(**arguments)  # type: ignore[arg-type]


def states_equal(one: NNCLRLoss, other: NNCLRLoss) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_buffers_have_the_official_names() -> None:
    queue = FeatureQueue(Q, D)
    shapes = {name: (tuple(x.shape), x.dtype) for name, x in queue.state_dict().items()}
    assert shapes == {
        "queue": ((Q, D), torch.float32),
        "queue_y": ((Q,), torch.int64),
        "queue_id": ((Q,), torch.int64),
        "queue_ptr": ((1,), torch.int64),
    }
    assert list(make_loss().state_dict()) == [f"queue.{name}" for name in shapes]
    assert not list(make_loss().parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_on_a_gpu_the_queue_keeps_a_shadow(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded anew after a move and a load, kept up by enqueue, no part of the state dict."""
    queue, other = FeatureQueue(Q, D, shadow=dtype), FeatureQueue(Q, D, shadow=dtype)
    assert queue.to("cpu").state.shadow is None
    monkeypatch.setattr(nn, "_is_on_gpu", lambda x: x.device.type == "cpu")

    def assert_up_to_date() -> None:
        assert queue.state.shadow is not None
        anew = with_shadow(queue.state, dtype=dtype).shadow
        assert anew is not None
        assert queue.state.shadow.rows.dtype == dtype
        for mine, theirs in zip(queue.state.shadow, anew, strict=True):
            assert torch.equal(mine, theirs)

    queue.to("cpu")
    assert_up_to_date()
    queue.enqueue(unit_rows(7, D), sample_id=torch.arange(7))
    assert_up_to_date()
    queue.load_state_dict(other.state_dict())
    assert_up_to_date()
    assert list(queue.state_dict()) == ["queue", "queue_y", "queue_id", "queue_ptr"]
    query = unit_rows(3, D, seed=8)
    found = queue_topk(query, queue.state, k=K, backend="triton")
    assert torch.equal(found.indices, other.search(query, k=K).indices)
    monkeypatch.undo()
    assert copy.deepcopy(queue).to("cpu").state.shadow is None


def test_queue_starts_with_random_unit_rows_of_nobody() -> None:
    first, second, other = (
        FeatureQueue(Q, D, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.queue.norm(dim=1).tolist() == pytest.approx([1.0] * Q, abs=1e-6)
    assert torch.equal(first.queue, second.queue)
    assert not torch.equal(first.queue, other.queue)
    for buffer in (first.queue_y, first.queue_id):
        assert buffer.tolist() == [-1] * Q
    assert first.queue_ptr.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_queue_is_fp32_whatever_the_default(dtype: torch.dtype) -> None:
    plain = make_loss().queue.queue
    torch.set_default_dtype(dtype)
    try:
        queue = make_loss().queue.queue
    finally:
        torch.set_default_dtype(torch.float32)
    assert queue.dtype == torch.float32
    assert torch.equal(queue, plain)


def test_a_conversion_of_the_model_leaves_the_queue() -> None:
    """Its rows are masters: not rounded, and what an assigned state dict brings is made fp32."""
    plain = make_loss()
    assert make_loss().double().queue.queue.dtype == torch.float64
    for convert in ("half", "bfloat16"):
        linear, loss = torch.nn.Linear(D, D), make_loss()
        getattr(torch.nn.Sequential(linear, loss), convert)()
        assert linear.weight.dtype != torch.float32
        assert states_equal(loss, plain)
        assert {x.dtype for x in loss.state_dict().values()} == {torch.float32, torch.int64}
    queue = FeatureQueue(Q, D)
    state = queue.state_dict()
    queue.load_state_dict(state | {"queue": state["queue"].half()}, assign=True)
    assert queue.queue.dtype == torch.float32
    assert dict(queue.named_buffers()).keys() == state.keys()


def test_queue_search_and_enqueue() -> None:
    queue = FeatureQueue(Q, D)
    rows, _, ids, labels = batch(0)
    queue.enqueue(rows[0], sample_id=ids, label=labels)
    assert queue.queue_ptr.tolist() == [N]
    assert torch.equal(queue.queue_id[:N], ids)
    assert torch.equal(queue.queue_y[:N], labels)
    found = queue.search(rows[0], k=1, label=labels, pick=Pick(0, 0, 0))
    assert found.indices.flatten().tolist() == list(range(N))
    assert found.label_hit is not None
    assert torch.equal(found.label_hit, labels >= 0)
    without = queue.search(rows[0], k=1, sample_id=ids)
    assert not (without.indices.flatten() == torch.arange(N)).any()


def test_state_dict_carries_the_ring_over() -> None:
    loss, other = make_loss(), make_loss(seed=6)
    for step in range(3):
        projected, predicted, ids, labels = batch(step)
        loss(projected, predicted, step=step, sample_id=ids, label=labels)
    other.load_state_dict(loss.state_dict())
    assert states_equal(loss, other)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("topk", [1, K])
def test_loss_is_search_then_info_nce_then_enqueue(topk: int, transposed: bool) -> None:
    """Against the ops called one by one, step after step, past the end of the ring."""
    loss = make_loss(topk=topk, transposed=transposed)
    ring = FeatureQueue(Q, D)
    ring.load_state_dict(loss.queue.state_dict())
    for step in range(STEPS):
        projected, predicted, ids, labels = batch(step)
        predicted.requires_grad_()
        result = loss(projected, predicted, step=step, sample_id=ids, label=labels)

        found = queue_topk(projected, ring.state, k=topk, query_id=ids, pick=Pick(5, step, 0))
        assert found.picked_index is not None
        assert found.picked_neighbour is not None
        expected = info_nce(
            predicted, found.picked_neighbour, temperature=0.2, transposed=transposed
        )
        assert torch.equal(result.loss, expected)
        for one, other in zip(
            torch.autograd.grad(result.loss, predicted),
            torch.autograd.grad(expected, predicted),
            strict=True,
        ):
            assert torch.equal(one, other)
        if topk == 1:
            assert torch.equal(found.picked_index, found.indices[..., 0])
        pairs = list(
            zip(labels.tolist(), ring.queue_y[found.picked_index[0]].tolist(), strict=True)
        )
        hits = [mine == theirs for mine, theirs in pairs if mine >= 0 and theirs >= 0]
        assert float(result.nn_accuracy) == pytest.approx(sum(hits) / max(1, len(hits)))

        ring.enqueue(projected[0], sample_id=ids, label=labels)
        assert all(
            torch.equal(a, b) for a, b in zip(loss.queue.state[:4], ring.state[:4], strict=True)
        )
    assert loss.queue.queue_ptr.tolist() == [STEPS * N % Q]
    assert torch.allclose(loss.queue.queue.norm(dim=1), torch.ones(Q))


def test_accuracy_counts_view_0_where_both_labels_are_known() -> None:
    """Entries equal view 0, so each row's nearest neighbour is itself; two labels are wrong."""
    loss = make_loss(topk=1, queue_size=4).eval()
    rows = unit_rows(4, D)
    loss.queue.enqueue(rows, label=torch.tensor([1, 2, -1, 3]))
    views = torch.stack((rows, rows.flip(0)))
    result = loss(views, views, step=0, label=torch.tensor([1, 0, 2, -1]))
    assert float(result.nn_accuracy) == 0.5


@pytest.mark.parametrize("labels", [None, torch.full((N,), -1)])
def test_accuracy_is_zero_without_labels(labels: Tensor | None) -> None:
    projected, predicted, *_ = batch(0)
    result = make_loss()(projected, predicted, step=0, label=labels)
    assert float(result.nn_accuracy) == 0


def test_a_batch_does_not_find_itself() -> None:
    """Enqueued after the search: otherwise the nearest neighbour of view 0 would be itself."""
    loss = make_loss(topk=1)
    projected, predicted, *_ = batch(0)
    before = normalize(projected, dim=-1) @ loss.queue.queue.T
    result = loss(projected, predicted, step=0)
    neighbour = loss.queue.queue.new_empty(0)
    untouched = make_loss(topk=1)
    neighbour = untouched.queue.queue[before.argmax(-1)]
    assert torch.equal(result.loss, info_nce(predicted, neighbour, temperature=0.2))
    again = loss(projected, predicted, step=1)
    assert not torch.equal(again.loss, result.loss)


def test_no_enqueue_in_eval_mode() -> None:
    loss, untouched = make_loss().eval(), make_loss()
    projected, predicted, ids, labels = batch(0)
    loss(projected, predicted, step=0, sample_id=ids, label=labels)
    assert states_equal(loss, untouched)
    loss.train()(projected, predicted, step=0, sample_id=ids, label=labels)
    assert not states_equal(loss, untouched)


def test_gradient_goes_to_the_predictions_alone() -> None:
    projected, predicted, *_ = batch(0)
    projected.requires_grad_()
    predicted.requires_grad_()
    torch.autograd.backward(make_loss()(projected, predicted, step=0).loss)
    assert projected.grad is None
    assert predicted.grad is not None
    assert (predicted.grad.norm(dim=-1) > 0).all()


def test_draws_depend_on_seed_and_step_and_nothing_else() -> None:
    projected, predicted, *_ = batch(0)
    losses = {}
    for seed, step in ((5, 0), (5, 1), (6, 0)):
        loss = make_loss(seed=seed).eval()
        loss.queue.load_state_dict(make_loss().queue.state_dict())
        torch.manual_seed(step)
        losses[seed, step] = float(loss(projected, predicted, step=step).loss)
        torch.manual_seed(99)
        again = loss(projected, predicted, step=torch.tensor(step)).loss
        assert float(again) == losses[seed, step]
    assert len(set(losses.values())) == 3


def test_topk_beyond_the_queue_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"topk: expected 1 \.\. 40, got 41"):
        make_loss(topk=41)


def test_compiles_without_graph_breaks() -> None:
    eager, other = make_loss(), make_loss()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for step in range(3):
        projected, predicted, ids, labels = batch(step)
        predicted.requires_grad_()
        results = [
            loss(projected, predicted, step=torch.tensor(step), sample_id=ids, label=labels)
            for loss in (eager, compiled)
        ]
        grads = [torch.autograd.grad(result.loss, predicted)[0] for result in results]
        assert torch.equal(results[0].loss, results[1].loss)
        assert torch.equal(results[0].nn_accuracy, results[1].nn_accuracy)
        assert torch.equal(*grads)
        assert states_equal(eager, other)


# Several ranks.


def rank_main(rank: int, folder: Path) -> None:
    """Some steps on this rank's share of the batches: losses, gradients and the final queue."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=WORLD_SIZE
    )
    group = dist.group.WORLD
    assert group is not None
    for transposed in (False, True):
        loss = make_loss(group=group, transposed=transposed)
        results, sent = [], []
        for step in range(STEPS):
            projected, predicted, ids, labels = (
                x.chunk(WORLD_SIZE, dim)[rank]
                for x, dim in zip(batch(step), (1, 1, 0, 0), strict=True)
            )
            predicted.requires_grad_()
            before = messages_of(group)
            result = loss(projected, predicted, step=step, sample_id=ids, label=labels)
            results.append((result.loss.detach(), *torch.autograd.grad(result.loss, predicted)))
            sent.append(messages_of(group) - before)
        torch.save((results, loss.state_dict(), sent), folder / f"{rank}-{transposed}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def rank_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all ranks, each a process of its own running this file."""
    folder = tmp_path_factory.mktemp("ranks")
    path = str(Path(__file__).parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": path},
        )
        for rank in range(WORLD_SIZE)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * WORLD_SIZE
    return folder


@pytest.mark.parametrize("transposed", [False, True])
def test_ranks_together_equal_one_process(transposed: bool, rank_folder: Path) -> None:
    results = (torch.load(rank_folder / f"{r}-{transposed}.pt") for r in range(WORLD_SIZE))
    parts, states, _ = zip(*results, strict=True)
    loss = make_loss(transposed=transposed)
    for step in range(STEPS):
        projected, predicted, ids, labels = batch(step)
        predicted.requires_grad_()
        result = loss(projected, predicted, step=step, sample_id=ids, label=labels)
        mean = torch.stack([part[step][0] for part in parts]).mean()
        torch.testing.assert_close(mean, result.loss.detach(), rtol=1e-6, atol=0)
        # DDP averages gradients over the ranks.
        grad = torch.cat([part[step][1] for part in parts], dim=1) / WORLD_SIZE
        (expected,) = torch.autograd.grad(result.loss, predicted)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-8)
    for state in states:
        for name, value in loss.state_dict().items():
            assert torch.equal(state[name], value), name


@pytest.mark.parametrize("transposed", [False, True])
def test_an_update_sends_one_message_and_the_sums(transposed: bool, rank_folder: Path) -> None:
    for rank in range(WORLD_SIZE):
        *_, sent = torch.load(rank_folder / f"{rank}-{transposed}.pt")
        # Once the numbers of rows: the first loss is the one that is not transposed.
        assert sent == ([1] * STEPS if transposed else [3, *[2] * (STEPS - 1)])


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
    # Past Python's own end, where torch 2.11 may still hold the group and gloo's threads abort the
    # process ("terminate called without an active exception", once in some dozens of runs).
    os._exit(0)
