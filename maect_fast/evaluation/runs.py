"""From run directories to features: which weights a run's evaluation looks at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from maect_fast.checkpoint import load_checkpoint, peek_checkpoint
from maect_fast.config import Config, load_config
from maect_fast.data import build_source, eval_batches
from maect_fast.evaluation.features import Features, extract_features, raw_pixels
from maect_fast.models.encoder import Encoder
from maect_fast.models.maect import PretrainModel, build_pretrain
from maect_fast.training.distributed import World, resolve_device
from maect_fast.training.stages import last_checkpoint

__all__ = ["check_run", "load_run", "run_encoder", "run_pretrain_model", "split_features"]

EVAL_BATCH = 256

Split = Literal["train", "test"]


def check_run(run: Path, overrides: Sequence[str], *splits: Split) -> None:
    """Find out in moments whether a run can be evaluated: checkpoint, settings and images.

    Raises:
        CheckpointError: there is no checkpoint.
        ConfigError: an override that the configuration does not take, or no images of a split.
    """
    config = load_config(peek_checkpoint(last_checkpoint(run))["config"], overrides=overrides)
    for split in splits:
        build_source(config.data, config.encoder, split=split)


def load_run(run: Path, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, Any]]:
    """The configuration and the last checkpoint of a run directory.

    Raises:
        CheckpointError: there is no checkpoint.
        ConfigError: an override that the configuration does not take.
    """
    state = load_checkpoint(last_checkpoint(run))
    return load_config(state["config"], overrides=overrides), state


def run_encoder(config: Config, state: dict[str, Any]) -> Encoder:
    """The run's encoder in evaluation mode: its EMA where the run kept one, as published."""
    # Whatever torch's default dtype: the weights of the file are fp32.
    encoder = Encoder(config.encoder).float()
    weights = state["encoder_ema"]
    if weights is None:
        prefix = "encoder."
        weights = {
            key.removeprefix(prefix): value
            for key, value in state["model"].items()
            if key.startswith(prefix)
        }
    encoder.load_state_dict(weights)
    return encoder.to(resolve_device(config.device)).eval()


def run_pretrain_model(config: Config, state: dict[str, Any]) -> PretrainModel:
    """Encoder and decoder of a pretrain run, in evaluation mode."""
    device = resolve_device(config.device)
    world = World(rank=0, size=1, local_rank=0, group=None, device=device)
    model = build_pretrain(config, world)
    model.load_state_dict(state["model"])
    return model.to(device).eval()


def split_features(config: Config, split: Split, encoder: Encoder | None) -> Features:
    """Features of the training or test images; raw pixels when `encoder` is None."""
    source = build_source(config.data, config.encoder, split=split)
    batches = eval_batches(
        source,
        config.augment,
        img_size=config.encoder.img_size,
        batch_size=EVAL_BATCH,
        workers=config.data.workers,
        max_broken=config.data.max_broken,
    )
    if encoder is None:
        return raw_pixels(batches, mean=config.augment.mean, std=config.augment.std)
    device = next(encoder.parameters()).device
    return extract_features(
        encoder,
        batches,
        pooling=config.head.pooling,
        device=torch.device(device),
        precision=config.precision,
    )
