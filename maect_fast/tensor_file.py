"""Files of tensors, read without running anything of theirs and without memory that they lack.

`torch.load` trusts what a file says of itself: a storage longer than its record is read beyond the
end of the buffer, a compressed record may be any size, and where it refuses, it advises to let the
file run its code. Here a file is `torch.save`'s (as a zip archive, or as before PyTorch 1.6) or
safetensors; every size it states is compared with the bytes it has before memory is taken, its
pickle may use the instructions that `torch.save` writes and the few names in `GLOBALS`, and an
error is one line.
"""

import argparse
import errno
import io
import math
import os
import pickle
import stat
import struct
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import torch
from torch import Tensor

from maect_fast.names import one_line, printable, shortened

__all__ = ["open_regular", "read_metadata", "read_tensor_file"]

# What describes the tensors: safetensors' header, a pickle, the list of an archive's records. Those
# of a ViT-H with its optimizer (2,400 tensors) take 0.4 MB; read, they are many times as large.
MAX_DESCRIPTION = 2 << 20
CHUNK = 1 << 20
ZIP = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# What torch.save writes with its protocol, 2. Left out is what takes memory by a number in the
# file, or calls what it is not given.
OPCODES = (
    pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.NEWOBJ, pickle.REDUCE,
    pickle.BUILD, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.TUPLE,
    pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.EMPTY_TUPLE, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.BININT, pickle.BININT1,
    pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING,
    pickle.BINSTRING, pickle.BINPERSID, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT,
    pickle.LONG_BINPUT,
)  # fmt: skip

DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a file for reading; whoever waits behind a pipe, a socket or a device is not asked.

    Raises:
        OSError: there is no such file, or it is no regular one.
    """
    # A pipe without a writer would block the call itself.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return file


def read_tensor_file(path: str | Path, *, with_tensors: bool = True) -> dict[str, Any]:
    """The dict that a file holds, its tensors on the CPU.

    Of objects beside tensors and plain values, a checkpoint's command-line arguments
    (`argparse.Namespace`) pass; an `OrderedDict` becomes a dict. Every byte of an archive is
    compared with its CRC.

    Args:
        path: of the file.
        with_tensors: False leaves the bytes of tensors unread, and them on the meta device, but for
            files of PyTorch before 1.6.

    Raises:
        ValueError: the file is missing, damaged, of another kind, holds what could run code, or
            states sizes that it does not have; one line, without the path.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if Path(path).suffix == ".safetensors":
                return _read_safetensors(path, file, size, with_tensors)
            content = _read_torch(file, size, with_tensors)
    except _RefusedError:
        raise
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except Exception as error:  # damage causes whatever it causes
        raise ValueError(f"cut off or damaged ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise _RefusedError(f"expected a state dict, got a {type(content).__name__}")
    return content


class _RefusedError(ValueError):
    """A file that is understood, and not taken; the message says why."""


def _check_description(length: int) -> None:
    if length > MAX_DESCRIPTION:
        raise _RefusedError(f"{length} bytes to describe its tensors, at most {MAX_DESCRIPTION}")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts that a safetensors file has beside its tensors; none of another file.

    Raises:
        ValueError: as for `read_tensor_file`.
    """
    if Path(path).suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path) as file:
            _check_description(int.from_bytes(file.read(8), "little"))
        with safe_open(path, "pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(one_line(error)) from error


def _read_safetensors(
    path: str | Path, file: IO[bytes], size: int, with_tensors: bool
) -> dict[str, Tensor]:
    """Its own library compares sizes, once the header is one to parse."""
    # Programs that read none need not have it.
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise _RefusedError(f"not a readable safetensors file: cut off (it has {size} bytes)")
    _check_description(length)
    try:
        if with_tensors:
            return dict(load_file(path))
        with safe_open(path, "pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            return {key: _on_meta(value) for key, value in slices.items()}
    except SafetensorError as error:
        raise _RefusedError(f"not a readable safetensors file: {one_line(error)}") from error


def _on_meta(part: Any) -> Tensor:
    """What a slice of a safetensors file is of, without its bytes."""
    shape = part.get_shape()
    dtype = SAFETENSORS_DTYPES.get(part.get_dtype(), torch.uint8)
    return torch.empty(shape, dtype=dtype, device="meta")


def _read_torch(file: IO[bytes], size: int, with_tensors: bool) -> Any:
    start = file.read(len(ZIP))
    file.seek(0)
    if start == ZIP:
        with zipfile.ZipFile(cast("IO[bytes]", _InParts(file))) as archive:
            return _read_archive(archive, size, with_tensors)
    if start[:1] == pickle.PROTO:
        return _read_legacy(file, size)
    raise _RefusedError("neither a file of torch.save nor one that ends in .safetensors")


def _read_archive(archive: zipfile.ZipFile, size: int, with_tensors: bool) -> Any:
    """A file of torch.save since PyTorch 1.6: a pickle, and a record of bytes per storage."""
    entries = archive.infolist()
    records = {entry.filename.partition("/")[2]: entry for entry in entries}
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise _RefusedError(
            "a TorchScript archive, which is a program; save its state dict with "
            "torch.save(model.state_dict(), PATH)"
        )
    if len(records) < len(entries) or "data.pkl" not in records:
        raise _RefusedError("a zip archive, but none of torch.save")
    # torch.save does not compress, and records that overlap would be worth more than the file.
    stated = sum(entry.file_size for entry in entries)
    if stated > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _RefusedError(f"its records state {stated} bytes, the file has {size}")
    if "byteorder" in records and archive.read(records["byteorder"]) != sys.byteorder.encode():
        raise _RefusedError("written on a machine of another byte order")
    storages = _ArchiveStorages(archive, records, size, with_tensors)
    return _Unpickler(io.BytesIO(archive.read(records["data.pkl"])), storages).load()


def _read_legacy(file: IO[bytes], size: int) -> Any:
    """A file of torch.save before PyTorch 1.6: five pickles, then the storages' bytes."""
    storages = _LegacyStorages(size)
    start = io.BytesIO(file.read(MAX_DESCRIPTION))
    if _Unpickler(start, storages).load() != LEGACY_MAGIC:
        raise _RefusedError("a pickle, but none of torch.save")
    for _ in range(2):  # protocol, and sizes of C types
        _Unpickler(start, storages).load()
    content = _Unpickler(start, storages).load()
    keys = _Unpickler(start, storages).load()
    file.seek(start.tell())
    if sorted(keys) != sorted(storages.known):
        raise _RefusedError("other storages than its tensors name")
    for key in keys:
        storage = storages.known[key]
        stated = struct.unpack("<q", file.read(8))[0] * storage.element_size()
        if stated != storage.nbytes:
            raise _RefusedError(
                f"storage {printable(key)} has {stated} bytes, {storage.nbytes} stated"
            )
        _fill(storage, file)
    return content


class _InParts:
    """A file of which little is read at once, since `zipfile` reads the list of records whole."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self.file = file

    def read(self, length: int = -1) -> bytes:
        """As a file's."""
        _check_description(length)
        return self.file.read(length)


class _Storages(ABC):
    """Hands out each storage of a file as one flat tensor."""

    def __init__(self, size: int) -> None:
        self.size = size
        """Bytes of the file, which all storages together cannot exceed."""
        self.known: dict[str, Tensor] = {}
        self.taken = 0

    def get(self, kind: Any, key: Any, numel: Any) -> Tensor:
        """Storage `key`, of `numel` elements."""
        if not isinstance(kind, torch.dtype) or type(key) is not str or type(numel) is not int:
            raise _RefusedError("a tensor without a storage")
        if key in self.known and (self.known[key].dtype, len(self.known[key])) == (kind, numel):
            return self.known[key]
        num_bytes = numel * kind.itemsize
        self.taken += num_bytes
        if num_bytes < 0 or self.taken > self.size:
            raise _RefusedError(f"its tensors take {self.taken} bytes, the file has {self.size}")
        self.known[key] = self.make(kind, key, num_bytes)
        return self.known[key]

    def view(self, storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        """A tensor of a storage's elements; repeated rows count as often as they are there."""
        numbers = (offset, *size, *stride)
        if any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride):
            raise _RefusedError("a tensor of impossible shape")
        numel = math.prod(size)
        if numel * storage.element_size() > self.size:
            raise _RefusedError(f"a tensor {shortened(list(size))}, the file has {self.size} bytes")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if numel and last >= len(storage):
            raise _RefusedError(
                f"a tensor {shortened(list(size))} beyond its {len(storage)} elements"
            )
        return storage.as_strided(size, stride, offset) if numel else storage.new_empty(size)

    @abstractmethod
    def make(self, kind: torch.dtype, key: str, num_bytes: int) -> Tensor:
        """A storage met for the first time."""


class _ArchiveStorages(_Storages):
    def __init__(
        self,
        archive: zipfile.ZipFile,
        records: dict[str, zipfile.ZipInfo],
        size: int,
        with_tensors: bool,
    ) -> None:
        super().__init__(size)
        self.archive, self.records, self.with_tensors = archive, records, with_tensors

    def make(self, kind: torch.dtype, key: str, num_bytes: int) -> Tensor:
        record = self.records[f"data/{key}"]
        if record.file_size != num_bytes:
            raise _RefusedError(
                f"storage {printable(key)} has {record.file_size} bytes, {num_bytes} stated"
            )
        numel = num_bytes // kind.itemsize
        if not self.with_tensors:
            return torch.empty(numel, dtype=kind, device="meta")
        storage = torch.empty(numel, dtype=kind)
        with self.archive.open(record) as file:
            _fill(storage, file)
            file.read(1)  # the end, where the checksum is compared
        return storage


class _LegacyStorages(_Storages):
    def make(self, kind: torch.dtype, key: str, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes // kind.itemsize, dtype=kind)


def _fill(storage: Tensor, file: IO[bytes]) -> None:
    """Read the storage's bytes from the file's position on."""
    target = memoryview(storage.view(torch.uint8).numpy().data)
    for start in range(0, len(target), CHUNK):
        part = target[start : start + CHUNK]
        content = file.read(len(part))
        if len(content) < len(part):
            raise EOFError("the file ends within a tensor")
        part[:] = content


def _checked_dict(items: Iterable[Any] = ()) -> dict[Any, Any]:
    """A dict of the pairs; a tuple is no key here, as the hash of a deeply nested one crashes."""
    pairs = [(key, value) for key, value in items]
    if any(type(key) is tuple for key, _ in pairs):
        raise _RefusedError("a dict whose keys are no plain values")
    return dict(pairs)


def _parameter(value: Tensor, *_: Any) -> Tensor:
    return value


GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": _checked_dict,
    "argparse.Namespace": argparse.Namespace,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": tuple,
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
    **{str(dtype): dtype for dtype in DTYPES.values()},
}


class _Unpickler(pickle._Unpickler):
    """Python's own, whose memo is a dict: the C one takes memory by an index in the file."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in OPCODES
    }

    def __init__(self, file: IO[bytes], storages: _Storages) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """One of a few harmless things."""
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return self.storages.view
        found = GLOBALS.get(f"{module}.{name}")
        if found is None:
            raise _RefusedError(
                f"holds {shortened(f'{module}.{name}', 80)}, more than tensors and plain values, "
                "and reading it could run code; save the state dict alone with torch.save"
            )
        return found

    def persistent_load(self, pid: Any) -> Tensor:
        """The storage that a tensor names."""
        kind, key, _, numel = pid[1:5]
        return self.storages.get(kind, key, numel)

    def load_setitem(self) -> None:
        """`dict[key] = value`."""
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def load_setitems(self) -> None:
        """The same of several."""
        self._update(self.pop_mark())

    def _update(self, flat: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise _RefusedError("items of something that is no dict")
        self.stack[-1].update(_checked_dict(zip(flat[::2], flat[1::2], strict=True)))

    def load_build(self) -> None:
        """Leave attributes behind: an OrderedDict's `_metadata`, a Namespace's arguments."""
        self.stack.pop()
        if type(self.stack[-1]) not in (dict, argparse.Namespace):
            raise _RefusedError("attributes of something that has none")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build
