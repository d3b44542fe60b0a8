"""From an image file's bytes to pixels, within stated limits of memory and time."""

import math
import warnings
from abc import abstractmethod
from typing import IO, cast

import numpy as np
from PIL import Image
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile

from maect_fast.data.sources import ORIGINAL_SIZE, Reduction, Source, UnfitImageError

__all__ = ["EXTENSIONS", "EncodedSource", "decode_image", "eight_bits"]

Image.init()
# Pillow goes by the content. Of the formats that it knows beside these, EPS runs another program,
# some are decoded in Python, and some have no signature, so that a text can be taken for a picture.
WANTED = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "SGI", "TIFF", "WEBP")
FORMATS = tuple(name for name in WANTED if name in Image.OPEN)
EXTENSIONS = frozenset(
    extension for extension, name in Image.registered_extensions().items() if name in FORMATS
)
# An encoder writes about ten; each costs a pass over all coefficients, however few bytes it has.
MAX_SCANS = 100
# Pillow reads Netpbm's numbers in letters one by one, in about the time of so many pixels.
TEXT = 16
# OpenJPEG holds four bytes for each number: 540 MB at 29 megapixels.
WIDE = 2
# TIFF tags.
BITS_PER_SAMPLE, PHOTOMETRIC, TILE_WIDTH, TILE_LENGTH = 258, 262, 322, 323
WHITE_IS_ZERO = 0


class EncodedSource(Source):
    """Images in files, or in parts of files, decoded on demand."""

    channels: int
    """Channels to decode to: 3 or 1."""
    max_pixels: int
    """Pixels of the largest image that is decoded."""

    @property
    def in_chans(self) -> int:
        """Channels of every decoded image."""
        return self.channels

    @abstractmethod
    def open(self, index: int) -> IO[bytes]:
        """Image `index` as an image file, at its beginning."""

    def decode(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        """Read image `index`; see `decode_image`."""
        with self.open(index) as file:
            return decode_image(
                file, channels=self.channels, max_pixels=self.max_pixels, reduction=reduction
            )


def decode_image(
    file: IO[bytes], *, channels: int, max_pixels: int, reduction: Reduction | None = None
) -> Image.Image:
    """The image in an open file, of mode RGB (3 channels) or L (1).

    Transparency and EXIF orientation are ignored, as torchvision's `ImageFolder` does. Grey images
    deeper than 8 bits are scaled by their format's range (16 bits, or a PGM's maxval), where
    Pillow's own conversion would clip them at 255. A JPEG is decoded at 1/2, 1/4 or 1/8 of its
    size, by libjpeg's scaled inverse transform, as far as `reduction` allows.

    Raises:
        Exception: whatever Pillow raises on a file that it cannot read in full.
        UnfitImageError: more pixels than `max_pixels`, or grey values without a range.
    """
    mode = "RGB" if channels == 3 else "L"
    # Pillow warns of odd metadata, palettes with transparency and very large pictures; it decodes
    # them all the same.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image: Image.Image = Image.open(file, formats=FORMATS)
        _limit(image, file, max_pixels, reduction)
        image = _netpbm(image, file) if isinstance(image, PpmImageFile) else eight_bits(image)
        image.load()
        return image if image.mode == mode else image.convert(mode)


def _limit(
    image: Image.Image, file: IO[bytes], max_pixels: int, reduction: Reduction | None
) -> None:
    """Choose a JPEG's scale, and refuse what would take too much memory or time."""
    width, height = image.size
    held, what = width * height, f"{width} x {height} pixels"
    if image.format in ("JPEG", "MPO"):
        factor = 1 if reduction is None else reduction(width, height)
        if factor > 1:
            image.draft(None, (width // factor, height // factor))
            image.info[ORIGINAL_SIZE] = (width, height)
        # A progressive one's coefficients are all held, whatever the scale.
        if "progressive" in image.info:
            _check_scans(file)
        else:
            held = image.width * image.height
    if isinstance(image, PpmImageFile) and image.tile[0][0] == "ppm_plain":
        held, what = held * TEXT, f"{what} in letters ({TEXT} times the work)"
    if image.format == "JPEG2000":
        held, what = held * WIDE, f"{what} in JPEG 2000 ({WIDE} times the memory)"
    if isinstance(image, TiffImageFile):
        tile = [image.tag_v2.get(tag, 0) for tag in (TILE_WIDTH, TILE_LENGTH)]
        if math.prod(tile) > held:
            held, what = math.prod(tile), f"a tile of {tile[0]} x {tile[1]} pixels"
    if held > max_pixels:
        raise UnfitImageError(
            "too large",
            f"{what}, more than data.max_pixels = {max_pixels}",
        )


def _check_scans(file: IO[bytes]) -> None:
    """Refuse a progressive JPEG of more scans than any encoder writes."""
    position = file.tell()
    file.seek(0)
    scans, last = 0, b""
    while part := file.read(1 << 20):
        # Within a scan, 0xFF is followed by 0.
        scans += (last + part).count(b"\xff\xda")
        last = part[-1:]
    file.seek(position)
    if scans > MAX_SCANS:
        raise UnfitImageError("too large", f"a JPEG of {scans} scans, at most {MAX_SCANS}")


def _netpbm(image: PpmImageFile, file: IO[bytes]) -> Image.Image:
    """A PGM or PPM whose white is not 255, scaled to 8 bits; others as they are.

    Pillow does this in Python, pixel by pixel: 28 s for 33 million.
    """
    codec, _, offset, arguments = image.tile[0]
    width, height = image.size
    if codec != "ppm":
        return image.point(lambda value: value / 256).convert("L") if image.mode == "I" else image
    white = cast("tuple[str, int]", arguments)[1]
    dtype = np.dtype(">u2" if white > 255 else "u1")
    table = (np.minimum(np.arange(256**dtype.itemsize), white) * (255 / white)).round()
    table = table.astype(np.uint8)
    pixels = np.empty((height, width, len(image.getbands())), np.uint8)
    file.seek(offset)
    for row in pixels:
        content = file.read(row.size * dtype.itemsize)
        if len(content) < row.size * dtype.itemsize:
            raise ValueError("the file ends within the image")
        row[:] = table[np.frombuffer(content, dtype)].reshape(row.shape)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def eight_bits(image: Image.Image) -> Image.Image:
    """The image with values of more than 8 bits scaled to 8, others as they are.

    Raises:
        UnfitImageError: 32-bit integers or floats, of which no format says where white is.
    """
    if image.mode.startswith("I;16"):
        bits, is_negative = 16, False
        if isinstance(image, TiffImageFile):
            bits = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0]
            is_negative = image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
        values = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        return Image.fromarray(~values if is_negative else values)
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise UnfitImageError(
            "too deep", f"32-bit {kind}, of which no format says what is white; save as 16 bits"
        )
    return image
