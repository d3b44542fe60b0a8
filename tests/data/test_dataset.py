import pickle
import sys
import threading
import types
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from maect_fast.config import AugmentConfig, ConfigError, DataConfig, EncoderConfig
from maect_fast.data import (
    Batch,
    DatasetSource,
    Loader,
    Source,
    build_source,
    eval_batches,
    from_dataset,
)

AUGMENT = AugmentConfig()


class Items(Dataset[Any]):
    """Counts what is read of a list."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.num_read = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.num_read += 1
        return self.items[index]


def opened(dataset: Any, in_chans: int = 3, **settings: Any) -> DatasetSource:
    return from_dataset(dataset, DataConfig(**settings), EncoderConfig(in_chans=in_chans))


def batches(source: Source, epoch: int, workers: int = 0) -> list[Batch]:
    loader = Loader(
        source, AUGMENT, num_views=2, batch_size=4, img_size=16, seed=5, workers=workers
    )
    return list(loader.batches(epoch))


def pixels(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("workers", [0, 1])
def test_views_labels_and_ids_are_those_of_the_same_folder(folder: Path, workers: int) -> None:
    ours = build_source(DataConfig(root=str(folder)), EncoderConfig(), split="train")
    theirs = opened(ImageFolder(str(folder)))
    assert theirs.class_names == ours.class_names == ["cat", "dog"]
    assert torch.equal(theirs.labels, ours.labels)
    for a, b in zip(batches(ours, 3), batches(theirs, 3, workers), strict=True):
        assert torch.equal(a.views, b.views)
        assert torch.equal(a.sample_id, b.sample_id)
        assert torch.equal(a.label, b.label)
    if not workers:
        shown = [list(eval_batches(s, AUGMENT, img_size=16, batch_size=5)) for s in (ours, theirs)]
        for (images, labels), (others, other_labels) in zip(*shown, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)


def test_stated_labels_are_read_without_the_images() -> None:
    dataset: Any = Items([(Image.new("RGB", (8, 8)), i % 3) for i in range(1000)])
    dataset.targets = [i % 3 for i in range(1000)]
    dataset.classes = ["a", "b", "c"]
    source = opened(dataset)
    assert source.has_labels
    assert source.labels.tolist() == dataset.targets
    assert source.class_names == ["a", "b", "c"]
    assert source.identity(None)["number"] == 1000
    assert dataset.num_read <= 30
    part = opened(ConcatDataset([Subset(dataset, [1, 2]), Subset(dataset, [5])]))
    assert part.labels.tolist() == [1, 2, 2]
    assert part.class_names == ["a", "b", "c"]


def test_labels_of_items_come_with_the_batches_and_else_by_loading_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dataset = Items([(Image.new("L", (8, 8)), torch.tensor(i % 3)) for i in range(8)])
    source = opened(dataset)
    assert source.has_labels
    for batch in batches(source, 0):
        assert torch.equal(batch.label, batch.sample_id % 3)
    assert not caplog.messages
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert source.class_names == ["0", "1", "2"]
    (message,) = caplog.messages
    assert "neither `targets` nor `labels`, so all of its 8 images are loaded" in message


def test_without_labels_nothing_is_loaded_to_know_that() -> None:
    dataset = Items([Image.new("RGB", (8, 8)) for _ in range(50)])
    source = opened(dataset)
    assert not source.has_labels
    assert source.labels.tolist() == [-1] * 50
    assert source.class_names == []
    assert dataset.num_read < 20
    assert opened(Items([(Image.new("RGB", (8, 8)), None)])).labels.tolist() == [-1]


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    "image",
    [
        pixels(6, 8),
        pixels(6, 8, 1),
        pixels(6, 8, 3),
        pixels(6, 8, 4),
        torch.from_numpy(pixels(3, 6, 8)),
        torch.from_numpy(pixels(6, 8)),
        Image.fromarray(pixels(6, 8, 3)).convert("P"),
    ],
    ids=lambda image: f"{type(image).__name__}{getattr(image, 'shape', '')}",
)
def test_every_kind_of_image_is_decoded_like_pillow_converts(image: Any, in_chans: int) -> None:
    decoded = opened(Items([(image, 0)]), in_chans).decode(0)
    if isinstance(image, Tensor):
        image = (image.movedim(0, -1) if image.ndim == 3 else image).numpy()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.squeeze())
    expected = image.convert("RGB" if in_chans == 3 else "L")
    assert (decoded.mode, decoded.size) == (expected.mode, (8, 6))
    assert decoded.tobytes() == expected.tobytes()


def test_deep_grey_is_scaled_and_large_images_are_refused() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    decoded = opened(Items([Image.fromarray(ramp)]), in_chans=1).decode(0)
    assert np.array_equal(np.asarray(decoded), (ramp // 256).astype(np.uint8))
    with pytest.raises(ConfigError, match=r"8 x 8 pixels, more than data\.max_pixels = 63"):
        opened(Items([Image.fromarray(ramp)]), max_pixels=63)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def flickering() -> Dataset[Any]:
    class Flickering(Items):
        def __getitem__(self, index: int) -> Any:
            self.num_read += 1
            return Image.new("L", (8, 8), self.num_read)

    return Flickering([None] * 5)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "expected a map-style Dataset .* got a Stream"),
        (Items([]), "Items has none"),
        (Items([torch.zeros(3, 4, 4)]), "expected uint8 pixels, got float32; leave ToTensor and"),
        (Items([pixels(4, 4, 2)]), r"1, 3 or 4 channels, got \[4, 4, 2\]"),
        (Items([("image.png", 0)]), "expected a Pillow image, .* got a str"),
        (Items([(pixels(4, 4), "cat")]), "expected an integer label, got a str"),
        (Items([(pixels(4, 4), 0, 1)]), r"expected \(image, label\) or an image, got 3 things"),
        (flickering(), "another one when it is read again; leave random transforms out"),
    ],
)
def test_what_is_no_such_dataset_is_refused_in_one_line(dataset: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        opened(dataset)
    assert str(error.value).startswith("data: ")
    assert "\n" not in str(error.value)


def test_items_that_fail_later_are_broken_images() -> None:
    items: list[Any] = [(pixels(8, 8, 3), i) for i in range(9)]
    items[4] = torch.zeros(3, 8, 8)
    source = opened(Items(items))
    loader = Loader(source, AUGMENT, num_views=2, batch_size=9, img_size=16, seed=5)
    (batch,) = loader.batches(0)
    assert sorted(batch.sample_id.tolist()) == [0, 1, 2, 3, 5, 5, 6, 7, 8]
    assert torch.equal(batch.label, batch.sample_id)
    assert loader.broken == ["image 4"]


def test_identity_is_that_of_length_and_samples() -> None:
    images = torch.from_numpy(pixels(40, 3, 8, 8))
    labels = torch.arange(40)
    whole = opened(TensorDataset(images, labels)).identity(None)
    assert opened(TensorDataset(images.clone(), labels)).identity("elsewhere") == whole
    assert opened(TensorDataset(images[:39], labels[:39])).identity(None) != whole
    images[0, 0, 0, 0] += 1
    assert opened(TensorDataset(images, labels)).identity(None)["digest"] != whole["digest"]


def test_what_workers_cannot_be_given_is_one_line() -> None:
    dataset: Any = Items([pixels(8, 8, 3)] * 4)
    dataset.lock = threading.Lock()
    source = opened(dataset)
    assert len(batches(source, 0)) == 1
    with pytest.raises(
        ConfigError, match=r"data\.workers: Items cannot go .* data\.workers=0"
    ) as error:
        batches(source, 0, workers=1)
    assert "\n" not in str(error.value)


def test_what_is_defined_in_a_notebook_goes_to_workers_by_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset: Any = Items([torch.from_numpy(pixels(3, 8, 8))] * 4)
    dataset.transform = lambda image: image
    dataset.shared = torch.zeros(1000)
    source = opened(dataset)
    # A module that no other process can import.
    notebook = types.ModuleType("__main__")
    notebook.Items = Items  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    monkeypatch.setattr(Items, "__module__", "__main__")
    source.check_workers()
    content = bytes(ForkingPickler.dumps(source))
    del notebook.Items
    # By name it could not be found.
    copy = pickle.loads(content)
    assert copy.decode(0).tobytes() == source.decode(0).tobytes()
    # Its memory is theirs too.
    dataset.shared[3] = 7
    assert copy.dataset.shared[3] == 7


def test_a_configuration_cannot_name_a_dataset() -> None:
    with pytest.raises(ConfigError, match=r"data\.source: .* come from Python"):
        build_source(DataConfig(source="dataset"), EncoderConfig(), split="train")
