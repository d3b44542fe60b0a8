"""What a benchmark is: an op's sizes, inputs, truth, formulas, and the programs that compute it.

Every module in `ops/` makes one `Op` and registers its providers by decorator. How they are timed
is not known here.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from maect_fast.benchmarks.results import OURS
from maect_fast.testing import assert_within_budget

__all__ = [
    "EAGER",
    "OURS",
    "Call",
    "Op",
    "Outputs",
    "Provider",
    "Sizes",
    "UnavailableError",
    "check_budget",
    "check_sums",
    "compile_peer",
    "import_peer",
    "judged_samples",
]

Inputs = TypeVar("Inputs")
Peer = TypeVar("Peer", bound=Callable[..., Any])
Sizes: TypeAlias = Mapping[str, int]
"""Dimension letters of the op's columns in the results: B, H, M, N, D, Q, K."""
Outputs: TypeAlias = dict[str, Tensor]
"""Results by name; the same name means the same quantity for every provider."""
Call: TypeAlias = Callable[[], Outputs]
"""What is timed: it computes the outputs anew each time."""

EAGER = "eager"
JUDGED_NUMBERS = 1 << 26
"""A truth's largest tensor, in numbers: 512 MiB in fp64."""


class UnavailableError(Exception):
    """A provider cannot run here; the message is the reason, one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provider(Generic[Inputs]):
    """One program that computes an op."""

    make: Callable[[Inputs, str], Call]
    """Sets up inputs and mode outside the timed part. Raises UnavailableError with the reason."""
    capturable: bool
    """False where a call waits for the device, so that no CUDA graph can hold it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Op(Generic[Inputs]):
    """Everything that the benchmarks know of one op."""

    name: str
    """Of the op, of its module here and of its results file."""
    letters: str
    """The dimension letters that make a shape."""
    modes: tuple[str, ...]
    """What can be timed of it."""
    sizes: Mapping[str, tuple[Sizes, ...]]
    """Lists of shapes by name: "cpu" and "cuda" are the default on such a device."""
    inputs: Callable[[Sizes, torch.dtype, torch.device], Inputs]
    """Fresh random inputs."""
    definition: Callable[[Inputs, str, torch.dtype], Outputs]
    """The op in plain PyTorch in a dtype: the truth in fp64, the measure of the error budget in
    the dtype of the inputs; where samples do not depend on each other of the judged ones, which
    `check` then picks."""
    check: Callable[[Inputs, Outputs, Outputs, Outputs], None]
    """The gate: (inputs, found, eager, truth), the latter two by `definition`. The first line of
    its AssertionError is the reason why a provider gets no time."""
    num_bytes: Callable[[Sizes, str, int], int]
    """(sizes, mode, bytes of an element) -> the fewest bytes that memory must move."""
    num_flops: Callable[[Sizes, str], int]
    """(sizes, mode) -> multiplications and additions of the matrix products."""
    products_dtype: torch.dtype | None = None
    """Where products in this dtype are faster than in that of the inputs, they are the floor: what
    a result needs in full precision may be few of them."""
    row_letters: Mapping[str, str] = field(default_factory=dict)
    """How launch rows call a dimension where that is not its letter here."""
    providers: dict[str, Provider[Inputs]] = field(default_factory=dict)
    """By name, in order of registration."""

    def provider(
        self, name: str, *, capturable: bool = True
    ) -> Callable[[Callable[[Inputs, str], Call]], Callable[[Inputs, str], Call]]:
        """Register the decorated function as a provider."""

        def register(make: Callable[[Inputs, str], Call]) -> Callable[[Inputs, str], Call]:
            self.providers[name] = Provider(make=make, capturable=capturable)
            return make

        return register


def judged_samples(count: int, numbers_each: int, device: torch.device) -> Tensor:
    """The samples of `count` that a gate judges, ascending: all, if their truths are small enough.

    Else as many as are, the first and last two, where tiles and offsets go wrong, and others drawn
    with a fixed seed: the same in every run.

    Args:
        count: samples that do not depend on each other.
        numbers_each: what a sample adds to the largest tensor of the truth.
        device: of the result.
    """
    most = max(4, JUDGED_NUMBERS // numbers_each)
    if count <= most:
        return torch.arange(count, device=device)
    generator = torch.Generator().manual_seed(count)
    drawn = 2 + torch.randperm(count - 4, generator=generator)[: most - 4]
    ends = torch.tensor([0, 1, count - 2, count - 1])
    return torch.cat((ends, drawn)).sort().values.to(device)


def check_budget(found: Outputs, eager: Outputs, truth: Outputs) -> None:
    """The gate of ops whose outputs are numbers: each within the error budget of its dtype."""
    assert found, "no outputs"
    for name, value in found.items():
        assert_within_budget(value, eager[name], truth[name], name=name)


def check_sums(found: Outputs, eager: Outputs, truth: Outputs, terms: Mapping[str, Tensor]) -> None:
    """`check_budget` where some outputs are sums over rows whose terms cancel.

    The magnitudes of the terms say how well such a sum can be known, in whatever order a program
    adds them up; eager's own error is that of one order.

    Args:
        found: what is judged.
        eager: eager PyTorch's.
        truth: in fp64.
        terms: those of each sum, in fp64, their rows first.
    """
    check_budget({name: x for name, x in found.items() if name not in terms}, eager, truth)
    for name in terms.keys() & found.keys():
        size = terms[name].abs().sum(0).max()
        error, allowed = ((x[name].double() - truth[name]).abs().max() for x in (found, eager))
        budget = 2 * (allowed + torch.finfo(eager[name].dtype).eps * size)
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"


def compile_peer(function: Peer) -> Peer:
    """`torch.compile` of a peer, whose backward is also timed alone, many times on one graph."""
    from torch._functorch import config

    # Buffers that a backward may overwrite do not admit that.
    config.donated_buffer = False
    compiled: Peer = torch.compile(function, dynamic=False, fullgraph=True)  # type: ignore[assignment]
    return compiled


def import_peer(name: str) -> ModuleType:
    """Import an optional package; UnavailableError says what it misses."""
    package = name.partition(".")[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == package:
            raise UnavailableError(f"{error.name} is not installed") from error
        raise UnavailableError(f"{package} does not load: {error}") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise UnavailableError(f"{package} does not load: {str(error).splitlines()[0]}") from error
