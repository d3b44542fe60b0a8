"""Errors of the public functions: one line with the argument, what was expected, what came."""

import functools
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = [
    "FLOATING",
    "INDEX",
    "check_bool",
    "check_int",
    "check_int64",
    "check_number",
    "check_rows",
    "check_temperature",
    "check_tensor",
    "check_tensors",
    "expect",
]

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX = (torch.int32, torch.int64)


def expect(
    ok: bool, name: str, expected: object, got: object, error: type[Exception] = ValueError
) -> None:
    """Raise ``name: expected ..., got ...`` unless `ok`."""
    if not ok:
        raise error(f"{name}: expected {expected}, got {got}")


def check_int(name: str, x: object, low: int, high: int | None = None) -> None:
    """Refuse what is no int, or out of `low` .. `high`; None is no bound."""
    # By far the most calls end at the first look.
    if type(x) is not int and not isinstance(x, numbers.Integral | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {_named(x)}")
    if not low <= x or (high is not None and x > high):  # type: ignore[operator]
        expected = f"{low} or more" if high is None else f"{low} .. {high}"
        raise ValueError(f"{name}: expected {expected}, got {x}")


def check_bool(name: str, x: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(x, bool):
        raise TypeError(f"{name}: expected True or False, got {_named(x)}")


def check_number(name: str, x: object, low: float = -math.inf) -> None:
    """Refuse what is no finite number above `low`."""
    if type(x) is not float and (
        not isinstance(x, numbers.Real | torch.SymFloat | torch.SymInt) or isinstance(x, bool)
    ):
        raise TypeError(f"{name}: expected a number, got {_named(x)}")
    if not low < x < math.inf:  # type: ignore[operator]
        expected = "a finite number" if low == -math.inf else f"a finite number above {low:g}"
        raise ValueError(f"{name}: expected {expected}, got {x}")


def check_tensors(**tensors: object) -> None:
    """Refuse what is no tensor, before it is asked for its shape."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {_named(x)}")


def _named(x: object) -> str:
    """A value for a message: itself if it is short, else its type."""
    text = repr(x)
    return text if len(text) <= 20 and "\n" not in text else type(x).__name__


def check_tensor(
    name: str,
    x: Tensor | None,
    like: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None],
) -> None:
    """Check what can be checked without reading values.

    Args:
        name: argument of the public function.
        x: its value; None is fine unless it is `like` itself.
        like: a tensor on the device that `x` must be on.
        dtypes: those allowed.
        shape: sizes; None = any.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: another shape or device, or a floating tensor whose last stride is not 1.
    """
    if x is None and like is not None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_named(x)}")
    # Messages are made where they are needed: a call of an op is not much longer than they take.
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {x.dtype}")
    fits = len(shape) == x.ndim
    for wanted, size in zip(shape, x.shape, strict=False):
        fits = fits and (wanted is None or size == wanted)
    if not fits:
        # Only here: torch.compile cannot turn a symbolic size into text.
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape [{sizes}], got {list(x.shape)}")
    if x is not like and x.device != like.device:
        raise ValueError(f"{name}: expected {like.device}, got {x.device}")
    if x.is_floating_point() and x.numel() > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: expected a last stride of 1, got {x.stride()}")


def check_rows(name: str, x: Tensor) -> None:
    """Refuse what is no view of rows [M, D] with one stride; the kernels copy nothing."""
    for i in range(x.ndim - 2):
        is_one = x.shape[i] == 1 or x.stride(i) == x.shape[i + 1] * x.stride(i + 1)
        expect(is_one or x.numel() == 0, name, "rows of one stride", x.stride())


def check_int64(name: str, entries: Tensor | None, shape: Sequence[int]) -> None:
    """Refuse another dtype or shape; None is fine, and so is any device."""
    if entries is not None and not isinstance(entries, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_named(entries)}")
    if entries is not None and (entries.dtype != torch.int64 or entries.shape != shape):
        expected, got = f"torch.int64 {list(shape)}", f"{entries.dtype} {list(entries.shape)}"
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_temperature(temperature: float | Tensor, *, learnable: bool) -> Tensor:
    """The temperature as a 0-d tensor.

    Args:
        temperature: a float or a 0-d tensor, whose value is not looked at: the host would wait.
        learnable: whether a tensor may require a gradient.

    Raises:
        TypeError: no number, or a tensor that is no float.
        ValueError: a float that is no finite number above 0, or another tensor.
    """
    if isinstance(temperature, Tensor):
        if temperature.ndim != 0 or (temperature.requires_grad and not learnable):
            expected = "a float or a 0-d tensor" + ("" if learnable else " without gradient")
            raise ValueError(
                f"temperature: expected {expected}, "
                f"got shape {list(temperature.shape)}, requires_grad {temperature.requires_grad}"
            )
        return temperature
    check_number("temperature", temperature, 0.0)
    # A mode's own tensor, as a fake one, may not be found later by calls without the mode.
    is_real = not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()
    return _scalar(temperature) if is_real else _make_scalar(temperature)


def _make_scalar(x: float) -> Tensor:
    """On the CPU whatever the device of the inputs: kernels take it as a number, nothing waits."""
    # An inference tensor could not be kept for a backward.
    with torch.inference_mode(False):
        return torch.tensor(x, dtype=torch.float64)


# A constant, which takes longer to make than to look up.
_scalar = functools.lru_cache(maxsize=16)(_make_scalar)
