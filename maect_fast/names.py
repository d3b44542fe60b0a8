"""Names that come from outside: of files, folders, classes, runs and tensors. They are data.

Every place that shows one asks here for its form there, so that no name can end a line, colour a
terminal, reorder the letters around it, or be read as markup.
"""

import re
from collections.abc import Sequence

__all__ = ["is_utf8", "listed", "markdown", "mathless", "one_line", "printable", "shortened"]

SHORT = 40
# What starts or ends something in Markdown, with its tables, HTML and formulas. A hyphen or a dot
# does so at a line's beginning alone, where no name stands.
MARKUP = re.compile(r"[\\`*_\[\]<>&|$~#!]")


def printable(name: object) -> str:
    r"""The name on one line, what is not printable as an escape such as `\n` or `\udcff`.

    That is line ends, terminal codes, marks that turn the writing, and bytes that are not UTF-8.
    """
    text = str(name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_utf8(name: object) -> bool:
    """Whether other programs' files (YAML, TensorBoard's events) can hold the name."""
    return not any("\ud800" <= c <= "\udfff" for c in str(name))


def shortened(name: object, length: int = SHORT) -> str:
    """The printable name with its middle left out where it is longer than `length`."""
    text = printable(name)
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}…{text[head + 1 - length :]}"


def listed(names: Sequence[object], separator: str = ", ") -> str:
    """The first four names, the others counted."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return separator.join(map(printable, names[:4])) + more


def markdown(name: object) -> str:
    """The printable name as text of a Markdown document, also within a table's cell."""
    return MARKUP.sub(r"\\\g<0>", printable(name))


def mathless(name: object) -> str:
    """The shortened name as text of a matplotlib figure, where dollars would enclose a formula."""
    return shortened(name).replace("$", r"\$")


def one_line(error: BaseException, length: int = 200) -> str:
    """What an error of another library says: its first line, at most `length` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[0] if lines else type(error).__name__, length)
