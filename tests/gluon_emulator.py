"""Runs Gluon kernels of warp groups with roles as Python: the same source, without a GPU.

Roles are threads of which one runs at a time; barriers have counts and phases; an asynchronous copy
lands when it arrives on its barrier, and a product reads shared memory when it is waited for, after
all others have run as far as they can. So a run depends on its seed alone, and the worst order of
things is the one that is tried.

It finds wrong formulas and indices, wrong phases and counts (nobody can go on: an error that says
who waits), buffers released before the products that read them are done or filled before they are
released, results used without a wait, addresses outside of a tensor. It cannot find wrong layouts
(the compiler does), missing proxy fences, and races between the warps of one role.
"""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import triton.language
from torch import Tensor
from triton.experimental.gluon import language
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.runtime.jit import JITFunction

__all__ = ["EmulationError", "launch"]

# Keyword arguments of a launch that are for the compiler.
COMPILER = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
THREADS_OF_A_WARP = 32


class EmulationError(Exception):
    """A kernel does what a GPU would hang or go wrong on."""


class _StoppedError(Exception):
    """Another role has failed."""


class _Int(int):
    """A number as kernels see it."""

    def to(self, _: torch.dtype) -> "_Int":
        return self


def _number_method(name: str) -> Callable[..., Any]:
    def method(self: _Int, *others: Any) -> Any:
        result = getattr(int, name)(self, *others)
        return _Int(result) if type(result) is int else result

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "rshift", "lshift"):
    for _side in ("", "r"):
        setattr(_Int, f"__{_side}{_name}__", _number_method(f"__{_side}{_name}__"))


class _Pointer:
    """An address in a tensor's memory, or a block of them."""

    def __init__(self, memory: Tensor, offsets: Any = 0) -> None:
        self.memory, self.offsets = memory, offsets
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offsets: Any) -> "_Pointer":
        return _Pointer(self.memory, self.offsets + offsets)


class _Shared:
    """Shared memory; nothing is in it before it is stored."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def index(self, i: int) -> "_Shared":
        assert 0 <= i < len(self.numbers), "a buffer that is not there"
        return _Shared(self.numbers[int(i)])

    def slice(self, start: int, length: int) -> "_Shared":
        return _Shared(self.numbers.narrow(0, int(start), int(length)))

    def permute(self, order: tuple[int, ...]) -> "_Shared":
        return _Shared(self.numbers.permute(*order))

    def load(self, _layout: Any) -> Tensor:
        return self.numbers.clone()

    def store(self, x: Tensor) -> None:
        assert x.shape == self.numbers.shape, "a store of another shape"
        self.numbers.copy_(x)


class _Barrier:
    def __init__(self) -> None:
        self.phase = self.expected = self.missing = 0

    def init(self, count: int) -> None:
        self.expected = self.missing = count

    def arrive(self, count: int) -> None:
        self.missing -= count
        if self.missing < 0:
            raise EmulationError("more arrivals than the barrier's count")
        if self.missing == 0:
            self.phase ^= 1
            self.missing = self.expected


class _Barriers:
    def __init__(self, count: int) -> None:
        self._barriers = [_Barrier() for _ in range(count)]

    def index(self, i: int) -> _Barrier:
        assert 0 <= i < len(self._barriers), "a barrier that is not there"
        return self._barriers[int(i)]


class _Product:
    """An asynchronous product: until it is waited for, nothing but another's accumulator."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self.value: Tensor | None = None

    def finish(self) -> None:
        self.value = self._compute()


class _Role(threading.Thread):
    """A warp group; runs while the program lets it."""

    def __init__(self, program: "_Program", function: Any, arguments: Any, num_warps: int) -> None:
        super().__init__(daemon=True)
        self._program, self._function, self._arguments = program, function, arguments
        self.num_warps = num_warps
        self.may_go: Callable[[], bool] = lambda: True
        self.is_patient = False
        self.go, self.error = threading.Semaphore(0), None
        self.products: list[_Product] = []
        self.copies: list[Callable[[], None]] = []
        self.is_stopped = False

    def run(self) -> None:
        with suppress(_StoppedError):
            try:
                self._halt()
                with torch.no_grad():
                    self._function(*self._arguments)
            except _StoppedError:
                raise
            # Whatever it is, the program raises it.
            except BaseException as error:
                self.error = error  # type: ignore[assignment]
        self._program.ended(self)

    def rest(self, may_go: Callable[[], bool], *, is_patient: bool = False) -> None:
        """Let others run until it may go on; a patient one lets them run as far as they can."""
        self.may_go, self.is_patient = may_go, is_patient
        self._program.turn.release()
        self._halt()

    def _halt(self) -> None:
        self.go.acquire()
        if self.is_stopped:
            raise _StoppedError


class _Program:
    """One program of a launch: whose turn it is."""

    def __init__(self, number: int, count: int, rng: random.Random) -> None:
        self.number, self.count, self._rng = number, count, rng
        self.turn = threading.Semaphore(0)
        self._roles: list[_Role] = []

    def ended(self, role: _Role) -> None:
        self._roles.remove(role)
        self.turn.release()

    def specialize(self, parts: Sequence[tuple[Any, Any]], warps: list[int], _: list[int]) -> None:
        """Run the roles to their ends."""
        self._roles = [
            _Role(self, *part, num_warps)
            for part, num_warps in zip(parts, (4, *warps), strict=True)
        ]
        roles = list(self._roles)
        for role in roles:
            role.start()
        while self._roles:
            ready = [role for role in self._roles if role.may_go()]
            if not ready:
                waiting = ", ".join(str(roles.index(role)) for role in self._roles)
                self._stop()
                raise EmulationError(f"hangs: roles {waiting} wait for what never comes")
            role = self._rng.choice([x for x in ready if not x.is_patient] or ready)
            role.go.release()
            self.turn.acquire()
            if role.error is not None:
                self._stop()
                raise role.error

    def _stop(self) -> None:
        for role in list(self._roles):
            role.is_stopped = True
            role.go.release()
            role.join()


_running = threading.local()


def _program() -> _Program:
    role = threading.current_thread()
    found: _Program = role._program if isinstance(role, _Role) else _running.program
    return found


def _role() -> _Role:
    role = threading.current_thread()
    assert isinstance(role, _Role), "outside of a role"
    return role


def _addresses(pointer: _Pointer, mask: Any) -> tuple[Tensor, Tensor]:
    offsets = torch.as_tensor(pointer.offsets).long()
    inside = torch.as_tensor(True if mask is None else mask).expand(offsets.shape)
    used = offsets[inside]
    if used.numel() and not (used.min() >= 0 and used.max() < len(pointer.memory)):
        raise EmulationError("an address outside of the tensor")
    return offsets, inside


def _load(pointer: _Pointer, mask: Any = None, other: float = 0) -> Any:
    offsets, inside = _addresses(pointer, mask)
    found = torch.full(offsets.shape, other, dtype=pointer.memory.dtype)
    found[inside] = pointer.memory[offsets[inside]]
    return found if offsets.ndim else _Int(found.item())


def _store(pointer: _Pointer, x: Tensor, mask: Any = None) -> None:
    offsets, inside = _addresses(pointer, mask)
    pointer.memory[offsets[inside]] = x.expand(offsets.shape)[inside].to(pointer.memory.dtype)


def _either(a: Any, b: Any, function: Callable[[Tensor, Tensor], Tensor]) -> Any:
    found = function(torch.as_tensor(a), torch.as_tensor(b))
    return found if isinstance(a, Tensor) or isinstance(b, Tensor) else _Int(found.item())


def _fail(what: str) -> None:
    raise EmulationError(what)


class _BarrierLayout:
    """Marks shared memory that holds barriers."""


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if isinstance(layout, _BarrierLayout):
        return _Barriers(shape[0])
    garbage = float("nan") if dtype.is_floating_point else -1
    return _Shared(torch.full(shape, garbage, dtype=dtype))


def _wait_for_phase(barrier: _Barrier, parity: int) -> None:
    _role().rest(lambda: barrier.phase != parity)


def _copy(buffer: _Shared, pointer: _Pointer, mask: Any = None) -> None:
    _role().copies.append(lambda: buffer.store(_load(pointer, mask)))


def _arrive_with_copies(barrier: _Barrier, increment_count: bool = True) -> None:
    assert not increment_count, "arrivals of copies are part of the barrier's count"
    role = _role()
    for copy in role.copies:
        copy()
    role.copies.clear()
    barrier.arrive(THREADS_OF_A_WARP * role.num_warps)


def _multiply(
    a: Any, b: _Shared, acc: Any, use_acc: bool = True, is_async: bool = False
) -> _Product:
    assert is_async, "products are asynchronous here"

    def compute() -> Tensor:
        left = a.numbers if isinstance(a, _Shared) else a
        product = left.float() @ b.numbers.float()
        if not use_acc:
            return product
        earlier = acc.value if isinstance(acc, _Product) else acc
        assert earlier is not None, "products end in their order"
        return product + earlier

    product = _Product(compute)
    _role().products.append(product)
    return product


def _wait_for_products(num_outstanding: int = 0, deps: Any = ()) -> Any:
    role = _role()
    role.rest(lambda: True, is_patient=True)
    while len(role.products) > num_outstanding:
        role.products.pop(0).finish()
    found = tuple(x.value if isinstance(x, _Product) and x.value is not None else x for x in deps)
    return found if len(found) > 1 else found[0]


def _range(*bounds: int, disable_licm: bool = False) -> Iterator[_Int]:
    assert disable_licm, "hoisted addresses spill"
    return map(_Int, range(*bounds))


_LANGUAGE = SimpleNamespace(
    **{name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int32", "int64")},
    SliceLayout=lambda dim, parent: None,
    static_range=range,
    static_assert=lambda holds: None if holds else _fail("a static assertion"),
    program_id=lambda axis: _Int(_program().number),
    num_programs=lambda axis: _Int(_program().count),
    arange=lambda start, end, layout: torch.arange(start, end),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    convert_layout=lambda x, layout: x,
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    maximum=lambda a, b: _either(a, b, torch.maximum),
    minimum=lambda a, b: _either(a, b, torch.minimum),
    where=torch.where,
    exp2=torch.exp2,
    log2=torch.log2,
    load=_load,
    store=_store,
    allocate_shared_memory=_allocate,
    warp_specialize=lambda *arguments: _program().specialize(*arguments),
)
# By the language's own objects, which kernels' modules import under whatever names.
_MEANINGS: dict[int, Any] = {
    id(language): _LANGUAGE,
    id(triton.language): SimpleNamespace(range=_range),
    id(hopper.mbarrier): SimpleNamespace(
        MBarrierLayout=_BarrierLayout,
        init=lambda barrier, count: barrier.init(count),
        wait=_wait_for_phase,
        arrive=lambda barrier, count: barrier.arrive(count),
    ),
    id(async_copy): SimpleNamespace(
        async_copy_global_to_shared=_copy, mbarrier_arrive=_arrive_with_copies
    ),
    id(hopper.fence_async_shared): lambda: None,
    id(hopper.warpgroup_mma): _multiply,
    id(hopper.warpgroup_mma_wait): _wait_for_products,
}


def _emulated(x: Any, known: dict[int, Any]) -> Any:
    """What a name of a kernel's module means here; functions are made anew, once."""
    if isinstance(x, triton.language.constexpr):
        return x.value
    if id(x) in _MEANINGS:
        return _MEANINGS[id(x)]
    if not isinstance(x, JITFunction):
        return x
    if id(x) not in known:
        names: dict[str, Any] = {}
        known[id(x)] = FunctionType(x.fn.__code__, names)
        for name in x.fn.__code__.co_names:
            if name in x.fn.__globals__:
                names[name] = _emulated(x.fn.__globals__[name], known)
    return known[id(x)]


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, seed: int = 0, **options: Any
) -> None:
    """``kernel[grid](*arguments, **options)`` on tensors of the CPU.

    Args:
        kernel: a `@gluon.jit` function.
        grid: of one dimension.
        arguments: as for a launch.
        seed: of the order in which roles take turns.
        options: as for a launch.

    Raises:
        EmulationError: it hangs, or leaves its tensors.
    """
    function = _emulated(kernel, {})
    given = {name: x for name, x in options.items() if name not in COMPILER}
    rng = random.Random(seed)
    with torch.no_grad():
        for number in range(grid[0]):
            _running.program = _Program(number, grid[0], rng)
            function(*map(_argument, arguments), **given)


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        # To the end of its memory, as an address has no shape.
        size = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
        return _Pointer(x.as_strided((max(size, 0),), (1,)))
    return _Int(x) if type(x) is int else x
