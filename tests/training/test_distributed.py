import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from maect_fast.config import load_config
from maect_fast.training.distributed import (
    SyncBatchNorm1d,
    World,
    all_gather_rows,
    close_world,
    init_world,
    resolve_device,
)
from maect_fast.training.ranks import messages_of
from maect_fast.training.stages import build_stage

N, D, RANKS = 5, 7, 2


def make_input() -> Tensor:
    # the mean is large against the spread, which E[x^2] - E[x]^2 would not survive in fp32
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, RANKS * N, D, generator=generator).double() + 300


def run_batch_norm(norm: nn.BatchNorm1d, views: Tensor) -> dict[str, Tensor]:
    """Two passes, as the head does, and a loss that is a mean over rows; everything it leaves."""
    norm.to(views.dtype)
    views = views.clone().requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, D))
        norm.bias.copy_(torch.linspace(-1, 1, D))
    outputs = torch.stack([norm(view) for view in views])
    loss = outputs.pow(3).mul(torch.arange(D) + 1.0).sum(dim=-1).mean(dim=-1).sum()
    torch.autograd.backward(loss)
    assert views.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    return {
        "outputs": outputs.detach(),
        "input_grad": views.grad,
        "weight_grad": norm.weight.grad,
        "bias_grad": norm.bias.grad,
        **{f"state.{name}": value.clone() for name, value in norm.state_dict().items()},
        "eval": norm.eval()(views[0]).detach(),
    }


def count_messages(world: World) -> list[int]:
    """Collectives of an update of stage 3: gathers, sums, and all of the group with DDP's."""
    config = load_config(
        {
            "stage": "tune",
            "encoder": {
                "img_size": 8,
                "patch_size": 4,
                "embed_dim": 16,
                "depth": 2,
                "num_heads": 2,
            },
            "head": {
                "projector_hidden": 8,
                "predictor_hidden": 8,
                "output_dim": 8,
                "queue_size": 50,
            },
        },
        overrides=["head.target_ema=0.9", "frozen_blocks=1", "batch_size=8"],
    )
    group = world.group
    assert group is not None
    state = build_stage(config, world, total=9)
    model = nn.parallel.DistributedDataParallel(state.model, broadcast_buffers=False)
    # In the second update DDP agrees on its buckets anew.
    for step in range(3):
        views = torch.randn(2, 4, 3, 8, 8)
        before = messages_of(group)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums:
            gather = mock.patch.object(
                dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor
            )
            with gather as gathers:
                ids = torch.arange(4) + 4 * world.rank
                torch.autograd.backward(model(views, step=step, sample_id=ids, label=ids)["loss"])
        state.optimizer.step()
        state.optimizer.zero_grad()
    all_messages = messages_of(group) - before
    return [gathers.call_count, sums.call_count, all_messages]


def rank_main(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The parent's, whose port nobody can take before they meet.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    torch.set_num_threads(1)
    world = init_world("cpu")
    assert init_world("cpu") == world
    assert (world.rank, world.size, world.local_rank) == (rank, RANKS, rank)
    rows = slice(rank * N, (rank + 1) * N)
    views = make_input()[:, rows]
    result = run_batch_norm(SyncBatchNorm1d(D, world.group), views)
    norm32 = SyncBatchNorm1d(D, world.group)
    result["outputs_fp32"] = run_batch_norm(norm32, views.float())["outputs"]
    norm16 = SyncBatchNorm1d(D, world.group)
    result["outputs_bf16"] = norm16((views[0] - 300).bfloat16()).detach()
    x = torch.full((2, 3), float(rank), requires_grad=True)
    result["gathered"] = all_gather_rows(x, world.group)
    result["gathered_ids"] = all_gather_rows(torch.arange(2) + 10 * rank, world.group)
    result["sent"] = torch.tensor(count_messages(world))
    torch.save(result, Path(folder) / f"{rank}.pt")
    close_world()
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of two gloo processes computed."""
    folder = tmp_path_factory.mktemp("ranks")
    start: Any = start_processes
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    start(rank_main, args=(store.port, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """What one process computes on the whole batch with torch's own layer."""
    return run_batch_norm(nn.BatchNorm1d(D), make_input())


def test_batch_norm_outputs_are_those_of_the_whole_batch(
    ranks: list[dict[str, Tensor]], whole: dict[str, Tensor]
) -> None:
    outputs = torch.cat([rank["outputs"] for rank in ranks], dim=1)
    torch.testing.assert_close(outputs, whole["outputs"], rtol=1e-9, atol=1e-9)
    outputs = torch.cat([rank["outputs_fp32"] for rank in ranks], dim=1)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs.double(), whole["outputs"], rtol=0, atol=5e-4)


def test_batch_norm_of_bf16_has_fp32_statistics(ranks: list[dict[str, Tensor]]) -> None:
    outputs = torch.cat([rank["outputs_bf16"] for rank in ranks])
    assert outputs.dtype == torch.bfloat16
    view = (make_input()[0] - 300).bfloat16().float()
    expected = nn.functional.batch_norm(view, None, None, training=True).bfloat16()
    torch.testing.assert_close(outputs, expected, rtol=2**-8, atol=1e-6)


def test_batch_norm_gradients_are_those_of_the_whole_batch(
    ranks: list[dict[str, Tensor]], whole: dict[str, Tensor]
) -> None:
    # A local loss is a mean over n rows, the whole one over 2n: inputs, which DDP does not average,
    # have RANKS times the gradient; parameters have it after the average.
    input_grad = torch.cat([rank["input_grad"] for rank in ranks], dim=1) / RANKS
    torch.testing.assert_close(input_grad, whole["input_grad"], rtol=1e-8, atol=1e-8)
    for name in ("weight_grad", "bias_grad"):
        averaged = torch.stack([rank[name] for rank in ranks]).mean(dim=0)
        torch.testing.assert_close(averaged, whole[name], rtol=1e-8, atol=1e-8)


def test_batch_norm_state_is_that_of_the_whole_batch(
    ranks: list[dict[str, Tensor]], whole: dict[str, Tensor]
) -> None:
    names = [name for name in whole if name.startswith("state.")]
    assert len(names) == 5
    for name in names:
        torch.testing.assert_close(ranks[0][name], whole[name], rtol=1e-10, atol=1e-10)
        assert torch.equal(ranks[0][name], ranks[1][name])
    assert whole["state.num_batches_tracked"] == 2
    local = torch.cat([rank["eval"] for rank in ranks])
    torch.testing.assert_close(local, whole["eval"], rtol=1e-10, atol=1e-8)


def test_rows_are_gathered_in_rank_order(ranks: list[dict[str, Tensor]]) -> None:
    for rank in ranks:
        assert rank["gathered"].tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
        assert not rank["gathered"].requires_grad
        assert rank["gathered_ids"].tolist() == [0, 1, 10, 11]


def test_an_update_sends_one_message_beside_sums(ranks: list[dict[str, Tensor]]) -> None:
    """Neighbours, keys, ids and labels in one; the loss's sums; batch statistics; gradients."""
    # A mean and a variance per norm and view: seven norms forward, those of the target alone
    # without a backward.
    statistics = 2 * 2 * (3 + 1 + 3) + 2 * 2 * (3 + 1)
    for rank in ranks:
        assert rank["sent"].tolist() == [1, statistics + 1, 1 + statistics + 1 + 1]


def test_without_a_group_it_is_torchs_layer(whole: dict[str, Tensor]) -> None:
    found = run_batch_norm(SyncBatchNorm1d(D), make_input())
    assert set(found) == set(whole)
    for name, value in found.items():
        assert torch.equal(value, whole[name]), name


def test_without_torchrun_the_world_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = init_world("cpu")
    assert world == World(rank=0, size=1, local_rank=0, group=None, device=torch.device("cpu"))
    close_world()
    x = torch.ones(2, requires_grad=True)
    assert not all_gather_rows(x, None).requires_grad


def test_auto_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device("auto") == torch.device(expected)
        assert resolve_device("cpu") == torch.device("cpu")
