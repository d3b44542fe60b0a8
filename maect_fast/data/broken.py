"""Images that cannot be read: counted, told by kind, and limited."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from maect_fast.data.sources import Reduction, Source, UnfitImageError
from maect_fast.errors import UserError
from maect_fast.names import listed, one_line, printable

__all__ = ["Broken", "BrokenImages", "DataError", "read_image", "told_once"]

logger = logging.getLogger(__package__)


class DataError(UserError, RuntimeError):
    """Images that cannot be had.

    More cannot be read than `data.max_broken` allows, and the message names them; or the workers
    that read them have ended.
    """


class Broken(NamedTuple):
    """Why an image cannot be read."""

    kind: str
    """In a word or two, the same for all of its kind."""
    reason: str


def read_image(
    source: Source, index: int, reduction: Reduction, broken: dict[int, Broken]
) -> tuple[Image.Image, int] | None:
    """Image `index` and its label, or None and an entry in `broken` when it cannot be read."""
    try:
        return source.read(index, reduction)
    # Pillow has no common base for what it raises on a damaged file.
    except Exception as error:
        broken[index] = _broken(error)
        return None


def _broken(error: Exception) -> Broken:
    if isinstance(error, UnfitImageError):
        return Broken(error.kind, str(error))
    if isinstance(error, UnidentifiedImageError):
        return Broken("no image", "it begins like none")
    reason = f"{type(error).__name__}: {one_line(error)}"
    if isinstance(error, Image.DecompressionBombError):
        return Broken("too large", reason)
    # What the system says has a number, what Pillow says has none.
    if isinstance(error, OSError) and error.errno is not None:
        return Broken("not to be opened", error.strerror or reason)
    return Broken("damaged", reason)


class _Once(logging.Filter):
    """Lets each message pass once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self.seen
        self.seen.add(message)
        return is_new


@contextmanager
def told_once() -> Iterator[None]:
    """Meanwhile the same is said once of images, however often they are read."""
    # All modules of the package share its logger.
    once = _Once()
    logger.addFilter(once)
    try:
        yield
    finally:
        logger.removeFilter(once)


class BrokenImages:
    """Counts the distinct images that cannot be read, tells them by kind, stops at the limit."""

    def __init__(self, source: Source, limit: int) -> None:
        self.source = source
        # At least one image must be left to stand in for the others.
        self.limit = min(limit, len(source) - 1)
        self.found: dict[int, Broken] = {}
        self.told = 0

    def add(self, broken: dict[int, Broken]) -> None:
        """Count those of a batch; raises DataError beyond the limit."""
        self.found |= broken
        if len(self.found) > self.limit:
            count = len(self.found)
            # The message says it all; `tell` would say it again.
            self.told = count
            raise DataError(
                f"{count} images cannot be read, at most {self.limit} may be (data.max_broken): "
                + "; ".join(self._kinds())
            )

    def tell(self) -> None:
        """One line per kind, if there is a new image since the last time."""
        if len(self.found) > self.told:
            self.told = len(self.found)
            for line in self._kinds():
                logger.warning("skipped %s", line)

    def _kinds(self) -> list[str]:
        kinds = sorted({broken.kind for broken in self.found.values()})
        return [self._line(kind) for kind in kinds]

    def _line(self, kind: str) -> str:
        of_kind = [
            f"{printable(self.source.name(index))} ({broken.reason})"
            for index, broken in sorted(self.found.items())
            if broken.kind == kind
        ]
        return f"{len(of_kind)} ({kind}): {listed(of_kind)}"

    def names(self) -> list[str]:
        """What they are called."""
        return [self.source.name(index) for index in self.found]
