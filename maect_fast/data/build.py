"""The images that a configuration names."""

from functools import partial
from typing import Literal

from maect_fast.config import ConfigError, DataConfig, EncoderConfig
from maect_fast.data.folder import open_folder
from maect_fast.data.generated import make_digits, make_synthetic
from maect_fast.data.sources import Source

__all__ = ["build_source"]


def build_source(
    data: DataConfig, encoder: EncoderConfig, *, split: Literal["train", "test"]
) -> Source:
    """The images of one split, in a fixed order.

    A folder's images are all regular files below it with an image extension, sorted by path; hidden
    files and folders are left out, linked folders followed, and no folder is listed twice. If every
    image lies in a sub-folder and there are at least two of them, the top-level sub-folders are the
    classes; otherwise no image has a label. A test folder's classes are numbered by the training
    folder's names.

    Raises:
        ConfigError: no folder given, the folder is missing or holds no image, its classes do not
            fit those of the training folder, or the encoder's input does not fit the images.
    """
    if data.source == "digits":
        return make_digits(encoder, split)
    if data.source == "synthetic":
        return make_synthetic(data, encoder, split)
    if data.source == "dataset":
        raise ConfigError(
            "data.source: the images of a Dataset come from Python (maect_fast.data.from_dataset); "
            "give others here, as data.source=folder data.root=/path/to/images"
        )
    if encoder.in_chans not in (1, 3):
        raise ConfigError(f"encoder.in_chans: expected 3 or 1, got {encoder.in_chans}")
    open_split = partial(open_folder, in_chans=encoder.in_chans, max_pixels=data.max_pixels)
    if split == "train":
        return open_split("data.root", data.root)
    known = open_split("data.root", data.root).class_names if data.root else ()
    return open_split("data.test_root", data.test_root, known=known)
