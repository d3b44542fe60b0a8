"""Images inside of larger files give what the same images in a folder give."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from maect_fast.config import AugmentConfig, ConfigError, DataConfig, EncoderConfig
from maect_fast.data import Batch, Loader, Source, build_source, from_dataset


def opened(root: Path | str, split: Any = "train", **settings: Any) -> Source:
    key = "root" if split == "train" else "test_root"
    paths: dict[str, Any] = {key: str(root)}
    data = DataConfig(**paths, **settings)
    return build_source(data, EncoderConfig(), split=split)


def batches(source: Source, workers: int = 0) -> list[Batch]:
    settings: dict[str, Any] = {"num_views": 2, "batch_size": 4, "img_size": 16, "seed": 5}
    return list(Loader(source, AugmentConfig(), workers=workers, **settings).batches(1))


def assert_same(ours: Source, theirs: Source, workers: int = 0) -> None:
    for a, b in zip(batches(ours), batches(theirs, workers), strict=True):
        assert torch.equal(a.views, b.views)
        assert torch.equal(a.sample_id, b.sample_id)
        assert torch.equal(a.label, b.label)


def samples(folder: Path) -> Iterator[tuple[str, bytes, str, int]]:
    """Suffix, content, class and label of the folder's images, in its order."""
    for path in sorted(folder.glob("*/*")):
        name = path.parent.name
        yield path.suffix[1:], path.read_bytes(), name, ["cat", "dog"].index(name)


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    """The folder's images as webdataset's users write them."""
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "shards").mkdir()
    pattern = str(tmp_path / "shards" / "s-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=5, verbose=0) as writer:
        for i, (suffix, content, _, label) in enumerate(samples(folder)):
            writer.write({"__key__": f"{i:04d}", suffix: content, "cls": label, "txt": "a pet"})
    return tmp_path / "shards"


def test_shards_give_what_the_folder_gives(folder: Path, shards: Path) -> None:
    ours, theirs = opened(folder), opened(shards / "s-{000000..000002}.tar")
    assert_same(ours, theirs)
    assert theirs.labels.tolist() == ours.labels.tolist()
    assert theirs.class_names == ["0", "1"]
    assert theirs.name(7) == str(shards / "s-000001.tar/0007.jpg")
    assert theirs.about() == "12 images of 2 classes; ignored: 12 .txt"
    identity = theirs.identity(None)
    assert opened(shards).identity(None) == identity
    assert opened(shards / "s-000000.tar").identity(None)["digest"] != identity["digest"]
    moved = shards.rename(shards.with_name("moved"))
    assert opened(moved).identity(None) == identity


def test_labels_of_shards_are_numbers_names_or_in_json(folder: Path, tmp_path: Path) -> None:
    images = list(samples(folder))[5:9]
    names = {f"a/{i}.{suffix}": content for i, (suffix, content, _, _) in enumerate(images)} | {
        f"a/{i}.cls": name.encode() for i, (_, _, name, _) in enumerate(images)
    }
    source = opened(write_tar(tmp_path / "t" / "names.tar", names | {"a/4.png": images[0][1]}))
    assert source.labels.tolist() == [0, 0, 1, 1, -1]
    assert source.class_names == ["cat", "dog"]
    fields = {f"{i}.json": json.dumps({"label": 3 - i, "kind": 7 * i}).encode() for i in range(2)}
    content = {"0.PNG": images[0][1], **fields, "1.seg.png": images[1][1], "1.jpg": b""}
    path = write_tar(tmp_path / "t" / "json.tar", content)
    assert opened(path).labels.tolist() == [3, 2]
    assert opened(path).about() == "2 images of 4 classes; ignored: 1 .jpg"
    assert opened(path, label_column="kind").labels.tolist() == [0, 7]
    # A test set is numbered by the training set's names, of whatever kind both are.
    data = DataConfig(root=str(folder), test_root=str(tmp_path / "t" / "names.tar"))
    test = build_source(data, EncoderConfig(), split="test")
    assert (test.labels.tolist(), test.class_names) == ([0, 0, 1, 1, -1], ["cat", "dog"])
    data.test_root = str(path)
    with pytest.raises(ConfigError, match=r"data\.test_root: expected the classes of .* got '2'"):
        build_source(data, EncoderConfig(), split="test")


def test_shards_that_cannot_be_read_are_one_line(shards: Path, tmp_path: Path) -> None:
    first = shards / "s-000000.tar"
    for root, message in (
        (shards / "s-{000000..000009}.tar", r"7 of 10 shards are missing, the first is .*003\.tar"),
        (shards / "s-{9..0}.tar", r"\{9\.\.0\} holds no number"),
        (write_tar(tmp_path / "t" / "none.tar", {"a.txt": b"x"}), "no image in .* in 1 tar files"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            opened(root)
        assert "\n" not in str(error.value)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(first, "x.png")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(first.read_bytes()[:2000])
    for path in (tmp_path / "packed.tar", cut):
        with pytest.raises(ConfigError, match="is no whole, uncompressed tar file") as error:
            opened(path)
        assert "\n" not in str(error.value)


def write_parquet(path: Path, folder: Path, names: list[str] | None) -> Path:
    """As on the hub, two row groups of six images."""
    rows = list(samples(folder))
    columns = {
        "image": [{"bytes": content, "path": f"x.{suffix}"} for suffix, content, _, _ in rows],
        "label": [label for _, _, _, label in rows],
    }
    table = pa.table(columns)
    if names:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        noted = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(noted)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=6)
    return path


def test_parquet_files_give_what_the_folder_gives(folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    path = write_parquet(hub / "data" / "train-00000-of-00001.parquet", folder, ["cat", "dog"])
    write_parquet(hub / "data" / "validation-00000-of-00001.parquet", folder, ["dog", "cat"])
    source = opened(hub)
    assert_same(opened(folder), source, workers=1)
    assert source.class_names == ["cat", "dog"]
    assert source.name(7) == f"{path}#7"
    assert source.identity(None) == opened(path).identity(None)
    # The test set states other names for its numbers.
    data = DataConfig(root=str(hub), test_root=str(hub))
    test = build_source(data, EncoderConfig(), split="test")
    assert test.labels.tolist() == (1 - source.labels).tolist()
    assert test.class_names == ["cat", "dog"]
    assert opened(write_parquet(tmp_path / "x.parquet", folder, None)).class_names == ["0", "1"]


def test_columns_of_parquet_files_may_be_named(folder: Path, tmp_path: Path) -> None:
    contents = [content for _, content, _, _ in samples(folder)]
    (folder / "odd.bin").write_bytes(contents[0])
    cells = [{"bytes": None, "path": "images/odd.bin"}, {"bytes": contents[1], "path": None}]
    table = pa.table({"a": contents[:2], "b": contents[2:4], "c": cells, "kind": ["x", "y"]})
    path = tmp_path / "x.parquet"
    parquet.write_table(table, path)
    source = opened(path)
    assert source.decode(0).tobytes() == opened(folder).decode(0).tobytes()
    assert source.labels.tolist() == [-1, -1]
    source = opened(path, image_column="b", label_column="kind")
    assert source.decode(0).tobytes() == opened(folder).decode(2).tobytes()
    assert (source.labels.tolist(), source.class_names) == ([0, 1], ["x", "y"])
    with pytest.raises(ConfigError, match=r"data\.image_column: there is no column 'd' in .* a, b"):
        opened(path, image_column="d")
    parquet.write_table(table.drop(["c"]), path)
    with pytest.raises(ConfigError, match=r"expected one column of images, got a, b of the .* say"):
        opened(path)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"data\.root: .*x\.parquet: ") as error:
        opened(path)
    assert "\n" not in str(error.value)


def test_large_row_groups_are_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_parquet(tmp_path / "x.parquet", folder, None)
    opened(path)
    assert not caplog.messages
    monkeypatch.setattr("maect_fast.data.tables.LARGE_GROUP", 100)
    opened(path)
    (message,) = caplog.messages
    assert "a row group is read, here of 6 rows" in message
    assert "maect-fast pack" in message


def test_hugging_face_datasets_on_disk_and_in_python(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    columns = {
        "image": [{"bytes": content, "path": None} for _, content, _, _ in samples(folder)],
        "label": [label for *_, label in samples(folder)],
    }
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    made.save_to_disk(tmp_path / "disk", num_shards=2)
    source = opened(tmp_path / "disk")
    assert_same(opened(folder), source)
    assert source.class_names == ["cat", "dog"]
    datasets.DatasetDict(train=made, validation=made.select(range(3))).save_to_disk(
        tmp_path / "parts"
    )
    assert opened(tmp_path / "parts").labels.tolist() == source.labels.tolist()
    assert len(opened(tmp_path / "parts", "test")) == 3
    datasets.DatasetDict(odd=made).save_to_disk(tmp_path / "odd")
    with pytest.raises(ConfigError, match=r"expected a split train in .*odd.*, which has odd"):
        opened(tmp_path / "odd")

    given = from_dataset(made, DataConfig(), EncoderConfig())
    assert_same(opened(folder), given)
    assert given.class_names == ["cat", "dog"]
    with pytest.raises(ConfigError, match="expected one column of the type Image, got none of"):
        from_dataset(made.select_columns(["label"]), DataConfig(), EncoderConfig())
