"""PTX and machine code (SASS) as plain data: instructions, loops, tensor-core products."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

__all__ = [
    "ARITHMETIC",
    "Code",
    "Instruction",
    "Role",
    "Shape",
    "count",
    "flops",
    "innermost_tensor_loops",
    "is_empty",
    "longest_loop",
    "main_loop",
    "parse_ptx",
    "parse_sass",
    "read_shares",
    "roles",
    "tensor_shape",
]

# M, N, K of one tensor-core instruction.
Shape = tuple[int, int, int]

PTX = re.compile(r"^\s*(?:@\S+\s+)?([a-z]\w*(?:\.[\w:]+)+)\s", re.MULTILINE)
SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*([^;]*);")
SASS_LABEL = re.compile(r"^(\.L\w+):")
SASS_TARGET = re.compile(r"\((\.L\w+)\)")
# What jumps to the label that it names; other names are of places where threads meet again.
JUMPS = ("BRA", "CALL", "WARPSYNC")
ENDS = ("EXIT", "RET", "BRX", "KILL")
# Per thread, on numbers: neither memory, control, tensor cores nor the warp's own (U...) registers.
ARITHMETIC = {
    *("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "FSET", "FCHK", "DADD", "DMUL", "DFMA"),
    *("DSETP", "HADD2", "HMUL2", "HFMA2", "HMNMX2", "HSETP2", "MUFU", "F2F", "F2FP", "F2I", "I2F"),
    *("I2FP", "IADD3", "IMAD", "IMUL", "IMNMX", "IABS", "ISETP", "VIADD", "VIMNMX", "VIMNMX3"),
    *("VIADDMNMX", "LEA", "LOP3", "SHF", "SEL", "PRMT", "POPC", "FLO", "BREV", "MOV"),
}
WIDE = re.compile(r"MMA|\.128|\.M88\.4")
REGISTER = re.compile(r"\bR(\d+)\b")
# A warp group's HGMMA.64x128x16 or wgmma m64n128k16, a warp's HMMA.16816 or mma m16n8k16; also of
# integers (I) and eight-bit floats (Q).
SHAPE = re.compile(
    r"^(?:[HIQ]GMMA\.(\d+)x(\d+)x(\d+)|[HIQ]MMA\.(16)(8)(\d+)|"
    r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.m(\d+)n(\d+)k(\d+))\b"
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One machine instruction."""

    opcode: str
    """With its modifiers: ``HMMA.16816.F32.BF16``."""
    operands: str
    guard: str = ""
    """The predicate under which it is executed: ``@!P0``; empty for always."""


@dataclass(frozen=True, slots=True)
class Code:
    """The machine code of a kernel."""

    instructions: list[Instruction]
    loops: list[range]
    """Index ranges, from the target of a backward branch to the branch."""
    labels: dict[str, int] = field(default_factory=dict)
    """Indices of the instructions behind them."""


@dataclass(frozen=True, slots=True)
class Role:
    """What one warp group does of a kernel whose warp groups have roles."""

    registers: int
    """Per thread, that it takes for itself."""
    code: range
    """Of its instructions, up to where it gives the registers back."""
    products: int
    spills: int
    """Loads and stores of the stack."""
    spills_in_loop: int
    """Of these, in the innermost loop that multiplies most."""


def parse_ptx(text: str) -> Counter[str]:
    """How often each PTX instruction is there, modifiers included."""
    return Counter(PTX.findall(text))


def parse_sass(text: str) -> Code:
    """Instructions and loops of a listing by `nvdisasm -c`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    for line in text.splitlines():
        if label := SASS_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := SASS.match(line):
            guard, opcode, operands = found.groups(default="")
            instructions.append(Instruction(opcode, operands, guard.strip()))
            target = SASS_TARGET.search(operands)
            if opcode.startswith("BRA") and target and target[1] in labels:
                ends[labels[target[1]]] = len(instructions)
    return Code(instructions, [range(start, end) for start, end in ends.items()], labels)


def count(opcodes: Counter[str], name: str) -> int:
    """How many are `name`, whatever modifiers follow: ``LDG`` counts ``LDG.E.128``."""
    return sum(n for opcode, n in opcodes.items() if f"{opcode}.".startswith(f"{name}."))


def tensor_shape(opcode: str) -> Shape | None:
    """Sizes of a tensor-core instruction, of PTX or of the machine; None for any other."""
    if not (found := SHAPE.match(opcode)):
        return None
    m, n, k = (int(size) for size in found.groups() if size)
    return m, n, k


def flops(shapes: Iterable[Shape], num_warps: int) -> int:
    """What all warps of a block execute: four warps together, or each warp its own (M = 16)."""
    return sum(2 * m * n * k * (num_warps // 4 if m == 64 else num_warps) for m, n, k in shapes)


def innermost_tensor_loops(code: Code) -> list[range]:
    """Loops with tensor-core instructions around no other such loop."""
    products = [i for i, x in enumerate(code.instructions) if tensor_shape(x.opcode)]
    loops = [loop for loop in code.loops if any(i in loop for i in products)]
    return [
        loop
        for loop in loops
        if not any(inner != loop and inner[0] in loop and inner[-1] in loop for inner in loops)
    ]


def roles(code: Code) -> list[Role]:
    """The roles that multiply or copy, in the order of the machine code; empty without any."""
    changes = [i for i, x in enumerate(code.instructions) if x.opcode.startswith("USETMAXREG")]
    found = []
    for start, end in pairwise([*changes, len(code.instructions)]):
        part = range(start, end)
        opcodes = {i: code.instructions[i].opcode for i in part}
        products = [i for i in part if tensor_shape(opcodes[i])]
        if not products and not any(x.startswith("LDGSTS") for x in opcodes.values()):
            continue
        spills = [i for i in part if opcodes[i].startswith(("LDL", "STL"))]
        # Where a wait begins again, at the end of the program, is no loop of the role's.
        own = Code(code.instructions, [x for x in code.loops if x[0] in part and x[-1] in part])
        loop = main_loop(own, 4)
        found.append(
            Role(
                registers=int(code.instructions[start].operands.split()[-1], 16),
                code=part,
                products=len(products),
                spills=len(spills),
                spills_in_loop=sum(i in loop for i in spills),
            )
        )
    return found


def main_loop(code: Code, num_warps: int) -> range:
    """The innermost loop that multiplies most; empty if none does."""

    def work(loop: range) -> int:
        shapes = (tensor_shape(code.instructions[i].opcode) for i in loop)
        return flops(filter(None, shapes), num_warps)

    return max(innermost_tensor_loops(code), key=work, default=range(0))


def longest_loop(code: Code) -> list[Instruction]:
    """Its instructions, or the program's if it has no loop; without what fills up a cache line."""
    # A kernel ends in a branch to itself, which nothing reaches.
    loops = [loop for loop in code.loops if len(loop) > 1]
    loop = max(loops, key=len, default=range(len(code.instructions)))
    return [code.instructions[i] for i in loop if code.instructions[i].opcode != "NOP"]


def is_empty(instruction: Instruction) -> bool:
    """Whether it is a tensor-core instruction that throws its product away."""
    return bool(tensor_shape(instruction.opcode)) and instruction.operands.startswith("RZ,")


def read_shares(code: Code) -> list[tuple[int, float]]:
    """For each warp-group product, its size and the share of its result that anything may read.

    A compiler can keep the products and still take their results for zero.
    """
    needed = _read_later(code)
    shares = []
    for instruction, after in zip(code.instructions, needed, strict=True):
        if result := _result(instruction):
            used = sum(after >> register & 1 for register in result)
            shares.append((len(result), used / len(result)))
    return shares


def _read_later(code: Code) -> list[int]:
    """Registers, as bits, that are read behind each instruction, on some way, before a new value.

    What is written under a predicate may keep the old one.
    """
    next_ones = [_successors(code, i) for i in range(len(code.instructions))]
    touched = [_registers(x) for x in code.instructions]
    read = [_bits(used) for _, used in touched]
    kept = [
        ~0 if x.guard else ~_bits(written)
        for x, (written, _) in zip(code.instructions, touched, strict=True)
    ]
    before = [0] * (len(code.instructions) + 1)
    after = [0] * len(code.instructions)
    has_changed = True
    while has_changed:
        has_changed = False
        for i in reversed(range(len(after))):
            found = 0
            for j in next_ones[i]:
                found |= before[j]
            after[i] = found
            found = read[i] | (found & kept[i])
            has_changed |= found != before[i]
            before[i] = found
    return after


def _bits(registers: set[int]) -> int:
    return sum(1 << register for register in registers)


def _successors(code: Code, i: int) -> list[int]:
    """What may be executed after instruction i; the index behind the last is the end."""
    instruction = code.instructions[i]
    name, *modifiers = instruction.opcode.split(".")
    found = []
    target = SASS_TARGET.search(instruction.operands) if name in JUMPS else None
    if target and target[1] in code.labels:
        found.append(code.labels[target[1]])
    # A branch may also be one by its modifier or by a predicate among its operands.
    is_sure = not instruction.guard and "DIV" not in modifiers
    if name == "BRA":
        is_sure = is_sure and bool(target) and instruction.operands.startswith("`")
    if not (is_sure and name in ("BRA", *ENDS)):
        found.append(i + 1)
    return found


def _result(instruction: Instruction) -> range:
    """Registers that hold a warp-group product; empty for any other instruction."""
    shape = tensor_shape(instruction.opcode)
    first = REGISTER.match(instruction.operands)
    if not shape or shape[0] != 64 or not first:
        return range(0)
    # 64 x N values on 128 threads; of fp16 accumulators two share a register.
    size = shape[1] // (4 if instruction.opcode.split(".")[2] == "F16" else 2)
    return range(int(first[1]), int(first[1]) + size)


def _registers(instruction: Instruction) -> tuple[set[int], set[int]]:
    """Registers written and read; an accumulator only passes through a warp-group product."""
    opcode, operands = instruction.opcode, instruction.operands.split(", ")
    if result := _result(instruction):
        return set(result if "RZ" in operands[2:] else ()), _named(operands[1:2], 4)
    size = 4 if WIDE.search(opcode) else 2 if ".64" in opcode or ".WIDE" in opcode else 1
    # SHFL puts a predicate first.
    target = 1 if opcode.startswith("SHFL") else 0
    if not REGISTER.match(operands[target]):
        return set(), _named(operands, size)
    sources = operands[:target] + operands[target + 1 :]
    return _named([operands[target]], size), _named(sources, 4 if "MMA" in opcode else 1)


def _named(operands: list[str], size: int) -> set[int]:
    """Registers named, each the first of `size`."""
    first = [int(register) for operand in operands for register in REGISTER.findall(operand)]
    return {register + i for register in first for i in range(size)}
