"""Which exceptions a user can mend, and the line that tells them how."""

import argparse
import errno
from typing import NoReturn
from zipfile import BadZipFile

__all__ = ["Parser", "UserError", "explain"]

# What torch says where the CPU's memory is used up, in an error without a class of its own.
NO_CPU_MEMORY = ("can't allocate memory", "not enough memory")
SMALLER = "a smaller batch_size, a chunk_size or fewer data.workers need less"
REMEDIES = {
    errno.EACCES: "choose another path, or ask for the right to use this one",
    errno.EDQUOT: "free some of your quota",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOSPC: "free some space",
    errno.ENOTDIR: "one of the folders on this path is a file",
    errno.EPERM: "choose another path, or ask for the right to use this one",
    errno.EROFS: "choose another path",
}


class UserError(Exception):
    """What the user can mend; the message is one line that names the thing and the remedy."""


class Parser(argparse.ArgumentParser):
    """A command line that tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def explain(error: Exception) -> str | None:
    """The line for an error that its user can mend, None for a fault of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.errno is not None:
        name = "" if error.filename is None else f"{error.filename}: "
        remedy = REMEDIES.get(error.errno)
        return f"{name}{error.strerror}" + ("" if remedy is None else f"; {remedy}")
    # By names, as the libraries of these errors need not be loaded, or there.
    if type(error).__name__ == "OutOfMemoryError":
        return f"the GPU's memory is used up; {SMALLER} ({text})"
    if isinstance(error, MemoryError) or any(part in text for part in NO_CPU_MEMORY):
        return f"the memory is used up; {SMALLER} ({text or 'no more is given'})"
    if isinstance(error, BadZipFile) or type(error).__name__ == "SafetensorError":
        return f"a damaged file: {text}"
    return None
