"""Names that come from outside: of files, folders, classes, runs and tensors. They are data.

Every place that shows one asks here for its form there, so that no name can end a line, colour a
terminal, reorder the letters around it, or be read as markup.
"""

__all__ = ["one_line", "printable", "shortened"]

SHORT = 40


def printable(name: object) -> str:
    r"""The name on one line: what is not printable (line ends, terminal codes, bytes that are not
    UTF-8) as an escape such as `\n` or `\udcff`, the rest as it is.
    """
    text = str(name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(name: object, length: int = SHORT) -> str:
    """The printable name with its middle left out where it is longer than `length`."""
    text = printable(name)
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}…{text[head + 1 - length :]}"


def one_line(error: BaseException, length: int = 200) -> str:
    """What an error of another library says: its first line, at most `length` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[0] if lines else type(error).__name__, length)
