"""From run directories to features: which weights a run's evaluation looks at."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from math import isqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from maect_fast.checkpoint import CheckpointError
from maect_fast.config import AugmentConfig, Config, load_config
from maect_fast.data import Loader, Source, build_source, eval_batches
from maect_fast.evaluation.features import Features, extract_features, raw_pixels
from maect_fast.evaluation.unlabelled import Views
from maect_fast.models.decoder import Decoder
from maect_fast.models.encoder import Encoder
from maect_fast.models.maect import PretrainModel, build_pretrain
from maect_fast.names import printable
from maect_fast.training.distributed import World, resolve_device
from maect_fast.training.ema import half_lives
from maect_fast.training.log import progress
from maect_fast.training.stages import load_module, load_state, part

__all__ = [
    "Extracted",
    "Show",
    "Split",
    "Weights",
    "load_run",
    "run_encoder",
    "run_pretrain_model",
    "source_features",
    "source_views",
    "split_features",
    "view_features",
    "weights_line",
]

EVAL_BATCH = 256
# Half-lives below which more than an eighth of an average is what the run started from.
FEW = 3

T = TypeVar("T")

Split = Literal["train", "test"]
Weights = Literal["ema", "model"]


class Show(Protocol):
    """What shows how far it is, as `progress` does."""

    def __call__(self, items: Iterable[T], title: str, *, total: int) -> Iterator[T]:
        """Pass the items through."""


class Extracted(NamedTuple):
    """The features of a split, and of which of its images."""

    features: Features
    """A row for each image that could be read, in the order of the source."""
    source: Source
    missing: dict[int, str]
    """Why the others could not, by index."""

    @property
    def sample_id(self) -> Tensor:
        """[N] int64: of each row, the index of its image in the source."""
        rows = [i for i in range(len(self.source)) if i not in self.missing]
        return torch.tensor(rows, dtype=torch.int64)


def load_run(
    run: Path, overrides: Sequence[str] = (), *, weights: Weights = "ema"
) -> tuple[Config, dict[str, Any]]:
    """The configuration and the last checkpoint of a run directory, whose sizes fit each other.

    Raises:
        CheckpointError: there is no checkpoint, or its weights are not those of its configuration.
        ConfigError: an override that the configuration does not take.
    """
    state = load_state(run)
    config = load_config(state["config"], overrides=overrides)
    chosen = encoder_weights(state, weights)
    decoder = part(state["model"], "decoder.") if config.stage == "pretrain" else {}
    _check_sizes(config, chosen, decoder, run)
    try:
        with torch.device("meta"):
            encoder = Encoder(config.encoder)
            load_module(encoder, chosen, "encoder", run)
            if config.stage == "pretrain":
                load_module(Decoder(config.decoder, encoder), decoder, "decoder", run)
    except ValueError as error:
        raise CheckpointError(f"{printable(run)}: {error}") from error
    return config, state


def encoder_weights(state: dict[str, Any], weights: Weights = "ema") -> dict[str, Tensor]:
    """The weights that evaluation looks at: the encoder's EMA where the run kept one."""
    if weights == "ema" and state["encoder_ema"] is not None:
        return dict(state["encoder_ema"])
    return part(state["model"], "encoder.")


def weights_line(config: Config, state: dict[str, Any], weights: Weights = "ema") -> str:
    """Which weights `encoder_weights` takes, and how far an average has left its start behind."""
    done = f"{state['update']:,} of {state['total']:,} updates"
    if weights == "model" or state["encoder_ema"] is None:
        why = "" if state["encoder_ema"] is None else ", not its EMA"
        return f"the encoder as trained{why}, after {done}"
    # Runs of before the warm-up have no decay of their own.
    decay = state.get("encoder_ema_decay", config.encoder_ema)
    if decay is None:
        return f"the encoder's EMA, after {done}"
    number = half_lives(decay, state["update"])
    line = f"the encoder's EMA of decay {decay:.4g} after {done}: {number:.1f} half-lives"
    if number < FEW:
        line += (
            f", so that {0.5**number:.0%} of it are what the run started from; --weights model "
            "takes the encoder as trained"
        )
    return line


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


def run_encoder(config: Config, state: dict[str, Any], weights: Weights = "ema") -> Encoder:
    """The run's encoder in evaluation mode: its EMA where the run kept one, as published."""
    # Whatever torch's default dtype: the weights of the file are fp32.
    encoder = Encoder(config.encoder).float()
    encoder.load_state_dict(encoder_weights(state, weights))
    return encoder.to(resolve_device(config.device)).eval()


def run_pretrain_model(config: Config, state: dict[str, Any]) -> PretrainModel:
    """Encoder and decoder of a pretrain run, in evaluation mode."""
    device = resolve_device(config.device)
    world = World(rank=0, size=1, local_rank=0, group=None, device=device)
    model = build_pretrain(config, world)
    model.load_state_dict(state["model"])
    return model.to(device).eval()


def split_features(
    config: Config, split: Split, encoder: nn.Module | None, *, title: str = ""
) -> Extracted:
    """Features of the training or test images; raw pixels when `encoder` is None.

    `title` is that of the progress bar.
    """
    source = build_source(config.data, config.encoder, split=split)
    return source_features(source, config, encoder, title=f"{title} {split} images".strip())


def source_features(
    source: Source,
    config: Config,
    encoder: nn.Module | None,
    *,
    title: str,
    indices: Sequence[int] | None = None,
    show: Show = progress,
) -> Extracted:
    """`split_features` of a source's images, or of some of them.

    Args:
        source: the images.
        config: how they are normalised, and how features are pooled.
        encoder: see `extract_features`; None for raw pixels.
        title: of the progress bar.
        indices: of the images that are taken, in this order.
        show: the progress bar.
    """
    device = "cpu" if encoder is None else next(encoder.parameters()).device
    batches = eval_batches(
        source,
        config.augment,
        img_size=config.encoder.img_size,
        batch_size=EVAL_BATCH,
        workers=config.data.workers,
        max_broken=config.data.max_broken,
        indices=indices,
        device=device,
    )
    passed = show(batches, title, total=len(batches))
    if encoder is None:
        features = raw_pixels(passed, mean=config.augment.mean, std=config.augment.std)
    else:
        features = extract_features(
            encoder,
            passed,
            pooling=config.head.pooling,
            device=device,
            precision=config.precision,
        )
    return Extracted(features, source, batches.skipped)


def view_features(
    config: Config, encoder: nn.Module, augment: AugmentConfig, *, seed: int, title: str = ""
) -> Views:
    """Features of two random views of the test images.

    Args:
        config: says which images, and how they are normalised.
        encoder: maps images to tokens, see `extract_features`.
        augment: how views are made, the same for all encoders that are compared.
        seed: of the views.
        title: of the progress bar.
    """
    source = build_source(config.data, config.encoder, split="test")
    return source_views(source, config, encoder, augment, seed=seed, title=f"{title} views".strip())


def source_views(
    source: Source,
    config: Config,
    encoder: nn.Module,
    augment: AugmentConfig,
    *,
    seed: int,
    title: str,
    limit: int | None = None,
    show: Show = progress,
) -> Views:
    """`view_features` of a source's images, or of a seeded choice of at most `limit` of them."""
    own = config.augment
    number = min(len(source), limit or len(source))
    # Batches as equal as can be: a loader drops a tail.
    count = -(-number // EVAL_BATCH)
    loader = Loader(
        source,
        dataclasses.replace(augment, views=augment.views[:2], mean=own.mean, std=own.std),
        num_views=2,
        batch_size=number // count,
        img_size=config.encoder.img_size,
        seed=seed,
        workers=config.data.workers,
        max_broken=config.data.max_broken,
        device=next(encoder.parameters()).device,
    )
    with closing(loader):
        both = (
            (batch.views.flatten(0, 1), batch.sample_id.repeat(2))
            for batch in show(islice(loader.batches(0), count), title, total=count)
        )
        found = extract_features(
            encoder,
            both,
            pooling=config.head.pooling,
            device=next(encoder.parameters()).device,
            precision=config.precision,
        )
    x = found.x.view(count, 2, -1, found.x.shape[1])
    ids = found.label.view(count, 2, -1)
    return Views(x[:, 0].flatten(0, 1), x[:, 1].flatten(0, 1), ids[:, 0].flatten())
