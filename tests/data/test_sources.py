import dataclasses
import io
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits

from maect_fast.config import ConfigError, DataConfig, EncoderConfig
from maect_fast.data import FolderSource, TensorSource, build_source
from maect_fast.data.sources import UnfitImageError

WriteImage = Callable[..., Path]

DIGITS = EncoderConfig(img_size=8, in_chans=1)
RGB = EncoderConfig(img_size=32)


def names(source: FolderSource, root: Path) -> list[str]:
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


def open_folder(root: Path, in_chans: int = 3) -> FolderSource:
    source = build_source(
        DataConfig(root=str(root)), EncoderConfig(in_chans=in_chans), split="train"
    )
    assert isinstance(source, FolderSource)
    return source


def test_digits_are_all_there_once() -> None:
    train = build_source(DataConfig(source="digits"), DIGITS, split="train")
    test = build_source(DataConfig(source="digits"), DIGITS, split="test")
    assert isinstance(train, TensorSource)
    assert isinstance(test, TensorSource)
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == [str(digit) for digit in range(10)]
    assert train.num_classes == 10
    assert train.images.dtype == torch.uint8

    both = torch.cat((train.images, test.images)).view(-1, 64).double() * (16 / 255)
    ours = torch.cat((both.round(), torch.cat((train.labels, test.labels))[:, None]), dim=1)
    pixels, labels = load_digits(return_X_y=True)
    theirs = torch.from_numpy(np.concatenate((pixels, labels[:, None]), axis=1))
    assert sorted(ours.tolist()) == sorted(theirs.tolist())
    assert (both - both.round()).abs().max() < 0.04


def test_digits_split_is_fixed() -> None:
    first = build_source(DataConfig(source="digits"), DIGITS, split="test")
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    again = build_source(DataConfig(source="digits"), DIGITS, split="test")
    assert isinstance(first, TensorSource)
    assert isinstance(again, TensorSource)
    assert torch.equal(first.images, again.images)
    # Reported figures rest on this split.
    assert first.labels[:12].tolist() == [2, 4, 2, 4, 6, 0, 7, 3, 1, 3, 3, 4]
    assert first.images.long().sum().item() == 1_803_927


def test_digits_need_an_encoder_of_their_size() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.img_size, encoder\.in_chans: expected 8, 1"):
        build_source(DataConfig(source="digits"), RGB, split="train")


def test_synthetic_images_are_repeatable_and_balanced() -> None:
    data = DataConfig(source="synthetic", num_images=200)
    train = build_source(data, RGB, split="train")
    again = build_source(data, RGB, split="train")
    test = build_source(data, RGB, split="test")
    assert isinstance(train, TensorSource)
    assert isinstance(again, TensorSource)
    assert isinstance(test, TensorSource)
    assert train.images.shape == (200, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert test.images.shape == (50, 3, 32, 32)
    assert torch.equal(train.images, again.images)
    assert not torch.equal(train.images[:50], test.images)
    assert train.labels.bincount().tolist() == [20] * 10
    # Neither grey nor clipped to black and white.
    assert 40 < train.images.float().std() < 70


def test_synthetic_classes_can_be_told_apart_but_not_by_their_pixels() -> None:
    data = DataConfig(source="synthetic", num_images=400)
    train = build_source(data, RGB, split="train")
    test = build_source(data, RGB, split="test")
    assert isinstance(train, TensorSource)
    assert isinstance(test, TensorSource)

    def accuracy(features: Callable[[torch.Tensor], torch.Tensor]) -> float:
        gallery, queries = features(train.images.float()), features(test.images.float())
        nearest = torch.cdist(queries.flatten(1), gallery.flatten(1)).argmin(dim=1)
        return (train.labels[nearest] == test.labels).double().mean().item()

    # The spectrum's magnitude does not see the phases, which are the image's own.
    spectrum = accuracy(lambda x: torch.fft.rfft2(x - x.mean(dim=(2, 3), keepdim=True)).abs())
    pixels = accuracy(lambda x: x)
    assert spectrum > 0.85
    assert pixels < 0.7


def test_synthetic_images_of_one_channel() -> None:
    encoder = EncoderConfig(img_size=16, in_chans=1)
    source = build_source(DataConfig(source="synthetic", num_images=3), encoder, split="test")
    assert isinstance(source, TensorSource)
    assert source.images.shape == (1, 1, 16, 16)
    assert source.decode(0).mode == "L"


def test_synthetic_needs_an_image() -> None:
    with pytest.raises(ConfigError, match=r"data\.num_images: expected at least 1, got 0"):
        build_source(DataConfig(source="synthetic", num_images=0), RGB, split="train")


def test_tensor_source_decodes_its_own_pixels() -> None:
    source = build_source(DataConfig(source="synthetic", num_images=2), RGB, split="train")
    assert isinstance(source, TensorSource)
    image = source.decode(1)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), source.images[1].permute(1, 2, 0).numpy())


def test_folder_is_sorted_and_nested_folders_belong_to_their_class(
    write_image: WriteImage, tmp_path: Path
) -> None:
    for name in ("b/2.png", "a/deep/er/1.JPG", "b/1.jpeg", "a/9.webp"):
        write_image(name)
    for name in ("a/.hidden.png", ".trash/1.png", "a/._9.png"):
        write_image(name)
    for name in ("a/notes.txt", "a/more.TXT", "layers.psd", "LICENSE"):
        (tmp_path / "images" / name).write_text("no image")
    (tmp_path / "images" / "empty").mkdir()
    source = open_folder(tmp_path / "images")
    assert names(source, tmp_path / "images") == [
        "a/9.webp",
        "a/deep/er/1.JPG",
        "b/1.jpeg",
        "b/2.png",
    ]
    assert source.class_names == ["a", "b"]
    assert source.num_classes == 2
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.about() == "4 images of 2 classes; ignored: 2 .txt, 1 without suffix, 1 .psd"


@pytest.mark.parametrize(
    "files", [["1.png", "2.png"], ["1.png", "a/2.png", "b/3.png"], ["all/1.png", "all/2.png"]]
)
def test_folder_without_classes_has_no_labels(
    write_image: WriteImage, tmp_path: Path, files: list[str]
) -> None:
    for name in files:
        write_image(name)
    source = open_folder(tmp_path / "images")
    assert source.labels.tolist() == [-1] * len(files)
    assert source.class_names == []
    assert source.num_classes == 0


def test_folder_follows_links(write_image: WriteImage, tmp_path: Path) -> None:
    write_image("a/1.png")
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "images" / "a").rename(elsewhere)
    (tmp_path / "images" / "linked").symlink_to(elsewhere)
    assert names(open_folder(tmp_path / "images"), tmp_path / "images") == ["linked/1.png"]


def test_each_real_folder_is_listed_once(
    write_image: WriteImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Round links and second ways to a folder give no image a second id."""
    for name in ("b/1.png", "c/deep/2.png", "other/3.png"):
        write_image(name)
    root = tmp_path / "images"
    (root / "other").rename(tmp_path / "other")
    write_image("../beside.png")
    (root / "c" / "deep" / "up").symlink_to(root / "c")
    (root / "around").symlink_to(tmp_path)
    (root / "again").symlink_to(root / "b")
    (root / "self").symlink_to(root / "self")
    (root / "x").symlink_to(tmp_path / "other")
    (root / "a").symlink_to(tmp_path / "other")
    source = open_folder(root)
    assert names(source, root) == ["a/3.png", "b/1.png", "c/deep/2.png"]
    assert source.class_names == ["a", "b", "c"]
    (message,) = caplog.messages
    assert message.startswith("data.root: left out 4 (links to a folder that is listed already")
    assert message.endswith(": again, around, c/deep/up, x")


def test_what_is_no_regular_file_is_left_out(
    write_image: WriteImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = write_image("1.png")
    root = tmp_path / "images"
    os.mkfifo(root / "pipe.png")
    (root / "null.png").symlink_to("/dev/null")
    (root / "nowhere.png").symlink_to(root / "gone")
    (root / "round.png").symlink_to(root / "round.png")
    (root / "linked.png").symlink_to(image)
    (root / "pipe.txt").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # a socket's path has at most 108 bytes
        server.bind("socket.png")
        assert names(open_folder(root), root) == ["1.png", "linked.png"]
    (message,) = caplog.messages
    assert message.startswith("data.root: left out 5 (pipes, sockets, devices")
    assert message.endswith("): nowhere.png, null.png, pipe.png, round.png and 1 more")


def test_a_file_that_became_a_pipe_is_an_error(write_image: WriteImage, tmp_path: Path) -> None:
    path = write_image("1.png")
    source = open_folder(tmp_path / "images")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        source.decode(0)


def test_a_folder_that_no_configuration_can_name(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"\xff")
    root.mkdir()
    with pytest.raises(ConfigError, match=r"data\.root: expected a path in UTF-8"):
        open_folder(root)


def test_file_names_may_be_any_bytes(write_image: WriteImage, tmp_path: Path) -> None:
    path = write_image("größe 1.png")
    odd = os.fsencode(tmp_path / "images") + b"/\xff\xfe.png"
    os.link(path, odd)
    source = open_folder(tmp_path / "images")
    assert {os.fsencode(source.name(i)) for i in range(2)} == {os.fsencode(path), odd}
    assert [source.decode(i).size for i in range(2)] == [(40, 30), (40, 30)]


def test_test_classes_are_numbered_by_the_training_folder(
    write_image: WriteImage, tmp_path: Path
) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "test/c/1.png", "test/b/1.png"):
        write_image(name)
    data = DataConfig(
        root=str(tmp_path / "images" / "train"), test_root=str(tmp_path / "images" / "test")
    )
    test = build_source(data, RGB, split="test")
    assert test.labels.tolist() == [1, 2]
    assert test.class_names == ["a", "b", "c"]

    # A single class is a class here, as the training folder shows.
    (tmp_path / "images" / "test" / "c" / "1.png").unlink()
    assert build_source(data, RGB, split="test").labels.tolist() == [1]

    write_image("test/d/1.png")
    with pytest.raises(ConfigError, match=r"data\.test_root: expected the class folders .* 'd'"):
        build_source(data, RGB, split="test")


def test_test_folder_alone_has_its_own_classes(write_image: WriteImage, tmp_path: Path) -> None:
    for name in ("test/b/1.png", "test/c/1.png"):
        write_image(name)
    data = DataConfig(test_root=str(tmp_path / "images" / "test"))
    assert build_source(data, RGB, split="test").labels.tolist() == [0, 1]


def test_flat_test_folder_beside_classes_has_no_labels(
    write_image: WriteImage, tmp_path: Path
) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "test/1.png"):
        write_image(name)
    data = DataConfig(
        root=str(tmp_path / "images" / "train"), test_root=str(tmp_path / "images" / "test")
    )
    test = build_source(data, RGB, split="test")
    assert test.labels.tolist() == [-1]
    assert test.class_names == []


@pytest.mark.parametrize("key", ["root", "test_root"])
def test_missing_folders_are_named_in_one_line(tmp_path: Path, key: str) -> None:
    (tmp_path / "empty").mkdir()
    split = "train" if key == "root" else "test"
    for value, message in (
        (None, "expected a folder of images, got none"),
        (str(tmp_path / "no"), "there is no folder"),
        (str(tmp_path / "empty"), "no image in"),
    ):
        data = DataConfig(**{key: value})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message) as error:
            build_source(data, RGB, split=split)  # type: ignore[arg-type]
        assert str(error.value).startswith(f"data.{key}: ")
        assert "\n" not in str(error.value)


def test_unreadable_folder_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def locked(path: str) -> object:
        if path.endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(ConfigError, match=r"data\.root: cannot read the folder .*dog.*denied"):
        open_folder(folder)


def test_channels_are_one_or_three(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.in_chans: expected 3 or 1, got 4"):
        open_folder(folder, in_chans=4)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("L", "x.png"),
        ("L", "x.jpg"),
        ("1", "x.png"),
        ("LA", "x.png"),
        ("RGBA", "x.png"),
        ("RGBA", "x.webp"),
        ("P", "x.png"),
        ("P", "x.gif"),
        ("CMYK", "x.jpg"),
        ("CMYK", "x.tif"),
        ("YCbCr", "x.jpg"),
        ("RGB", "x.avif"),
        ("RGBA", "x.jp2"),
        ("L", "x.sgi"),
    ],
)
def test_every_mode_is_decoded_like_pillow_converts(
    write_image: WriteImage, tmp_path: Path, mode: str, name: str, in_chans: int
) -> None:
    path = write_image(name, mode=mode)
    with Image.open(path) as stored:
        expected = stored.convert("RGB" if in_chans == 3 else "L")
    image = open_folder(tmp_path / "images", in_chans).decode(0)
    assert image.mode == expected.mode
    assert image.size == (40, 30)
    assert image.tobytes() == expected.tobytes()


def test_palette_with_transparency_warns_nobody(write_image: WriteImage, tmp_path: Path) -> None:
    path = write_image("x.png", mode="P")
    with Image.open(path) as stored:
        stored.load()
        stored.save(path, transparency=bytes([0, 128, 255]))
    with pytest.warns(UserWarning, match="Transparency"), Image.open(path) as stored:
        stored.convert("RGB")
    assert open_folder(tmp_path / "images").decode(0).mode == "RGB"


def open_written(tmp_path: Path, name: str, content: bytes) -> FolderSource:
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images" / name).write_bytes(content)
    return open_folder(tmp_path / "images", in_chans=1)


def written(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("is_text", [False, True])
@pytest.mark.parametrize("maxval", [1, 100, 255, 256, 1023, 4095, 65535])
def test_grey_of_any_depth_is_scaled_by_its_range(
    tmp_path: Path, maxval: int, is_text: bool
) -> None:
    values = np.unique(np.linspace(0, maxval, 9).astype(np.int64))
    if is_text:
        content = " ".join(map(str, values)).encode()
    else:
        content = values.astype(">u2" if maxval > 255 else "u1").tobytes()
    header = f"P{2 if is_text else 5}\n{len(values)} 1\n{maxval}\n".encode()
    pixels = np.asarray(open_written(tmp_path, "x.pgm", header + content).decode(0))
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert np.abs(pixels[0] - values * (255 / maxval)).max() <= 1


@pytest.mark.parametrize("maxval", [100, 255, 1023, 65535])
def test_colours_of_any_depth_are_scaled_by_their_range(tmp_path: Path, maxval: int) -> None:
    values = np.array([[0, maxval // 2, maxval], [maxval, 0, maxval // 3]])
    content = values.astype(">u2" if maxval > 255 else "u1").tobytes()
    (tmp_path / "x.ppm").write_bytes(f"P6\n1 2\n{maxval}\n".encode() + content)
    image = open_folder(tmp_path).decode(0)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[:, 0] - values * (255 / maxval)).max() <= 1


def test_a_deep_pgm_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    source = open_written(tmp_path, "x.pgm", b"P5\n4 4\n1023\n" + bytes(31))
    with pytest.raises(ValueError, match="ends within the image"):
        source.decode(0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, kind: str) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    content = written(Image.fromarray(ramp), kind)
    image = open_written(tmp_path, "x.png", content).decode(0)
    assert np.array_equal(np.asarray(image), (ramp // 256).astype(np.uint8))


def test_a_tiff_says_how_many_bits_it_uses_and_which_end_is_white(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    negative = written(Image.fromarray(ramp), "TIFF", tiffinfo={262: 0})
    image = open_written(tmp_path, "x.tif", negative).decode(0)
    assert np.array_equal(np.asarray(image), 255 - ramp // 256)
    # Two values of 12 bits, 0 and 4095, are three bytes: 00 0f ff.
    fields = ((256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 110), (278, 1), (279, 3))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    twelve = b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + b"\0\0\0\0\x00\x0f\xff"
    image = open_written(tmp_path, "x.tif", twelve).decode(0)
    assert np.asarray(image).tolist() == [[0, 255]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_without_a_range_counts_as_unreadable(tmp_path: Path, dtype: Any) -> None:
    content = written(Image.fromarray(np.ones((8, 8), dtype)), "TIFF")
    with pytest.raises(UnfitImageError, match="no format says what is white"):
        open_written(tmp_path, "x.tif", content).decode(0)


def test_formats_beyond_the_listed_are_not_opened(tmp_path: Path) -> None:
    """Pillow would start Ghostscript for this one."""
    content = written(Image.new("RGB", (8, 8)), "EPS")
    Image.open(io.BytesIO(content))
    with pytest.raises(UnidentifiedImageError):
        open_written(tmp_path, "x.png", content).decode(0)


def test_larger_images_than_allowed_are_refused_by_their_header(
    write_image: WriteImage, tmp_path: Path
) -> None:
    path = write_image("x.png")
    data = DataConfig(root=str(tmp_path / "images"), max_pixels=1200)
    assert build_source(data, RGB, split="train").decode(0).size == (40, 30)
    data.max_pixels = 1199
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UnfitImageError, match=r"40 x 30 pixels, more than data.max_pixels = 1199"):
        build_source(data, RGB, split="train").decode(0)


@pytest.mark.parametrize("is_progressive", [False, True])
def test_jpegs_are_decoded_at_a_reduced_scale(tmp_path: Path, is_progressive: bool) -> None:
    y, x = np.mgrid[:1001, :1203]
    picture = np.stack([127 + 120 * np.sin(x / 60), 127 + 120 * np.cos(y / 50), (x + y) / 9], -1)
    image = Image.fromarray(picture.astype(np.uint8))
    (tmp_path / "x.jpg").write_bytes(written(image, "JPEG", progressive=is_progressive))
    source = open_folder(tmp_path)
    whole = source.decode(0)
    assert whole.size == (1203, 1001)
    for factor in (2, 4, 8):
        small = source.decode(0, lambda width, height, factor=factor: factor)  # type: ignore[misc]
        assert small.size == (-(-1203 // factor), -(-1001 // factor))
        expected = whole.reduce(factor)
        error = np.abs(np.asarray(small, dtype=int) - np.asarray(expected, dtype=int))
        assert error[1:-1, 1:-1].max() <= 6
    # What remains counts, except where all coefficients are held.
    reduced = dataclasses.replace(source, max_pixels=1203 * 1001 // 4)
    if is_progressive:
        with pytest.raises(UnfitImageError, match="1203 x 1001 pixels"):
            reduced.decode(0, lambda width, height: 4)
    else:
        assert reduced.decode(0, lambda width, height: 4).size == (301, 251)


def test_large_pictures_and_odd_metadata_warn_nobody(
    write_image: WriteImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_image("x.jpg")
    with Image.open(path) as stored:
        stored.load()
        stored.save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    # 40 x 30 pixels are above the limit of 1,000 that warns and below the 2,000 that refuses.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns() as record, Image.open(path):
        pass
    assert {warning.category for warning in record} == {
        UserWarning,
        Image.DecompressionBombWarning,
    }
    assert open_folder(tmp_path / "images").decode(0).size == (40, 30)
