"""The program from Python: the three stages, and a trained encoder that takes any image.

`maect_fast.pretrain`, `prepare_head`, `tune` and `load` are these. They need no ``if __name__ ==
"__main__"`` around them, and work in a notebook.
"""

import json
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from maect_fast.checkpoint import random_states, set_random_states
from maect_fast.config import Config, ConfigError, Stage
from maect_fast.data import DatasetSource, Source
from maect_fast.data.augment import to_normalized
from maect_fast.data.decode import decode_image
from maect_fast.data.sources import Reduction
from maect_fast.evaluation.encoders import Opened, check_encoder, is_run, open_encoder
from maect_fast.evaluation.features import extract_features
from maect_fast.evaluation.runs import EVAL_BATCH, Show, Weights, source_features
from maect_fast.tensor_file import open_regular
from maect_fast.training.log import progress, read_metrics
from maect_fast.training.ranks import read_place
from maect_fast.training.start import start_run

__all__ = ["ImageEncoder", "Run", "load", "prepare_head", "pretrain", "tune"]

T = TypeVar("T")

Data = str | Path | Mapping[str, Any] | Dataset[Any]
Pooling = Literal["class_token", "mean_patch"]


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run of a stage."""

    directory: Path
    """Its run directory: what the next stage's `init` takes, and every command of the shell."""

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The lines of its metrics.jsonl: update, epoch, loss, lr, ..."""
        return read_metrics(self.directory)

    def load(self, *, weights: Weights = "ema") -> "ImageEncoder":
        """`load` of this run."""
        return load(self.directory, weights=weights)


def pretrain(
    data: Data | None = None,
    *,
    out: str | Path,
    recipe: str | None = None,
    init: "str | Path | Run | None" = None,
    change: Mapping[str, Any] | None = None,
    restart: bool = False,
    capture: bool = True,
    **settings: Any,
) -> Run:
    """Stage 1: train encoder and decoder by reconstruction (MAE).

    The same call on a run directory continues its run; an interrupt (Ctrl-C, a notebook's stop
    button) saves first.

    Args:
        data: a folder of images, or a `torch.utils.data.Dataset` of (image, label), see
            `maect_fast.data.from_dataset`; with other settings of `data` a mapping, of which it is
            the `root`: `{"root": dataset, "workers": 8}`. None is what the recipe or `init` has.
        out: run directory.
        recipe: its name, or a YAML file; needed where there is no run to continue or to start from.
        init: a file with an encoder's weights to start from.
        change: settings to continue a run with that differ from its own, such as `{"epochs": 40}`.
        restart: set a run that is there aside, and start anew.
        capture: on a GPU, one CUDA graph per update where that is possible.
        **settings: changes of the recipe, by the names that ``maect-fast pretrain --help`` lists:
            `epochs=10`, or of a group a mapping, `optim={"encoder_lr": 1e-4}`.

    Returns:
        The finished run.

    Raises:
        UserError: what the command line would say, in one line.
        KeyboardInterrupt: it was stopped, and saved.
    """
    return _train(
        "pretrain",
        data,
        out,
        settings,
        recipe=recipe,
        init=init,
        change=change,
        restart=restart,
        capture=capture,
    )


def prepare_head(
    data: Data | None = None,
    *,
    out: str | Path,
    init: "str | Path | Run | None" = None,
    recipe: str | None = None,
    from_scratch: bool = False,
    change: Mapping[str, Any] | None = None,
    restart: bool = False,
    capture: bool = True,
    **settings: Any,
) -> Run:
    """Stage 2: train the head and fill its queue, on the frozen encoder.

    Args:
        data: see `pretrain`; images, augmentation and the recipe are inherited from a run `init`.
        out: run directory.
        init: the run of stage 1, its directory, or a file with an encoder's weights.
        recipe: see `pretrain`.
        from_scratch: start from random weights, as a control.
        change: see `pretrain`.
        restart: see `pretrain`.
        capture: see `pretrain`.
        **settings: see `pretrain`.

    Returns and raises what `pretrain` does.
    """
    return _train(
        "prepare-head",
        data,
        out,
        settings,
        recipe=recipe,
        init=init,
        from_scratch=from_scratch,
        change=change,
        restart=restart,
        capture=capture,
    )


def tune(
    data: Data | None = None,
    *,
    out: str | Path,
    init: "str | Path | Run | None" = None,
    recipe: str | None = None,
    decoder: "str | Path | Run | None" = None,
    from_scratch: bool = False,
    change: Mapping[str, Any] | None = None,
    restart: bool = False,
    capture: bool = True,
    **settings: Any,
) -> Run:
    """Stage 3: tune the upper blocks by contrast with neighbours from the queue.

    Args:
        data: see `prepare_head`.
        out: run directory.
        init: the run of stage 2, or its directory.
        recipe: see `pretrain`.
        decoder: the run of stage 1 whose decoder `reconstruction_weight` uses.
        from_scratch: start from random weights, as a control.
        change: see `pretrain`.
        restart: see `pretrain`.
        capture: see `pretrain`.
        **settings: see `pretrain`.

    Returns and raises what `pretrain` does.
    """
    return _train(
        "tune",
        data,
        out,
        settings,
        recipe=recipe,
        init=init,
        decoder=decoder,
        from_scratch=from_scratch,
        change=change,
        restart=restart,
        capture=capture,
    )


def _train(
    stage: Stage,
    data: Data | None,
    out: str | Path,
    settings: Mapping[str, Any],
    *,
    recipe: str | None,
    init: str | Path | Run | None,
    decoder: str | Path | Run | None = None,
    from_scratch: bool = False,
    change: Mapping[str, Any] | None,
    restart: bool,
    capture: bool,
) -> Run:
    if read_place().size > 1:
        raise ConfigError(
            f"{stage}: a call from Python is one process; several are started by "
            f"torchrun ... -m maect_fast.cli {stage}"
        )
    given = dict(data) if isinstance(data, Mapping) else {} if data is None else {"root": data}
    dataset = given.get("root")
    if isinstance(dataset, str | Path):
        given, dataset = {"source": "folder", **given}, None
    elif dataset is not None:
        given = {**given, "root": None, "source": "dataset"}
    # A run sets both, and its caller goes on with its own.
    num_threads, generators = torch.get_num_threads(), random_states()
    try:
        stopped_by = start_run(
            stage,
            Path(out),
            recipe=recipe,
            init=_path(init),
            decoder=_path(decoder),
            from_scratch=from_scratch,
            overrides=[*_words({"data": given}), *_words(settings)],
            change=list(_words(change or {})),
            restart=restart,
            capture=capture,
            dataset=dataset,
        )
    finally:
        torch.set_num_threads(num_threads)
        set_random_states(generators)
    if stopped_by:
        name = signal.Signals(stopped_by).name
        print(f"stopped by {name} and saved; the same call continues {out}")  # noqa: T201
        if stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        # As if the run had not been in its way; where the caller ignores it, the run still is none.
        signal.raise_signal(stopped_by)
        raise SystemExit(128 + stopped_by)
    return Run(Path(out))


def _path(run: str | Path | Run | None) -> Path | None:
    if run is None:
        return None
    return run.directory if isinstance(run, Run) else Path(run)


def _words(settings: Mapping[str, Any], group: str = "") -> Iterator[str]:
    """Settings as the command line has them, `key=value`."""
    for name, value in settings.items():
        key = f"{group}{name}"
        if isinstance(value, Mapping):
            yield from _words(value, f"{key}.")
        elif value is None or isinstance(value, str | Path):
            yield f"{key}={'' if value is None else value}"
        else:
            try:
                # Which is YAML.
                yield f"{key}={json.dumps(value)}"
            except TypeError:
                kind = type(value).__name__
                raise ConfigError(
                    f"{key}: expected a number, a text, a list or a mapping, got a {kind}"
                ) from None


def load(source: str | Path | Run, *, weights: Weights = "ema", **settings: Any) -> "ImageEncoder":
    """A trained encoder, in evaluation mode on its device.

    Args:
        source: a run or its directory, a file with an encoder's weights (facebook's MAE, MAE-CT's,
            timm's, ours), or `timm:NAME` for timm's pretrained weights.
        weights: of a run the encoder's `ema`, where one was kept, or the `model` as trained.
        **settings: as in `pretrain`, such as `device="cpu"` or `head={"pooling": "mean_patch"}`.

    Raises:
        UserError: there is none, or the settings do not fit it; one line.
    """
    word = str(_path(source) if isinstance(source, Run) else source)
    overrides = list(_words(settings))
    if is_run(word):
        check_encoder(word, overrides)
    return ImageEncoder(open_encoder(word, overrides, weights=weights))


class ImageEncoder(nn.Module):
    """An encoder with the preprocessing that belongs to it.

    Args:
        opened: the encoder, and its configuration.
    """

    def __init__(self, opened: Opened) -> None:
        super().__init__()
        self.encoder = opened.encoder
        self.config = opened.config
        self.origin = opened.origin
        """Where the weights are from, in a line."""
        self.weights = opened.weights
        """Which of them were taken, in a line."""

    def forward(self, images: Tensor) -> Tensor:
        """Tokens [n, 1 + L, D] of normalised images [n, C, S, S], with gradients."""
        tokens: Tensor = self.encoder(images)
        return tokens

    def encode(self, images: Any, pool: Pooling | None = None) -> Tensor:
        """Features of images, as `maect-fast extract` writes them.

        Image files, Pillow images and arrays are resized to a short side of S * 256 / 224 (bicubic)
        and the middle S x S is cut out, where S is the encoder's `img_size`; tensors are taken as
        they are. All are normalised with the mean and deviation of the run. The same files in the
        same order give the same bits as `extract`.

        Args:
            images: one image or a list, either of paths, Pillow images and arrays [H, W] or
                [H, W, C] of uint8 with C 1, 3 or 4, of any sizes; or of tensors [C, S, S] of uint8
                in [0, 255] or floats in [0, 1], not normalised. An array [n, H, W, C] or a tensor
                [n, C, S, S] is a list too.
            pool: `class_token`, or `mean_patch` for the mean of the patches' tokens; None is what
                the run's head has.

        Returns:
            [n, D] fp32, on the encoder's device, without gradients; a single image has n = 1.

        Raises:
            ValueError: no image; an array or a tensor of another shape, type or range.
            TypeError: something that is no image, or tensors beside other images.
            DataError: an image that cannot be read; names it.
        """
        if pool not in (None, "class_token", "mean_patch"):
            raise ValueError(f"pool: expected class_token, mean_patch or None, got {pool!r}")
        given = _listed(images)
        if not given:
            raise ValueError("images: expected at least one, got none")
        head = replace(self.config.head, pooling=pool or self.config.head.pooling)
        few = len(given) <= EVAL_BATCH
        # In a list every image has its row, so none may be left out.
        data = replace(
            self.config.data, max_broken=0, workers=0 if few else self.config.data.workers
        )
        config = replace(self.config, head=head, data=data)
        device = next(self.encoder.parameters()).device
        show: Show = _pass_on if few else progress
        if not isinstance(given[0], Tensor):
            source = _Images.of(given, config)
            found = source_features(source, config, self.encoder, title="encode", show=show)
            return found.features.x.to(device)
        num_batches = -(-len(given) // EVAL_BATCH)
        features = extract_features(
            self.encoder,
            show(_normalized(given, config), "encode", total=num_batches),
            pooling=config.head.pooling,
            device=device,
            precision=config.precision,
        )
        return features.x.to(device)


def _listed(images: Any) -> list[Any]:
    """One image, a batch or a list as a list of images of one kind."""
    if isinstance(images, Tensor | np.ndarray):
        given = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, str | Path | Image.Image):
        given = [images]
    else:
        try:
            given = list(images)
        except TypeError:
            given = [images]
    for image in given:
        if not isinstance(image, str | Path | Image.Image | np.ndarray | Tensor):
            raise TypeError(
                "images: expected paths, Pillow images, arrays or tensors, got a "
                f"{type(image).__name__}"
            )
        if isinstance(image, Tensor) != isinstance(given[0], Tensor):
            raise TypeError("images: expected tensors, which are not resized, or none in the list")
        if isinstance(image, np.ndarray) and image.dtype != np.uint8:
            raise ValueError(f"images: expected arrays of uint8 in [0, 255], got {image.dtype}")
    return given


def _normalized(images: Sequence[Tensor], config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of tensors, without labels."""
    S = config.encoder.img_size
    shape = [config.encoder.in_chans, S, S]
    for image in images:
        if list(image.shape) != shape:
            raise ValueError(
                f"images: expected tensors of {shape}, which are not resized, got "
                f"{list(image.shape)}; Pillow images and arrays [H, W, C] are"
            )
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ValueError(f"images: expected tensors of uint8 or floats, got {image.dtype}")
        low, high = (float(x) for x in image.aminmax())
        if image.is_floating_point() and not (low >= 0 and high <= 1):
            raise ValueError(
                "images: expected floats in [0, 1], not normalised, got values from "
                f"{low:.3g} to {high:.3g}"
            )
    for start in range(0, len(images), EVAL_BATCH):
        some = images[start : start + EVAL_BATCH]
        white = (1 if x.is_floating_point() else 255 for x in some)
        pixels = torch.stack([x.cpu().float() / w for x, w in zip(some, white, strict=True)])
        yield to_normalized(pixels, config.augment), torch.full((len(some),), -1)


def _pass_on(items: Iterable[T], title: str, *, total: int) -> Iterator[T]:
    return iter(items)


@dataclass(frozen=True, eq=False)
class _Images(Source):
    """Images that a caller has, or has the paths of."""

    labels: Tensor
    class_names: list[str]
    images: list[Any]
    channels: int
    max_pixels: int

    @classmethod
    def of(cls, images: list[Any], config: Config) -> "_Images":
        none = torch.full((len(images),), -1)
        return cls(none, [], images, config.encoder.in_chans, config.data.max_pixels)

    @property
    def in_chans(self) -> int:
        return self.channels

    def decode(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        image = self.images[index]
        if not isinstance(image, str | Path):
            return DatasetSource([image], self.channels, self.max_pixels).decode(0)
        with open_regular(str(image)) as file:
            return decode_image(
                file, channels=self.channels, max_pixels=self.max_pixels, reduction=reduction
            )

    def name(self, index: int) -> str:
        image = self.images[index]
        return str(image) if isinstance(image, str | Path) else f"image {index} of the list"

    def _digest(self, root: str | None) -> str:
        raise NotImplementedError("no run is started with these")
