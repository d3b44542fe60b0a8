"""Checkpoints: written whole or not at all, verified when read, without running code from the file.

Every byte is under the CRCs of the zip file that `torch.save` writes. A run has
`checkpoints/last.pt`, from which it continues, and `checkpoints/update-N.pt`, which stay.
"""

import copy
import glob
import hashlib
import os
import random
import secrets
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maect_fast.errors import UserError
from maect_fast.names import printable
from maect_fast.tensor_file import read_tensor_file

__all__ = [
    "CheckpointError",
    "fingerprint",
    "kept_checkpoints",
    "load_checkpoint",
    "peek_checkpoint",
    "random_states",
    "remove_temporaries",
    "save_checkpoint",
    "seed_generators",
    "set_random_states",
    "way_out",
    "write_atomically",
]

FORMAT = 1
# Longer than any write of ours goes without touching its file.
STALE_SECONDS = 3600


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, unreadable or does not fit; the message says which and why."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, flush it to disk and rename it to `path`.

    A reader, or a process that is killed at any moment, finds the old file or the new one. The
    temporary name is this call's own, so that two writers do not meet.

    Raises:
        OSError: with `path` as its filename.
    """
    pattern = f"{glob.escape(path.name)}.*"
    remove_temporaries(path.parent, of=pattern, seconds=STALE_SECONDS)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
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
    except OSError as error:
        raise _about(path, error) from error


def remove_temporaries(folder: Path, *, of: str = "*", seconds: float = 0) -> None:
    """Remove from `folder` what killed writers left there.

    Args:
        folder: may be missing.
        of: pattern of the rest of their names.
        seconds: leave what was written to since.
    """
    for temporary in folder.glob(f".{of}.tmp"):
        try:
            if time.time() - temporary.stat().st_mtime >= seconds:
                temporary.unlink()
        except FileNotFoundError:
            pass  # its writer was faster


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain Python values) atomically.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            try:
                torch.save({"format": FORMAT, **state}, file)
            except RuntimeError as error:
                # What went wrong with the file is a cause of what torch says of it.
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__context__
                raise cause or error from None

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU, and verify every byte by the file's CRCs.

    Raises:
        CheckpointError: no such file, not one of ours, damaged, or of a newer format. Of a damaged
            one the message names the newest kept checkpoint beside it that can be read.
    """
    return _read_or_tell(path, with_tensors=True)


def peek_checkpoint(path: Path) -> dict[str, Any]:
    """`load_checkpoint` without reading tensors, which come on the meta device: milliseconds.

    Raises:
        CheckpointError: as for `load_checkpoint`, but for damaged tensors, which are not looked at.
    """
    return _read_or_tell(path, with_tensors=False)


def kept_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a `checkpoints` folder that stay, the newest first."""
    return sorted(folder.glob("update-*.pt"), reverse=True)


def way_out(last: Path) -> str:
    """How to continue a run whose last checkpoint is missing or damaged."""
    for kept in kept_checkpoints(last.parent):
        try:
            _read(kept, with_tensors=True)
        except (ValueError, CheckpointError):
            continue
        own, there = printable(kept), printable(last)
        return (
            f"the newest that can be read is {own}: after cp {own} {there} the same command "
            "continues from there"
        )
    return "there is no other that can be read: --restart starts the run anew"


def fingerprint(path: Path) -> str:
    """A digest of a file's content; of a zip file, such as torch writes, from its CRCs alone."""
    digest = hashlib.sha256()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                digest.update(f"{info.filename} {info.file_size} {info.CRC}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_or_tell(path: Path, *, with_tensors: bool) -> dict[str, Any]:
    shown = printable(path)
    if not path.exists():
        way = f"; {way_out(path)}" if kept_checkpoints(path.parent) else ""
        raise CheckpointError(f"{shown}: no such checkpoint{way}")
    try:
        return _read(path, with_tensors=with_tensors)
    except ValueError as error:
        way = f"; {way_out(path)}"
        raise CheckpointError(f"{shown}: not a readable checkpoint: {error}{way}") from error


def _read(path: Path, *, with_tensors: bool) -> dict[str, Any]:
    """What the file holds; ValueError where it is damaged."""
    state = read_tensor_file(path, with_tensors=with_tensors)
    if type(state.get("format")) is not int:
        raise CheckpointError(f"{printable(path)}: not a checkpoint of maect-fast")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{printable(path)}: format {state['format']} is newer than this version reads "
            f"({FORMAT}); update maect-fast"
        )
    return state


def _about(path: Path, error: OSError) -> OSError:
    """The same error, of `path`."""
    return error if error.errno is None else OSError(error.errno, error.strerror, str(path))


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
