"""`chunk_size`: the same update, with fewer images in memory at a time."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from maect_fast.block import Stream
from maect_fast.checkpoint import load_checkpoint
from maect_fast.cli import main
from maect_fast.config import ConfigError, Stage, load_config
from maect_fast.data import Batch
from maect_fast.models.encoder import Encoder
from maect_fast.training.chunks import in_chunks
from maect_fast.training.distributed import init_world
from maect_fast.training.stages import StageState, build_stage, last_checkpoint
from maect_fast.training.update import Update

UPDATES = 3
N = 10
SETTINGS = """
encoder:
  {name: vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 32, depth: 4, num_heads: 2}
decoder: {embed_dim: 16, depth: 2, num_heads: 4}
head: {projector_hidden: 24, predictor_hidden: 40, output_dim: 16, queue_size: 50, topk: 5}
optim: {encoder_lr: 0.01, other_lr: 0.01, warmup: 0.2, eps: 1e-4}
batch_size: 10
mask_ratio: 0.7
precision: fp32
device: cpu
"""
TUNE = ["stage=tune", "frozen_blocks=2", "head.target_ema=0.9", "encoder_ema=0.9"]
CASES = {
    "tune": TUNE,
    "tune-mean-patch": [*TUNE, "head.pooling=mean_patch"],
    "tune-all-blocks": [*TUNE, "frozen_blocks=0"],
    "tune-norm-alone": [*TUNE, "frozen_blocks=4"],
    "tune-reconstruction": [*TUNE, "reconstruction_weight=0.5"],
    "prepare-head": ["stage=prepare-head"],
    "pretrain": ["stage=pretrain"],
    "pretrain-3-views": ["stage=pretrain", "num_views=3"],
}
# One of each stage; the others are tested as slow ones.
QUICK = ("tune", "prepare-head", "pretrain")
# Divides the batch; leaves a short last chunk; one image at a time.
SIZES = (5, 4, 1)


def build(case: str, dtype: torch.dtype, *overrides: str) -> StageState:
    layer = cast("DictConfig", OmegaConf.create(SETTINGS))
    config = load_config(layer, overrides=[*CASES[case], *overrides])
    state = build_stage(config, init_world("cpu"), total=12)
    state.model.to(dtype)
    if state.encoder_ema is not None:
        state.encoder_ema.encoder.to(dtype)
    return state


def batches(state: StageState, dtype: torch.dtype) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(2)
    for update in range(UPDATES):
        views = torch.randn(state.config.num_views, N, 3, 8, 8, generator=generator)
        sample_id = torch.arange(N) + N * update
        yield Batch(views=views.to(dtype), sample_id=sample_id, label=sample_id % 3)


def train(case: str, dtype: torch.dtype, *overrides: str) -> dict[str, Tensor]:
    """Everything that some updates leave: losses, metrics, gradients, parameters, EMAs, queue."""
    state = build(case, dtype, *overrides)
    found: dict[str, Tensor] = {}

    def keep(name: str, parameter: nn.Parameter) -> None:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            key = f"update {state.update}: gradient of {name}"
            assert key not in found, "a second gradient of one update"
            found[key] = parameter.grad.clone()

        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    for name, parameter in state.model.named_parameters():
        if parameter.requires_grad:
            keep(name, parameter)
    make_update = Update(state, state.model, init_world("cpu"))
    for update, batch in enumerate(batches(state, dtype)):
        outputs = make_update(batch)
        found |= {f"update {update}: {name}": value for name, value in outputs.items()}
    found |= dict(state.model.state_dict())
    if state.encoder_ema is not None:
        found |= {f"EMA {name}": x for name, x in state.encoder_ema.state_dict().items()}
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Integers equal; the rest within the tolerance, relative where above 1."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value.is_floating_point():
            scale = max(expected[name].abs().max().item(), 1.0)
            error = (value - expected[name]).abs().max().item()
            assert error <= tolerance * scale, f"{name}: off by {error:.2g} of {scale:.2g}"
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_updates_are_those_of_one_pass(case: str) -> None:
    expected = train(case, torch.float64)
    num_gradients = sum("gradient of" in name for name in expected)
    assert num_gradients >= UPDATES * 6
    for size in SIZES:
        found = train(case, torch.float64, f"chunk_size={size}")
        assert_close(found, expected, 1e-12)


@pytest.mark.parametrize(
    "case", ["tune", pytest.param("tune-reconstruction", marks=pytest.mark.slow)]
)
def test_in_fp32_they_differ_by_rounding(case: str) -> None:
    # With such an eps, AdamW does not blow up gradients that are zero but for rounding.
    expected = train(case, torch.float32, "optim.eps=1e-3")
    for size in SIZES:
        found = train(case, torch.float32, "optim.eps=1e-3", f"chunk_size={size}")
        assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("off", ["chunk_size=0", "chunk_size=null", f"chunk_size={N}"])
def test_one_pass_is_bitwise_what_it_was(off: str) -> None:
    expected = train("tune", torch.float32)
    for name, value in train("tune", torch.float32, off).items():
        assert torch.equal(value, expected[name]), name


def test_under_autocast() -> None:
    """The second pass has the first one's dtypes, though backward runs outside of autocast."""
    expected = train("tune", torch.float32)
    whole = train("tune", torch.float32, "precision=bf16")
    chunked = train("tune", torch.float32, "precision=bf16", "chunk_size=4")
    for name in (name for name in expected if name.startswith(("update 0: l", "update 0: g"))):
        error = (whole[name] - expected[name]).abs().max().item()
        assert error > 0, name
        scale = expected[name].abs().max().item()
        assert (chunked[name] - whole[name]).abs().max().item() <= error + 2**-8 * scale, name


@contextmanager
def saved(found: list[int], module: nn.Module) -> Iterator[None]:
    """Counts the numbers that autograd saves, but for parameters."""
    storages = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in storages:
            found.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield


def test_no_more_than_a_chunk_is_saved() -> None:
    encoder = Encoder(load_config(cast("DictConfig", OmegaConf.create(SETTINGS))).encoder)
    images = torch.randn(8, 3, 8, 8)

    def run(images: Tensor) -> Tensor:
        assert torch.is_grad_enabled() == (len(passes) >= num_forward)
        count: list[int] = []
        with saved(count, encoder):
            result = cast("Tensor", encoder(images)[:, 0])
        passes.append(sum(count))
        return result

    passes: list[int] = []
    num_forward = 0
    in_chunks(lambda x: (x,), run, [images], encoder.parameters(), size=None)
    (whole,) = passes
    passes, num_forward = [], 4
    output = in_chunks(lambda x: (x,), run, [images], encoder.parameters(), size=2)
    assert passes == [0, 0, 0, 0]
    torch.autograd.backward(output.square().sum())
    assert passes[4:] == [whole / 4] * 4


def test_the_frozen_blocks_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    state = build("tune", torch.float32, "chunk_size=4")
    calls: list[tuple[int, int]] = []
    run_blocks = Encoder._run_blocks

    def count(
        self: Encoder, blocks: list[nn.Module], stream: Stream, class_token_only: bool
    ) -> Stream:
        calls.extend((list(self.blocks).index(block), len(stream.r)) for block in blocks)
        return run_blocks(self, blocks, stream, class_token_only)

    monkeypatch.setattr(Encoder, "_run_blocks", count)
    Update(state, state.model, init_world("cpu"))(next(batches(state, torch.float32)))
    rows = [8, 8, 4]  # two views of 4, 4 and 2 images
    assert [n for i, n in calls if i == 0] == rows
    assert [n for i, n in calls if i == 1] == rows
    assert [n for i, n in calls if i == 3] == rows * 2


def test_a_wrong_size_is_one_line(
    recipes: dict[Stage, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pretrain", "--recipe", str(recipes["pretrain"]), "--out", str(tmp_path / "run")]
    assert main([*command, "chunk_size=-1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == ("maect-fast pretrain: chunk_size: expected a number in [0, 16777216], got -1")
    with pytest.raises(ConfigError, match=r"^chunk_size: "):
        load_config(overrides=["chunk_size=many"])


def tune(recipes: dict[Stage, Path], out: Path, *settings: str) -> list[str]:
    # eps as in test_world_size.py: gradients that are zero but for rounding stay small.
    settings = ("optim.eps=1e-2", *settings)
    return [
        "tune",
        "--recipe",
        str(recipes["tune"]),
        "--from-scratch",
        "--out",
        str(out),
        *settings,
    ]


def weights(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_checkpoint(last_checkpoint(out))
    assert found["update"] == 16
    return {**found["model"], **{f"EMA {k}": v for k, v in found["encoder_ema"].items()}}


@pytest.mark.slow
def test_two_processes_with_chunks(recipes: dict[Stage, Path], tmp_path: Path) -> None:
    """Chunks of 3 of each rank's 8 images; DDP would refuse a second gradient of a parameter."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(tune(recipes, one)) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "maect_fast.cli", *tune(recipes, two, "chunk_size=3")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected, found = weights(one), weights(two)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_resume_with_chunks(recipes: dict[Stage, Path], tmp_path: Path) -> None:
    """Bit for bit where chunk_size stays, and it may change."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(tune(recipes, whole, "chunk_size=5")) == 0
    call = Update.__call__

    def until_7(update: Update, batch: Batch) -> dict[str, Tensor]:
        result = call(update, batch)
        if update.state.update == 7:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Update, "__call__", until_7)
        assert main(tune(recipes, parts, "chunk_size=5", "save_minutes=0")) == 130
    assert load_checkpoint(last_checkpoint(parts))["update"] == 6
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", str(parts), str(other)], check=True)
    assert main(tune(recipes, parts, "chunk_size=5")) == 0
    expected = weights(whole)
    for name, value in weights(parts).items():
        assert torch.equal(value, expected[name]), name
    assert main(tune(recipes, other, "chunk_size=16")) == 0
    for name, value in weights(other).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
