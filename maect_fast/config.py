"""One run's configuration: the dataclasses that the recipes fill.

A recipe is a YAML file under ``maect_fast/recipes``; ``key=value`` overrides follow it on the
command line. Every key is checked against these classes, so a misspelt key or a wrong type is an
error that names the key, never ignored.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = [
    "AugmentConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DecoderConfig",
    "EncoderConfig",
    "HeadConfig",
    "OptimConfig",
    "Stage",
    "ViewConfig",
    "load_config",
    "load_recipe",
    "profile_window",
    "save_config",
]

Stage = Literal["pretrain", "prepare-head", "tune"]

RECIPES = Path(__file__).parent / "recipes"

# What YAML 1.1 would read as a number in base 60.
BASE_60 = re.compile(r"=(\d+:\d+)$")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key and says what was expected."""


@dataclass(kw_only=True, slots=True)
class EncoderConfig:
    """A timm ViT by name; the optional fields override what the name implies."""

    name: str = "vit_base_patch16_224"
    """timm model name."""
    img_size: int = 224
    """Side of the square input, pixels."""
    in_chans: int = 3
    """Input channels: 3 or 1."""
    patch_size: int | None = None
    """Patch side, pixels."""
    embed_dim: int | None = None
    """Width."""
    depth: int | None = None
    """Number of blocks."""
    num_heads: int | None = None
    """Attention heads."""
    stream: Literal["fp32", "bf16"] = "fp32"
    """What the residual stream is kept in under bf16 autocast, the decoder's too. `bf16` moves half
    of the bytes and is about twice as far from exact; it has not been trained with."""


@dataclass(kw_only=True, slots=True)
class DecoderConfig:
    """The MAE decoder."""

    embed_dim: int = 512
    """Width."""
    depth: int = 8
    """Number of blocks."""
    num_heads: int = 16
    """Attention heads."""
    normalize_pixels: bool = True
    """Predict every patch with its own mean and deviation taken out, as the paper does; patches of
    a few pixels have too little left then."""


@dataclass(kw_only=True, slots=True)
class HeadConfig:
    """The NNCLR head, its queue and its loss."""

    pooling: Literal["class_token", "mean_patch"] = "class_token"
    """Which feature of the encoder enters the head."""
    projector_hidden: int = 2048
    """Width of the projector's two hidden layers."""
    predictor_hidden: int = 4096
    """Width of the predictor's hidden layer."""
    output_dim: int = 256
    """Dimension of the projection, and of a queue row."""
    queue_size: int = 65536
    """Rows of the ring buffer."""
    topk: int = 20
    """The neighbour is drawn uniformly from the k nearest; 1 takes the nearest."""
    temperature: float = 0.15
    """Divisor of the cosine similarities."""
    transposed: bool = False
    """True: rows are predictions and columns neighbours."""
    target_ema: float | None = None
    """Decay of the target projector's EMA; None searches with the online projector."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the images come from."""

    source: Literal["folder", "digits", "synthetic"] = "folder"
    """`folder`: image files; `digits`: scikit-learn's 1,797 digits; `synthetic`: random images."""
    root: str | None = None
    """Folder of training images, with or without class sub-folders."""
    test_root: str | None = None
    """Folder of evaluation images."""
    num_images: int = 1024
    """Size of the synthetic training set; its test set is a quarter of it."""
    workers: int = 4
    """Decoding processes per rank, at most one per core; 0 decodes in the training process."""
    max_broken: int = 10
    """Unreadable image files that are skipped before the run stops."""
    max_pixels: int = 30_000_000
    """Pixels of the largest image that is decoded (of a JPEG that is decoded at a reduced scale,
    those that remain); what is larger counts as unreadable. Decoding takes 4 to 20 bytes for each;
    Pillow refuses more than 178,956,970."""


@dataclass(kw_only=True, slots=True)
class ViewConfig:
    """Photometric augmentation of one view."""

    jitter: float = 0.0
    """Probability of colour jitter: brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1, in
    random order."""
    blur: float = 0.0
    """Probability of a Gaussian blur with a radius from U(0.1, 2.0) pixels."""
    grayscale: float = 0.0
    """Probability of dropping the colour."""
    solarize: float = 0.0
    """Probability of inverting values of 128 and above."""


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """Random views of an image: crop, flip, rotation, photometric changes, normalisation."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random resized crop as a share of the image's area."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Aspect ratio of the crop, log-uniform."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rotation: float = 0.0
    """Rotation from U(-r, r), radians."""
    contrast: float = 0.0
    """Contrast factor from U(1 - c, 1 + c) around the image's mean."""
    noise: float = 0.0
    """Standard deviation of additive Gaussian noise, on pixel values in [0, 1]."""
    views: list[ViewConfig] = field(default_factory=list)
    """Photometric changes, one entry per view; empty for none."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Per-channel mean subtracted from pixel values in [0, 1]."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Per-channel divisor."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, linear warm-up, cosine decay, both per update."""

    encoder_lr: float = 1.5e-4
    """Base rate of the encoder; the effective rate is base * batch_size * num_views / 256."""
    other_lr: float = 1.5e-4
    """Base rate of the decoder or the head."""
    encoder_weight_decay: float = 0.05
    """Weight decay of the encoder (none on biases and one-dimensional parameters)."""
    other_weight_decay: float = 0.05
    """Weight decay of the decoder or the head."""
    layer_decay: float = 1.0
    """The rate of block i is scaled by layer_decay ** (depth - i), the final norm's by 1."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging coefficients."""
    eps: float = 1e-8
    """AdamW's denominator term."""
    warmup: float = 0.2
    """Share of all updates that warm up linearly."""


@dataclass(kw_only=True, slots=True)
class Config:
    """One run of one stage."""

    stage: Stage = "pretrain"
    """Which of the three stages."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 5
    """Seed of everything random in the run."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 1024
    """Images per update over all ranks; each gives num_views views."""
    chunk_size: int | None = None
    """Images of a process whose activations are in memory at a time; None or 0 is all of them. With
    chunks the trained blocks run twice, and the update is the same to rounding: for a batch that is
    larger than the GPU; `maect-fast plan` says which size fits."""
    num_views: int = 2
    """Random crops per image and update."""
    mask_ratio: float = 0.75
    """Share of the patches hidden from the encoder in reconstruction; contrastive passes hide
    nothing."""
    frozen_blocks: int = 0
    """Stage `tune`: the stem and this many of the lowest blocks are not trained."""
    reconstruction_weight: float = 0.0
    """Stage `tune`: weight of an added MAE loss; it needs the decoder of a pretrain run."""
    encoder_ema: float | None = None
    """Decay of the encoder's EMA, which evaluation uses when it exists."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast dtype; auto is bf16 on a GPU and fp32 on a CPU. Master weights are fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    threads: int | None = None
    """CPU threads for torch; None leaves torch's choice."""
    log_every: int = 20
    """Updates between two lines of metrics."""
    checkpoint_every: int = 10
    """Epochs between two checkpoints that are kept; the last epoch is always saved."""
    save_minutes: float = 10.0
    """Minutes between two saves of the checkpoint from which the run would resume."""
    profile: str | None = None
    """START:STOP, the updates of which rank 0 takes a profile, STOP excluded (in YAML quoted)."""
    profiler: Literal["torch", "nsight"] = "torch"
    """`torch` writes a trace and a table to profile/ in the run; `nsight` is for a run that Nsight
    Systems or Nsight Compute records."""


def load_recipe(recipe: str, stage: Stage) -> DictConfig:
    """Read `recipes/<recipe>/<stage>.yaml`, or the YAML file that `recipe` names.

    Raises:
        ConfigError: there is no such recipe; the message lists those that exist for the stage.
    """
    path = (
        Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / recipe / f"{stage}.yaml"
    )
    if not path.is_file():
        names = ", ".join(sorted(p.parent.name for p in RECIPES.glob(f"*/{stage}.yaml")))
        raise ConfigError(
            f"no recipe {recipe!r} for {stage}; there are: {names} (or the path of a YAML file)"
        )
    return cast("DictConfig", OmegaConf.load(path))


def load_config(*layers: DictConfig | dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Merge the layers and the `key=value` overrides (the later one counts), check the result.

    Raises:
        ConfigError: unknown key, wrong type, or values that cannot work together.
    """
    for item in overrides:
        if "=" not in item:
            raise ConfigError(
                f"override {item!r}: expected key=value, such as optim.encoder_lr=1e-4"
            )
    merged = OmegaConf.structured(Config)
    texts = [BASE_60.sub(r"='\1'", item) for item in overrides]
    try:
        merged = OmegaConf.merge(merged, *layers, OmegaConf.from_dotlist(texts))
        config = cast("Config", OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{key}: {reason}{_known_keys(error)}") from None
    _check(config)
    return config


def profile_window(profile: str | None) -> range:
    """The updates that `Config.profile` names; an empty range for None.

    Raises:
        ConfigError: it is not START:STOP with START below STOP.
    """
    if profile is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", profile)
    updates = range(int(match[1]), int(match[2])) if match else range(0)
    if not updates:
        raise ConfigError(
            "profile: expected START:STOP, two update numbers with START below STOP "
            f"(profile=10:20; in a YAML file quoted), got {profile}"
        )
    return updates


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    OmegaConf.save(OmegaConf.structured(config), path)


def _known_keys(error: OmegaConfBaseException) -> str:
    """Name the keys that would have been valid where an unknown one was given."""
    node = getattr(error, "object_type", None)
    fields = getattr(node, "__dataclass_fields__", None)
    unknown = type(error).__name__ == "ConfigKeyError"
    return f"; expected one of: {', '.join(fields)}" if unknown and fields else ""


def _check(config: Config) -> None:
    """Refuse values that cannot work, one line each."""
    head, augment, optim = config.head, config.augment, config.optim
    rules = [
        (config.epochs >= 1, "epochs", "at least 1", config.epochs),
        (
            config.batch_size >= 2,
            "batch_size",
            "at least 2 (batch statistics need two rows)",
            config.batch_size,
        ),
        (
            config.chunk_size is None or config.chunk_size >= 0,
            "chunk_size",
            "images per chunk, 0 or null for one pass",
            config.chunk_size,
        ),
        (config.num_views >= 1, "num_views", "at least 1", config.num_views),
        (
            config.stage == "pretrain" or config.num_views == 2,
            "num_views",
            "2 (the contrastive loss crosses two views)",
            config.num_views,
        ),
        (0.0 <= config.mask_ratio < 1.0, "mask_ratio", "in [0, 1)", config.mask_ratio),
        (config.frozen_blocks >= 0, "frozen_blocks", "0 or more", config.frozen_blocks),
        (config.log_every >= 1, "log_every", "at least 1", config.log_every),
        (config.save_minutes >= 0, "save_minutes", "0 (every update) or more", config.save_minutes),
        (config.checkpoint_every >= 1, "checkpoint_every", "at least 1", config.checkpoint_every),
        (config.threads is None or config.threads >= 1, "threads", "at least 1", config.threads),
        (
            config.encoder_ema is None or 0 <= config.encoder_ema < 1,
            "encoder_ema",
            "in [0, 1)",
            config.encoder_ema,
        ),
        (
            head.target_ema is None or 0 <= head.target_ema < 1,
            "head.target_ema",
            "in [0, 1)",
            head.target_ema,
        ),
        (head.topk >= 1, "head.topk", "at least 1", head.topk),
        (
            head.queue_size >= head.topk,
            "head.queue_size",
            f"at least head.topk = {head.topk}",
            head.queue_size,
        ),
        (head.temperature > 0, "head.temperature", "above 0", head.temperature),
        (
            0 < augment.scale[0] <= augment.scale[1] <= 1,
            "augment.scale",
            "0 < low <= high <= 1",
            augment.scale,
        ),
        (
            0 < augment.ratio[0] <= augment.ratio[1],
            "augment.ratio",
            "0 < low <= high",
            augment.ratio,
        ),
        (
            len(augment.views) in (0, config.num_views),
            "augment.views",
            f"no entry or num_views = {config.num_views}",
            len(augment.views),
        ),
        (
            len(augment.mean) == len(augment.std) == config.encoder.in_chans,
            "augment.mean, augment.std",
            f"encoder.in_chans = {config.encoder.in_chans} values each",
            (len(augment.mean), len(augment.std)),
        ),
        (0 <= optim.warmup < 1, "optim.warmup", "in [0, 1)", optim.warmup),
        (0 < optim.layer_decay <= 1, "optim.layer_decay", "in (0, 1]", optim.layer_decay),
    ]
    for holds, key, expected, got in rules:
        if not holds:
            raise ConfigError(f"{key}: expected {expected}, got {got}")
    profile_window(config.profile)
