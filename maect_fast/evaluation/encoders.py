"""What can be evaluated: a run, a file with an encoder's weights, or a model of timm's by name."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import is_model_in_modules, is_model_pretrained
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maect_fast.checkpoint import CheckpointError, peek_checkpoint
from maect_fast.config import Config, ConfigError, EncoderConfig, load_config
from maect_fast.convert import FoundEncoder, check_fit, check_possible, find_encoder, load_encoder
from maect_fast.convert.find import FOLDER_FILE
from maect_fast.data import build_source
from maect_fast.evaluation.runs import Split, Weights, load_run, run_encoder, weights_line
from maect_fast.models.encoder import Encoder
from maect_fast.names import one_line, printable
from maect_fast.training.distributed import resolve_device
from maect_fast.training.stages import last_checkpoint

__all__ = [
    "TIMM",
    "Opened",
    "TimmEncoder",
    "check_encoder",
    "check_file",
    "is_run",
    "open_encoder",
]

TIMM = "timm:"
# What is to be said of timm's models in `encoder.*`; the rest comes with the weights.
OF_TIMM = ("img_size", "in_chans")


class Opened(NamedTuple):
    """An encoder in evaluation mode, and what is to be said of it."""

    config: Config
    """Says which images, how they are normalised, and how features are pooled."""
    encoder: nn.Module
    """Maps images to tokens [B, 1 + L, D], the class token first."""
    kind: str
    """A run's stage, `file` or `timm`."""
    origin: str
    """Where it is from."""
    weights: str
    """Which weights were taken."""
    state: dict[str, Any] | None
    """A run's last checkpoint."""


class TimmEncoder(nn.Module):
    """A ViT of timm's, unchanged but for the registers that are left out of its tokens.

    Args:
        vit: one with a class token.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        # Where `pooled_attention` looks for them.
        self.blocks, self.patch_embed = vit.blocks, vit.patch_embed

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] normalised to [B, 1 + L, D], after the final norm."""
        tokens = self.vit.forward_features(images)
        return torch.cat([tokens[:, :1], tokens[:, self.vit.num_prefix_tokens :]], dim=1)


def is_run(word: str) -> bool:
    """Whether the word means a run directory, there or not."""
    path = Path(word)
    return not word.startswith(TIMM) and not path.is_file() and not (path / FOLDER_FILE).is_file()


def check_encoder(
    word: str, overrides: Sequence[str], *splits: Split
) -> tuple[Config, list[Tensor]]:
    """Find out whether an encoder can be evaluated: weights, settings and images.

    That takes moments, but for weights of timm's that have to be fetched.

    Args:
        word: a run directory, a file with an encoder's weights, or `timm:NAME`.
        overrides: `key=value` changes of the configuration.
        splits: whose images are looked for.

    Returns:
        The configuration, and the labels of each split's images.

    Raises:
        CheckpointError: there is none, or it holds no encoder that the settings fit.
        ConfigError: no such model, an override that the configuration does not take, or no images
            of a split.
    """
    if word.startswith(TIMM):
        config = _timm_config(word, overrides)
    elif is_run(word):
        path = last_checkpoint(Path(word))
        if not Path(word).is_dir():
            raise CheckpointError(
                f"{printable(word)}: no run directory with a checkpoint, and no file with an "
                f"encoder's weights (a model of timm's is {TIMM}NAME)"
            )
        config = load_config(peek_checkpoint(path)["config"], overrides=overrides)
    else:
        config = check_file(word, overrides)[0]
    labels = [build_source(config.data, config.encoder, split=split).labels for split in splits]
    if word.startswith(TIMM):
        _pretrained(word, config)
    return config, labels


def open_encoder(word: str, overrides: Sequence[str] = (), *, weights: Weights = "ema") -> Opened:
    """Load what the word means; of runs the `weights` that are asked for.

    Args and errors are those of `check_encoder`.
    """
    if word.startswith(TIMM):
        return _open_timm(word, overrides)
    if not is_run(word):
        return _open_file(word, overrides)
    config, state = load_run(Path(word), overrides, weights=weights)
    record = state.get("record")
    recipe = (record.get("recipe") if isinstance(record, dict) else None) or "not recorded"
    origin = (
        f"{os.path.abspath(word)}: stage {config.stage}, recipe {recipe}, seed {config.seed}, "
        f"{config.epochs} epochs of batches of {config.batch_size}"
    )
    line = weights_line(config, state, weights)
    return Opened(config, run_encoder(config, state, weights), config.stage, origin, line, state)


def _open_file(word: str, overrides: Sequence[str]) -> Opened:
    config, found = check_file(word, overrides)
    encoder = Encoder(config.encoder).float()
    taken = "; ".join(load_encoder(encoder, found))
    sizes = (
        f"width {encoder.embed_dim}, {encoder.depth} blocks of {config.encoder.num_heads} heads, "
        f"patches of {encoder.patch_size} pixels"
    )
    encoder.to(resolve_device(config.device)).eval()
    return Opened(config, encoder, "file", os.path.abspath(word), f"{taken}; {sizes}", None)


def check_file(
    word: str, overrides: Sequence[str], *, encoder: str | None = None
) -> tuple[Config, FoundEncoder]:
    """The encoder in a file, and settings that it fits.

    Args:
        word: the file.
        overrides: `key=value` changes of the configuration.
        encoder: which, where there are several; None takes the default one.

    Raises:
        CheckpointError: there is none, or none that an encoder of ours can be.
        ConfigError: an override that does not fit, or heads that nothing tells.
    """
    try:
        found = find_encoder(word, encoder=encoder)
        check_possible(found)
        config = load_config(found.settings(), overrides=overrides)
        if config.encoder.num_heads is None:
            raise ConfigError(
                f"encoder.num_heads: {printable(word)} does not say how many its blocks have; "
                "give encoder.num_heads=N"
            )
        # Before a model is built, however large the one that is asked for.
        with torch.device("meta"):
            check_fit(Encoder(config.encoder), found)
    except ConfigError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return config, found


def _open_timm(word: str, overrides: Sequence[str]) -> Opened:
    config = _timm_config(word, overrides)
    vit = _pretrained(word, config)
    # Where the name has no tag, timm's release decides.
    line = f"pretrained weights {vit.pretrained_cfg['tag']}"
    encoder = TimmEncoder(vit).to(resolve_device(config.device)).eval()
    return Opened(config, encoder, "timm", f"{word}, of timm {timm.__version__}", line, None)


def _timm_config(word: str, overrides: Sequence[str]) -> Config:
    """What the model was trained on decides input size and normalisation."""
    name, shown = word.removeprefix(TIMM), printable(word)
    if not timm.is_model(name):
        raise ConfigError(f"{shown}: timm has no such model")
    if not is_model_in_modules(name, {"vision_transformer", "deit"}):
        raise ConfigError(f"{shown}: expected one of timm's ViTs (vision_transformer.py)")
    if not is_model_pretrained(name):
        raise ConfigError(f"{shown}: timm has no pretrained weights of this name")
    with torch.device("meta"):
        vit: Any = timm.create_model(name, pretrained=False, num_classes=0)
    if vit.cls_token is None or isinstance(vit.norm, nn.Identity):
        lacks = "class token" if vit.cls_token is None else "final norm before its pooling"
        raise ConfigError(f"{shown}: expected a ViT with class token and norm, has no {lacks}")
    trained: dict[str, Any] = resolve_model_data_config(vit)  # type: ignore[no-untyped-call]
    in_chans, _, img_size = trained["input_size"]
    own = {"name": name, "img_size": img_size, "in_chans": in_chans}
    normalisation = {"mean": list(trained["mean"]), "std": list(trained["std"])}
    config = load_config({"encoder": own, "augment": normalisation}, overrides=overrides)
    natural = dataclasses.asdict(EncoderConfig(**own))
    for key, value in dataclasses.asdict(config.encoder).items():
        if key not in OF_TIMM and value != natural[key]:
            raise ConfigError(
                f"encoder.{key}: {shown} has its own; encoder.img_size and encoder.in_chans alone "
                "may differ"
            )
    patch_size = vit.patch_embed.patch_size[0]
    if config.encoder.img_size % patch_size:
        raise ConfigError(
            f"encoder.img_size: expected a multiple of the patch size {patch_size} of {shown}, "
            f"got {config.encoder.img_size}"
        )
    return config


def _pretrained(word: str, config: Config) -> Any:
    """Timm's model with its weights, which are fetched unless they are kept here."""
    own = {key: getattr(config.encoder, key) for key in OF_TIMM}
    try:
        vit = timm.create_model(config.encoder.name, pretrained=True, num_classes=0, **own)
        return vit.float()
    # The ways in which a download fails have no class in common: requests', httpx', the hub's.
    except Exception as error:
        raise CheckpointError(
            f"{printable(word)}: its pretrained weights cannot be had ({one_line(error)}); fetch "
            "them once with a network, after which they are kept, or give a file of them"
        ) from error
