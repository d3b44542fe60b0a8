"""Updates of the three stages against `transcription`, which was written independently.

Our side is the engine's own update: build_stage, forward, backward, optimiser, EMAs. In fp64 the
two agree to rounding, so that any difference in the formulas shows; fp32 is what users run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transcription as paper
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from maect_fast import block as block_module
from maect_fast.block import FusedBlock, Stream
from maect_fast.checkpoint import save_checkpoint
from maect_fast.config import Config, load_config
from maect_fast.data import Batch
from maect_fast.models.maect import ContrastiveModel, PretrainModel
from maect_fast.training.distributed import init_world
from maect_fast.training.stages import StageState, build_stage, last_checkpoint, start_weights
from maect_fast.training.update import Update

BATCH, TOTAL, WARMUP = 16, 12, 2
FIRST = 1  # the three updates see the last warm-up rate, the peak and the first decayed rate
QUEUE = 50  # no multiple of the batch
POINTER = 24  # the second update wraps round
PATCHES = 16

TINY = """
encoder:
  name: vit_tiny_patch16_224
  img_size: 8
  patch_size: 2
  embed_dim: 32
  depth: 4
  num_heads: 2
decoder: {embed_dim: 16, depth: 2, num_heads: 4}
head: {projector_hidden: 24, predictor_hidden: 40, output_dim: 16, queue_size: 50, temperature: 0.2}
optim:
  encoder_lr: 0.01
  other_lr: 0.008
  warmup: 0.2
  # much stronger than in the recipes, and unequal, so that a misplaced decay shows
  encoder_weight_decay: 0.5
  other_weight_decay: 0.3
batch_size: 16
num_views: 2
mask_ratio: 0.7
seed: 8589934597  # more than 32 bits
"""
STAGE1 = "stage: pretrain"
STAGE2 = """
stage: prepare-head
head: {topk: 1, pooling: mean_patch}
"""
STAGE3 = """
stage: tune
head: {topk: 5, target_ema: 0.99, pooling: class_token}
optim: {layer_decay: 0.65}
frozen_blocks: 2
encoder_ema: 0.75
"""


@dataclass(frozen=True)
class Precision:
    dtype: torch.dtype
    tolerance: float
    # AdamW's. In fp32 it is large enough to hide gradients that are zero but for rounding, such as
    # those of the keys' bias.
    eps: float


FP64 = Precision(torch.float64, 1e-9, 1e-8)
FP32 = Precision(torch.float32, 1e-5, 1e-3)


@pytest.fixture(params=[FP64, FP32], ids=["fp64", "fp32"])
def precision(request: pytest.FixtureRequest) -> Precision:
    found: Precision = request.param
    return found


def tiny_config(stage: str, precision: Precision, **changes: float) -> Config:
    layers = [cast("DictConfig", OmegaConf.create(layer)) for layer in (TINY, stage)]
    overrides = [f"optim.eps={precision.eps}", "precision=fp32"]
    return load_config(*layers, changes, overrides=overrides)


def settings_of(config: Config) -> paper.Settings:
    head, optim = config.head, config.optim
    return paper.Settings(
        num_heads=2,
        decoder_heads=4,
        pooling=head.pooling,
        topk=head.topk,
        temperature=head.temperature,
        target_ema=head.target_ema,
        encoder_ema=config.encoder_ema,
        frozen_blocks={"pretrain": 0, "prepare-head": None, "tune": 2}[config.stage],
        layer_decay=0.65 if config.stage == "tune" else 1.0,
        encoder_lr=optim.encoder_lr,
        other_lr=optim.other_lr,
        encoder_weight_decay=optim.encoder_weight_decay,
        other_weight_decay=optim.other_weight_decay,
        eps=optim.eps,
        batch_size=BATCH,
        total_updates=TOTAL,
        warmup_updates=WARMUP,
        seed=config.seed,
    )


def build(config: Config, precision: Precision) -> StageState:
    """Our state as if in the middle of a run.

    No bias is zero, no scale is one, both averages lag behind, and the pointer is inside the queue.
    """
    state = build_stage(config, init_world("cpu"), total=TOTAL)
    state.update = FIRST
    generator = torch.Generator().manual_seed(1)
    model = state.model.to(precision.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
            elif name.endswith("queue_ptr"):
                buffer.fill_(POINTER)
    if state.encoder_ema is not None:
        state.encoder_ema.encoder.to(precision.dtype)
        average = official(model.encoder)
        for name, parameter in model.encoder.named_parameters():
            if parameter.requires_grad:
                average[name] += 0.01 * torch.randn(parameter.shape, generator=generator)
        state.encoder_ema.load_state_dict(average)
    return state


def official(module: nn.Module) -> paper.State:
    """A copy of a module's state under the official names: `loss.queue.queue_id` is `queue_id`."""
    return {
        name.removeprefix("loss.queue."): value.detach().clone()
        for name, value in module.state_dict().items()
    }


def batches(precision: Precision, count: int = 3) -> Iterator[Batch]:
    """Batches out of 24 images, each image in two noisy views; ids repeat, -1 is no label."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(24, 3, 8, 8, generator=generator)
    labels = torch.randint(-1, 3, (24,), generator=generator)
    for _ in range(count):
        sample_id = torch.randint(24, (BATCH,), generator=generator)
        noise = torch.randn(2, BATCH, 3, 8, 8, generator=generator)
        views = (images[sample_id] + 0.5 * noise).to(precision.dtype)
        yield Batch(views=views, sample_id=sample_id, label=labels[sample_id])


def masked_pass(
    decoder: paper.State, config: Config, update: int, weight: float = 1.0
) -> paper.MaskedPass:
    """The masks of one update, drawn by the transcription."""
    ids = [
        paper.masking_ids(
            BATCH, PATCHES, config.mask_ratio, seed=config.seed, step=update, view=view
        )
        for view in (0, 1)
    ]
    ids_keep, ids_restore = (torch.cat(per_view) for per_view in zip(*ids, strict=True))
    return paper.MaskedPass(decoder, ids_keep, ids_restore, weight)


def watch_gradients(model: nn.Module) -> paper.State:
    """A dictionary of every parameter's last gradient, which the optimiser's step discards."""
    grads: paper.State = {}

    def watch(name: str, parameter: nn.Parameter) -> None:
        def keep(parameter: Tensor) -> None:
            assert parameter.grad is not None
            grads[name] = parameter.grad.clone()

        parameter.register_post_accumulate_grad_hook(keep)  # type: ignore[no-untyped-call]

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            watch(name, parameter)
    return grads


def learning_rates(state: StageState) -> dict[str, dict[str, float]]:
    """The optimiser's rate of every parameter, per sub-model."""
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    found: dict[str, dict[str, float]] = {}
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            part, _, name = names[id(parameter)].partition(".")
            found.setdefault(part, {})[name] = float(group["lr"])
    return found


def assert_same(ours: paper.State, theirs: paper.State, tolerance: float, what: str) -> None:
    """Same names; integers equal, the rest within the tolerance, relative where above 1."""
    assert ours.keys() == theirs.keys(), f"{what}: {sorted(ours.keys() ^ theirs.keys())}"
    for name, value in ours.items():
        expected = theirs[name]
        assert value.dtype == expected.dtype, f"{what} {name}: {value.dtype}"
        assert value.shape == expected.shape, f"{what} {name}: {value.shape}"
        error = (value.double() - expected.double()).abs().max().item()
        largest = expected.abs().max().item()
        limit = tolerance * max(1.0, largest) if value.is_floating_point() else 0.0
        assert error <= limit, f"{what} {name}: off by {error:.2g}"


def assert_same_update(
    state: StageState,
    outputs: dict[str, Tensor],
    grads: paper.State,
    expected: paper.StepRecord,
    tolerance: float,
) -> None:
    """Loss, gradients and learning rates of one update."""
    assert abs(outputs["loss"] - expected.loss) <= tolerance * expected.loss
    flat = {
        f"{part}.{name}": grad
        for part, by_name in expected.grads.items()
        for name, grad in by_name.items()
    }
    assert_same(grads, flat, tolerance, "gradient of")
    found = learning_rates(state)
    for part, by_name in expected.rates.items():
        assert found.get(part, {}) == pytest.approx(by_name, rel=1e-12)


def run_contrastive(config: Config, precision: Precision) -> None:
    """Three updates on both sides, everything compared after each."""
    state, settings = build(config, precision), settings_of(config)
    model, tolerance = state.model, precision.tolerance
    assert isinstance(model, ContrastiveModel)
    encoder, head = official(model.encoder), official(model.head)
    decoder = None if model.decoder is None else official(model.decoder)
    average = None if state.encoder_ema is None else official(state.encoder_ema.encoder)
    start = dict(encoder)
    moments = {part: paper.Moments() for part in ("encoder", "head", "decoder")}
    grads = watch_gradients(model)
    make_update = Update(state, model, init_world("cpu"))
    for update, batch in enumerate(batches(precision), FIRST):
        outputs = make_update(batch)
        masked = None
        if decoder is not None:
            masked = masked_pass(decoder, config, update, config.reconstruction_weight)
        tensors = (batch.views, batch.sample_id, batch.label)
        expected = paper.contrastive_step(
            encoder, head, average, moments, tensors, settings, update, masked
        )
        assert_same_update(state, outputs, grads, expected, tolerance)
        assert outputs["nn_accuracy"].item() == pytest.approx(expected.nn_accuracy)
        assert_same(official(model.head), head, tolerance, "head")
        assert_same(official(model.encoder), encoder, tolerance, "encoder")
        if model.decoder is not None and decoder is not None:
            assert_same(official(model.decoder), decoder, tolerance, "decoder")
        if state.encoder_ema is not None and average is not None:
            assert_same(official(state.encoder_ema.encoder), average, tolerance, "encoder EMA")
    assert head["queue_ptr"].item() == (POINTER + 3 * BATCH) % QUEUE
    changed = {name for name in encoder if not torch.equal(encoder[name], start[name])}
    assert changed == set(paper.trainable_encoder(encoder, settings.frozen_blocks))


def test_stage_3(precision: Precision) -> None:
    run_contrastive(tiny_config(STAGE3, precision), precision)


def test_stage_3_with_a_reconstruction_loss(precision: Precision) -> None:
    run_contrastive(tiny_config(STAGE3, precision, reconstruction_weight=0.5), precision)


def test_stage_2(precision: Precision) -> None:
    run_contrastive(tiny_config(STAGE2, precision), precision)


def test_stage_1(precision: Precision) -> None:
    config = tiny_config(STAGE1, precision)
    state, settings = build(config, precision), settings_of(config)
    model, tolerance = state.model, precision.tolerance
    assert isinstance(model, PretrainModel)
    encoder, decoder = official(model.encoder), official(model.decoder)
    moments = {"encoder": paper.Moments(), "decoder": paper.Moments()}
    grads = watch_gradients(model)
    make_update = Update(state, model, init_world("cpu"))
    for update, batch in enumerate(batches(precision), FIRST):
        outputs = make_update(batch)
        masked = masked_pass(decoder, config, update)
        expected = paper.pretrain_step(encoder, masked, moments, batch.views, settings, update)
        assert_same_update(state, outputs, grads, expected, tolerance)
        assert_same(official(model.encoder), encoder, tolerance, "encoder")
        assert_same(official(model.decoder), decoder, tolerance, "decoder")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Blocks take their fused path, by the ops' definitions; notes whether autograd is on."""
    monkeypatch.setattr(block_module, "_place_obstacle", lambda x, dtype: None)
    calls: list[bool] = []
    advance = FusedBlock.advance

    def noted(block: FusedBlock, *arguments: Any, keeps_bias: bool) -> Stream:
        calls.append(torch.is_grad_enabled())
        return advance(block, *arguments, keeps_bias=keeps_bias)

    monkeypatch.setattr(FusedBlock, "advance", noted)
    return calls


def test_fifty_updates_on_fused_blocks(fused: list[bool]) -> None:
    """In fp32 the loss stays within 1e-4 of the transcription's, through warm-up and decay."""
    count = 50
    config = tiny_config(STAGE3, FP32)
    settings = replace(settings_of(config), total_updates=count, warmup_updates=count // 5)
    state = build(config, FP32)
    state.update, state.total = 0, count
    model = state.model
    assert isinstance(model, ContrastiveModel)
    assert state.encoder_ema is not None
    encoder, head = official(model.encoder), official(model.head)
    average = official(state.encoder_ema.encoder)
    moments = {part: paper.Moments() for part in ("encoder", "head")}
    make_update = Update(state, model, init_world("cpu"))
    losses = []
    for update, batch in enumerate(batches(FP32, count)):
        loss = make_update(batch)["loss"].item()
        tensors = (batch.views, batch.sample_id, batch.label)
        expected = paper.contrastive_step(
            encoder, head, average, moments, tensors, settings, update
        )
        assert loss == pytest.approx(expected.loss.item(), rel=1e-4), f"update {update}"
        losses.append(loss)
    # The last of the four blocks runs for the class token alone, from its norm on.
    assert fused == [False, False, True] * count
    assert sum(losses[-10:]) < sum(losses[:10])


def test_stage_3_starts_where_stage_2_ended(tmp_path: Path) -> None:
    """Encoder, head, statistics and queue go on; only the target projector is new: a true copy."""
    stage2 = build(tiny_config(STAGE2, FP32), FP32)
    make_update = Update(stage2, stage2.model, init_world("cpu"))
    for batch in batches(FP32):
        make_update(batch)
    stage2.update = TOTAL
    saved = {**stage2.state_dict(), "config": {}, "random_states": []}
    save_checkpoint(last_checkpoint(tmp_path), saved)
    stage3 = build(tiny_config(STAGE3, FP32, seed=6), FP32)
    start_weights(stage3, init=tmp_path)
    assert isinstance(stage2.model, ContrastiveModel)
    assert isinstance(stage3.model, ContrastiveModel)
    assert stage3.encoder_ema is not None
    encoder, head = official(stage2.model.encoder), official(stage2.model.head)
    paper.start_target(head)
    assert_same(official(stage3.model.encoder), encoder, 0, "encoder")
    assert_same(official(stage3.encoder_ema.encoder), encoder, 0, "encoder EMA")
    assert_same(official(stage3.model.head), head, 0, "head")
    with torch.no_grad():
        for parameter in stage3.model.head.projector.parameters():
            parameter.zero_()
    target = {name: value for name, value in head.items() if name.startswith("target")}
    found = official(stage3.model.head)
    assert_same({name: found[name] for name in target}, target, 0, "head")


def test_positions() -> None:
    model = build(tiny_config(STAGE1, FP32), FP32).model
    assert isinstance(model, PretrainModel)
    for part, dim in ((model.encoder, 32), (model.decoder, 16)):
        torch.testing.assert_close(part.pos_embed, paper.sincos_positions(dim, 4).float())


def test_the_transcription_draws_the_published_numbers() -> None:
    """Known answers of Random123: tests/kat_vectors."""
    zero = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert paper.philox4x32((0, 0), (0, 0, 0, 0)) == zero
    key, counter = (0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    pi = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert paper.philox4x32(key, counter) == pi
