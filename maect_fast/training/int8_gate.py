"""Whether a run may have its frozen blocks in int8: that is seen on its first images.

Rows in int8 share a step; the more a few features of an encoder stand out, the less is left for
the others. How far they do is a matter of the weights.
"""

from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from maect_fast.config import ConfigError
from maect_fast.data import Loader
from maect_fast.fuse import why_not
from maect_fast.models.maect import ContrastiveModel
from maect_fast.training.distributed import World
from maect_fast.training.stages import StageState, autocast

__all__ = ["LEAST_COSINE", "check_int8"]

# Rounding to eight-bit floats gives 0.998, to int8 as here 0.9998 (simulated for ViT-L/16).
LEAST_COSINE = 0.999
NUM_BATCHES = 2


@torch.no_grad()
def check_int8(state: StageState, loader: Loader, world: World) -> list[str]:
    """Compare pooled features with those that `frozen_precision=same` gives, all else equal.

    On the batches that are trained on next. Nothing of the run changes.

    Returns:
        A line with what was found; none where no block is in int8.

    Raises:
        ConfigError: an image's features differ too much, or a block cannot be in int8.
    """
    model = state.model
    if state.config.frozen_precision == "same":
        return []
    assert isinstance(model, ContrastiveModel)
    epoch, position = divmod(state.update, loader.updates_per_epoch)
    cosines: list[Tensor] = []
    with autocast(state.config, world.device):
        for batch in islice(loader.batches(epoch, position), NUM_BATCHES):
            if not cosines:
                _check_blocks(model, batch.views)
            cosines.append(_cosines(model, batch.views))
    least, mean = _over_ranks(torch.cat(cosines), world)
    found = f"{least:.6f} at least, {mean:.6f} on average over {NUM_BATCHES} batches"
    # NaN is no cosine.
    if not least >= LEAST_COSINE:
        raise ConfigError(
            "frozen_precision: int8 changes these weights' features too much: expected a cosine of "
            f"{LEAST_COSINE} with those of frozen_precision=same, got {found}; use that"
        )
    return [f"frozen blocks in int8: features keep a cosine of {found}"]


def _check_blocks(model: ContrastiveModel, views: Tensor) -> None:
    encoder = model.encoder
    tokens = encoder.embed(views[0, :1])
    if reasons := why_not(encoder.blocks[: encoder.num_frozen], tokens):
        raise ConfigError(f"frozen_precision: int8 is not for block {reasons[0]}")


def _cosines(model: ContrastiveModel, views: Tensor) -> Tensor:
    """Of each image's features, [V * n] fp32."""
    found = model.pooled(views)
    blocks: list[Any] = [block for block in model.encoder.blocks if block.is_int8]
    for block in blocks:
        block.is_int8 = False
    try:
        expected = model.pooled(views)
    finally:
        for block in blocks:
            block.is_int8 = True
    return F.cosine_similarity(found.float(), expected.float(), dim=-1)


def _over_ranks(cosines: Tensor, world: World) -> tuple[float, float]:
    """The least and the mean, the same on every rank."""
    least, mean = cosines.min(), cosines.mean()
    if world.size > 1:
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        dist.all_reduce(mean)
    return least.item(), mean.item() / world.size
