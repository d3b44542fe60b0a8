"""Before a run: what an update needs of a GPU, and how long it takes: `maect-fast plan`.

Memory and times are arithmetic and say so; a time that was measured stands beside them, with the
device and the commit that gave it.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from maect_fast.benchmarks.step import update_flops
from maect_fast.config import Config
from maect_fast.training.distributed import World
from maect_fast.training.memory import MemoryPlan, plan_memory, usable_bytes
from maect_fast.training.stages import build_stage

__all__ = ["report"]

RESULTS = Path(__file__).parent / "benchmarks" / "results"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU by its data: what a time is computed from."""

    name: str
    num_bytes: float
    """Of memory, by the name: what the driver shows is 7 % more, for its own use and gaps."""
    matrix_rate: float
    """FLOP per second of large bf16 products."""
    bandwidth: float
    """Bytes per second, read and written ones."""


# Of int8 products, as the data sheets have it: at best.
INT8_SPEED = 2
# The H200's rates were measured (results/nvidia-h200/floors.csv). An H100 has the same cores and
# reaches nine tenths of 3.35 TB/s; an A100's are the usual shares of its data sheet.
DEVICES = (
    Device("H200 141 GB", 141e9, 786e12, 4.27e12),
    Device("H100 80 GB", 80e9, 786e12, 3.0e12),
    Device("A100 80 GB", 80e9, 240e12, 1.75e12),
)


def report(recipe: str, config: Config, *, num_gpus: int = 1) -> str:
    """The plan of one GPU's share of an update, as text.

    Args:
        recipe: its name, by which measured rows are found.
        config: the recipe with the overrides.
        num_gpus: processes that share the batch.
    """
    plan = plan_memory(config, num_gpus=num_gpus)
    title = f"{recipe} {config.stage}: {plan.num_images} images of {config.num_views} views per GPU"
    lines = [title, "", f"{'memory (arithmetic)':<40}{'GiB':>8}"]
    lines += [f"  {name:<38}{_gib(value):>8}" for name, value in _parts(plan)]
    lines += ["", *_table(plan, config), ""]
    if config.frozen_precision == "int8":
        words = (
            f"qkv, fc1 and fc2 of frozen blocks count as {INT8_SPEED} times as fast; not measured"
        )
        lines += [f"frozen_precision=int8: {words}", ""]
    lines += [f"measured: {line}" for line in _measured(recipe, config)] or ["measured: no row"]
    return "\n".join(lines)


def _parts(plan: MemoryPlan) -> list[tuple[str, float]]:
    saved = plan.saved_per_image - plan.kept_per_image
    gradients = "gradients, as saved tensors go", plan.gradients
    if plan.is_chunked:
        gradients = "gradients, those of a chunk beside", 2 * plan.gradients
    return [
        ("weights", plan.weights),
        ("weights as saved for products", plan.weight_copies),
        ("AdamW's averages", plan.optimizer),
        ("EMA of the encoder", plan.encoder_ema),
        ("queue and its fp16 copy", plan.queue),
        gradients,
        (f"views of {plan.num_images} images", plan.views),
        (f"kept of {plan.num_images} images", plan.kept_per_image * plan.num_images),
        (
            f"saved of {plan.chunk_size} images, {saved / 2**20:.1f} MiB each",
            saved * plan.chunk_size,
        ),
        (f"a block at work on {plan.chunk_size} images", plan.backward_per_image * plan.chunk_size),
        ("peak, as a backward begins", plan.peak),
    ]


def _table(plan: MemoryPlan, config: Config) -> Iterator[str]:
    """One line per device, this machine's first."""
    flops = _flops(config)
    titles = f"{'GiB':>7}{'chunk_size':>12}{'peak':>8}{'ms':>7}{'images/s':>10}"
    yield f"{'arithmetic, at best':<22}{titles}"
    devices: list[tuple[str, float, Device | None]] = [(d.name, d.num_bytes, d) for d in DEVICES]
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = next((d for d in DEVICES if d.name.split()[0] in name), None)
        devices.insert(0, (f"here: {name}", usable_bytes(torch.device("cuda")), known))
    for name, num_bytes, device in devices:
        fitting = plan.fitting(int(num_bytes))
        line = f"{name:<22}{_gib(num_bytes):>7}"
        if fitting is None:
            yield f"{line}{'none':>12}{_gib(plan.smallest.peak):>8}"
            continue
        size = str(fitting.chunk_size) if fitting.is_chunked else "one pass"
        line += f"{size:>12}{_gib(fitting.peak):>8}"
        if device is not None:
            seconds = _seconds(fitting, flops, device)
            line += f"{1e3 * seconds:>7.0f}{plan.num_images / seconds:>10.0f}"
        yield line


def _seconds(plan: MemoryPlan, flops: tuple[int, int], device: Device) -> float:
    """Of an update in which nothing waits: products at the matrix rate, all else at bandwidth."""
    products = flops[plan.is_chunked] * plan.num_images / device.matrix_rate
    return products + plan.moved / device.bandwidth


def _flops(config: Config) -> tuple[int, int]:
    """Per image, in one pass and in chunks, in units of bf16 products."""
    meta = torch.device("meta")
    with meta:
        world = World(rank=0, size=1, local_rank=0, group=None, device=meta)
        model = build_stage(config, world, total=1).model
    flops = update_flops(model, config)
    in_int8 = flops.int8 - flops.int8 // INT8_SPEED
    return flops.total - in_int8, flops.total + flops.tuned // 3 - in_int8


def _measured(recipe: str, config: Config) -> Iterator[str]:
    """Rows of ours in the results, whatever their batch."""
    for row in _rows("step.csv"):
        is_ours = row.get("provider", "") in ("", "maect-fast") and not row["overrides"]
        if is_ours and row["recipe"] == recipe and row["stage"] == config.stage and row["gpu"]:
            yield _row(row, float(row["p50_ms"]), float(row["peak_mib"]) / 1024, config)
    for row in _rows("updates.csv"):
        is_ours = row["implementation"] == "maect-fast" and row["blocks"] == "eager"
        if is_ours and row["encoder"] == config.encoder.name and config.stage == "tune":
            yield _row(row, float(row["ms"]), float(row["peak_gib"]), config)


def _row(row: dict[str, str], ms: float, peak_gib: float, config: Config) -> str:
    """What was measured, each beside today's arithmetic for that batch and device."""
    batch_size = int(row["batch_size"])
    then = replace(config, batch_size=batch_size, chunk_size=None, frozen_precision="same")
    plan = plan_memory(then)
    time = f"{float(row['images_per_second']):.0f} images/s, {ms:.0f} ms"
    device = next((d for d in DEVICES if d.name.split()[0] in row["gpu"]), None)
    if device is not None:
        time += f" (arithmetic {1e3 * _seconds(plan, _flops(then), device):.0f})"
    peak = f"peak {peak_gib:.1f} GiB (arithmetic {_gib(plan.peak)})"
    source = f"{row['gpu']}, commit {row['commit']}, {row['date']}"
    return f"batch {batch_size}: {time}, {peak}; {source}"


def _rows(name: str) -> Iterator[dict[str, str]]:
    for path in sorted(RESULTS.glob(f"*/{name}")):
        with path.open(newline="") as file:
            yield from csv.DictReader(file)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"
