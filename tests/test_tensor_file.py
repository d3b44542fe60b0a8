"""The reader of tensor files gives what torch.load gives; hostile_files.py has what it refuses."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from maect_fast.tensor_file import read_tensor_file


def content() -> dict[str, Any]:
    shared = torch.arange(12.0)
    dtypes = ("bool", "uint8", "int8", "int16", "int32", "int64")
    floats = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
    return {
        "dtypes": {name: torch.ones(3, dtype=getattr(torch, name)) for name in dtypes + floats},
        "model": torch.nn.BatchNorm1d(4).state_dict(),
        "ordered": OrderedDict(b=1, a=2),
        "views": [shared.view(3, 4).t(), shared[2:5], torch.ones(4, 1).expand(4, 3)],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.0),
        "large": torch.randn(700_000),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "plain": [None, True, 1, -5, 10**30, 2.5, "ü\udcff\n", (1, (2, 3)), {4: 5}],
    }


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        same_kind = found.dtype == expected.dtype and found.stride() == expected.stride()
        return same_kind and torch.equal(found, expected)
    if isinstance(expected, dict):
        keys = list(found) == list(expected)
        return keys and all(same(found[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize("is_archive", [True, False])
def test_reads_what_torch_saves(tmp_path: Path, is_archive: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save(content(), path, _use_new_zipfile_serialization=is_archive)
    found = read_tensor_file(path)
    assert same(found, torch.load(path, weights_only=True))
    # Views of one storage still are.
    first, second, _ = found["views"]
    first[0, 0] = 7
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@pytest.mark.parametrize("is_archive", [True, False])
def test_every_cut_is_one_line(tmp_path: Path, is_archive: bool) -> None:
    path = tmp_path / "x.pt"
    small = {"x": torch.arange(50.0), "y": [1, "two"], "z": torch.ones(3)}
    torch.save(small, path, _use_new_zipfile_serialization=is_archive)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"\w") as error:
            read_tensor_file(path)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("is_archive", [True, False])
def test_every_changed_byte_is_read_or_told_in_one_line(tmp_path: Path, is_archive: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(4)}, path, _use_new_zipfile_serialization=is_archive)
    whole = path.read_bytes()
    messages = []
    for at in range(len(whole)):
        for flip in (0x01, 0x80):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            try:
                read_tensor_file(path)
            except ValueError as error:
                messages.append(str(error))
    assert all(message.isprintable() for message in messages)
    assert len(messages) > len(whole) / 10
