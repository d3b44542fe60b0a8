"""One run's configuration: the dataclasses that the recipes fill.

A recipe is a YAML file under ``maect_fast/recipes``; ``key=value`` overrides follow it on the
command line. Every key is checked against these classes, so a misspelt key or a wrong type is an
error that names the key, never ignored.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from maect_fast.errors import UserError

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
    "flat_settings",
    "load_config",
    "load_recipe",
    "merge_config",
    "profile_window",
    "save_config",
]

Stage = Literal["pretrain", "prepare-head", "tune"]

RECIPES = Path(__file__).parent / "recipes"

# What other programs call it.
ACCUMULATION = {
    "accum_iter",
    "accumulate",
    "accumulate_grad_batches",
    "accumulation_steps",
    "grad_accum",
    "grad_accum_steps",
    "gradient_accumulation",
    "gradient_accumulation_steps",
}


class ConfigError(UserError, ValueError):
    """A setting that cannot be used; the message names the key and says what was expected."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The numbers that a setting may be: "[0, 1)" is 0 <= x < 1. NaN is in none."""

    text: str
    """Two finite bounds, each in the bracket that takes it in or leaves it out."""

    def __contains__(self, x: float) -> bool:
        low, high = (float(bound) for bound in self.text[1:-1].split(","))
        above = low <= x if self.text[0] == "[" else low < x
        return above and (x <= high if self.text[-1] == "]" else x < high)


# Of a LayerNorm, also where a file says it.
NORM_EPS = Interval("(0, 0.01)")

Count = Annotated[int, Interval("[1, 1000000000]")]
Depth = Annotated[int, Interval("[1, 1024]")]
Side = Annotated[int, Interval("[1, 16384]")]
Width = Annotated[int, Interval("[1, 65536]")]
Area = Annotated[float, Interval("(0, 1]")]
Aspect = Annotated[float, Interval("[0.01, 100]")]
BelowOne = Annotated[float, Interval("[0, 1)")]
Mean = Annotated[float, Interval("[-1000, 1000]")]
NormEps = Annotated[float, NORM_EPS]
Rate = Annotated[float, Interval("[0, 1000]")]
Share = Annotated[float, Interval("[0, 1]")]
Std = Annotated[float, Interval("[0.000001, 1000]")]


@dataclass(kw_only=True, slots=True)
class EncoderConfig:
    """A timm ViT by name; the optional fields override what the name implies."""

    name: str = "vit_base_patch16_224"
    """timm model name."""
    img_size: Side = 224
    """Side of the square input, pixels."""
    in_chans: Annotated[int, Interval("[1, 3]")] = 3
    """Input channels: 3 or 1."""
    patch_size: Side | None = None
    """Patch side, pixels."""
    embed_dim: Width | None = None
    """Width."""
    depth: Depth | None = None
    """Number of blocks."""
    num_heads: Width | None = None
    """Attention heads."""
    norm_eps: NormEps = 1e-6
    """Added to the variance in every LayerNorm, the decoder's too: MAE's and timm's ViTs have 1e-6,
    Hugging Face's 1e-12."""
    stream: Literal["fp32", "bf16"] = "fp32"
    """What the residual stream is kept in under bf16 autocast, the decoder's too. `bf16` moves half
    of the bytes and is about twice as far from exact; it has not been trained with."""


@dataclass(kw_only=True, slots=True)
class DecoderConfig:
    """The MAE decoder."""

    embed_dim: Width = 512
    """Width."""
    depth: Depth = 8
    """Number of blocks."""
    num_heads: Width = 16
    """Attention heads."""
    normalize_pixels: bool = True
    """Predict every patch with its own mean and deviation taken out, as the paper does; patches of
    a few pixels have too little left then."""


@dataclass(kw_only=True, slots=True)
class HeadConfig:
    """The NNCLR head, its queue and its loss."""

    pooling: Literal["class_token", "mean_patch"] = "class_token"
    """Which feature of the encoder enters the head."""
    projector_hidden: Width = 2048
    """Width of the projector's two hidden layers."""
    predictor_hidden: Width = 4096
    """Width of the predictor's hidden layer."""
    output_dim: Width = 256
    """Dimension of the projection, and of a queue row."""
    queue_size: Count = 65536
    """Rows of the ring buffer."""
    topk: Count = 20
    """The neighbour is drawn uniformly from the k nearest; 1 takes the nearest."""
    temperature: Annotated[float, Interval("[0.001, 1000]")] = 0.15
    """Divisor of the cosine similarities."""
    transposed: bool = False
    """True: rows are predictions and columns neighbours."""
    target_ema: BelowOne | None = None
    """Decay of the target projector's EMA; None searches with the online projector."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the images come from."""

    source: Literal["folder", "digits", "synthetic", "dataset"] = "folder"
    """`folder`: what `data.root` names; `digits`: scikit-learn's 1,797 digits; `synthetic`: random
    images; `dataset`: a torch Dataset that was given in Python."""
    root: str | None = None
    """Training images: a folder of files, with or without class sub-folders; tar shards as
    webdataset writes them (shard-{000..009}.tar, or their folder); Parquet files, or a folder of
    Hugging Face `datasets`."""
    test_root: str | None = None
    """Evaluation images, the same."""
    image_column: str | None = None
    """Column of tables that holds the images; None finds it by its type."""
    label_column: str | None = None
    """Column of tables that holds the labels, or their key in the .json of tar shards; None finds
    it by type and name."""
    num_images: Annotated[int, Interval("[1, 100000000]")] = 1024
    """Size of the synthetic training set; its test set is a quarter of it."""
    workers: Annotated[int, Interval("[0, 1024]")] = 4
    """Decoding processes per rank, at most one per core; 0 decodes in the training process."""
    max_broken: Annotated[int, Interval("[0, 1000000000]")] = 10
    """Unreadable image files that are skipped before the run stops."""
    max_pixels: Annotated[int, Interval("[1, 178956970]")] = 30_000_000
    """Pixels of the largest image that is decoded (of a JPEG that is decoded at a reduced scale,
    those that remain); what is larger counts as unreadable. Decoding takes 4 to 20 bytes for each;
    Pillow refuses more than 178,956,970."""


@dataclass(kw_only=True, slots=True)
class ViewConfig:
    """Photometric augmentation of one view."""

    jitter: Share = 0.0
    """Probability of colour jitter: brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1, in
    random order."""
    blur: Share = 0.0
    """Probability of a Gaussian blur with a radius from U(0.1, 2.0) pixels."""
    grayscale: Share = 0.0
    """Probability of dropping the colour."""
    solarize: Share = 0.0
    """Probability of inverting values of 128 and above."""


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """Random views of an image: crop, flip, rotation, photometric changes, normalisation."""

    scale: tuple[Area, Area] = (0.08, 1.0)
    """Area of the random resized crop as a share of the image's area."""
    ratio: tuple[Aspect, Aspect] = (0.75, 4 / 3)
    """Aspect ratio of the crop, log-uniform."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    rotation: Annotated[float, Interval("[0, 3.15]")] = 0.0
    """Rotation from U(-r, r), radians."""
    contrast: Share = 0.0
    """Contrast factor from U(1 - c, 1 + c) around the image's mean."""
    noise: Annotated[float, Interval("[0, 10]")] = 0.0
    """Standard deviation of additive Gaussian noise, on pixel values in [0, 1]."""
    views: list[ViewConfig] = field(default_factory=list)
    """Photometric changes, one entry per view; empty for none."""
    mean: list[Mean] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Per-channel mean subtracted from pixel values in [0, 1]."""
    std: list[Std] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Per-channel divisor."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, linear warm-up, cosine decay, both per update."""

    encoder_lr: Rate = 1.5e-4
    """Base rate of the encoder; the effective rate is base * batch_size * num_views / 256."""
    other_lr: Rate = 1.5e-4
    """Base rate of the decoder or the head."""
    encoder_weight_decay: Rate = 0.05
    """Weight decay of the encoder (none on biases and one-dimensional parameters)."""
    other_weight_decay: Rate = 0.05
    """Weight decay of the decoder or the head."""
    layer_decay: Annotated[float, Interval("(0, 1]")] = 1.0
    """The rate of block i is scaled by layer_decay ** (depth - i), the final norm's by 1."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """AdamW's averaging coefficients."""
    eps: Share = 1e-8
    """AdamW's denominator term."""
    warmup: BelowOne = 0.2
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
    seed: Annotated[int, Interval("[0, 9007199254740991]")] = 5
    """Seed of everything random in the run."""
    epochs: Count = 20
    """Passes over the training images. `--change epochs=N` makes a run longer, also a finished one:
    from there on its rates are those of a run of N epochs from the start."""
    batch_size: Annotated[int, Interval("[2, 16777216]")] = 1024
    """Images per update over all ranks; each gives num_views views."""
    chunk_size: Annotated[int, Interval("[0, 16777216]")] | None = None
    """Images of a process whose activations are in memory at a time; None or 0 is all of them. This
    is gradient accumulation for a loss that sees the whole batch: with chunks the trained blocks
    run twice, and the update is the same to rounding, for a batch that is larger than the GPU;
    `maect-fast plan` says which size fits."""
    num_views: Annotated[int, Interval("[1, 64]")] = 2
    """Random crops per image and update."""
    mask_ratio: BelowOne = 0.75
    """Share of the patches hidden from the encoder in reconstruction; contrastive passes hide
    nothing."""
    frozen_blocks: Annotated[int, Interval("[0, 1024]")] = 0
    """Stage `tune`: the stem and this many of the lowest blocks are not trained."""
    reconstruction_weight: Annotated[float, Interval("[0, 1000000]")] = 0.0
    """Stage `tune`: weight of an added MAE loss; it needs the decoder of a pretrain run."""
    encoder_ema: BelowOne | None = None
    """Decay of the encoder's EMA, which evaluation uses when it exists; it warms up in runs of less
    than 2.5 / (1 - decay) updates."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast dtype; auto is bf16 on a GPU and fp32 on a CPU. Master weights are fp32."""
    frozen_precision: Literal["same", "int8"] = "same"
    """Matrix products of the frozen blocks: `same` is as `precision` says; `int8` has qkv, fc1 and
    fc2 in int8 with scales of rows and columns. A run starts with that only if the features of its
    first images stay what they are, by a cosine of at least 0.999 each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    threads: Annotated[int, Interval("[1, 1024]")] | None = None
    """CPU threads for torch; None leaves torch's choice."""
    log_every: Count = 20
    """Updates between two lines of metrics."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """Where metrics go beside metrics.jsonl: [wandb], [tensorboard,mlflow], [] for nowhere."""
    checkpoint_every: Count = 10
    """Epochs between two checkpoints that are kept; the last epoch is always saved."""
    knn_every: Annotated[int, Interval("[0, 1000000000]")] = 0
    """Epochs between two measurements of the encoder's features, and one at the end; 0 takes none.
    With classes it is k-NN accuracy on the test images (without any on a tenth of the training
    images), without classes how well two views agree about their neighbours; of at most 10,000
    images beside a gallery of at most 50,000."""
    save_minutes: Annotated[float, Interval("[0, 1000000]")] = 10.0
    """Minutes between two saves of the checkpoint from which the run would resume."""
    rank_timeout: Annotated[float, Interval("[1, 1000000]")] = 20.0
    """Several processes: seconds without a sign of life of one until all end and name it. One that
    lives but keeps the others waiting has twice as long; there is no such limit in the first
    update, while a checkpoint is written, and with a profile."""
    profile: str | None = None
    """START:STOP, the updates of which rank 0 takes a profile, STOP excluded (in YAML quoted)."""
    profiler: Literal["torch", "nsight"] = "torch"
    """`torch` writes a trace and a table to profile/ in the run; `nsight` is for a run that Nsight
    Systems or Nsight Compute records."""


def load_recipe(recipe: str, stage: Stage) -> DictConfig:
    """Read `recipes/<recipe>/<stage>.yaml`, or the YAML file that `recipe` names.

    Raises:
        ConfigError: there is no such recipe, with a list of those that exist for the stage; or the
            file cannot be read.
    """
    path = (
        Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / recipe / f"{stage}.yaml"
    )
    if not path.is_file():
        names = ", ".join(sorted(p.parent.name for p in RECIPES.glob(f"*/{stage}.yaml")))
        raise ConfigError(
            f"no recipe {recipe!r} for {stage}; there are: {names} (or the path of a YAML file)"
        )
    try:
        layer = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path}: expected keys with values, got a list")
    return layer


def load_config(*layers: DictConfig | dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Merge the layers and the `key=value` overrides (the later one counts), check the result.

    What stands for a text is taken to the letter in overrides and plain dictionaries; an override
    without a value is none. Other values of overrides are YAML.

    Raises:
        ConfigError: unknown key, wrong type, a number out of its interval, or values that cannot
            work together.
    """
    config = merge_config(*layers, overrides=overrides)
    _check(config)
    return config


def merge_config(*layers: DictConfig | dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """`load_config` of what need not work by itself, such as a recipe that leaves a value open.

    Raises:
        ConfigError: unknown key or wrong type.
    """
    merged = OmegaConf.structured(Config)
    for layer in layers:
        with _errors_named():
            plain = layer if isinstance(layer, DictConfig) else _literal(layer)
            merged = OmegaConf.merge(merged, plain)
    for item in overrides:
        key, value = _parse_override(item)
        with _errors_named(key):
            merged = OmegaConf.merge(merged, _literal(value))
    with _errors_named():
        return cast("Config", OmegaConf.to_object(merged))


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


def flat_settings(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key, as plain values."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                visit(f"{prefix}.{key}" if prefix else key, value)
        else:
            flat[prefix] = node

    visit("", dataclasses.asdict(config))
    return flat


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    OmegaConf.save(OmegaConf.create(_literal(dataclasses.asdict(config))), path)


@contextmanager
def _errors_named(key: str = "configuration") -> Iterator[None]:
    """Turn OmegaConf's errors into one line each; `key` where they name none."""
    try:
        yield
    except OmegaConfBaseException as error:
        name = getattr(error, "full_key", None) or key
        if name.rpartition(".")[2] in ACCUMULATION:
            raise ConfigError(
                f"{name}: unknown key: use chunk_size, which is gradient accumulation here: "
                "batch_size is the whole batch, chunk_size the images of it in memory at a time"
            ) from None
        raise ConfigError(f"{name}: {_one_line(error)}{_known_keys(error)}") from None


def _parse_override(item: str) -> tuple[str, dict[str, Any]]:
    """The key of one `key=value`, and the nested dictionary that it means."""
    key, equals, text = item.partition("=")
    names = key.split(".")
    if not equals or not all(names):
        raise ConfigError(f"override {item!r}: expected key=value, such as optim.encoder_lr=1e-4")
    if "[" in key:
        whole = key.partition("[")[0]
        raise ConfigError(f"{key}: a list is given whole, as {whole}=[...]")
    value: Any = text or None
    if text and not _is_text(_hint(names)):
        try:
            # By the loader that files are read with.
            read: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{key}: {text!r} is no YAML value: {_one_line(error)}") from None
        value = read["value"]
        if value == "???":
            raise ConfigError(f"{key}: expected a value, got ???")
    for name in reversed(names):
        value = {name: value}
    return key, cast("dict[str, Any]", value)


def _hint(names: Sequence[str]) -> Any:
    """The type of the setting that the dotted names lead to; None if there is none."""
    hint: Any = Config
    for name in names:
        hint = get_type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return hint


def _is_text(hint: Any) -> bool:
    """Whether a setting of this type is a text, one of some texts, or none."""
    if get_origin(hint) in (list, tuple):
        return False
    return hint is str or any(isinstance(x, str) or _is_text(x) for x in get_args(hint))


def _literal(node: Any) -> Any:
    """The same with every text written so that OmegaConf reads no interpolation in it."""
    if isinstance(node, dict):
        return {key: _literal(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_literal(value) for value in node]
    if isinstance(node, str):
        return re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", node)
    return node


def _one_line(error: Exception) -> str:
    """What a YAML error says, and where."""
    if isinstance(error, MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        return str(error.problem) + ("" if mark is None else f" in line {mark.line + 1}")
    return str(error).splitlines()[0]


def _known_keys(error: OmegaConfBaseException) -> str:
    """Name the keys that would have been valid where an unknown one was given like none of them."""
    node = getattr(error, "object_type", None)
    fields = getattr(node, "__dataclass_fields__", None)
    unknown = type(error).__name__ == "ConfigKeyError" and "Did you mean" not in str(error)
    return f"; expected one of: {', '.join(fields)}" if unknown and fields else ""


def _freezes(config: Config) -> bool:
    """Whether the stage has frozen blocks."""
    return config.stage == "prepare-head" or (config.stage == "tune" and config.frozen_blocks > 0)


def _check(config: Config) -> None:
    """Refuse values that cannot work, one line each."""
    for key, value, interval in _numbers(config):
        if value not in interval:
            raise ConfigError(f"{key}: expected a number in {interval.text}, got {value}")
    head, augment, in_chans = config.head, config.augment, config.encoder.in_chans
    rules = [
        (in_chans in (1, 3), "encoder.in_chans", "3 or 1", in_chans),
        (
            config.stage == "pretrain" or config.num_views == 2,
            "num_views",
            "2 (the contrastive loss crosses two views)",
            config.num_views,
        ),
        (
            config.knn_every == 0 or config.stage != "prepare-head",
            "knn_every",
            "0 in prepare-head, which does not train the encoder",
            config.knn_every,
        ),
        (
            config.frozen_precision == "same" or _freezes(config),
            "frozen_precision",
            "same where no block is frozen",
            config.frozen_precision,
        ),
        (
            head.queue_size >= head.topk,
            "head.queue_size",
            f"at least head.topk = {head.topk}",
            head.queue_size,
        ),
        (augment.scale[0] <= augment.scale[1], "augment.scale", "low <= high", augment.scale),
        (augment.ratio[0] <= augment.ratio[1], "augment.ratio", "low <= high", augment.ratio),
        (
            len(augment.views) in (0, config.num_views),
            "augment.views",
            f"no entry or num_views = {config.num_views}",
            len(augment.views),
        ),
        (
            len(augment.mean) == len(augment.std) == in_chans,
            "augment.mean, augment.std",
            f"encoder.in_chans = {in_chans} values each",
            (len(augment.mean), len(augment.std)),
        ),
    ]
    for holds, key, expected, got in rules:
        if not holds:
            raise ConfigError(f"{key}: expected {expected}, got {got}")
    profile_window(config.profile)


def _numbers(node: Any, hint: Any = Config, key: str = "") -> Iterator[tuple[str, float, Interval]]:
    """Every number below `node`, with its dotted key and its interval."""
    if get_origin(hint) is Annotated:
        yield key, node, hint.__metadata__[0]
    elif dataclasses.is_dataclass(hint):
        for name, inner in get_type_hints(hint, include_extras=True).items():
            yield from _numbers(getattr(node, name), inner, f"{key}.{name}".removeprefix("."))
    elif isinstance(node, list | tuple):
        hints = get_args(hint)
        for i, value in enumerate(node):
            yield from _numbers(value, hints[min(i, len(hints) - 1)], f"{key}[{i}]")
    elif node is not None and get_args(hint):
        # Of `X | None`, X.
        yield from _numbers(node, get_args(hint)[0], key)
