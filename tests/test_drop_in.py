"""What takes the place of lightly's, open_clip's and the authors' own modules, beside them."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from maect_fast.kernels import info_nce, symmetric_info_nce
from maect_fast.nn import ClipLoss, FeatureQueue
from maect_fast.official import find_nn, nnclr_loss_fn
from maect_fast.testing import assert_within_budget, unit_rows

N, D, Q = 6, 16, 40
WORLD_SIZE = 2


# lightly's NNCLR: NNMemoryBankModule and NTXentLoss.


def lightly_bank(queue: FeatureQueue) -> nn.Module:
    modules = pytest.importorskip("lightly.models.modules")
    bank: nn.Module = modules.NNMemoryBankModule(size=(Q, D))
    bank.bank.copy_(queue.queue)  # type: ignore[operator]
    return bank


def test_lightlys_loop_with_our_queue_and_loss() -> None:
    """Three updates: neighbours, losses and gradients of lightly's loop, past the ring's end."""
    criterion = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.2)
    queue = FeatureQueue(Q, D)
    bank = lightly_bank(queue)
    for step in range(3):
        projected = 4 * unit_rows(2, 16, D, seed=step)
        predicted = (projected + unit_rows(2, 16, D, seed=9 + step)).requires_grad_()
        theirs = [bank(projected[v], update=v == 1) for v in range(2)]
        expected = (criterion(theirs[0], predicted[1]) + criterion(theirs[1], predicted[0])) / 2
        found = queue.search(projected, k=1, pick=torch.zeros(2, 16, dtype=torch.int64))
        ours = found.picked_neighbour
        assert ours is not None
        queue.enqueue(projected[1])
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, F.normalize(other, dim=1))
        losses = [
            symmetric_info_nce(ours[v], predicted[1 - v], temperature=0.2, same_view=True)
            for v in range(2)
        ]
        loss = (losses[0] + losses[1]) / 2
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        grads = [torch.autograd.grad(x, predicted)[0] for x in (loss, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-8)
    # lightly drops what is beyond its end; ours goes on at the front.
    assert queue.queue_ptr.tolist() == [3 * 16 % Q]


def test_nt_xent_is_the_papers_loss_and_negatives_of_the_same_view() -> None:
    """Each row's loss of NNCLR in both directions, and what its own view adds to the denominator.

    ``log(S + R) - positive = (log S - positive) + log(1 + R / S)`` with S the sum over the other
    view, which is NNCLR's, and R over the own one, without the row itself.
    """
    criterion = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.2)
    neighbour, predicted = unit_rows(2, N, D, seed=1).double()
    expected = criterion(neighbour, predicted)
    added = torch.zeros(())
    for rows, others in ((neighbour, predicted), (predicted, neighbour)):
        across = (rows @ others.T / 0.2).exp().sum(dim=1)
        within = (rows @ rows.T / 0.2).exp().fill_diagonal_(0).sum(dim=1)
        added = added + (1 + within / across).log().mean() / 2
    both = [
        info_nce(predicted, neighbour, temperature=0.2, transposed=transposed)
        for transposed in (False, True)
    ]
    torch.testing.assert_close((both[0] + both[1]) / 2 + added, expected)
    assert float(added) > 0.1


# The authors' functions.


def official_loss(predicted: Tensor, nn: Tensor, temperature: float, transposed: bool) -> Tensor:
    """Source: ml-jku/MAE-CT: losses/nnclr_loss.py, of one process."""
    rows, columns = (F.normalize(predicted, dim=-1), nn)[:: 1 if transposed else -1]
    return F.cross_entropy(rows @ columns.T / temperature, torch.arange(len(nn)))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_authors_loss(transposed: bool) -> None:
    predicted, neighbour = 3 * unit_rows(N, D, seed=1), unit_rows(N, D, seed=2)
    results = []
    for function, dtype in (
        (official_loss, torch.float64),
        (official_loss, torch.float32),
        (nnclr_loss_fn, torch.float32),
    ):
        x = predicted.to(dtype).requires_grad_()
        loss = function(x, neighbour.to(dtype), 0.15, transposed)
        results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    exact, eager, ours = results
    for name, *tensors in zip(("loss", "gradient"), ours, eager, exact, strict=True):
        assert_within_budget(*tensors, name=name)


@pytest.mark.parametrize("topk", [0, 1, 5])
def test_the_authors_search(topk: int) -> None:
    """Source: ml-jku/MAE-CT: utils/nnclr_util.py, contrastive_head_base.py; the same dice."""
    queue, projected = unit_rows(Q, D, seed=1), 3 * unit_rows(N, D, seed=2)
    ids, queue_ids = torch.arange(N), torch.arange(Q) // 3
    similarity = F.normalize(projected, dim=-1) @ queue.T
    similarity[queue_ids[None] == ids[:, None]] = -1.0
    torch.manual_seed(3)
    if topk == 0:
        expected = similarity.max(dim=1)[1]
    else:
        dice = torch.randint(size=(N,), high=topk)
        expected = similarity.topk(topk, dim=1)[1][torch.arange(N), dice]
    torch.manual_seed(3)
    index, rows = find_nn(projected, ids, queue, queue_ids, topk=topk)
    assert torch.equal(index, expected)
    assert torch.equal(rows, queue[expected])
    assert not (queue_ids[index] == ids).any()


# open_clip's ClipLoss.


def embeddings(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    """Of images and texts, before a model's last normalisation."""
    first = 3 * unit_rows(n, D, seed=seed)
    return first, first + 4 * unit_rows(n, D, seed=seed + 1)


def results_of(criterion: Any, pair: tuple[Tensor, Tensor], **options: Any) -> list[Tensor]:
    """Loss, gradients of the embeddings, the scale and the bias, as parameters would get them."""
    leaves = [x.detach().clone().requires_grad_() for x in pair]
    numbers = [torch.tensor(math.log(1 / 0.07)), torch.tensor(0.5)]
    scale, bias = (x.to(pair[0].dtype).requires_grad_() for x in numbers)
    rows = (F.normalize(x, dim=-1) for x in leaves)
    loss = criterion(*rows, scale.exp(), logit_bias=bias, **options)
    loss = loss["contrastive_loss"] if options.get("output_dict") else loss
    return [loss.detach(), *torch.autograd.grad(loss, [*leaves, scale, bias])]


@pytest.mark.parametrize("output_dict", [False, True])
def test_open_clips_loss(output_dict: bool) -> None:
    theirs = pytest.importorskip("open_clip.loss").ClipLoss(cache_labels=True)
    pair = embeddings()
    exact = results_of(theirs, (pair[0].double(), pair[1].double()), output_dict=output_dict)
    eager = results_of(theirs, pair, output_dict=output_dict)
    ours = results_of(ClipLoss(cache_labels=True), pair, output_dict=output_dict)
    names = ("loss", "images", "texts", "scale")
    for name, *tensors in zip(names, ours[:-1], eager[:-1], exact[:-1], strict=True):
        assert_within_budget(*tensors, name=name)
    # The bias is in all logits: open_clip's gradient is rounding, ours is zero.
    assert float(ours[-1]) == 0
    assert abs(float(eager[-1])) < 1e-6


def test_a_scale_may_be_a_number_or_a_tensor_of_one() -> None:
    rows = [F.normalize(x, dim=-1) for x in embeddings()]
    loss = ClipLoss()
    expected = loss(*rows, torch.tensor(10.0))
    assert torch.equal(loss(*rows, torch.tensor([10.0])), expected)
    torch.testing.assert_close(loss(*rows, 10.0), expected)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"use_horovod": True}, "use_horovod: expected False"),
        ({"local_loss": True, "world_size": 2}, "local_loss: expected False without gather_with_"),
        ({"rank": 2, "world_size": 2}, r"rank: expected 0 \.\. 1, got 2"),
        ({"world_size": 0}, "world_size: expected 1 or more"),
    ],
)
def test_what_open_clip_has_and_we_do_not(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        ClipLoss(**options)


def test_ranks_need_a_group() -> None:
    with pytest.raises(ValueError, match="rank, world_size: expected an initialised process group"):
        ClipLoss(gather_with_grad=True, world_size=2)(*embeddings(), 10.0)


MODES = {
    "local": {"local_loss": True, "gather_with_grad": True},
    "global": {"gather_with_grad": True},
    "default": {},
}


def rank_main(rank: int, folder: Path) -> None:
    """Both losses on this rank's half of the batch."""
    from open_clip.loss import ClipLoss as TheirClipLoss

    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=WORLD_SIZE)
    first, second = embeddings(n=2 * N)
    pair = (first.chunk(WORLD_SIZE)[rank], second.chunk(WORLD_SIZE)[rank])
    found = {}
    for name, options in MODES.items():
        place: dict[str, Any] = {"rank": rank, "world_size": WORLD_SIZE}
        kinds = (ClipLoss, TheirClipLoss)
        found[name] = [results_of(kind(**options, **place), pair) for kind in kinds]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def rank_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment)
        for rank in range(WORLD_SIZE)
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0] * WORLD_SIZE
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_open_clips_loss_on_two_ranks(mode: str, rank_folder: Path) -> None:
    """Values and features' gradients on each rank; the scale's as DDP averages it."""
    ranks = [torch.load(rank_folder / f"{rank}.pt")[mode] for rank in range(WORLD_SIZE)]
    for ours, theirs in ranks:
        torch.testing.assert_close(ours[:3], theirs[:3], rtol=1e-5, atol=1e-7)
    scale = [torch.stack([rank[i][3] for rank in ranks]).mean() for i in range(2)]
    torch.testing.assert_close(*scale, rtol=1e-5, atol=1e-7)


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
    # As in test_nn_nnclr.py: gloo's threads may abort a process at Python's end.
    os._exit(0)
