"""Checkpoints: written whole or not at all, read without running code from the file."""

import copy
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maect_fast.names import printable
from maect_fast.tensor_file import read_tensor_file

__all__ = [
    "CheckpointError",
    "load_checkpoint",
    "random_states",
    "save_checkpoint",
    "seed_generators",
    "set_random_states",
    "write_atomically",
]

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, unreadable or does not fit; the message says which and why."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, flush it to disk and rename it to `path`.

    A reader, or a process that is killed at any moment, finds the old file or the new one.
    """
    # One name per file: what a kill leaves behind, the next write replaces.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain Python values) atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: torch.save({"format": FORMAT, **state}, temporary))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU.

    Raises:
        CheckpointError: no such file, not one of ours, or of a newer format.
    """
    shown = printable(path)
    if not path.exists():
        raise CheckpointError(f"{shown}: no such checkpoint")
    try:
        state = read_tensor_file(path)
    except ValueError as error:
        raise CheckpointError(f"{shown}: not a readable checkpoint: {error}") from error
    if type(state.get("format")) is not int:
        raise CheckpointError(f"{shown}: not a checkpoint of maect-fast")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{shown}: format {state['format']} is newer than this version reads ({FORMAT}); "
            "update maect-fast"
        )
    return state


def seed_generators(seed: int) -> None:
    """Start every generator of this process anew; nothing of this project draws from them."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def random_states() -> dict[str, Any]:
    """The states of every generator of this process: torch (CPU, CUDA), NumPy, Python."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    numpy_state["state"]["key"] = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": numpy_state,
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    numpy_state = copy.deepcopy(states["numpy"])
    numpy_state["state"]["key"] = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy_state)  # noqa: NPY002
    random.setstate(states["python"])
