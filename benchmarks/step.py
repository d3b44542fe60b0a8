"""Images per second and MFU of whole training updates: `maect-fast bench step`.

Timed is the engine's own update on a batch that lies on the device, and in stage 3 beside it, on a
CPU in turn with it, the same update in stock PyTorch (`stock.py`) and as the authors' program makes
it (`official.py`); what making a batch costs is reported beside it. MFU, the model FLOPs
utilisation, is the model's FLOPs per second over the matrix rate measured here: what an
implementation leaves out counts for it, what it computes twice counts against it.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from maect_fast.benchmarks.floors import matrix_rate
from maect_fast.benchmarks.results import (
    OURS,
    append_rows,
    device_folder,
    environment_columns,
    is_wide,
)
from maect_fast.benchmarks.table import number
from maect_fast.errors import Parser

if TYPE_CHECKING:
    from maect_fast.config import Config
    from maect_fast.data import Batch
    from maect_fast.models.decoder import Decoder
    from maect_fast.models.encoder import Encoder
    from maect_fast.models.maect import ContrastiveModel, PretrainModel
    from maect_fast.training.distributed import World

__all__ = ["StepRow", "UpdateFlops", "main", "measure_step", "update_flops"]

# An update is captured in the fourth.
WARMUP = 5
# Settings that the results show anyhow.
HAVE_COLUMNS = ("batch_size", "device", "precision", "threads")
# Columns that say what was measured.
KEY = (
    *("recipe", "overrides", "stage", "batch_size", "dtype", "gpu", "cpu", "threads"),
    *("provider", "compiled", "captured"),
)
STOCK, OFFICIAL = "stock", "official"
# Updates whose enqueueing is timed, each on an idle device.
HOST_UPDATES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateFlops:
    """FLOPs of one update per image, all its views; a multiplication with its addition is two.

    Forward passes count once where nothing trains, three times where something does: the backward
    pass is two more.
    """

    frozen: int
    """The encoder's frozen part."""
    tuned: int
    """The rest of the encoder, and the decoder."""
    head: int
    """Projector and predictor, and once the target projector."""
    search: int
    """Similarities with the queue."""
    int8: int
    """Those of the frozen part's products that are in int8."""

    @property
    def total(self) -> int:
        return self.frozen + self.tuned + self.head + self.search


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRow:
    """One recipe's update on one device; a line of step.csv."""

    recipe: str
    overrides: str
    """What was changed of the recipe, but for what has a column."""
    stage: str
    batch_size: int
    """Images per update; each has num_views views."""
    dtype: str
    """Of the operands of matrix products."""
    images_per_second: float
    """batch_size over p50."""
    p50_ms: float
    p20_ms: float
    p80_ms: float
    frozen_gflop: float
    """Per image, as the following three; see UpdateFlops."""
    tuned_gflop: float
    head_gflop: float
    search_gflop: float
    tflops: float
    """Sustained by the update, at p50."""
    matrix_tflops: float
    """Sustained by a large matrix product of the same dtype, measured in this run."""
    mfu: float
    """The ratio of the two."""
    peak_mib: float | None
    """Largest memory allocated on the GPU, weights and optimiser included; None on a CPU."""
    data_ms: float
    """Augmenting one batch of images that are in memory, in one process; not in the figures above.
    """
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str
    cpu: str
    threads: int
    provider: str = OURS
    compiled: str = ""
    """What torch.compile was asked for: the transformer "blocks", or nothing."""
    captured: str = ""
    """What is launched as one CUDA graph: the "update", or nothing."""
    launches: int | None = None
    """Per update: what the GPU is given, kernels and copies; on a CPU operator calls."""
    host_ms: float | None = None
    """From an idle GPU until the last launch of an update is enqueued; None on a CPU. CUDA's queue
    holds about a thousand launches: a longer update waits in it for the device."""


def update_flops(model: "PretrainModel | ContrastiveModel", config: "Config") -> UpdateFlops:
    """Count by formula: a block is ``24 N d^2 + 4 N^2 d`` for N tokens of width d.

    As the paper's program computes them, masked passes count the patch embedding and the prediction
    of all patches, and the last block counts for all tokens where the class token alone is used.
    """
    encoder, decoder = model.encoder, model.decoder
    head = getattr(model, "head", None)
    num_kept = 1 + int(encoder.num_patches * (1 - config.mask_ratio))
    frozen = tuned = head_flops = search = int8 = 0
    if head is not None:
        frozen, tuned = _encoder_flops(encoder, 1 + encoder.num_patches)
        int8 = _int8_flops(encoder, 1 + encoder.num_patches)
        head_flops = 3 * (_linear_flops(head.projector, 1) + _linear_flops(head.predictor, 1))
        if head.target_projector is not None:
            head_flops += _linear_flops(head.target_projector, 1)
        search = 2 * head.loss.queue.queue.numel()
    if decoder is not None:
        masked = _encoder_flops(encoder, num_kept)
        int8 += _int8_flops(encoder, num_kept)
        frozen, tuned = frozen + masked[0], tuned + masked[1] + _decoder_flops(decoder, num_kept)
    views = config.num_views
    return UpdateFlops(
        frozen=views * frozen,
        tuned=views * 3 * tuned,
        head=views * head_flops,
        search=views * search,
        int8=views * int8,
    )


def _encoder_flops(encoder: "Encoder", num_tokens: int) -> tuple[int, int]:
    """One forward pass of one view: the frozen layers, the others."""
    stem = 2 * encoder.num_patches * encoder.patch_embed.proj.weight.numel()
    layers = [stem, *(_block_flops(block, num_tokens) for block in encoder.blocks)]
    # A frozen stem comes before the frozen blocks; beyond the last block is the final norm.
    num_frozen = encoder.num_frozen + 1 if encoder.num_frozen else 0
    return sum(layers[:num_frozen]), sum(layers[num_frozen:])


def _int8_flops(encoder: "Encoder", num_tokens: int) -> int:
    """Of the frozen layers, the products in int8: all linear layers of a block but proj."""
    blocks: list[Any] = [block for block in encoder.blocks if block.is_int8]
    return sum(
        _linear_flops(block, num_tokens) - _linear_flops(block.attn.proj, num_tokens)
        for block in blocks
    )


def _decoder_flops(decoder: "Decoder", num_kept: int) -> int:
    """One forward pass of one view."""
    num_patches = decoder.pos_embed.shape[1]
    return (
        _linear_flops(decoder.embed, num_kept)
        + sum(_block_flops(block, 1 + num_patches) for block in decoder.blocks)
        + _linear_flops(decoder.pred, num_patches)
    )


def _block_flops(block: nn.Module, num_tokens: int) -> int:
    width = block.get_submodule("attn.proj").get_parameter("weight").shape[0]
    return _linear_flops(block, num_tokens) + 4 * num_tokens**2 * width


def _linear_flops(module: nn.Module, num_rows: int) -> int:
    """All linear layers in it, forward."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return 2 * num_rows * sum(layer.weight.numel() for layer in layers)


def measure_step(
    recipe: str,
    config: "Config",
    *,
    overrides: Sequence[str],
    num_updates: int,
    providers: Sequence[str] = (OURS,),
    compile_blocks: bool = False,
    capture: bool = True,
) -> list[StepRow]:
    """Time updates with random weights on synthetic images, those of several providers in turn.

    Args:
        recipe: its name, for the rows.
        config: the recipe with the overrides.
        overrides: for the rows.
        num_updates: how many of each are timed, at least two, after some that are not.
        providers: ours, stock PyTorch and the authors' way.
        compile_blocks: of stock PyTorch.
        capture: of ours, on a GPU, in a CUDA graph.
    """
    from maect_fast.training.distributed import init_world
    from maect_fast.training.stages import matrix_dtype

    world = init_world(config.device)
    device, dtype = world.device, matrix_dtype(config, world.device)
    batch, data_seconds = _batch(config, world)
    total = WARMUP + num_updates + HOST_UPDATES + 1
    programs = [
        _program(p, config, world, batch, total, compile_blocks, capture) for p in providers
    ]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = _seconds([update for update, _ in programs], num_updates, device)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    best = matrix_rate(dtype, device)
    rows = []
    for provider, (update, model), seconds in zip(providers, programs, times, strict=True):
        deciles = quantiles(seconds, n=10, method="inclusive")
        flops = update_flops(model, config)
        rate = config.batch_size * flops.total / deciles[4]
        row = StepRow(
            recipe=recipe,
            overrides=" ".join(
                item for item in overrides if item.split("=")[0] not in HAVE_COLUMNS
            ),
            stage=config.stage,
            batch_size=config.batch_size,
            dtype={torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype],
            images_per_second=config.batch_size / deciles[4],
            p50_ms=1e3 * deciles[4],
            p20_ms=1e3 * deciles[1],
            p80_ms=1e3 * deciles[7],
            frozen_gflop=flops.frozen / 1e9,
            tuned_gflop=flops.tuned / 1e9,
            head_gflop=flops.head / 1e9,
            search_gflop=flops.search / 1e9,
            tflops=rate / 1e12,
            matrix_tflops=best / 1e12,
            mfu=rate / best,
            peak_mib=peak,
            data_ms=1e3 * data_seconds,
            provider=provider,
            compiled="blocks" if provider == STOCK and compile_blocks else "",
            captured="update" if getattr(update.func, "is_captured", False) else "",
            host_ms=_host_ms(update, device),
            launches=_launches(update, device),
            **environment_columns(device),
        )
        rows.append(row)
    return rows


def _program(
    provider: str,
    config: "Config",
    world: "World",
    batch: "Batch",
    total: int,
    compile_blocks: bool,
    capture: bool,
) -> tuple[partial[Any], "PretrainModel | ContrastiveModel"]:
    """An update to call, and the model by which its FLOPs are counted."""
    from maect_fast.training.stages import build_stage, matrix_dtype
    from maect_fast.training.update import Update

    if provider == OURS:
        state = build_stage(config, world, total=total)
        return partial(Update(state, state.model, world, capture=capture), batch), state.model
    from maect_fast.benchmarks.official import OfficialTuning
    from maect_fast.benchmarks.stock import StockTuning

    dtype, given = matrix_dtype(config, world.device), (batch.views, batch.sample_id)
    other: StockTuning
    if provider == STOCK:
        other = StockTuning(config, world.device, dtype, compile_blocks=compile_blocks, batch=given)
    else:
        other = OfficialTuning(config, world.device, dtype, batch=(*given, batch.label))
    with torch.device("meta"):
        model = build_stage(config, replace(world, device=torch.device("meta")), total=1).model
    return partial(other.update), model


def _host_ms(update: Callable[[], object], device: torch.device) -> float | None:
    """Median time until an update is enqueued."""
    if device.type != "cuda":
        return None
    times = []
    for _ in range(HOST_UPDATES):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        update()
        times.append(time.perf_counter() - began)
    torch.cuda.synchronize(device)
    return 1e3 * median(times)


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operator calls below autograd."""

    count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _launches(update: Callable[[], object], device: torch.device) -> int:
    """Of one update."""
    if device.type != "cuda":
        calls = _Calls()  # type: ignore[no-untyped-call]
        with calls:
            update()
        return calls.count
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        update()
        torch.cuda.synchronize(device)
    # Named ranges, as that of an optimiser's step, come as events of the device, too.
    return sum(
        event.device_type == DeviceType.CUDA and not event.is_user_annotation
        for event in recorded.events() or ()
    )


def _batch(config: "Config", world: "World") -> tuple["Batch", float]:
    """A batch on the device, and the seconds that it took to make."""
    from maect_fast.data import Batch, Loader, build_source

    data = replace(config.data, source="synthetic", num_images=config.batch_size)
    loader = Loader(
        build_source(data, config.encoder, split="train"),
        config.augment,
        num_views=config.num_views,
        batch_size=config.batch_size,
        img_size=config.encoder.img_size,
        seed=config.seed,
    )
    for epoch in range(2):  # one batch each; the first one warms up
        began = time.perf_counter()
        batch = next(loader.batches(epoch))
        seconds = time.perf_counter() - began
    tensors = (batch.views, batch.sample_id, batch.label)
    return Batch(*(tensor.to(world.device) for tensor in tensors)), seconds


def _seconds(
    updates: Sequence[Callable[[], object]], count: int, device: torch.device
) -> list[list[float]]:
    """Of `count` updates of each, in turn, after a warm-up; on a GPU the host waits for none."""
    for update in updates:
        for _ in range(WARMUP):
            update()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count * len(updates) + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for event, update in zip(events[1:], cycle(updates), strict=False):
            update()
            event.record()
        torch.cuda.synchronize(device)
        seconds = [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]
    else:
        times = [time.perf_counter()]
        for update in islice(cycle(updates), count * len(updates)):
            update()
            times.append(time.perf_counter())
        seconds = [end - start for start, end in pairwise(times)]
    return [seconds[i :: len(updates)] for i in range(len(updates))]


HEADER = {
    "recipe": "---",
    "stage": "---",
    "device": "---",
    "batch": "---:",
    "images/s": "---:",
    "ms p20 / p50 / p80": "---:",
    "GFLOP per image: frozen / tuned / head / search": "---:",
    "TFLOP/s": "---:",
    "MFU": "---:",
    "peak MiB": "---:",
    "data ms": "---:",
    "provider": "---",
    "launches": "---:",
    "host ms": "---:",
}


def _cells(row: StepRow) -> list[str]:
    wide = " wide" if is_wide(row.p20_ms, row.p50_ms, row.p80_ms) else ""
    gflop = (row.frozen_gflop, row.tuned_gflop, row.head_gflop, row.search_gflop)
    return [
        f"{row.recipe} ({row.overrides})" if row.overrides else row.recipe,
        row.stage,
        f"{row.gpu or f'{row.cpu}, {row.threads} threads'}, {row.dtype}",
        str(row.batch_size),
        number(row.images_per_second),
        " / ".join(number(ms) for ms in (row.p20_ms, row.p50_ms, row.p80_ms)) + wide,
        " / ".join(number(value) for value in gflop),
        number(row.tflops),
        f"{row.mfu:.1%}",
        number(row.peak_mib),
        number(row.data_ms),
        row.provider
        + (f", {row.compiled} compiled" if row.compiled else "")
        + (f", {row.captured} captured" if row.captured else ""),
        number(row.launches),
        number(row.host_ms),
    ]


def main(words: Sequence[str]) -> int:
    """Measure recipe by recipe; 1 where one did not fit into the GPU's memory.

    Raises:
        ConfigError: an unknown recipe, or a setting that cannot be used.
    """
    from maect_fast.config import load_config, load_recipe
    from maect_fast.training.distributed import resolve_device

    options, overrides = _parse(words)
    configs = {
        recipe: load_config(load_recipe(recipe, options.stage), overrides=overrides)
        for recipe in options.recipe
    }
    all_threads = torch.get_num_threads()
    code = 0
    for cells in (HEADER, HEADER.values()):
        print(f"| {' | '.join(cells)} |")
    for recipe, config in configs.items():
        torch.set_num_threads(config.threads or all_threads)
        matrix_rate.cache_clear()  # it depends on the threads
        device = resolve_device(config.device)
        compile_blocks = options.compile_blocks
        if compile_blocks is None:
            compile_blocks = device.type == "cuda"
        # A CPU's speed changes with its clock and its neighbours: updates are timed in turn.
        # A GPU's memory is for one program at a time.
        alone = [[provider] for provider in options.provider]
        rows: dict[str, StepRow] = {}
        for providers in [options.provider] if device.type == "cpu" else alone:
            try:
                measured = measure_step(
                    recipe,
                    config,
                    overrides=overrides,
                    num_updates=options.updates,
                    providers=providers,
                    compile_blocks=compile_blocks,
                    capture=options.capture,
                )
            except torch.OutOfMemoryError:
                who = recipe if providers == [OURS] else f"{recipe}, {', '.join(providers)}"
                size = config.batch_size
                print(f"{who}: out of memory, give less than batch_size={size}", file=sys.stderr)
                code = 1
                continue
            finally:
                _release(device)
            for row in measured:
                rows[row.provider] = row
                print(f"| {' | '.join(_cells(row))} |", flush=True)
            append_rows(options.out / device_folder(device) / "step.csv", measured, key=KEY)
        for other in [name for name in rows if name != OURS] if OURS in rows else []:
            ratio = number(rows[OURS].p50_ms / rows[other].p50_ms)
            print(f"{recipe}: an update of {OURS} takes {ratio} times as long as {other}'s")
    return code


def _release(device: torch.device) -> None:
    """Give the memory of one program to the next."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the key=value overrides wherever they stand."""
    parser = Parser(
        prog="maect-fast bench step",
        usage="%(prog)s [options] [key=value ...]",
        description="Time whole training updates of recipes, with random weights on synthetic "
        "images; key=value changes any setting of them (batch_size=64 precision=bf16).",
    )
    parser.add_argument("--recipe", nargs="+", default=["digits"], help="default: digits")
    parser.add_argument(
        "--stage",
        choices=("pretrain", "prepare-head", "tune"),
        default="tune",
        help="default: tune",
    )
    parser.add_argument(
        "--provider",
        nargs="+",
        choices=(OURS, STOCK, OFFICIAL),
        help=f"default: {OURS}, and in tune {STOCK}, the same in stock PyTorch, and {OFFICIAL}, as "
        "the authors' program does it",
    )
    parser.add_argument(
        "--no-capture",
        dest="capture",
        action="store_false",
        help=f"on a GPU, launch {OURS}'s update kernel by kernel instead of as one CUDA graph",
    )
    parser.add_argument(
        "--compile-blocks",
        action=argparse.BooleanOptionalAction,
        help=f"torch.compile for each of {STOCK}'s blocks; default: on a GPU",
    )
    parser.add_argument("--updates", type=int, default=20, help="that are timed; default: 20")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        help="default: runs/bench; in it a folder per device with step.csv",
    )
    # First, or --recipe and --provider take those that follow them.
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    options, unknown = parser.parse_known_args([word for word in words if word not in overrides])
    if unknown:
        parser.error(f"not known: {' '.join(unknown)}")
    if options.updates < 2:
        parser.error(f"--updates: expected at least 2, got {options.updates}")
    if options.provider is None:
        options.provider = [OURS, STOCK, OFFICIAL] if options.stage == "tune" else [OURS]
    for provider in options.provider:
        if provider != OURS and options.stage != "tune":
            parser.error(f"--provider: {provider} does tune only, got {options.stage}")
    return options, overrides
