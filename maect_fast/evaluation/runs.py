"""From run directories to features: which weights a run's evaluation looks at."""

from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from maect_fast.checkpoint import CheckpointError, peek_checkpoint
from maect_fast.config import Config, load_config
from maect_fast.data import build_source, eval_batches
from maect_fast.evaluation.features import Features, extract_features, raw_pixels
from maect_fast.models.decoder import Decoder
from maect_fast.models.encoder import Encoder
from maect_fast.models.maect import PretrainModel, build_pretrain
from maect_fast.names import printable
from maect_fast.training.distributed import World, resolve_device
from maect_fast.training.stages import last_checkpoint, load_module, load_state, part

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
    """The configuration and the last checkpoint of a run directory, whose sizes fit each other.

    Raises:
        CheckpointError: there is no checkpoint, or its weights are not those of its configuration.
        ConfigError: an override that the configuration does not take.
    """
    state = load_state(run)
    config = load_config(state["config"], overrides=overrides)
    weights = encoder_weights(state)
    decoder = part(state["model"], "decoder.") if config.stage == "pretrain" else {}
    _check_sizes(config, weights, decoder, run)
    try:
        with torch.device("meta"):
            encoder = Encoder(config.encoder)
            load_module(encoder, weights, "encoder", run)
            if config.stage == "pretrain":
                load_module(Decoder(config.decoder, encoder), decoder, "decoder", run)
    except ValueError as error:
        raise CheckpointError(f"{printable(run)}: {error}") from error
    return config, state


def encoder_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that evaluation looks at: the encoder's EMA where the run kept one."""
    if state["encoder_ema"] is not None:
        return dict(state["encoder_ema"])
    return part(state["model"], "encoder.")


def _check_sizes(
    config: Config, encoder: dict[str, Tensor], decoder: dict[str, Tensor], run: Path
) -> None:
    """Refuse sizes beyond those of the weights before a model is built of them, however large."""
    patch = _shape(encoder, "patch_embed.proj.weight", 4, run)[3]
    grid = isqrt(_shape(encoder, "pos_embed", 3, run)[1])
    sizes = {
        "encoder.depth": (config.encoder.depth, _num_blocks(encoder)),
        "encoder.embed_dim": (config.encoder.embed_dim, _shape(encoder, "cls_token", 3, run)[2]),
        "encoder.patch_size": (config.encoder.patch_size, patch),
        "encoder.img_size": (config.encoder.img_size, grid * patch),
    }
    if config.stage == "pretrain":
        width = _shape(decoder, "mask_token", 3, run)[2]
        sizes |= {
            "decoder.depth": (config.decoder.depth, _num_blocks(decoder)),
            "decoder.embed_dim": (config.decoder.embed_dim, width),
        }
    for key, (stated, held) in sizes.items():
        if stated is not None and stated != held:
            raise CheckpointError(
                f"{printable(run)}: {key} is {stated} in its configuration, {held} in its weights"
            )


def _num_blocks(weights: dict[str, Tensor]) -> int:
    return len({key.split(".")[1] for key in weights if key.startswith("blocks.")})


def _shape(weights: dict[str, Tensor], key: str, ndim: int, run: Path) -> torch.Size:
    if key not in weights or weights[key].ndim != ndim:
        raise CheckpointError(f"{printable(run)}: a checkpoint without the weights {key}")
    return weights[key].shape


def run_encoder(config: Config, state: dict[str, Any]) -> Encoder:
    """The run's encoder in evaluation mode: its EMA where the run kept one, as published."""
    # Whatever torch's default dtype: the weights of the file are fp32.
    encoder = Encoder(config.encoder).float()
    encoder.load_state_dict(encoder_weights(state))
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
