import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from maect_fast.cli import main
from maect_fast.config import AugmentConfig, ConfigError, DataConfig, EncoderConfig
from maect_fast.data import (
    Batch,
    DataError,
    Loader,
    PackSource,
    Source,
    build_source,
    eval_batches,
    write_pack,
)

PLAIN = AugmentConfig(mean=[0.0] * 3, std=[1.0] * 3)
ROTATED = AugmentConfig(mean=[0.0] * 3, std=[1.0] * 3, rotation=0.3)


def opened(root: Path, in_chans: int = 3, img_size: int = 16) -> Source:
    encoder = EncoderConfig(in_chans=in_chans, img_size=img_size)
    return build_source(DataConfig(root=str(root), max_broken=3), encoder, split="train")


def views(source: Source, augment: AugmentConfig, img_size: int, workers: int = 0) -> list[Batch]:
    settings: dict[str, Any] = {"num_views": 2, "batch_size": 4, "seed": 5}
    loader = Loader(source, augment, img_size=img_size, workers=workers, **settings)
    return list(loader.batches(1))


def smooth(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture of which nothing is lost at a short side of 64 pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Eight pictures of several sizes and aspects, of which the last is smaller than 64 pixels."""
    sizes = [(640, 480), (480, 640), (1001, 331), (333, 747), (512, 512), (400, 300), (90, 70)]
    for i, size in enumerate([*sizes, (48, 40)]):
        path = tmp_path / "large" / "ab"[i % 2] / f"{i}.{'png' if i % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(size, i).save(path, quality=98)
    return tmp_path / "large"


def test_a_pack_has_the_names_labels_and_sizes_of_its_source(large: Path, tmp_path: Path) -> None:
    source = opened(large)
    pack = write_pack(source, tmp_path / "x.pack", short_side=64)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.pack"]
    read = opened(tmp_path / "x.pack")
    assert isinstance(read, PackSource)
    for packed in (pack, read):
        assert isinstance(packed, PackSource)
        assert packed.class_names == ["a", "b"]
        assert torch.equal(packed.labels, source.labels)
        assert [packed.name(i) for i in range(8)] == [source.name(i) for i in range(8)]
        assert packed.original_size.tolist() == [list(source.decode(i).size) for i in range(8)]
    assert sorted(min(read.decode(i).size) for i in range(8)) == [40, *[64] * 7]
    assert read.identity(None) == pack.identity("elsewhere")
    # Other programs read it as what it is.
    with safe_open(tmp_path / "x.pack", "pt") as file:
        assert file.metadata() == {"format": "maect-fast pack 1", "short_side": "64"}
        assert file.get_tensor("size").tolist() == read.size.tolist()


def test_what_is_stored_is_what_evaluation_would_resize(large: Path, tmp_path: Path) -> None:
    """At 56 pixels the images are evaluated at a short side of 64: nothing is resampled again."""
    source, pack = opened(large), write_pack(opened(large), tmp_path / "x.pack", short_side=64)
    batches = [eval_batches(s, PLAIN, img_size=56, batch_size=8) for s in (source, pack)]
    shown = [next(iter(each))[0] for each in batches]
    is_png = [source.name(i).endswith(".png") for i in range(8)]
    assert sum(is_png) == 5
    assert torch.equal(shown[0][is_png], shown[1][is_png])
    # libjpeg's own scaling comes first, by different factors.
    assert (shown[0] - shown[1]).abs().max() < 8 / 255


@pytest.mark.parametrize("augment", [PLAIN, ROTATED], ids=["plain", "rotated"])
def test_views_are_those_of_the_originals_up_to_resampling(
    large: Path, tmp_path: Path, augment: AugmentConfig
) -> None:
    """Where no detail is lost, by 4/255 at most and 0.5/255 in the mean; as the CHANGELOG says."""
    source = opened(large)
    pack = write_pack(source, tmp_path / "x.pack", short_side=64)
    for a, b in zip(views(source, augment, 32), views(pack, augment, 32), strict=True):
        assert torch.equal(a.sample_id, b.sample_id)
        assert torch.equal(a.label, b.label)
        error = (a.views - b.views).abs() * 255
        if augment.rotation:
            # The rim of a rotated picture is a step to black, sharper the larger it was.
            assert error.mean() <= 1
        else:
            assert error.mean() <= 0.5
            assert error.max() <= 4


def test_workers_change_nothing(large: Path, tmp_path: Path) -> None:
    pack = write_pack(opened(large), tmp_path / "x.pack", short_side=64)
    write_pack(opened(large), tmp_path / "y.pack", short_side=64, workers=1)
    assert (tmp_path / "x.pack").read_bytes() == (tmp_path / "y.pack").read_bytes()
    for a, b in zip(views(pack, PLAIN, 32), views(pack, PLAIN, 32, workers=1), strict=True):
        assert torch.equal(a.views, b.views)


def test_grey_images_take_a_byte_per_pixel(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*/*"):
        with Image.open(path) as image:
            image.convert("L").convert("RGB").save(path.with_suffix(".png"))
    for path in folder.glob("*/*.jpg"):
        path.unlink()
    pack = write_pack(opened(folder), tmp_path / "x.pack")
    assert (pack.end.diff() == pack.size[1:].prod(dim=1)).all()
    for in_chans in (1, 3):
        source, read = opened(folder, in_chans), opened(tmp_path / "x.pack", in_chans)
        for i in range(len(source)):
            assert source.decode(i).mode == read.decode(i).mode
            assert source.decode(i).tobytes() == read.decode(i).tobytes()


def test_damaged_images_are_told_and_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cat/1.png", "dog/4.jpg"):
        (folder / name).write_text("no image")
    pack = write_pack(opened(folder), tmp_path / "x.pack")
    assert len(pack) == 10
    assert pack.labels.tolist() == [0] * 6 + [1] * 4
    assert pack.name(1) == str(folder / "cat" / "2.png")
    (message,) = caplog.messages
    assert message.startswith("skipped 2 (no image): ")
    with pytest.raises(DataError, match=r"2 images cannot be read, at most 1"):
        write_pack(opened(folder), tmp_path / "y.pack", max_broken=1)
    assert not list(tmp_path.glob("*y.pack*"))


def test_an_interrupted_pack_leaves_the_one_before(large: Path, tmp_path: Path) -> None:
    write_pack(opened(large / "a"), tmp_path / "x.pack", short_side=64)
    before = (tmp_path / "x.pack").read_bytes()

    def interrupted(items: Iterable[Any], total: int) -> Iterable[Any]:
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pack(opened(large), tmp_path / "x.pack", short_side=64, progress=interrupted)
    assert (tmp_path / "x.pack").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.pack"]


def test_larger_inputs_than_a_pack_has_are_refused(large: Path, tmp_path: Path) -> None:
    write_pack(opened(large), tmp_path / "x.pack", short_side=64)
    assert len(opened(tmp_path / "x.pack", img_size=64)) == 8
    with pytest.raises(
        ConfigError, match=r"short side of 64, and encoder\.img_size is 65"
    ) as error:
        opened(tmp_path / "x.pack", img_size=65)
    assert "\n" not in str(error.value)
    # None of these was made smaller.
    for path in [*large.glob("*/[0-6].*")]:
        path.unlink()
    write_pack(opened(large), tmp_path / "y.pack", short_side=64)
    assert len(opened(tmp_path / "y.pack", img_size=224)) == 1


def cut(content: bytes) -> bytes:
    return content[:-100]


def other_format(content: bytes) -> bytes:
    return content.replace(b"maect-fast pack 1", b"maect-fast pack 9")


@pytest.mark.parametrize("change", [cut, other_format, lambda _: b"no pack", lambda _: b""])
def test_what_is_no_pack_is_one_line(
    folder: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "x.pack"
    write_pack(opened(folder), path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"data\.root: .*x\.pack is no pack that") as error:
        opened(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"x\.pack is no pack .*No such file"):
        opened(tmp_path / "gone" / "x.pack")


def test_the_command_packs_and_a_run_trains_on_it(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (large / "notes.txt").write_text("no image")
    out = tmp_path / "x.pack"
    words = ["pack", str(large), "--out", str(out), "--short-side", "64", "--workers", "0"]
    assert main(words) == 0
    told = capsys.readouterr()
    assert f"{large}: 8 images of 2 classes; ignored: 1 .txt" in told.err
    assert told.out.startswith(f"{out}: 8 images of 2 classes, 0.")
    for more, message in (
        (["epochs=3"], "epochs=3: expected data.KEY=VALUE"),
        (["--short-side", "4"], "--short-side: expected at least 8, got 4"),
        (["--out", str(tmp_path / "x.bin")], "--out: expected a file that ends in .pack"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err

    recipe = ["--recipe", "digits", "data.source=folder", f"data.root={out}", "batch_size=4"]
    small = ["data.workers=0", "epochs=1", "encoder.img_size=16", "encoder.depth=1"]
    run = tmp_path / "run"
    assert main(["pretrain", "--out", str(run), *recipe, *small]) == 0
    assert "8 images of 2 classes" in capsys.readouterr().err
    extract = ["extract", str(run), "--out", str(tmp_path / "f.csv"), "encoder.img_size=16"]
    assert main(extract) == 0
    rows = (tmp_path / "f.csv").read_text().splitlines()
    assert rows[1].split(",")[0].strip('"') == str(large / "a" / "0.jpg")
    assert len(rows) == 9
    assert json.dumps(rows[1].split(",")[3]) == json.dumps('"a"')
