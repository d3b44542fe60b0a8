"""Where NaN and infinity come from: weights that a run starts from, or its divergence."""

from pathlib import Path

import torch

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


def not_finite(state: StageState, out: Path, what: str) -> str:
    """Say what to do when the loss is not finite, or weights are not.

    Args:
        state: of the run. It started from finite weights, and settings leave images finite.
        out: run directory.
        what: is not finite, in words.
    """
    config = state.config
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
