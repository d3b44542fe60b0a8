import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from maect_fast.config import AugmentConfig, ConfigError, DataConfig, EncoderConfig, ViewConfig
from maect_fast.data import (
    Batch,
    DataError,
    FolderSource,
    Loader,
    TensorSource,
    build_source,
    eval_batches,
)
from maect_fast.data.augment import draw, finish_views, image_views, num_draws
from maect_fast.data.loader import permutation

WriteImage = Callable[..., Path]

RANDOM = AugmentConfig(rotation=0.1, contrast=0.2, noise=0.05)
PHOTOMETRIC = AugmentConfig(
    views=[ViewConfig(jitter=0.8, blur=1.0), ViewConfig(jitter=0.8, blur=0.1, solarize=0.2)]
)


def open_folder(root: Path, in_chans: int = 3) -> FolderSource:
    source = build_source(
        DataConfig(root=str(root)), EncoderConfig(in_chans=in_chans), split="train"
    )
    assert isinstance(source, FolderSource)
    return source


def synthetic(num: int = 20, size: int = 16) -> TensorSource:
    source = build_source(
        DataConfig(source="synthetic", num_images=num),
        EncoderConfig(img_size=size),
        split="train",
    )
    assert isinstance(source, TensorSource)
    return source


def make_loader(source: Any, augment: AugmentConfig = RANDOM, **settings: Any) -> Loader:
    defaults = {"num_views": 2, "batch_size": 4, "img_size": 16, "seed": 5}
    return Loader(source, augment, **(defaults | settings))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.sample_id, b.sample_id)
        assert torch.equal(a.label, b.label)
        assert torch.equal(a.views, b.views)


@pytest.fixture(params=["folder", "memory"])
def source(request: pytest.FixtureRequest, folder: Path) -> FolderSource | TensorSource:
    return open_folder(folder) if request.param == "folder" else synthetic()


def test_batches_hold_normalised_views_with_ids_and_labels(
    source: FolderSource | TensorSource,
) -> None:
    loader = make_loader(source)
    batches = list(loader.batches(0))
    assert len(batches) == loader.updates_per_epoch == len(source) // 4
    for batch in batches:
        assert batch.views.shape == (2, 4, 3, 16, 16)
        assert batch.views.dtype == torch.float32
        assert batch.views.is_contiguous()
        assert batch.sample_id.dtype == batch.label.dtype == torch.int64
        assert torch.equal(batch.label, source.labels[batch.sample_id])
    views = torch.cat([batch.views for batch in batches], dim=1)
    # ImageNet's mean and std, pixels in [0, 1].
    assert views.abs().max() < 4
    assert 0.3 < views.std() < 2


def test_an_epoch_shows_every_image_once_and_drops_the_tail(
    source: FolderSource | TensorSource,
) -> None:
    ids = torch.cat([b.sample_id for b in make_loader(source, batch_size=5).batches(2)])
    assert len(ids) == len(source) // 5 * 5
    assert len(set(ids.tolist())) == len(ids)
    assert torch.equal(ids, permutation(len(source), seed=5, epoch=2)[: len(ids)])


def test_permutation_depends_on_seed_and_epoch() -> None:
    orders = {
        tuple(permutation(50, seed=seed, epoch=epoch).tolist())
        for seed in (0, 1, 5, 2**40)
        for epoch in range(5)
    }
    assert len(orders) == 20
    assert all(sorted(order) == list(range(50)) for order in orders)
    state = torch.get_rng_state()
    permutation(50, seed=0, epoch=0)
    assert torch.equal(state, torch.get_rng_state())


def test_views_change_with_epoch_and_seed(source: FolderSource | TensorSource) -> None:
    def by_id(loader: Loader, epoch: int) -> dict[int, Tensor]:
        return {
            int(i): batch.views[:, row]
            for batch in loader.batches(epoch)
            for row, i in enumerate(batch.sample_id)
        }

    first = by_id(make_loader(source), 0)
    for other in (by_id(make_loader(source), 1), by_id(make_loader(source, seed=6), 0)):
        assert first.keys() == other.keys()
        assert all(not torch.equal(first[i], other[i]) for i in first)
    assert all(not torch.equal(views[0], views[1]) for views in first.values())


def test_start_continues_inside_an_epoch(source: FolderSource | TensorSource) -> None:
    whole = list(make_loader(source).batches(1))
    for start in range(len(whole) + 1):
        assert_same(list(make_loader(source).batches(1, start)), whole[start:])


def test_rank_slices_form_the_global_batch(source: FolderSource | TensorSource) -> None:
    whole = list(make_loader(source).batches(3))
    ranks = [list(make_loader(source, rank=rank, world_size=2).batches(3)) for rank in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert [len(part.sample_id) for part in parts] == [2, 2]
        assert torch.equal(torch.cat([part.sample_id for part in parts]), batch.sample_id)
        assert torch.equal(torch.cat([part.label for part in parts]), batch.label)
        assert torch.equal(torch.cat([part.views for part in parts], dim=1), batch.views)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("augment", [RANDOM, PHOTOMETRIC], ids=["random", "photometric"])
def test_workers_change_nothing(folder: Path, augment: AugmentConfig) -> None:
    source = open_folder(folder)
    own = make_loader(source, augment)
    epochs = [list(own.batches(0)), list(own.batches(1))]
    for workers in (1, 3):
        loader = make_loader(source, augment, workers=workers)
        state = torch.get_rng_state()
        assert_same(list(loader.batches(0)), epochs[0])
        assert_same(list(loader.batches(1, start=1)), epochs[1][1:])
        assert torch.equal(state, torch.get_rng_state())


def test_an_abandoned_epoch_leaves_nothing_behind(folder: Path) -> None:
    source = open_folder(folder)
    expected = list(make_loader(source, batch_size=2).batches(1))
    loader = make_loader(source, batch_size=2, workers=2)
    for _ in range(2):
        next(loader.batches(0))
        assert_same(list(loader.batches(1)), expected)


def test_iterators_made_early_keep_their_epoch(folder: Path) -> None:
    loader = make_loader(open_folder(folder))
    first, second = loader.batches(0), loader.batches(1)
    assert_same(list(first), list(loader.batches(0)))
    assert_same(list(second), list(loader.batches(1)))


def test_grey_encoders_get_grey_files(folder: Path) -> None:
    config = AugmentConfig(mean=[0.5], std=[0.5])
    (batch, *_) = make_loader(open_folder(folder, in_chans=1), config).batches(0)
    assert batch.views.shape == (2, 4, 1, 16, 16)


def test_one_view_or_many(source: FolderSource | TensorSource) -> None:
    (three, *_) = make_loader(source, num_views=3).batches(0)
    (one, *_) = make_loader(source, num_views=1).batches(0)
    assert three.views.shape == (3, 4, 3, 16, 16)
    assert torch.equal(three.views[:1], one.views)


def test_images_in_memory_get_their_photometric_changes() -> None:
    source = synthetic()
    plain = make_loader(source, AugmentConfig(flip=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    grey = AugmentConfig(
        flip=0.0,
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        views=[ViewConfig(), ViewConfig(grayscale=1.0)],
        mean=[0.0] * 3,
        std=[1.0] * 3,
    )
    batches = list(make_loader(source, grey).batches(0))
    assert_same(list(make_loader(source, grey, workers=1).batches(0)), batches)
    for batch, unchanged in zip(batches, plain.batches(0), strict=True):
        assert torch.equal(batch.sample_id, unchanged.sample_id)
        pixels = source.images[batch.sample_id].float() / 255
        torch.testing.assert_close(batch.views[0], pixels)
        luma = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        torch.testing.assert_close(
            batch.views[1], luma.expand(-1, 3, -1, -1), atol=1.5 / 255, rtol=0
        )


def test_batch_size_must_fit(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^batch_size: expected at most the 12 images .* got 13"):
        make_loader(open_folder(folder), batch_size=13)
    with pytest.raises(
        ConfigError, match=r"^batch_size: expected a multiple of the 3 ranks, got 4"
    ):
        make_loader(open_folder(folder), batch_size=4, world_size=3)
    assert make_loader(open_folder(folder), batch_size=12).updates_per_epoch == 1


@pytest.fixture
def damaged(folder: Path) -> Path:
    """The folder with three broken files: one cut off, one without an image, one empty."""
    path = folder / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:-200])
    (folder / "dog" / "3.jpg").write_text("not an image")
    (folder / "dog" / "4.jpg").write_bytes(b"")
    return folder


BROKEN = ["cat/1.png", "dog/3.jpg", "dog/4.jpg"]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_named_counted_and_replaced(
    damaged: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_folder(damaged)
    loader = make_loader(source, workers=workers, max_broken=3)
    shown = []
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            for batch in loader.batches(epoch):
                assert torch.equal(batch.label, source.labels[batch.sample_id])
                shown.append(batch.sample_id)
    wanted = torch.cat([permutation(12, seed=5, epoch=epoch) for epoch in range(3)])
    # The next readable file stands in: 2 for 1, and 0 for 10 and 11, the last ones.
    expected = torch.tensor([{1: 2, 10: 0, 11: 0}.get(i, i) for i in wanted.tolist()])
    assert torch.equal(torch.cat(shown), expected)

    assert sorted(os.path.relpath(path, damaged) for path in loader.broken) == BROKEN
    for name in BROKEN:
        assert len([m for m in caplog.messages if str(damaged / name) in m]) == 1
    # One line for each kind, in the first epoch, in which all of them are met.
    damaged_one, no_images = caplog.messages
    assert re.fullmatch(
        r"skipped 1 \(damaged\): .*cat/1.png \(OSError: .*truncated.*\)", damaged_one
    )
    assert re.fullmatch(r"skipped 2 \(no image\): .*/3.jpg \(.*\), .*/4.jpg \(.*\)", no_images)


def test_a_stand_in_has_the_views_of_its_own_id(damaged: Path) -> None:
    loader = make_loader(open_folder(damaged), batch_size=12)
    (batch,) = loader.batches(0)
    for image in (2, 0):
        rows = (batch.sample_id == image).nonzero().flatten().tolist()
        assert len(rows) == (2 if image else 3)
        for row in rows[1:]:
            assert torch.equal(batch.views[:, row], batch.views[:, rows[0]])


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_files_stop_the_run(damaged: Path, workers: int) -> None:
    loader = make_loader(open_folder(damaged), workers=workers, max_broken=2)
    # All of them are met within one epoch.
    with pytest.raises(DataError, match=r"3 images cannot be read, at most 2") as error:
        list(loader.batches(0))
    for name in BROKEN:
        assert str(damaged / name) in str(error.value)
    # The traceback would keep the workers until some later garbage collection.
    del error


def test_no_broken_file_is_allowed_where_none_may_be(damaged: Path) -> None:
    with pytest.raises(DataError, match=r"1 images? cannot be read, at most 0"):
        list(make_loader(open_folder(damaged), max_broken=0).batches(0))


def test_many_odd_files_make_a_line_per_kind(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(20):
        (folder / "cat" / f"no image\n{i}.png").write_text("no image")
    source = open_folder(folder)
    loader = make_loader(source, max_broken=20)
    for epoch in range(2):
        list(loader.batches(epoch))
    (message,) = caplog.messages
    assert message.startswith("skipped 20 (no image): ")
    assert message.endswith(" and 16 more")
    assert "\n" not in message
    with pytest.raises(
        DataError, match=r"\(data.max_broken\): \d+ \(no image\): .* more$"
    ) as error:
        list(make_loader(source, max_broken=12).batches(0))
    assert "\n" not in str(error.value)


def test_only_broken_files_end_in_an_error(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_text("no image")
    source = open_folder(tmp_path)
    with pytest.raises(DataError, match="4 images cannot be read"):
        list(make_loader(source, max_broken=100).batches(0))
    with pytest.raises(DataError, match="4 images cannot be read"):
        list(eval_batches(source, RANDOM, img_size=16, batch_size=2, max_broken=100))


def test_a_vanished_file_is_a_broken_one(folder: Path) -> None:
    source = open_folder(folder)
    (folder / "dog" / "2.jpg").unlink()
    loader = make_loader(source)
    list(loader.batches(0))
    assert loader.broken == [str(folder / "dog" / "2.jpg")]


def test_pictures_above_the_limit_of_pillow_are_broken_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    source = open_folder(folder)
    with pytest.raises(DataError, match="DecompressionBombError"):
        list(make_loader(source, max_broken=0).batches(0))


def test_evaluation_shows_every_image_in_order(source: FolderSource | TensorSource) -> None:
    batches = eval_batches(source, RANDOM, img_size=16, batch_size=5)
    shown = list(batches)
    sizes = [5] * (len(source) // 5) + ([len(source) % 5] if len(source) % 5 else [])
    assert [len(images) for images, _ in shown] == sizes
    assert len(batches) == len(sizes)
    assert torch.equal(torch.cat([labels for _, labels in shown]), source.labels)
    images = torch.cat([images for images, _ in shown])
    assert images.shape == (len(source), 3, 16, 16)
    assert images.dtype == torch.float32
    assert batches.skipped == {}
    # A second pass shows the same.
    assert torch.equal(torch.cat([images for images, _ in batches]), images)


def test_evaluation_of_images_in_memory_leaves_them_as_they_are() -> None:
    source = synthetic()
    shown = list(eval_batches(source, RANDOM, img_size=16, batch_size=7, workers=2))
    images = torch.cat([images for images, _ in shown])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (RANDOM.mean, RANDOM.std))
    torch.testing.assert_close(images * std + mean, source.images.float() / 255)


def test_evaluation_resizes_and_cuts_out_the_middle(tmp_path: Path) -> None:
    # 640 x 320 becomes 256 x 128, of which the middle 112 x 112 is 280 pixels wide: x 180 to 460.
    picture = Image.new("RGB", (640, 320), (0, 255, 0))
    picture.paste((255, 0, 0), (180, 0, 320, 320))
    picture.paste((0, 0, 255), (320, 0, 460, 320))
    picture.save(tmp_path / "x.png")
    config = AugmentConfig(mean=[0.0] * 3, std=[1.0] * 3)
    ((images, labels),) = eval_batches(open_folder(tmp_path), config, img_size=112, batch_size=1)
    assert labels.tolist() == [-1]
    red, green, blue = images[0]
    assert red[:, 3:53].min() > 0.95
    assert blue[:, 59:109].min() > 0.95
    assert green[:, 3:109].max() < 0.05


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_broken_files_out(
    damaged: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_folder(damaged)
    batches = eval_batches(source, RANDOM, img_size=16, batch_size=2, workers=workers)
    shown = list(batches)
    # 10 and 11 made one batch, of which nothing is left.
    assert [len(images) for images, _ in shown] == [1, 2, 2, 2, 2]
    assert list(batches.skipped) == [1, 10, 11]
    left = [i for i in range(12) if i not in batches.skipped]
    assert torch.equal(torch.cat([labels for _, labels in shown]), source.labels[left])
    assert [message[:11] for message in caplog.messages] == ["skipped 1 (", "skipped 2 ("]
    list(batches)
    assert len(caplog.messages) == 2

    strict = eval_batches(source, RANDOM, img_size=16, batch_size=2, workers=workers, max_broken=2)
    with pytest.raises(DataError, match=re.escape(str(damaged / "dog" / "4.jpg"))):
        list(strict)


@pytest.mark.parametrize("workers", [0, 1])
def test_views_that_travel_as_bytes_are_normalised_to_the_same_bits(
    folder: Path, workers: int
) -> None:
    """Without contrast and noise, as in the recipes of the paper."""
    source, augment = open_folder(folder), AugmentConfig(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.1])
    loader = make_loader(source, augment, workers=workers)
    (item,) = itertools.islice(make_loader(source, augment)._from_workers([torch.arange(4)], 0), 1)
    assert item[0].dtype == torch.uint8
    for batch in loader.batches(3):
        assert batch.views.dtype == torch.float32
        draws = draw(5, batch.sample_id, epoch=3, num_views=2, num=num_draws(augment, 3 * 16 * 16))
        for row, index in enumerate(batch.sample_id.tolist()):
            pixels = image_views(source.decode(index), draws[:, row].tolist(), augment, 16)
            images = torch.from_numpy(pixels).movedim(-1, -3).float() / 255
            expected = finish_views(images[:, None], draws[:, row : row + 1], augment)
            assert torch.equal(batch.views[:, row], expected[:, 0])


@pytest.mark.parametrize("augment", [AugmentConfig(), RANDOM], ids=["bytes", "floats"])
def test_batches_reach_a_gpu_as_they_are_on_the_cpu(
    augment: AugmentConfig, folder: Path, cuda: torch.device
) -> None:
    on_host = list(make_loader(open_folder(folder), augment).batches(0))
    on_device = list(make_loader(open_folder(folder), augment, device=cuda).batches(0))
    assert all(batch.views.is_cuda for batch in on_device)
    moved = [Batch(b.views.cpu(), b.sample_id.cpu(), b.label.cpu()) for b in on_device]
    assert_same(moved, on_host)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_pinned_where_there_is_cuda(folder: Path) -> None:
    for batch in (
        next(make_loader(open_folder(folder)).batches(0)),
        next(make_loader(open_folder(folder), workers=1).batches(0)),
        next(make_loader(synthetic()).batches(0)),
    ):
        assert batch.views.is_pinned()
    on_device = next(make_loader(synthetic().to("cuda"), device="cuda").batches(0))
    on_host = next(make_loader(synthetic()).batches(0))
    assert on_device.views.is_cuda
    torch.testing.assert_close(on_device.views.cpu(), on_host.views, atol=1e-3, rtol=0)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def descendants(ancestor: int) -> list[int]:
    """Living processes below `ancestor`."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rsplit(") ", 1)[1].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(path.parent.name)] = int(parent)
    found = [ancestor]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


@linux
def test_stop_signals_of_others_do_not_stop_the_workers(folder: Path) -> None:
    source = open_folder(folder)
    expected = list(make_loader(source, batch_size=1).batches(0))
    loader = make_loader(source, batch_size=1, workers=2)
    before = set(descendants(os.getpid()))
    batches = loader.batches(0)
    shown = [next(batches)]
    processes = descendants(os.getpid())
    assert len(set(processes) - before) >= 2
    for signal in ("-INT", "-TERM"):
        subprocess.run(["kill", signal, *map(str, processes)], check=True)
    time.sleep(0.2)
    assert set(processes) <= set(descendants(os.getpid()))
    assert_same(shown + list(batches), expected)


PROGRAM = """
import sys, time
from maect_fast.config import AugmentConfig, DataConfig, EncoderConfig
from maect_fast.data import Loader, build_source

if __name__ == "__main__":
    source = build_source(DataConfig(root=sys.argv[1]), EncoderConfig(), split="train")
    settings = dict(num_views=2, batch_size=2, img_size=16, seed=5, workers=2)
    whole, part = (Loader(source, AugmentConfig(), **settings) for _ in range(2))
    list(whole.batches(0))
    unfinished = part.batches(0)
    next(unfinished)
    print("running", flush=True)
    if sys.argv[2] == "wait":
        time.sleep(100)
"""


def start(tmp_path: Path, folder: Path, what: str) -> "subprocess.Popen[str]":
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, str(program), str(folder), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


@linux
def test_a_program_ends_with_idle_and_with_busy_workers(tmp_path: Path, folder: Path) -> None:
    process = start(tmp_path, folder, "end")
    out, err = process.communicate(timeout=120)
    assert (out, err, process.returncode) == ("running\n", "", 0)


@linux
@pytest.mark.slow
def test_workers_end_with_a_killed_program(tmp_path: Path, folder: Path) -> None:
    process = start(tmp_path, folder, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    below = descendants(process.pid)
    assert len(below) >= 4
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]


SHARED = """
import logging, sys
from maect_fast.config import AugmentConfig, ConfigError, DataConfig, EncoderConfig
from maect_fast.data import DataError, Loader, build_source, workers

if __name__ == "__main__":
    source = build_source(DataConfig(root=sys.argv[1]), EncoderConfig(), split="train")
    settings = dict(num_views=2, batch_size=4, img_size=224, seed=5, workers=1)
    try:
        Loader(source, AugmentConfig(), **settings)
    except ConfigError as error:
        print(error)
    # As if the memory had been there when the run began.
    workers._check_shared_memory = lambda *_: None
    try:
        list(Loader(source, AugmentConfig(), **settings).batches(0))
    except DataError as error:
        print(error)
"""


@linux
def test_shared_memory_that_is_too_small_is_one_line(tmp_path: Path, folder: Path) -> None:
    """Nobody waits for batches that found no room."""
    if not shutil.which("unshare") or subprocess.call(["unshare", "-m", "true"]):
        pytest.skip("needs a mount namespace")
    program = tmp_path / "program.py"
    program.write_text(SHARED)
    root = Path(__file__).parents[2]
    words = (sys.executable, str(program), str(folder))
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" "$1" "$2"', *words],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    before, while_running = done.stdout.splitlines()
    assert "data.workers: the batches of 1 workers take 18 MiB of /dev/shm, which has" in before
    assert "a worker that reads images ended: RuntimeError: unable to alloc" in while_running
    assert "lower data.workers" in while_running
