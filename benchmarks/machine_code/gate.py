"""Holds machine code to the limits of its launch row, and to the PTX that it was made from."""

import re
from collections import Counter
from collections.abc import Iterator
from math import inf

from maect_fast.benchmarks.machine_code.assembly import (
    ARITHMETIC,
    count,
    flops,
    is_empty,
    longest_loop,
    main_loop,
    read_shares,
    roles,
    tensor_shape,
)
from maect_fast.benchmarks.machine_code.compile import Compiled
from maect_fast.kernels._common.launch import Limits

__all__ = ["alu_per_result", "failures", "instructions", "waste"]

# Which share of these PTX instructions must reach the machine code. In 116 sound compilations
# (Triton 3.6 and 3.9; sm_80 and sm_90; products, attention forward and backward, loss, search,
# selection) every maximum, exponential and shuffle did. Of loads and stores 0.75 did where a mask
# is known to be false; tiles are powers of two, so for a well-chosen one it is less than half.
# Where ptxas 12.8 and 12.9 lose work, 0 to 0.43 of the maxima did.
KEPT = {
    "FMNMX": (re.compile(r"(max|min)\..*f32$"), 0.9),
    "MUFU.EX2": (re.compile(r"ex2\.approx\..*f32$"), 0.9),
    "SHFL": (re.compile(r"shfl\.sync\.bfly\."), 0.9),
    "LDG": (re.compile(r"ld\.global\."), 0.5),
    "LDGSTS": (re.compile(r"cp\.async\.c[ag]\."), 0.5),
    "STG": (re.compile(r"st\.global\."), 0.5),
}
# Equal quotients may differ in the last bit.
SLACK = 1e-9
ATOMIC = re.compile(r"(atom|red)\.(?!.*shared)")


def failures(limits: Limits, arch: int, found: Compiled) -> list[str]:
    """Every broken limit, in words: what, found, expected."""
    return [
        *_resources(limits, found),
        *_roles(limits, found),
        *_products(limits, arch, found),
        *_operations(limits, found),
    ]


def waste(limits: Limits, found: Compiled) -> float:
    """Tensor-core FLOPs that the program executes over the useful ones; 0 without products."""
    executed = flops(_shapes(found.ptx).elements(), found.num_warps)
    return executed / _useful(limits) if limits.products else 0.0


def alu_per_result(limits: Limits, found: Compiled) -> float:
    """Arithmetic instructions per result of the products, in the loop that multiplies most.

    The products must be as long as each other (K), and all of them in that loop. Infinite without
    such a loop.
    """
    opcodes = [found.code.instructions[i].opcode for i in main_loop(found.code, found.num_warps)]
    arithmetic = sum(opcode.split(".")[0] in ARITHMETIC for opcode in opcodes)
    shapes = filter(None, map(tensor_shape, opcodes))
    results = flops(shapes, found.num_warps) / (2 * limits.products[0][2])
    return arithmetic * 32 * found.num_warps / results if results else inf


def instructions(limits: Limits, found: Compiled) -> float:
    """Instructions per element of the result, as `Limits.elements` counts them."""
    return len(longest_loop(found.code)) * 32 * found.num_warps / limits.elements


def _resources(limits: Limits, found: Compiled) -> Iterator[str]:
    yield from _at_most("registers", found.registers, limits.registers)
    yield from _at_most("stack bytes", found.stack_bytes, limits.stack_bytes)
    if limits.shared_bytes is not None:
        shared = found.static_shared + found.dynamic_shared
        yield from _at_most("shared bytes", shared, limits.shared_bytes)
    yield from _at_least("blocks per multiprocessor", found.blocks_per_sm, limits.blocks_per_sm)


def _roles(limits: Limits, found: Compiled) -> Iterator[str]:
    parts = roles(found.code)
    registers = sorted(part.registers for part in parts)
    if registers != sorted(limits.roles):
        yield f"registers of the roles: found {registers}, expected {sorted(limits.roles)}"
    for part in parts:
        if part.products:
            most = limits.spills_in_loop
            yield from _at_most("spills in a role's main loop", part.spills_in_loop, most)


def _products(limits: Limits, arch: int, found: Compiled) -> Iterator[str]:
    planned = _shapes(found.ptx)
    if not limits.products:
        yield from _at_most("tensor-core instructions, none declared", planned.total(), 0)
        return
    real = _shapes(Counter(x.opcode for x in found.code.instructions if not is_empty(x)))
    empty = sum(is_empty(x) for x in found.code.instructions)
    yield from _at_most("empty tensor-core instructions", empty, 0)
    done = min(flops(shapes.elements(), found.num_warps) for shapes in (planned, real))
    yield from _at_least("tensor-core FLOPs", done, _useful(limits))
    if arch >= 90:
        yield from _at_most("HMMA", sum(n for (m, *_), n in real.items() if m == 16), limits.hmma)
    if not planned:
        return
    yield from _at_most("waste", waste(limits, found), limits.max_waste)
    # Padding alone may go: whole products of a warp, columns of a warp group's.
    needed = min(1 / waste(limits, found), 1)
    for (m, n, k), times in planned.items():
        least = times if m == 64 else needed * times
        yield from _at_least(f"products of {m}x{n}x{k}", real[m, n, k], least)
    if shares := read_shares(found.code):
        read = sum(size * share for size, share in shares) / sum(size for size, _ in shares)
        yield from _at_least("share of the products' results that is read", read, needed)


def _operations(limits: Limits, found: Compiled) -> Iterator[str]:
    opcodes = Counter(instruction.opcode for instruction in found.code.instructions)
    for name, least in limits.opcodes.items():
        yield from _at_least(name, count(opcodes, name), least)
    loop = main_loop(found.code, found.num_warps)
    looped = Counter(found.code.instructions[i].opcode for i in loop)
    for name, most in limits.loop_opcodes.items():
        yield from _at_most(f"{name} in the main loop", count(looped, name), most)
    if limits.alu_per_result is not None:
        per_result = alu_per_result(limits, found)
        yield from _at_most("arithmetic per result", per_result, limits.alu_per_result)
    if limits.instructions is not None:
        per_element = instructions(limits, found)
        yield from _at_most("instructions per element", per_element, limits.instructions)
    for name, (pattern, share) in KEPT.items():
        planned = _matching(found.ptx, pattern)
        least_kept = share * planned
        yield from _at_least(f"{name} for {planned} in the PTX", count(opcodes, name), least_kept)
    # Their order changes from run to run, and with it the rounding.
    yield from _at_most("global atomics", _matching(found.ptx, ATOMIC), 0)


def _matching(opcodes: Counter[str], pattern: re.Pattern[str]) -> int:
    return sum(n for opcode, n in opcodes.items() if pattern.match(opcode))


def _useful(limits: Limits) -> float:
    return sum(2 * m * n * k for m, n, k in limits.products)


def _shapes(opcodes: Counter[str]) -> Counter[tuple[int, int, int]]:
    """Tensor-core instructions by size."""
    shapes: Counter[tuple[int, int, int]] = Counter()
    for opcode, n in opcodes.items():
        if shape := tensor_shape(opcode):
            shapes[shape] += n
    return shapes


def _at_most(what: str, found: float, limit: float) -> Iterator[str]:
    if found > limit + SLACK:
        yield f"{what}: found {found:.8g}, expected at most {limit:.8g}"


def _at_least(what: str, found: float, limit: float) -> Iterator[str]:
    if found < limit - SLACK:
        yield f"{what}: found {found:.8g}, expected at least {limit:.8g}"
