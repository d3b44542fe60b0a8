"""Checkpoints: written whole or not at all, verified when read, without running code from the file.

A file holds a checksum of every tensor's bytes; the rest is under the CRCs of the zip file that
`torch.save` writes. A run has `checkpoints/last.pt`, from which it continues, and
`checkpoints/update-N.pt`, which stay.
"""

import copy
import glob
import hashlib
import io
import os
import random
import secrets
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage

from maect_fast.errors import UserError

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

FORMAT = 2
# The first with checksums of its own; of older files the zip's CRCs are verified, which is slower.
FIRST_WITH_CHECKSUMS = 2
# Bytes that are summed as 64-bit words, and bytes that are read at a time: they stay in the cache,
# where summing them costs next to nothing.
ROW = 1 << 12
PIECE = 1 << 18
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
    content = {"format": FORMAT, **state}
    content["checksums"] = [_storage_checksum(storage) for storage in _storages(content)]

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:
                # What went wrong with the file is a cause of what torch says of it.
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__context__
                raise cause or error from None

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU, and verify every byte that has a meaning.

    Raises:
        CheckpointError: no such file, not one of ours, damaged, or of a newer format. Of a damaged
            one the message names the newest kept checkpoint beside it that can be read.
    """
    try:
        return _read(path)
    except _DamageError as error:
        raise CheckpointError(f"{error}; {way_out(path)}") from error


def peek_checkpoint(path: Path) -> dict[str, Any]:
    """`load_checkpoint` without reading tensors, which come on the meta device: milliseconds.

    Raises:
        CheckpointError: as for `load_checkpoint`, but for damaged tensors, which are not looked at.
    """
    try:
        return _read(path, with_tensors=False)
    except _DamageError as error:
        raise CheckpointError(f"{error}; {way_out(path)}") from error


def kept_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a `checkpoints` folder that stay, the newest first."""
    return sorted(folder.glob("update-*.pt"), reverse=True)


def way_out(last: Path) -> str:
    """How to continue a run whose last checkpoint is missing or damaged."""
    for kept in kept_checkpoints(last.parent):
        try:
            _read(kept)
        except (CheckpointError, _DamageError):
            continue
        return (
            f"the newest that can be read is {kept}: after cp {kept} {last} the same command "
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


class _DamageError(Exception):
    """A file that is there and cannot be read; the message is the first part of the user's."""


def _read(path: Path, *, with_tensors: bool = True) -> dict[str, Any]:
    """What the file holds, verified."""
    if not path.is_file():
        way = f"; {way_out(path)}" if kept_checkpoints(path.parent) else ""
        raise CheckpointError(f"{path}: no such checkpoint{way}")
    sums: list[int] = []
    try:
        with _SummingFile(path) as file:
            _verify_zip(file, leave_out="/data/")
            file.seek(0)

            def take(storage: UntypedStorage, _: str) -> UntypedStorage:
                sums.append(file.checksum(storage))
                return storage

            place: Any = take if with_tensors else "meta"
            state = torch.load(file, map_location=place, weights_only=True)
            if not isinstance(state, dict) or "format" not in state:
                raise CheckpointError(f"{path}: not a checkpoint of maect-fast")
            if state["format"] > FORMAT:
                raise CheckpointError(
                    f"{path}: format {state['format']} is newer than this version reads "
                    f"({FORMAT}); update maect-fast"
                )
            if state["format"] < FIRST_WITH_CHECKSUMS and with_tensors:
                _verify_zip(file)
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # whatever the damage causes
        reason = str(error).partition("\n")[0]
        raise _DamageError(f"{path}: not a readable checkpoint ({reason})") from error
    if with_tensors and sums != state.pop("checksums", sums):
        raise _DamageError(f"{path}: not a readable checkpoint (tensors are damaged)")
    return state


def _verify_zip(file: io.FileIO, *, leave_out: str | None = None) -> None:
    """Compare the CRCs of a zip file's members, but for those with `leave_out` in their name."""
    archive = zipfile.ZipFile(file)
    for info in archive.infolist():
        if leave_out is None or leave_out not in info.filename:
            with archive.open(info) as member:
                while member.read(PIECE):
                    pass


class _SummingFile(io.FileIO):
    """A file that sums what is read into tensors while it is in the cache."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._last = (0, 0)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the file goes."""
        view = memoryview(buffer).cast("B")
        num_bytes = checksum = 0
        for start in range(0, len(view), PIECE):
            piece, count = view[start : start + PIECE], 0
            while count < len(piece) and (got := super().readinto(piece[count:])):
                count += got
            checksum = _add(piece[:count], checksum)
            num_bytes += count
            if count < len(piece):
                break
        self._last = (num_bytes, checksum)
        return num_bytes

    def checksum(self, storage: UntypedStorage) -> int:
        """Of a storage that was read just now; torch reads one in one go."""
        num_bytes, checksum = self._last
        return checksum if num_bytes == storage.nbytes() else _storage_checksum(storage)


def _storages(node: Any) -> Iterator[UntypedStorage]:
    """The storages of a tree's tensors in the order in which torch saves them, each once."""
    seen: set[int] = set()

    def visit(node: Any) -> Iterator[UntypedStorage]:
        if isinstance(node, Tensor):
            storage = node.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                yield storage
        elif isinstance(node, dict):
            for value in node.values():
                yield from visit(value)
        elif isinstance(node, list | tuple):
            for value in node:
                yield from visit(value)

    yield from visit(node)


def _storage_checksum(storage: UntypedStorage) -> int:
    """What `_SummingFile` finds when it reads the storage."""
    here: UntypedStorage = storage.cpu()  # type: ignore[no-untyped-call]
    array = torch.tensor([], dtype=torch.uint8).set_(here).numpy()
    checksum = 0
    for start in range(0, len(array), PIECE):
        checksum = _add(array[start : start + PIECE], checksum)
    return checksum


def _add(piece: Any, checksum: int) -> int:
    """Continue a checksum: the CRC of the sums of every ROW bytes as words, then of the rest.

    Any change within one word changes its row's sum; only several in one row can cancel. Of a
    gigabyte in the page cache reading takes 0.14 s of CPU time, this 0.06 s, a CRC 0.23 s (AMD
    EPYC, Zen 5).
    """
    whole = len(piece) // ROW * ROW
    words = np.frombuffer(piece[:whole], dtype="<u8").reshape(-1, ROW // 8)
    return zlib.crc32(piece[whole:], zlib.crc32(np.add.reduce(words, axis=1), checksum))


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
