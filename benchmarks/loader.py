"""Where the time of making batches goes: `maect-fast bench loader`.

Stages are timed in this process, on one core, with the code that workers run: read (the file's
bytes), decode (to pixels), augment (its views), collate (into the batch, and the random numbers);
and, as in the main process, hand-over (to the device, and the normalisation of bytes there). The
whole is timed with the recipe's workers. Several sources are timed in turn, as the speed of a
machine changes.
"""

import argparse
import io
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor

from maect_fast.benchmarks.results import cpu_name
from maect_fast.benchmarks.table import number
from maect_fast.config import Config, ConfigError, load_config, load_recipe
from maect_fast.data import Loader, PackSource, Source, build_source
from maect_fast.data.decode import EncodedSource, decode_image
from maect_fast.data.loader import TrainingBatches, permutation
from maect_fast.data.sources import Reduction
from maect_fast.data.workers import PREFETCH, num_cores
from maect_fast.errors import Parser
from maect_fast.names import printable
from maect_fast.training.distributed import resolve_device

__all__ = ["Measured", "bottleneck", "main", "measure"]

# Of a batch; how long an image takes hardly depends on it, and large images take seconds.
BATCH = 8
ROUNDS = 2
HAND_OVER = "hand-over"


@dataclass(slots=True)
class Stages:
    """Seconds that the images of a worker took."""

    read: float = 0.0
    decode: float = 0.0
    augment: float = 0.0
    collate: float = 0.0
    hand_over: float = 0.0
    num_images: int = 0


@dataclass(slots=True)
class Measured:
    """One source of images."""

    name: str
    loader: Loader
    workers: int
    """Processes that decode."""
    stages: Stages = field(default_factory=Stages)
    seconds: float = 0.0
    """Of the whole, with workers."""
    num_images: int = 0
    """In these."""

    @property
    def rate(self) -> float:
        """Images per second with workers."""
        return self.num_images / self.seconds

    def per_image(self) -> dict[str, float]:
        """Seconds per image of each stage, by its name."""
        return {
            each.name.replace("_", "-"): getattr(self.stages, each.name) / self.stages.num_images
            for each in fields(self.stages)
            if each.name != "num_images"
        }


@dataclass(frozen=True, eq=False)
class _TimedSource(Source):
    """A source whose reading and decoding are timed apart."""

    inner: Source
    stages: Stages

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        return self.inner.labels

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def in_chans(self) -> int:
        return self.inner.in_chans

    def read(self, index: int, reduction: Reduction | None = None) -> tuple[Image.Image, int]:
        source, began = self.inner, time.perf_counter()
        if not isinstance(source, EncodedSource):
            found = source.read(index, reduction)
            self.stages.decode += time.perf_counter() - began
            return found
        with source.open(index) as file:
            content = file.read()
        between = time.perf_counter()
        image = decode_image(
            io.BytesIO(content),
            channels=source.channels,
            max_pixels=source.max_pixels,
            reduction=reduction,
        )
        self.stages.read += between - began
        self.stages.decode += time.perf_counter() - between
        return image, int(source.labels[index])

    def decode(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        return self.read(index, reduction)[0]

    def name(self, index: int) -> str:
        return self.inner.name(index)

    def _digest(self, root: str | None) -> str:
        return self.inner._digest(root)


@dataclass(frozen=True)
class _TimedBatches(TrainingBatches):
    """A worker's work with its time by stages."""

    stages: Stages

    def make_views(self, image: Image.Image, draws: Tensor) -> Tensor:
        began = time.perf_counter()
        views = super().make_views(image, draws)
        self.stages.augment += time.perf_counter() - began
        return views


def measure(config: Config, sources: Mapping[str, Source], *, seconds: float) -> list[Measured]:
    """Time the loading of each source, for about so many seconds the stages and as many the whole.

    Args:
        config: of the run whose loading is measured.
        sources: by name; they are measured in turn.
        seconds: for each source, and again.
    """
    found = [
        Measured(name, _loader(config, source), min(config.data.workers, num_cores()))
        for name, source in sources.items()
    ]
    try:
        for each in found:
            if each.loader.is_in_memory:
                each.workers = 0
        batches = [_epochs(each.loader) for each in found]
        for each, own in zip(found, batches, strict=True):
            # Workers start.
            for _ in range(each.workers + 1):
                next(own)
        for number in range(ROUNDS):
            for each, own in zip(found, batches, strict=True):
                # Workers that were idle meanwhile have batches ready.
                for _ in range(PREFETCH * each.workers if number or each is not found[0] else 0):
                    next(own)
                _time_whole(each, own, seconds / ROUNDS)
    finally:
        for each in found:
            each.loader.close()
    for _ in range(ROUNDS):
        for each in found:
            if not each.loader.is_in_memory:
                _time_stages(each, seconds / ROUNDS)
    return found


def _loader(config: Config, source: Source) -> Loader:
    return Loader(
        source,
        config.augment,
        num_views=config.num_views,
        batch_size=min(BATCH, config.batch_size, len(source)),
        img_size=config.encoder.img_size,
        seed=config.seed,
        workers=config.data.workers,
        max_broken=config.data.max_broken,
        device=resolve_device(config.device),
    )


def _epochs(loader: Loader) -> Iterator[Any]:
    for epoch in itertools.count():
        yield from loader.batches(epoch)


def _time_whole(measured: Measured, batches: Iterator[Any], seconds: float) -> None:
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        measured.num_images += len(next(batches).sample_id)
    measured.seconds += time.perf_counter() - began


def _time_stages(measured: Measured, seconds: float) -> None:
    stages, loader = measured.stages, measured.loader
    values = {each.name: getattr(loader.work, each.name) for each in fields(loader.work)}
    values["source"] = _TimedSource(loader.work.source, stages)
    work = _TimedBatches(**values, stages=stages)
    order = permutation(len(loader.source), seed=loader.seed, epoch=0).tolist()
    ids_ahead = itertools.cycle(order[stages.num_images % len(order) :] + order)
    began = time.perf_counter()
    threads = torch.get_num_threads()
    while not stages.num_images or time.perf_counter() - began < seconds:
        ids = list(itertools.islice(ids_ahead, loader.batch_size))
        torch.set_num_threads(1)  # as in a worker
        start, known = time.perf_counter(), stages.read + stages.decode + stages.augment
        item = work[0, ids]
        made = time.perf_counter()
        torch.set_num_threads(threads)
        known = stages.read + stages.decode + stages.augment - known
        stages.collate += made - start - known
        for _ in loader.handed_over([(item.pixels, item.sample_id, item.label)]):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        stages.hand_over += time.perf_counter() - made
        stages.num_images += len(ids)


def bottleneck(measured: Measured) -> str:
    """What limits the rate, in words, and what would help."""
    if measured.loader.is_in_memory:
        return "the images are in memory, and their views are made in batches, by no worker"
    times = measured.per_image()
    hand_over = times.pop(HAND_OVER)
    of_worker = sum(times.values())
    workers = measured.workers
    if workers and hand_over > of_worker / workers:
        return (
            f"hand-over: the main process takes {number(hand_over * 1e3)} ms for an image, "
            f"{workers} workers together {number(of_worker / workers * 1e3)} ms; more of them do "
            "not help (on a GPU, bytes are normalised there)"
        )
    stage = max(times, key=lambda name: times[name])
    share = times[stage] / of_worker
    told = f"{stage}: {share:.0%} of the time that an image takes"
    is_packed = isinstance(measured.loader.source, PackSource)
    left = of_worker - times["read"] - times["decode"]
    packed = (
        "`maect-fast pack SOURCE --out FILE.pack` would leave at most "
        f"{number(left * 1e3)} of {number(of_worker * 1e3)} ms"
    )
    if stage in ("read", "decode") and not is_packed:
        return f"{told}; {packed}"
    if stage == "read":
        return f"{told}; a faster disk, or more data.workers"
    cores = num_cores()
    if workers < cores:
        return f"{told}; data.workers={cores} would use all {cores} cores"
    return f"{told}; all {cores} cores are used: more of them, or fewer changes in augment.*"


def main(words: Sequence[str]) -> int:
    """Measure, and print a table and the bottleneck of each source.

    Raises:
        ConfigError: an unknown recipe, a setting that cannot be used, or no images.
    """
    options, overrides = _parse(words)
    config = load_config(load_recipe(options.recipe, options.stage), overrides=overrides)
    if options.seconds <= 0:
        raise ConfigError(f"--seconds: expected more than 0, got {options.seconds}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    roots = [*([config.data.root] if config.data.root else []), *options.source]
    sources: dict[str, Source] = {}
    if config.data.source == "folder" and roots:
        for root in dict.fromkeys(roots):
            data = replace(config.data, root=root)
            sources[printable(root)] = build_source(data, config.encoder, split="train")
    else:
        sources[config.data.source] = build_source(config.data, config.encoder, split="train")
    print(
        f"{options.recipe}, {options.stage}: {config.num_views} views of "
        f"{config.encoder.img_size} pixels; {cpu_name()}, {num_cores()} cores"
    )
    found = measure(config, sources, seconds=options.seconds)
    print(table(found))
    for each in found:
        print(f"{each.name}: {each.loader.source.about()}\n  {bottleneck(each)}")
    return 0


def table(found: Sequence[Measured]) -> str:
    """Images per second and core of each stage, and of the whole."""
    rows: list[list[str]] = []
    for each in found:
        stages = {} if each.loader.is_in_memory else each.per_image()
        of_all = sum(stages.values())
        for stage, seconds in stages.items():
            rate = f"{1 / seconds:,.0f}" if seconds else "-"
            rows.append([each.name, stage, f"{seconds * 1e3:.3f}", f"{seconds / of_all:.0%}", rate])
        whole = f"{each.workers} workers" if each.workers else "in this process"
        rows.append([each.name, whole, f"{1e3 / each.rate:.3f}", "", f"{each.rate:,.1f}"])
    headers = ["images", "stage", "ms per image", "share", "images/s"]
    align = ("left", "left", "right", "right", "right")
    told = tabulate(rows, headers, tablefmt="github", colalign=align, disable_numparse=True)
    if len(found) > 1:
        ratios = ", ".join(f"{each.name} {each.rate / found[0].rate:.2f} x" for each in found[1:])
        told += f"\nbeside {found[0].name}: {ratios}"
    return told


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        prog="maect-fast bench loader",
        usage="%(prog)s --recipe NAME [SOURCE ...] [options] [key=value ...]",
        description="Images/s of loading and augmenting, per core and stage and with workers; what "
        "limits them, and what would help.",
    )
    parser.add_argument("--recipe", required=True, metavar="NAME", help="name, or a YAML file")
    parser.add_argument(
        "source", nargs="*", metavar="SOURCE", help="images beside data.root, measured in turn"
    )
    parser.add_argument(
        "--stage",
        choices=("pretrain", "prepare-head", "tune"),
        default="tune",
        help="default: tune",
    )
    parser.add_argument(
        "--seconds", type=float, default=6.0, metavar="S", help="per source, twice; default: 6"
    )
    options, unknown = parser.parse_known_args(list(words))
    given = [*options.source, *unknown]
    if odd := [word for word in unknown if word.startswith("-")]:
        parser.error(f"unrecognized: {' '.join(odd)}")
    options.source = [word for word in options.source if "=" not in word]
    return options, [word for word in given if "=" in word]
