"""Launches made again without Triton's Python.

What a launcher launches depends on its tensors' shapes, strides, dtypes and devices and on numbers.
Its first call with them runs as it is written and is recorded: kernels, grids, arguments, results,
memory in between. From the second on, results are allocated and the compiled kernels are launched
with new addresses: some microseconds instead of Triton's binder, launch tables and checks.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maect_fast.kernels._common import gpu
from maect_fast.kernels._common.launch import triton_minor

__all__ = ["Plans", "launch"]

# Releases whose `CompiledKernel.run` was read: it takes what is given to it below.
RELEASES = ((3, 6), (3, 9))
# Code compiled for addresses that are multiples of it may not have others.
ALIGNMENT = 16
# Of each part of the memory in between.
SCRATCH_ALIGNMENT = 256
# Plans of one op; a program that meets more shapes than that starts over.
MAX_PLANS = 256

Key = tuple[Any, ...]
ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


# Of dtypes alone.
HARMLESS = (torch.ops.aten.promote_types.default,)


class _Call(NamedTuple):
    """One launch, as a launcher asked for it."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    arguments: list[Any]


class _Recording(threading.local):
    calls: list[_Call] | None = None


_RECORDING = _Recording()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``, noted while a plan is made."""
    compiled = kernel[grid](*arguments, **options)
    if _RECORDING.calls is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        values = [named[name] for name in kernel.arg_names]
        _RECORDING.calls.append(_Call(kernel, compiled, grid, values))


class Plans:
    """The plans of one op.

    Args:
        scalars: kernels' arguments that hold a number or the address of one, which may differ from
            call to call. All other numbers are part of what a plan is for.
    """

    def __init__(self, *, scalars: Sequence[str] = ()) -> None:
        self._scalars = tuple(scalars)
        self._plans: dict[Key, _Plan | None] = {}

    def replay(
        self,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[Any, ...],
        scalars: tuple[Tensor | float | None, ...] = (),
    ) -> tuple[Tensor, ...] | None:
        """The results, by launching again what was recorded for such arguments; None: nothing was.

        Args:
            tensors: those of the op, in a fixed order.
            numbers: all else that launches depend on, hashable.
            scalars: numbers, or tensors that hold them, in the order of the names.
        """
        if not self._plans:
            return None
        plan = self._plans.get(_key(tensors, numbers, scalars))
        return None if plan is None else plan.run(tensors, scalars)

    def record(
        self,
        launcher: Callable[[], tuple[Tensor, ...]],
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[Any, ...],
        scalars: tuple[Tensor | float | None, ...] = (),
    ) -> tuple[Tensor, ...]:
        """The launcher's results, on the tensors' device; a plan is left for the next such call.

        Possible is it where the launcher does nothing but allocate, take views and `launch`.
        """
        key = _key(tensors, numbers, scalars)
        given = [*tensors, *(x for x in scalars if isinstance(x, Tensor))]
        with gpu.current(next(x for x in given if x is not None)):
            if key in self._plans or not _is_recordable():
                return launcher()
            watch = _Watch()
            calls: list[_Call] = []
            _RECORDING.calls = calls
            try:
                with watch:
                    results = launcher()
            finally:
                _RECORDING.calls = None
            self._keep(key, given, results, watch, calls, scalars)
        return results

    def _keep(
        self,
        key: Key,
        given: list[Tensor | None],
        results: tuple[Tensor, ...],
        watch: "_Watch",
        calls: list[_Call],
        scalars: tuple[Tensor | float | None, ...],
    ) -> None:
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        try:
            names = dict(zip(self._scalars, scalars, strict=True))
            self._plans[key] = None if watch.others else _Plan(given, results, watch, calls, names)
        except _UnclearError:
            # Tensors share memory, so that addresses do not tell them apart; others may not.
            self._plans.pop(key, None)


def _key(
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    scalars: tuple[Tensor | float | None, ...],
) -> Key:
    found: list[Any] = [numbers]
    for x in tensors:
        found.append(None if x is None else (x.shape, x.stride(), x.dtype, x.device))
    for scalar in scalars:
        if isinstance(scalar, Tensor):
            found.append((scalar.dtype, scalar.device))
        else:
            found.append(_number_type(scalar))
    return tuple(found)


def _number_type(x: float | None) -> str:
    """The type that Triton gives a number which it does not specialise on."""
    if x is None or isinstance(x, float):
        return type(x).__name__
    if -(2**31) <= x < 2**31:
        return "i32"
    return "u64" if x >= 2**63 else "i64"


def _runtime() -> tuple[Any, Any]:
    """Triton's driver and the settings of its runtime."""
    return _runtime_module().driver.active, _knobs()


@functools.cache
def _runtime_module() -> Any:
    import triton.runtime

    return triton.runtime


@functools.cache
def _knobs() -> Any:
    import triton

    return triton.knobs.runtime


def _has_hooks(knobs: Any) -> bool:
    """Whether somebody wants to see launches: a profiler."""
    hooks = (knobs.launch_enter_hook, knobs.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _is_recordable() -> bool:
    knobs = _knobs()
    return not knobs.interpret and triton_minor() in RELEASES and not _has_hooks(knobs)


class _UnclearError(Exception):
    """An address that may belong to more than one tensor."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is allocated, and what is neither an allocation nor a view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocated: list[Tensor] = []
        self.others: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self.allocated.append(result)
        elif not func.is_view and func not in HARMLESS:
            self.others.append(func)
        return result


class _Step(NamedTuple):
    """One launch of a plan."""

    kernel: Any
    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: int
    metadata: Any
    arguments: list[Any]
    """With gaps for what changes."""
    pointers: list[tuple[int, int, int]]
    """Argument, tensor, and the bytes between its address and the argument."""
    scalars: list[tuple[int, int]]
    """Argument, and which of the scalars it is."""


class _Plan:
    """What one call of a launcher did, for tensors like its own.

    Tensors are numbered: those given, tensors among the scalars, results, memory in between.
    """

    __slots__ = ("_device", "_results", "_scratch", "_scratch_bytes", "_steps", "_where")

    def __init__(
        self,
        given: list[Tensor | None],
        results: tuple[Tensor, ...],
        watch: _Watch,
        calls: list[_Call],
        scalars: dict[str, Tensor | float | None],
    ) -> None:
        self._device = _runtime()[0].get_current_device()
        self._where = watch.allocated[0].device if watch.allocated else None
        self._results = [(x.shape, x.stride(), x.dtype) for x in results]
        # By address: autograd wraps some of them anew.
        fresh = {x.data_ptr(): x for x in watch.allocated if x.numel() > 0}
        for x in results:
            if x.numel() > 0:
                # Otherwise it is a view, of which another call's memory would have to be one, too.
                assert x.data_ptr() in fresh, "a result is no allocation of the launcher's"
                del fresh[x.data_ptr()]
        between = list(fresh.values())
        self._scratch, self._scratch_bytes = [], 0
        for x in between:
            self._scratch.append(self._scratch_bytes)
            size = x.untyped_storage().nbytes()
            self._scratch_bytes += -(-size // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        tensors = [*given, *results, *between]
        if not _are_aligned([0 if x is None else x.data_ptr() for x in tensors]):
            raise _UnclearError
        self._steps = [_step(call, tensors, scalars) for call in calls]

    def run(
        self, tensors: tuple[Tensor | None, ...], scalars: tuple[Tensor | float | None, ...]
    ) -> tuple[Tensor, ...] | None:
        """Allocate and launch; None where the ordinary way must be taken."""
        driver, knobs = _runtime()
        device = driver.get_current_device()
        hooked = _has_hooks(knobs) or any(step.kernel.pre_run_hooks for step in self._steps)
        if device != self._device or hooked:
            return None
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        for scalar in scalars:
            if isinstance(scalar, Tensor):
                addresses.append(scalar.data_ptr())
        if not _are_aligned(addresses):
            return None
        results = []
        for shape, stride, dtype in self._results:
            result = torch.empty_strided(shape, stride, dtype=dtype, device=self._where)
            results.append(result)
            addresses.append(result.data_ptr())
        if self._scratch_bytes:
            scratch = torch.empty(self._scratch_bytes, dtype=torch.uint8, device=self._where)
            base = scratch.data_ptr()
            addresses += [base + offset for offset in self._scratch]
        stream = driver.get_current_stream(device)
        for step in self._steps:
            arguments = step.arguments.copy()
            for i, tensor, offset in step.pointers:
                arguments[i] = addresses[tensor] + offset
            for i, scalar_at in step.scalars:
                arguments[i] = scalars[scalar_at]
            # As `JITFunction.run` does at its end, without hooks.
            step.run(*step.grid, stream, step.function, step.metadata, None, None, None, *arguments)
        return tuple(results)


def _are_aligned(addresses: list[int]) -> bool:
    bits = 0
    for address in addresses:
        bits |= address
    return bits % ALIGNMENT == 0


def _step(
    call: _Call, tensors: list[Tensor | None], scalars: dict[str, Tensor | float | None]
) -> _Step:
    arguments, pointers, numbers = list(call.arguments), [], []
    for i, (name, x) in enumerate(zip(call.kernel.arg_names, arguments, strict=True)):
        if isinstance(x, Tensor) and x.numel() == 0:
            arguments[i] = 0
        elif isinstance(x, Tensor):
            at, offset = _find(x, tensors)
            pointers.append((i, at, offset))
            arguments[i] = None
        elif name in scalars and isinstance(scalars[name], int | float):
            assert x == scalars[name], f"{name} is not what was given"
            numbers.append((i, list(scalars).index(name)))
    compiled = call.compiled
    x, y, z = (*call.grid, 1, 1)[:3]
    return _Step(
        kernel=call.kernel,
        run=compiled.run,
        grid=(x, y, z),
        function=compiled.function,
        metadata=compiled.packed_metadata,
        arguments=arguments,
        pointers=pointers,
        scalars=numbers,
    )


def _find(x: Tensor, tensors: list[Tensor | None]) -> tuple[int, int]:
    """Which tensor an argument is, or lies in, and how many bytes behind its beginning."""
    same = [i for i, tensor in enumerate(tensors) if tensor is x]
    if not same:
        address = x.data_ptr()
        same = [i for i, y in enumerate(tensors) if y is not None and address in _span(y)]
    if len(same) != 1:
        raise _UnclearError
    tensor = tensors[same[0]]
    assert tensor is not None
    return same[0], x.data_ptr() - tensor.data_ptr()


def _span(x: Tensor) -> range:
    """Addresses from a tensor's first number to its last."""
    if x.numel() == 0:
        return range(0)
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return range(x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize)
