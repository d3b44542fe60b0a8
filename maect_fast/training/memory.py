"""What an update needs of a GPU's memory and bandwidth, without one: nothing is allocated here.

The bytes that autograd saves and that operators move are counted on fake tensors, which run the
model's own forward as on a GPU, so they follow the code. The rest is arithmetic.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maect_fast.config import Config, ConfigError
from maect_fast.models.maect import PretrainModel
from maect_fast.training.distributed import World
from maect_fast.training.stages import StageModel, build_stage, matrix_dtype

__all__ = ["MemoryPlan", "check_memory", "plan_memory", "usable_bytes"]

# Of a block while it runs, in bytes per token and feature. Forward: two fp32 streams, the MLP's
# hidden layer before and after its GELU in bf16. Backward, beyond what was saved: the fp32
# gradient, its bf16 copy, and of the hidden layer both gradients and the GELU, made again.
FORWARD_BYTES = 24
BACKWARD_BYTES = 30
# Bound by the matrix rate, not by bytes.
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.convolution}
PRODUCTS.add(torch.ops.maect_fast.int8_linear)
# Of a GPU's memory: 141 GB of an H200's 150.8, 80 of an H100's 85.5.
USABLE = 0.935
# Of the queue's rounded copy, fp16.
SHADOW_BYTES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes on one GPU."""

    num_images: int
    """Images of an update on this GPU."""
    chunk_size: int
    """Of them in memory at a time; `num_images` for one pass."""
    weights: int
    """Parameters and buffers of the model, but for the queue."""
    gradients: int
    """Of the parameters that train; a chunked update has those of a chunk beside their sum."""
    optimizer: int
    """AdamW's two averages."""
    encoder_ema: int
    queue: int
    """With its rounded copy."""
    views: int
    """The batch."""
    weight_copies: int
    """Weights in the dtype of matrix products, as autograd saves them."""
    saved_per_image: int
    """What autograd saves of one image, all its views, in one pass."""
    kept_per_image: int
    """What a chunked update keeps of an image until its chunk's turn: the frozen blocks' result;
    and what the head saves."""
    forward_per_image: int
    """A block's own tensors while it runs forward."""
    backward_per_image: int
    """The same while it runs backward, beyond what was saved."""
    moved_once: int
    """Read and written by the frozen part's operators, matrix products left out."""
    moved_forward: int
    """The same of the part that trains, in one forward pass."""

    @property
    def is_chunked(self) -> bool:
        """Whether the trained blocks run twice."""
        return self.chunk_size < self.num_images

    @property
    def fixed(self) -> int:
        """What does not depend on chunk_size."""
        state = self.weights + self.optimizer + self.encoder_ema + self.queue
        return state + self.views + self.weight_copies

    @property
    def saved(self) -> int:
        """What autograd saves, at most at a time."""
        kept = self.kept_per_image * (self.num_images if self.is_chunked else self.chunk_size)
        return kept + (self.saved_per_image - self.kept_per_image) * self.chunk_size

    @property
    def peak(self) -> int:
        """The largest sum: as the backward begins, when one pass has no gradients yet."""
        forward = self.forward_per_image * self.chunk_size
        if self.is_chunked:
            forward += self.kept_per_image * self.num_images
        backward = self.saved + self.backward_per_image * self.chunk_size
        if self.is_chunked:
            return self.fixed + max(forward, self.gradients + max(backward, self.gradients))
        return self.fixed + max(forward, backward, self.gradients)

    @property
    def moved(self) -> int:
        """Read and written in an update by all but matrix products; a backward counts twice."""
        # Each with the optimiser's gradient, weight and averages, and the EMA's two.
        step = 7 * self.gradients + (3 * self.gradients if self.encoder_ema else 0)
        return self.moved_once + (4 if self.is_chunked else 3) * self.moved_forward + step

    def fitting(self, num_bytes: int) -> "MemoryPlan | None":
        """The plan with the fewest chunks, all of a size, whose peak fits; None if none does."""
        counts = range(1, self.num_images + 1)
        sizes = dict.fromkeys(math.ceil(self.num_images / count) for count in counts)
        plans = (dataclasses.replace(self, chunk_size=size) for size in sizes)
        return next((plan for plan in plans if plan.peak <= num_bytes), None)

    @property
    def smallest(self) -> "MemoryPlan":
        """The same with one image at a time."""
        return dataclasses.replace(self, chunk_size=1)


def usable_bytes(device: torch.device) -> int:
    """Of a GPU's memory what tensors can have; the rest is CUDA's and lost in gaps."""
    return int(USABLE * torch.cuda.get_device_properties(device).total_memory)


def check_memory(config: Config, *, num_gpus: int, num_bytes: int) -> None:
    """Refuse a run whose updates cannot fit into `num_bytes` of a GPU, before it starts.

    Raises:
        ConfigError: in one line, with the chunk_size that fits.
    """
    plan = plan_memory(config, num_gpus=num_gpus)
    if plan.peak <= num_bytes:
        return
    needs = f"needs {plan.peak / 2**30:.1f} GiB, the GPU has {num_bytes / 2**30:.1f} GiB"
    fitting = plan.fitting(num_bytes)
    if fitting is not None:
        raise ConfigError(f"chunk_size: {needs}; chunk_size={fitting.chunk_size} fits")
    one = plan.smallest.peak / 2**30
    raise ConfigError(f"batch_size: {needs}, and {one:.1f} GiB are needed with chunk_size=1")


def plan_memory(config: Config, *, num_gpus: int = 1, device_type: str = "cuda") -> MemoryPlan:
    """Plan one GPU's share of an update, under the autocast that `config.precision` means there.

    Args:
        config: of the run.
        num_gpus: processes that share the batch.
        device_type: where the update would run; the device need not be there.
    """
    meta = torch.device("meta")
    world = World(rank=0, size=1, local_rank=0, group=None, device=meta)
    with meta:
        model = build_stage(dataclasses.replace(config, chunk_size=None), world, total=1).model
    buffers = dict(model.named_buffers())
    queue = sum(_nbytes(b) for name, b in buffers.items() if ".loss.queue." in name)
    shadow = sum(SHADOW_BYTES * b.numel() for name, b in buffers.items() if name.endswith(".queue"))
    trained = sum(_nbytes(p) for p in model.parameters() if p.requires_grad)
    encoder = model.encoder
    # Tokens of an image that the encoder or the decoder holds, in units of the encoder's width.
    tokens = 1.0 + encoder.num_patches
    if isinstance(model, PretrainModel):
        width = model.decoder.pos_embed.shape[2] / encoder.embed_dim
        tokens *= max(1 - config.mask_ratio, width)
    row = round(config.num_views * tokens * encoder.embed_dim)
    num_images = config.batch_size // num_gpus
    with FakeTensorMode(allow_non_fake_inputs=True), _autocast(config, device_type):
        _move(model, device_type)
        two, four = (_count(model, config.num_views, num_images) for num_images in (2, 4))
        views = _nbytes(_views(model, config.num_views, 1))
    # Bytes of an image, and those that are there whatever the batch.
    slope = _Count(*((b - a) // 2 for a, b in zip(two, four, strict=True)))
    offset = _Count(*(2 * a - b for a, b in zip(two, four, strict=True)))
    # Frozen weights are converted once, not in every update.
    moved = slope.moved * num_images + offset.moved - offset.moved_by_trunk
    # In prepare-head nothing but the head trains, and that is small.
    trains = any(parameter.requires_grad for parameter in encoder.parameters())
    moved_once = slope.moved_by_trunk * num_images if trains else moved
    masked = 0.0 if model.decoder is None else 1 - config.mask_ratio
    kept = slope.saved_by_head + round((1 + masked) * slope.trunk)
    return MemoryPlan(
        num_images=num_images,
        chunk_size=min(config.chunk_size or num_images, num_images),
        weights=sum(map(_nbytes, [*model.parameters(), *buffers.values()])) - queue,
        gradients=trained,
        optimizer=2 * trained,
        encoder_ema=_state_bytes(encoder) if config.encoder_ema is not None else 0,
        queue=queue + shadow,
        views=views * num_images,
        weight_copies=offset.saved,
        saved_per_image=slope.saved,
        kept_per_image=min(slope.saved, kept),
        forward_per_image=FORWARD_BYTES * row,
        backward_per_image=BACKWARD_BYTES * row if trains else 0,
        moved_once=moved_once,
        moved_forward=moved - moved_once,
    )


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _state_bytes(module: nn.Module) -> int:
    return sum(map(_nbytes, [*module.parameters(), *module.buffers()]))


def _move(module: nn.Module, device_type: str) -> None:
    """Put fake tensors in place of a module's own; `to` cannot leave the meta device."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device_type)
            setattr(part, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            fake = torch.empty(buffer.shape, dtype=buffer.dtype, device=device_type)
            setattr(part, name, fake)


@contextmanager
def _autocast(config: Config, device_type: str) -> Iterator[None]:
    """What `torch.autocast` does, which refuses a device that is not there."""
    dtype = matrix_dtype(config, torch.device(device_type))
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, dtype != torch.float32)
    torch.set_autocast_dtype(device_type, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])


class _Count(NamedTuple):
    """Bytes of one forward pass; parameters, buffers and views are not counted as saved."""

    saved: int
    """What autograd saves."""
    saved_by_head: int
    """The same in the head alone."""
    moved: int
    """What operators read and write, matrix products left out."""
    moved_by_trunk: int
    """The same in the frozen blocks."""
    trunk: int
    """The frozen blocks' result."""


def _count(model: StageModel, num_views: int, num_images: int) -> _Count:
    # Every update casts its weights anew.
    torch.clear_autocast_cache()
    views = _views(model, num_views, num_images)
    known = [*model.parameters(), *model.buffers(), views]
    with _Traffic() as by_trunk:  # type: ignore[no-untyped-call]
        trunk = model.encoder.trunk(views.flatten(0, 1))
    # The outputs hold the graph, and the graph the storages that are counted.
    with _counted(known) as saved, _Traffic() as traffic:  # type: ignore[no-untyped-call]
        output = model(views, step=0)
    del output
    head: dict[int, int] = {}
    if not isinstance(model, PretrainModel):
        width, device = model.encoder.embed_dim, views.device
        pooled = torch.empty(num_views, num_images, width, device=device, requires_grad=True)
        with _counted(known) as head:
            output = model.head(pooled, step=0)
        del output
    return _Count(
        saved=sum(saved.values()),
        saved_by_head=sum(head.values()),
        moved=traffic.num_bytes,
        moved_by_trunk=by_trunk.num_bytes,
        trunk=0 if trunk is None else _nbytes(trunk),
    )


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of operators' arguments and results."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if made and not func.is_view and func.overloadpacket not in PRODUCTS:
            read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.num_bytes += sum(map(_nbytes, [*read, *made]))
        return result


def _views(model: StageModel, num_views: int, num_images: int) -> Tensor:
    encoder = model.encoder
    side, device = encoder.img_size, encoder.cls_token.device
    return torch.empty(num_views, num_images, encoder.in_chans, side, side, device=device)


@contextmanager
def _counted(known: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd saves, by storage; those of `known` tensors left out."""
    left_out = {x.untyped_storage()._cdata for x in known}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in left_out:
            found[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found
