"""What the compiler made of the C++ library: products that stay in registers, no code too new.

Every op has a table of functions per instruction set, `maect_fast::<op>::<set>`. All code of the
file that these functions come from belongs to the set; other code must run on any x86-64 CPU.
"""

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from maect_fast.benchmarks.machine_code.assembly import Code, Instruction
from maect_fast.benchmarks.machine_code.report import markdown
from maect_fast.kernels._common import cpp

__all__ = ["PRODUCTS", "TILES", "Function", "Loop", "failures", "loops", "main", "read", "why_not"]


@dataclass(frozen=True, slots=True)
class Tile:
    """The innermost loop over a tile of accumulators."""

    product: str
    """Its multiply-add, as a regular expression."""
    register: str
    products: int
    """At least so many per trip: 2 * kTileRows (kernels/_common/simd.h), four tiles with AMX."""


FMA = r"vfmadd(132|213|231)ps"
TILES = {
    "avx2": Tile(FMA, "ymm", 8),
    "avx512": Tile(FMA, "zmm", 16),
    "avx512_bf16": Tile("vdpbf16ps", "zmm", 16),
    "avx512_vnni": Tile("vpdpbusd", "zmm", 16),
    "amx_bf16": Tile("tdpbf16ps", "tmm", 4),
}
# The functions of each op that multiply tile by tile.
PRODUCTS = {"info_nce": ("accumulate", "score"), "queue_topk": ("score",)}

# Address, flags, size and name of a line of `objdump -t`.
SYMBOL = re.compile(r"^([0-9a-f]+) (.{7}) \S+\t([0-9a-f]+)\s+(?:\.hidden )?(.*)$", re.MULTILINE)
RELOCATION = re.compile(r"^([0-9a-f]+) R_X86_64_RELATIVE\s+\*ABS\*\+0x([0-9a-f]+)$", re.MULTILINE)
TABLE = re.compile(rf"maect_fast::(\w+)::({'|'.join(TILES)})")
HEADER = re.compile(r"([0-9a-f]+) <(.*)>:")
# Address, bytes, mnemonic and operands.
LINE = re.compile(r"\s*([0-9a-f]+):\t((?:[0-9a-f]{2} )+)\s*\t(\S+)\s*(.*)")
# Prefixes, then VEX or EVEX: in 64-bit mode these bytes begin nothing else.
TOO_NEW = re.compile(r"((26|2e|36|3e|64|65|67) )*(c4|c5|62) ")


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the library."""

    name: str
    op: str
    """Empty, as is the next, for code that must run on every CPU."""
    simd: str
    code: Code
    too_new: str
    """Its first instruction that needs AVX or later extensions, or nothing."""


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop with products, and what one trip does."""

    op: str
    simd: str
    function: str
    products: int
    others: int
    stack: int
    """Vectors read from the stack or written to it."""
    stores: int
    """Vectors written to any memory."""


def why_not(library: Path) -> str | None:
    """Why the library's machine code cannot be read here; None if it can."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        return f"expected an x86-64 CPU, got {platform.machine()}"
    if shutil.which("objdump") is None:
        return "objdump is not there: install binutils"
    if not library.exists():
        return f"{library} is not there: run `make install` with a C++17 compiler"
    return None


def read(library: Path) -> list[Function]:
    """Every function of a shared library."""
    file_of, tables = _symbols(library)
    simd_of = {file_of[address]: table for address, table in tables.items() if address in file_of}
    functions = []
    for address, name, lines in _disassembly(library):
        op, simd = simd_of.get(file_of.get(address, 0), ("", ""))
        new = (f"{line[2]} {line[3]}" for line in lines if TOO_NEW.match(line[1]))
        functions.append(Function(name, op, simd, _code(lines), next(new, "")))
    return functions


def loops(functions: Sequence[Function]) -> list[Loop]:
    """The innermost loops with products, of all functions that multiply tile by tile."""
    chosen = [x for x in functions if x.simd and _short(x.name) in PRODUCTS.get(x.op, ())]
    found = [loop for function in chosen for loop in _loops(function)]
    return sorted(found, key=lambda loop: (loop.op, loop.simd, loop.function))


def failures(functions: Sequence[Function]) -> Iterator[str]:
    """Every broken rule, in words: where, expected, found."""
    for function in functions:
        if not function.simd and function.too_new:
            yield f"{function.name}: expected code for every x86-64 CPU, found {function.too_new}"
        if function.simd and function.name.startswith("_GLOBAL__sub_I"):
            yield f"{function.op} {function.simd}: expected no code that runs when loaded"
    tables = {(function.op, function.simd) for function in functions if function.simd}
    for op in sorted(PRODUCTS.keys() ^ {op for op, _ in tables}):
        yield f"{op}: expected tables of functions and a line in PRODUCTS, found one of the two"
    found = loops(functions)
    for op, simd in sorted(tables):
        for name in PRODUCTS.get(op, ()):
            own = [
                loop for loop in found if (loop.op, loop.simd, loop.function) == (op, simd, name)
            ]
            least, most = TILES[simd].products, max((loop.products for loop in own), default=0)
            if most < least:
                yield f"{op} {simd} {name}: expected a loop of {least} products, found {most}"
            if stack := sum(loop.stack for loop in own):
                yield f"{op} {simd} {name}: expected no vectors on the stack, found {stack}"
            if stores := sum(loop.stores for loop in own):
                yield f"{op} {simd} {name}: expected no vectors written, found {stores}"


def main() -> int:
    """Print the loops and what is refused; 1 if anything is."""
    if reason := why_not(cpp.LIBRARY):
        print(f"C++ library left out: {reason}")
        return 0
    functions = read(cpp.LIBRARY)
    lines = [{key: str(cell) for key, cell in asdict(loop).items()} for loop in loops(functions)]
    if lines:
        print(markdown(lines))
    refused = list(failures(functions))
    for line in refused:
        print(f"REFUSED {line}")
    print(f"C++ library: {len(functions)} functions, {len(refused)} refused")
    return 1 if refused else 0


def _loops(function: Function) -> Iterator[Loop]:
    tile = TILES[function.simd]
    product = re.compile(rf"{tile.product} .*%{tile.register}")
    texts = [f"{x.opcode} {x.operands}" for x in function.code.instructions]
    products = {i for i, text in enumerate(texts) if product.match(text)}
    around = [loop for loop in function.code.loops if not products.isdisjoint(loop)]
    # %rbp is the stack's only where it was set so, else a register like any other.
    stack = re.compile(r"\(%r[sb]p" if "mov %rsp,%rbp" in texts else r"\(%rsp")
    for loop in around:
        if any(o != loop and o[0] in loop and o[-1] in loop for o in around):
            continue
        vectors = [texts[i] for i in loop if re.search("%[xyz]mm", texts[i])]
        num_products = len(products.intersection(loop))
        yield Loop(
            op=function.op,
            simd=function.simd,
            function=_short(function.name),
            products=num_products,
            others=len(loop) - num_products,
            stack=sum(bool(stack.search(text)) for text in vectors),
            # The result comes last, perhaps with a mask.
            stores=sum(bool(re.search(r"\)(\{.*\})?$", text)) for text in vectors),
        )


def _short(name: str) -> str:
    """A function's own name, without namespaces, template arguments and arguments."""
    found = re.search(r"(\w+)(<.*>)?\(", name.replace("(anonymous namespace)", ""))
    return found[1] if found else name


def _symbols(library: Path) -> tuple[dict[int, int], dict[int, tuple[str, str]]]:
    """The file, as a number, of every local function; the table of every function in one."""
    file_of: dict[int, int] = {}
    extents = []
    file = 0
    for at, flags, size, name in SYMBOL.findall(_objdump(library, "-t", "-C")):
        address = int(at, 16)
        if flags.endswith("df"):
            file += 1
        elif flags.startswith("l") and flags.endswith("F"):
            file_of[address] = file
        elif table := TABLE.fullmatch(name):
            extents.append((range(address, address + int(size, 16)), (table[1], table[2])))
    pointers = [
        (int(at, 16), int(to, 16)) for at, to in RELOCATION.findall(_objdump(library, "-R"))
    ]
    tables = {to: table for at, to in pointers for extent, table in extents if at in extent}
    return file_of, tables


Line = tuple[int, str, str, str]


def _disassembly(library: Path) -> list[tuple[int, str, list[Line]]]:
    """Address, name and lines (address, bytes, mnemonic, operands) of every function."""
    functions: list[tuple[int, str, list[Line]]] = []
    for text in _objdump(library, "-d", "-C", "-w").splitlines():
        if header := HEADER.fullmatch(text):
            functions.append((int(header[1], 16), header[2], []))
        elif line := LINE.fullmatch(text):
            operands = line[4].partition("#")[0].strip()
            functions[-1][2].append((int(line[1], 16), line[2], line[3], operands))
    return functions


def _code(lines: Sequence[Line]) -> Code:
    index = {address: i for i, (address, *_) in enumerate(lines)}
    ends: dict[int, int] = {}
    for i, (_, _, opcode, operands) in enumerate(lines):
        target = re.match(r"([0-9a-f]+) <", operands) if opcode.startswith("j") else None
        start = index.get(int(target[1], 16)) if target else None
        if start is not None and start <= i:
            ends[start] = i + 1
    instructions = [Instruction(opcode, operands) for *_, opcode, operands in lines]
    return Code(instructions, [range(start, end) for start, end in ends.items()])


def _objdump(library: Path, *options: str) -> str:
    command = ["objdump", *options, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
