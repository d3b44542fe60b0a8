import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from maect_fast.checkpoint import (
    CheckpointError,
    fingerprint,
    load_checkpoint,
    peek_checkpoint,
    random_states,
    remove_temporaries,
    save_checkpoint,
    seed_generators,
    set_random_states,
    write_atomically,
)


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


def test_generators_continue_through_a_file(tmp_path: Path) -> None:
    seed_generators(3)
    draws()
    np.random.randn()  # noqa: NPY002 (leaves a second normal number in NumPy's state)
    save_checkpoint(tmp_path / "x.pt", {"random_states": random_states()})
    expected = [draws(), draws()]
    seed_generators(4)
    set_random_states(load_checkpoint(tmp_path / "x.pt")["random_states"])
    assert [draws(), draws()] == expected


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"value": 1})

    def fail(temporary: Path) -> NoReturn:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert load_checkpoint(path)["value"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_the_file_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(number: int) -> None:
        order.append("fsync")
        fsync(number)

    def watched_replace(path: Path, target: Path) -> Path:
        order.append("replace")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    save_checkpoint(tmp_path / "x.pt", {})
    assert order == ["fsync", "replace", "fsync"]


def test_damage_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, {"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of maect-fast"):
        load_checkpoint(path)
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match="format 99 is newer"):
        load_checkpoint(path)


def state_of(seed: int = 0) -> dict[str, Any]:
    """Tensors that share memory, have strides or no elements, of several dtypes, and values."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(300, 20, generator=generator)
    return {
        "shared": [shared, shared[3:7], shared.T],
        "step": torch.tensor(3.0),
        "none": torch.empty(0),
        "ids": torch.arange(2000),
        "half": {"rows": torch.randn(77, generator=generator).half()},
        "config": {"seed": seed, "name": "x", "rates": (0.1, None)},
    }


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("rb+") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint(path, state_of())
    expected = load_checkpoint(path)
    assert_same(expected, {"format": 1, **state_of()})
    whole = path.read_bytes()
    moments = random.Random(0)
    told: list[str] = []
    for _ in range(100):
        path.write_bytes(whole)
        flip(path, moments.randrange(len(whole)), moments.randrange(8))
        try:
            assert_same(load_checkpoint(path), expected)
        except CheckpointError as error:
            told.append(str(error))
    # The others hit what pads a tensor to 64 bytes.
    assert len(told) > 50
    assert all(str(path) in line and "\n" not in line for line in told)


@pytest.mark.parametrize("position", [0, 4096 * 3 + 5, -1])
def test_one_bit_of_a_large_tensor(tmp_path: Path, position: int) -> None:
    """First and last byte, and one in the midst of a read."""
    path = tmp_path / "x.pt"
    values = torch.arange(200_001)
    save_checkpoint(path, {"values": values})
    start = path.read_bytes().index(values.numpy().tobytes())
    flip(path, start + position % (8 * 200_001), 7)
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        load_checkpoint(path)
    # This reads no tensors.
    assert peek_checkpoint(path)["values"].is_meta


def test_older_files_are_verified_too(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    values = torch.arange(1000)
    torch.save({"format": 1, "values": values}, path)
    assert torch.equal(load_checkpoint(path)["values"], values)
    flip(path, path.read_bytes().index(values.numpy().tobytes()) + 100, 0)
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        load_checkpoint(path)


def test_damage_names_the_newest_that_can_be_read(tmp_path: Path) -> None:
    last = tmp_path / "last.pt"
    kept = [tmp_path / f"update-{number:07d}.pt" for number in (5, 10, 15)]
    for path in (last, *kept):
        save_checkpoint(path, {"update": 1})
    kept[2].write_bytes(b"nothing")
    flip(last, last.stat().st_size // 2, 3)
    last.write_bytes(last.read_bytes()[:-30])
    told = f"cp {kept[1]} {last} the same command continues"
    for read in (load_checkpoint, peek_checkpoint):
        with pytest.raises(CheckpointError, match=re.escape(told)):
            read(last)
    last.unlink()
    with pytest.raises(CheckpointError, match=re.escape(told)):
        load_checkpoint(last)
    for path in kept:
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="--restart"):
        load_checkpoint(last)


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    names = []

    def write(text: str, then: Callable[[], object]) -> Callable[[Path], None]:
        def fill(temporary: Path) -> None:
            names.append(temporary)
            temporary.write_text(text)
            then()

        return fill

    write_atomically(
        path, write("first", lambda: write_atomically(path, write("second", lambda: None)))
    )
    assert path.read_text() == "first"
    assert len(set(names)) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_is_removed_with_time(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    old, new, other = (tmp_path / f".{name}.tmp" for name in ("x.txt.1", "x.txt.2", "y.txt.1"))
    for temporary in (old, new, other):
        temporary.write_text("half")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    write_atomically(path, lambda temporary: temporary.write_text("x"))
    assert sorted(tmp_path.iterdir()) == sorted([path, new, other])
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_names_the_file(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the disk's."""
    program = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from maect_fast.checkpoint import save_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n"
        "    save_checkpoint(Path(sys.argv[1]), {'x': torch.zeros(100_000)})\n"
        "except OSError as error:\n"
        "    print(error.filename, error.strerror)\n"
    )
    path = tmp_path / "x.pt"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{path} File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("a.pt", "b.pt", "c.pt"))
    save_checkpoint(first, state_of(0))
    save_checkpoint(second, state_of(1))
    shutil.copyfile(first, third)
    assert fingerprint(first) == fingerprint(third) != fingerprint(second)
    for path, text in ((first, "x"), (second, "y"), (third, "x")):
        path.write_text(text)
    assert fingerprint(first) == fingerprint(third) != fingerprint(second)
