"""The report's columns, as a table for people and as CSV."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from maect_fast.benchmarks.machine_code.assembly import (
    Code,
    count,
    main_loop,
    roles,
)
from maect_fast.benchmarks.machine_code.compile import Compiled, Job
from maect_fast.benchmarks.machine_code.gate import alu_per_result, instructions, waste

__all__ = ["columns", "loop_mix", "markdown", "write_csv"]

# Products of integers are in the same columns.
OPCODES = {
    "HGMMA": ("HGMMA", "IGMMA"),
    "HMMA": ("HMMA", "IMMA"),
    **{name: (name,) for name in ("LDGSTS", "SHFL", "BAR", "LDL", "STL")},
}
MIX_LENGTH = 8


def columns(job: Job, found: Compiled) -> dict[str, str]:
    """One line of the report."""
    opcodes = Counter(instruction.opcode for instruction in found.code.instructions)
    loads = ("LDG", "LDS", "LDGSTS")
    line: dict[str, object] = {
        "kernel": job.kernel,
        "row": job.row,
        "arch": f"sm_{job.arch}",
        "registers": found.registers,
        "stack": found.stack_bytes,
        "static shared": found.static_shared,
        "dynamic shared": found.dynamic_shared,
        "blocks/SM": found.blocks_per_sm,
        **{name: sum(count(opcodes, x) for x in same) for name, same in OPCODES.items()},
        "UTMA": sum(n for opcode, n in opcodes.items() if opcode.startswith("UTMA")),
        "128-bit loads": sum(
            n for opcode, n in opcodes.items() if opcode.split(".")[0] in loads and ".128" in opcode
        ),
        "roles: registers, spills (in the main loop)": "; ".join(
            f"{x.registers}, {x.spills} ({x.spills_in_loop})" for x in roles(found.code)
        ),
        "waste": f"{waste(job.limits, found):.2f}" if job.limits.products else "",
        "ALU/result": f"{alu_per_result(job.limits, found):.2f}"
        if job.limits.alu_per_result is not None
        else "",
        "instr/element": f"{instructions(job.limits, found):.2f}" if job.limits.elements else "",
        "innermost loop, per tensor-core instruction": loop_mix(found.code, found.num_warps),
        "backing": job.backing,
    }
    return {name: str(cell) for name, cell in line.items()}


def loop_mix(code: Code, num_warps: int) -> str:
    """Instructions of the innermost loop that multiplies most: ``16 x HGMMA: LDS 1.5, ...``."""

    loop = main_loop(code, num_warps)
    mix = Counter(_family(code.instructions[i].opcode) for i in loop)
    products = {name: mix.pop(name) for name in list(mix) if name.endswith("MMA")}
    if not products:
        return ""
    total = sum(products.values())
    rest = ", ".join(f"{name} {n / total:.1f}" for name, n in mix.most_common(MIX_LENGTH))
    return " + ".join(f"{n} x {name}" for name, n in products.items()) + f": {rest}"


def _family(opcode: str) -> str:
    """The instruction's name; MUFU's modifier says what it computes."""
    parts = opcode.split(".")
    return ".".join(parts[:2]) if parts[0] == "MUFU" else parts[0]


def markdown(lines: Sequence[dict[str, str]]) -> str:
    """A table that also reads well in a terminal."""
    cells = [list(lines[0]), *(list(line.values()) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:]])


def write_csv(path: Path, lines: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
