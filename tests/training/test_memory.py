"""The memory plan against what autograd saves, and against arithmetic by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from maect_fast.cli import main
from maect_fast.config import Config, ConfigError, Stage, load_config, load_recipe
from maect_fast.training import engine
from maect_fast.training.distributed import World, init_world
from maect_fast.training.memory import MemoryPlan, check_memory, plan_memory
from maect_fast.training.stages import build_stage

D, HEADS, TOKENS, VIEWS = 128, 2, 17, 2
GIB = 2**30


def config(stage: Stage = "tune", *overrides: str) -> Config:
    encoder = (
        "encoder={name: vit_tiny_patch16_224, img_size: 16, patch_size: 4, embed_dim: 128, "
        "depth: 4, num_heads: 2}"
    )
    head = "head={queue_size: 64, topk: 3, projector_hidden: 32, predictor_hidden: 32}"
    decoder = "decoder={embed_dim: 32, depth: 1, num_heads: 2}"
    mine = [f"stage={stage}", encoder, head, decoder, "batch_size=12", "encoder_ema=0.9"]
    mine += ["frozen_blocks=2"] if stage == "tune" else []
    return load_config(overrides=[*mine, *overrides])


def saved_bytes(settings: Config) -> int:
    """What a real forward pass on the CPU saves, but for parameters, buffers and the batch."""
    model = build_stage(settings, init_world("cpu"), total=1).model
    views = torch.randn(VIEWS, settings.batch_size, 3, 16, 16)
    known = [*model.parameters(), *model.buffers(), views]
    left_out = {x.untyped_storage().data_ptr() for x in known}
    # The tensors are held, so that no storage gets the address of one before.
    held: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in left_out:
            held[x.untyped_storage().data_ptr()] = x
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"),
    ):
        output = model(views, step=0)
    assert "loss" in output
    return sum(x.untyped_storage().nbytes() for x in held.values())


@pytest.mark.parametrize("stage", ["pretrain", "prepare-head", "tune"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_bytes_are_those_of_a_real_pass(stage: Stage, precision: str) -> None:
    settings = config(stage, f"precision={precision}")
    plan = plan_memory(settings, device_type="cpu")
    expected = saved_bytes(settings)
    found = plan.saved_per_image * plan.num_images + plan.weight_copies
    assert found == pytest.approx(expected, rel=0.05)


def test_a_tuned_block_on_a_gpu_by_hand() -> None:
    """In bf16 beside an fp32 stream, fused: norms and the GELU are made again."""
    four, five = (plan_memory(config("tune", f"encoder.depth={depth}")) for depth in (4, 5))
    found = five.saved_per_image - four.saved_per_image
    stream, qkv, attention, hidden = 2 * 4, 3 * 2, 2, 4 * 2
    by_hand = VIEWS * TOKENS * D * (stream + qkv + attention + hidden)
    assert found == pytest.approx(by_hand, rel=0.05)
    # Its weights and biases once more, in bf16.
    assert five.weight_copies - four.weight_copies == pytest.approx(12 * D * D * 2, rel=0.05)


def test_state_by_hand() -> None:
    settings = config()
    plan = plan_memory(settings)
    state = build_stage(settings, init_world("cpu"), total=1)
    parameters = list(state.model.parameters())
    trained = sum(4 * p.numel() for p in parameters if p.requires_grad)
    assert plan.gradients == trained
    assert plan.optimizer == 2 * trained
    assert plan.views == 12 * VIEWS * 3 * 16 * 16 * 4
    queue = 64 * 256
    assert plan.queue == queue * (4 + 2) + 64 * 2 * 8 + 8
    average = state.encoder_ema
    assert average is not None
    assert plan.encoder_ema == sum(x.numel() * 4 for x in average.state_dict().values())
    # The frozen blocks' result, fp32.
    assert plan.kept_per_image >= VIEWS * TOKENS * D * 4


def test_half_the_images_on_two_gpus() -> None:
    one, two = plan_memory(config()), plan_memory(config(), num_gpus=2)
    assert (one.num_images, two.num_images) == (12, 6)
    assert two.views == one.views // 2
    assert two.saved_per_image == one.saved_per_image


@pytest.mark.parametrize("stage", ["pretrain", "tune"])
def test_the_fewest_chunks_that_fit(stage: Stage) -> None:
    whole = plan_memory(config(stage, "batch_size=120"))
    assert not whole.is_chunked
    assert whole.fitting(whole.peak) == whole
    seen: list[int] = []
    num_bytes = whole.peak - 1
    while (fitting := whole.fitting(num_bytes)) is not None:
        assert fitting.peak <= num_bytes
        seen.append(fitting.chunk_size)
        num_bytes = fitting.peak - 1
    sizes = dict.fromkeys(-(-120 // count) for count in range(2, 121))
    assert seen == list(sizes)[: len(seen)]
    assert len(seen) >= 4
    assert num_bytes < whole.smallest.peak <= num_bytes + 1
    given = plan_memory(config(stage, "batch_size=120", f"chunk_size={seen[0]}"))
    assert given == whole.fitting(whole.peak - 1)


def big(*overrides: str) -> Config:
    return load_config(load_recipe("h14", "tune"), overrides=overrides)


def test_what_cannot_fit_is_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        check_memory(big(), num_gpus=1, num_bytes=80 * GIB)
    plan = plan_memory(big())
    fitting = plan.fitting(80 * GIB)
    assert fitting is not None
    assert str(error.value) == (
        f"chunk_size: needs {plan.peak / GIB:.1f} GiB, the GPU has 80.0 GiB; "
        f"chunk_size={fitting.chunk_size} fits"
    )
    check_memory(big(f"chunk_size={fitting.chunk_size}"), num_gpus=1, num_bytes=80 * GIB)
    check_memory(big(), num_gpus=8, num_bytes=80 * GIB)
    with pytest.raises(ConfigError, match=r"^batch_size: needs .* with chunk_size=1$"):
        check_memory(big(), num_gpus=1, num_bytes=4 * GIB)


def test_a_run_says_so_before_it_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(rank=0, size=1, local_rank=0, group=None, device=torch.device("cuda"))
    monkeypatch.setattr(engine, "init_world", lambda device: world)
    gpu = SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    with pytest.raises(ConfigError, match=r"the GPU has 80.0 GiB; chunk_size=\d+ fits$"):
        engine.run_stage(big(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "l16", "batch_size=1024", "chunk_size=128"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "l16 tune: 1024 images of 2 views per GPU"
    peak = plan_memory(load_config(load_recipe("l16", "tune"), overrides=["chunk_size=128"])).peak
    (line,) = [line for line in lines if "peak, as" in line]
    assert float(line.split()[-1]) == pytest.approx(peak / GIB, abs=0.006)
    named = [line for line in lines if line.startswith(("H200", "H100", "A100"))]
    assert len(named) == 3
    assert any("NVIDIA H200, commit" in line for line in lines if line.startswith("measured"))


def test_plan_refuses_what_a_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "l16", "--gpus", "3"]) == 2
    expected = "maect-fast plan: --gpus: expected a divisor of batch_size = 1024, got 3\n"
    assert capsys.readouterr().err == expected


def test_a_plan_leaves_autocast_as_it_was() -> None:
    before: Any = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    assert isinstance(plan_memory(config()), MemoryPlan)
    assert (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")) == before


def test_a_plan_leaves_no_fake_tensor() -> None:
    """Constants that ops keep belong to real calls alone."""
    settings = config()
    plan_memory(settings, device_type="cpu")
    model = build_stage(settings, init_world("cpu"), total=1).model
    loss = model(torch.randn(VIEWS, 4, 3, 16, 16), step=0)["loss"]
    assert loss.isfinite()
