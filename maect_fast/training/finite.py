"""Where NaN and infinity come from: weights, images, or a run that diverges."""

from pathlib import Path

import torch
from torch import Tensor

from maect_fast.checkpoint import CheckpointError
from maect_fast.training.stages import StageState, matrix_dtype

__all__ = ["check_finite", "not_finite"]


def check_finite(state: StageState, source: Path | None) -> None:
    """Refuse to start from weights, batch statistics or a queue that are not finite.

    Raises:
        CheckpointError: names a tensor, and `source`, which it was read from.
    """
    for name, value in state.model.state_dict().items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{source or 'initial weights'}: {name} holds NaN or infinity")


def not_finite(state: StageState, views: Tensor | None, out: Path, loss: float) -> str:
    """Say what to do when the loss is not finite, or weights are not.

    Args:
        state: of the run.
        views: the last batch's. Pixels are bytes, so what is not finite there comes from settings,
            which hold for every batch.
        out: run directory.
        loss: average since the last line of metrics.
    """
    config = state.config
    if views is not None and not bool(views.isfinite().all()):
        return (
            f"the images are not finite at update {state.update}, and so the loss is {loss}; see "
            "augment.mean, augment.std, augment.contrast and augment.noise"
        )
    what = f"the loss is {loss}" if views is not None else "weights are not finite"
    command = f"maect-fast {config.stage} --out {out} --change"
    lower = (
        f"{command} optim.encoder_lr={config.optim.encoder_lr / 2:g} "
        f"--change optim.other_lr={config.optim.other_lr / 2:g}"
    )
    device = next(state.model.parameters()).device
    if matrix_dtype(config, device) != torch.float32:
        lower += f", or {command} precision=fp32,"
    return (
        f"the run diverged: {what} at update {state.update}; the last saved checkpoint is from "
        f"before: {lower} continues from it"
    )
