"""The machine-code gate passes what is sound, refuses what is not, and says which and why."""

import csv
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from maect_fast import doctor
from maect_fast.benchmarks.machine_code import controls
from maect_fast.benchmarks.machine_code.assembly import (
    count,
    innermost_tensor_loops,
    parse_ptx,
    parse_sass,
    read_shares,
    roles,
    tensor_shape,
)
from maect_fast.benchmarks.machine_code.cli import registered
from maect_fast.benchmarks.machine_code.compile import Compiled, blocks_per_sm
from maect_fast.benchmarks.machine_code.gate import failures, instructions
from maect_fast.benchmarks.machine_code.ptxas import drops_work, ptxas_in_use
from maect_fast.benchmarks.machine_code.report import loop_mix
from maect_fast.kernels._common.launch import (
    H200,
    LaunchRow,
    Limits,
    fitting,
    tables_in_use,
    triton_minor,
)
from maect_fast.kernels.masked_attention.op import GLUON_RELEASES

CONTROLS = "maect_fast.benchmarks.machine_code.controls"

# One slice of a product of 64 x 16 x 16 in fp32: R24..R31, of which the epilogue reads four.
LOOP = [
    "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT",
    "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
    "FMNMX R2, R24, R25.reuse, !PT",
    "STG.E.64 desc[UR6][R8.64], R26",
    "MUFU.EX2 R28, R2",
    "FADD R3, R28, R28",
]


def listing(instructions: Sequence[str], loop: slice = slice(0, 0)) -> str:
    """As nvdisasm prints it, labels among the lines, with a loop around some of them."""
    lines = [
        text if text.endswith(":") else f"        /*{16 * i:04x}*/   {text} ;"
        for i, text in enumerate(instructions)
    ]
    if loop.stop:
        lines.insert(loop.stop, "        /*ffff*/              @!P0 BRA `(.L_x_0) ;")
        lines.insert(loop.start, ".L_x_0:")
    return "\n".join([".text.kernel:", *lines, "        /*fff0*/   EXIT ;"])


def test_loops_and_their_instruction_mix() -> None:
    code = parse_sass(listing(["MOV R1, R2", *LOOP], slice(1, 7)))
    assert len(code.instructions) == 9
    assert code.loops == [range(1, 8)]
    assert innermost_tensor_loops(code) == code.loops
    assert loop_mix(code, 4) == "2 x HGMMA: FMNMX 0.5, STG 0.5, MUFU.EX2 0.5, FADD 0.5, BRA 0.5"
    assert loop_mix(parse_sass(listing(["MOV R1, R2", *LOOP])), 4) == ""


def test_an_inner_loop_without_products_is_not_the_tensor_loop() -> None:
    inner = [".L_x_1:", "        /*0010*/  FADD R1, R2, R3 ;", "        /*0020*/  BRA `(.L_x_1) ;"]
    text = listing(LOOP, slice(0, 6)).splitlines()
    code = parse_sass("\n".join([*text[:5], *inner, *text[5:]]))
    assert len(code.loops) == 2
    assert innermost_tensor_loops(code) == [max(code.loops, key=len)]


@pytest.mark.parametrize("loop", [slice(0, 0), slice(0, 6)], ids=["straight", "loop"])
def test_results_that_nothing_reads_are_noticed(loop: slice) -> None:
    """R24 to R27 are read, R28 is overwritten before it is read, R29 to R31 are never read."""
    assert read_shares(parse_sass(listing(LOOP, loop))) == [(8, 0.5), (8, 0.5)]


@pytest.mark.parametrize(
    ("kind", "size"),
    [("HGMMA.64x16x16.F32", 8), ("HGMMA.64x16x16.F16", 4), ("IGMMA.64x16x32.S8.S8", 8)],
)
def test_a_result_has_as_many_registers_as_its_type_needs(kind: str, size: int) -> None:
    code = parse_sass(listing([f"{kind} R24, gdesc[UR4], RZ, !UPT"]))
    assert read_shares(code) == [(size, 0.0)]


def test_results_read_at_the_head_of_the_next_trip_are_read() -> None:
    reads = [f"FADD R2, R2, R{i}" for i in range(24, 32)]
    code = parse_sass(listing([*reads, *LOOP[:2]], slice(0, 10)))
    assert read_shares(code) == [(8, 1.0), (8, 1.0)]


def test_results_read_after_the_loop_are_read() -> None:
    reads = [f"FADD R2, R2, R{i}" for i in range(24, 32)]
    code = parse_sass(listing([LOOP[1], *reads], slice(0, 1)))
    assert read_shares(code) == [(8, 1.0)]


READS = [f"FADD R2, R2, R{i}" for i in range(24, 32)]
ZEROS = [f"MOV R{i}, RZ" for i in range(24, 32)]


@pytest.mark.parametrize(
    ("behind_the_loop", "share"),
    [
        ("BRA `(.L_x_2)", 1.0),
        ("@P2 BRA `(.L_x_2)", 1.0),
        ("BRA P2, `(.L_x_2)", 1.0),
        ("BRA.DIV UR4, `(.L_x_2)", 1.0),
        ("BRA `(.L_x_1)", 0.0),
        ("@P2 EXIT", 0.0),
        ("EXIT", 0.0),
        ("BSSY B0, `(.L_x_2)", 0.0),
    ],
)
def test_the_branch_for_no_trip_overwrites_nothing(behind_the_loop: str, share: float) -> None:
    """It lies between the loop and what reads the sums, in the listing alone."""
    code = parse_sass(
        listing(
            [
                *("@P0 BRA `(.L_x_1)", ".L_x_0:", LOOP[1], "@!P1 BRA `(.L_x_0)", behind_the_loop),
                *(".L_x_1:", *ZEROS, ".L_x_2:", *READS),
            ]
        )
    )
    assert read_shares(code) == [(8, share)]


def test_what_is_written_under_a_predicate_may_keep_the_product() -> None:
    for guard, share in (("@P0 ", 1.0), ("", 0.0)):
        zeros = [guard + x for x in ZEROS]
        assert read_shares(parse_sass(listing([LOOP[1], *zeros, *READS]))) == [(8, share)]


@pytest.mark.parametrize(
    ("opcode", "shape"),
    [
        ("HGMMA.64x128x16.F32.BF16", (64, 128, 16)),
        ("IGMMA.64x256x32.S8.S8", (64, 256, 32)),
        ("HMMA.16816.F32.BF16", (16, 8, 16)),
        ("HMMA.1688.F32.TF32", (16, 8, 8)),
        ("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16", (64, 16, 16)),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", (16, 8, 16)),
        ("FMNMX", None),
        ("wgmma.fence.sync.aligned", None),
    ],
)
def test_shapes_of_tensor_core_instructions(
    opcode: str, shape: tuple[int, int, int] | None
) -> None:
    assert tensor_shape(opcode) == shape


def test_ptx_instructions_are_counted_with_and_without_predicate() -> None:
    text = "$L__BB0_1:\n\t@!%p1 st.global.v4.b32 [ %rd1 ], { %r1 };\n\tst.global.b32 [%rd1], %r1;"
    assert parse_ptx(text) == {"st.global.v4.b32": 1, "st.global.b32": 1}
    opcodes = Counter({"LDG.E.128": 2, "LDGSTS.E.128": 3})
    assert count(opcodes, "LDG") == 2


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared", "blocks"),
    [
        (80, 4, 168, 30 * 1024, 3),  # 12 warps of 5376 registers
        (80, 4, 255, 0, 2),
        (80, 8, 255, 0, 1),
        (80, 4, 128, 20 * 1024, 4),
        (80, 4, 32, 163 * 1024, 1),
        (80, 4, 32, 163 * 1024 + 1, 0),
        (90, 4, 168, 95 * 1024, 2),
        (90, 4, 32, 227 * 1024, 1),
        (90, 4, 32, 227 * 1024 + 1, 0),
        (90, 1, 16, 0, 32),
        (90, 32, 32, 0, 2),
    ],
)
def test_blocks_per_multiprocessor(
    arch: int, num_warps: int, registers: int, shared: int, blocks: int
) -> None:
    found = blocks_per_sm(arch, num_warps=num_warps, registers=registers, shared=shared)
    assert found == blocks


SOUND = Compiled(
    num_warps=4,
    registers=100,
    stack_bytes=0,
    static_shared=16,
    dynamic_shared=1000,
    blocks_per_sm=4,
    ptx=Counter(
        {
            "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16": 2,
            "max.f32": 1,
            "ex2.approx.ftz.f32": 1,
            "st.global.v2.b32": 1,
        }
    ),
    code=parse_sass(listing([*LOOP[:4], "STG.E.128 desc[UR6][R8.64], R28", *LOOP[4:]])),
)
LIMITS = Limits(
    registers=100,
    shared_bytes=1016,
    blocks_per_sm=4,
    products=((64, 16, 16), (64, 15, 16)),
    max_waste=1.04,
    opcodes={"FMNMX": 1},
)


def sass(*instructions: str) -> Compiled:
    return replace(SOUND, code=parse_sass(listing(instructions)))


def test_a_sound_kernel_at_its_limits_passes() -> None:
    assert failures(LIMITS, 90, SOUND) == []


@pytest.mark.parametrize(
    ("limits", "found", "message"),
    [
        (replace(LIMITS, registers=99), SOUND, "registers: found 100, expected at most 99"),
        (LIMITS, replace(SOUND, stack_bytes=8), "stack bytes: found 8, expected at most 0"),
        (replace(LIMITS, shared_bytes=1015), SOUND, "shared bytes: found 1016, expected"),
        (replace(LIMITS, blocks_per_sm=5), SOUND, "blocks per multiprocessor: found 4, expected"),
        (replace(LIMITS, max_waste=1.03), SOUND, "waste: found 1.032"),
        (replace(LIMITS, products=((64, 33, 16),), max_waste=2), SOUND, "tensor-core FLOPs: found"),
        (replace(LIMITS, products=()), SOUND, "tensor-core instructions, none declared: found 2"),
        (replace(LIMITS, opcodes={"LDG.E.128": 1}), SOUND, "LDG.E.128: found 0, expected"),
        (
            LIMITS,
            replace(SOUND, ptx=SOUND.ptx + Counter({"red.global.gpu.add.f32": 1})),
            "global atomics: found 1",
        ),
        (
            LIMITS,
            replace(SOUND, ptx=SOUND.ptx + Counter({"max.f32": 1})),
            "FMNMX for 2 in the PTX: found 1, expected at least 1.8",
        ),
        (LIMITS, sass(*LOOP), "share of the products' results that is read: found 0.5, expected"),
        (LIMITS, sass(LOOP[0], *LOOP[2:]), "products of 64x16x16: found 1, expected at least 2"),
        (
            LIMITS,
            sass(*(x.replace("64x16x16.F32.BF16 R24", "64x8x16.F16 RZ") for x in LOOP)),
            "empty tensor-core instructions: found 2, expected at most 0",
        ),
        (LIMITS, sass(*LOOP, "HMMA.16816.F32 R4, R8, R12, R4"), "HMMA: found 1, expected at most"),
    ],
)
def test_each_broken_limit_is_named(limits: Limits, found: Compiled, message: str) -> None:
    assert [line for line in failures(limits, 90, found) if line.startswith(message)]


def test_the_main_loop_has_limits_of_its_own() -> None:
    """Three arithmetic instructions of 128 threads for two products of 64 x 16."""
    looped = replace(SOUND, code=parse_sass(listing([*LOOP, "SHFL R4, R5"], slice(0, 6))))
    limits = replace(LIMITS, max_waste=2, loop_opcodes={"FADD": 1, "SHFL": 0})
    assert failures(replace(limits, alu_per_result=0.1875), 90, looped) == failures(
        replace(LIMITS, max_waste=2), 90, looped
    )
    strict = replace(limits, loop_opcodes={"FADD": 0, "SHFL": 0}, alu_per_result=0.187)
    found = [
        line for line in failures(strict, 90, looped) if "main loop" in line or "per r" in line
    ]
    assert found == [
        "FADD in the main loop: found 1, expected at most 0",
        "arithmetic per result: found 0.1875, expected at most 0.187",
    ]
    assert any("arithmetic per result: found inf" in x for x in failures(strict, 90, SOUND))


def test_kernels_bound_by_bytes_have_a_limit_per_element() -> None:
    """128 threads for 512 numbers: four instructions in the loop, or nine without padding."""
    limits = Limits(registers=100, elements=512, instructions=1)
    body = ["LDG.E.128 R4, R2", *["FADD R4, R4, R5"] * 5, "STG.E.128 R2, R4"]
    end = "\n/*fff1*/ NOP ;\n.L_x_9:\n/*fff2*/ BRA `(.L_x_9) ;\n/*fff3*/ NOP ;"
    looped, straight = (
        replace(SOUND, ptx=Counter(), code=parse_sass(listing(body, loop) + end))
        for loop in (slice(1, 4), slice(0, 0))
    )
    assert failures(limits, 90, looped) == []
    message = "instructions per element: found 2.25, expected at most 1"
    assert failures(limits, 90, straight) == [message]
    assert instructions(limits, straight) == 2.25


ROLES = [
    "STL [R1], R8",
    "USETMAXREG.DEALLOC.CTAPOOL 0x28",
    "LDL R8, [R1]",
    "LDGSTS.E.128 [R2], desc[UR6][R4.64]",
    "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8",
    "LDL R8, [R1]",
    *LOOP[:4],
    "STG.E.128 desc[UR6][R8.64], R28",
    *LOOP[4:],
    "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x100",
]


def test_warp_groups_have_roles_with_registers_of_their_own() -> None:
    """The producer copies and reads the stack, the consumer does so before its loop."""
    found = replace(SOUND, stack_bytes=8, code=parse_sass(listing(ROLES, slice(6, 13))))
    producer, consumer = roles(found.code)
    assert (producer.registers, producer.products, producer.spills) == (40, 0, 1)
    assert (consumer.registers, consumer.products, consumer.spills) == (232, 2, 1)
    assert producer.spills_in_loop == consumer.spills_in_loop == 0
    limits = replace(LIMITS, stack_bytes=8, roles=(232, 40))
    assert failures(limits, 90, found) == []
    message = "registers of the roles: found [40, 232], expected [40, 224]"
    assert failures(replace(limits, roles=(224, 40)), 90, found) == [message]
    assert failures(LIMITS, 90, SOUND) == []


def test_a_role_that_multiplies_must_not_spill_in_its_main_loop() -> None:
    found = replace(SOUND, stack_bytes=8, code=parse_sass(listing(ROLES, slice(5, 13))))
    limits = replace(LIMITS, stack_bytes=8, roles=(232, 40))
    message = "spills in a role's main loop: found 1, expected at most 0"
    assert failures(limits, 90, found) == [message]


def test_the_compiler_may_leave_out_padding() -> None:
    """Warps' products of a masked tail go, as long as the useful ones stay."""
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    found = replace(sass(*["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 7), ptx=Counter({mma: 8}))
    limits = Limits(registers=100, products=((64, 50, 16),), max_waste=1.28)
    assert failures(limits, 80, found) == []
    less = replace(sass(*["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 6), ptx=Counter({mma: 8}))
    assert any("products of 16x8x16" in line for line in failures(limits, 80, less))


@pytest.mark.parametrize(
    ("release", "arch", "words"),
    [
        ((3, 6), 90, "Triton 3.6, sm_90"),
        ((3, 9), 80, "Triton 3.6 (nearest to 3.9), sm_80"),
        ((3, 6), 100, "Triton 3.6, sm_90 (nearest to sm_100)"),
        ((3, 6), 120, "Triton 3.6, sm_86 (nearest to sm_120)"),
    ],
)
def test_an_unlisted_release_or_device_takes_the_nearest_tables(
    release: tuple[int, int], arch: int, words: str
) -> None:
    assert tables_in_use(release, arch) == words


def test_the_launch_table_is_read_for_architecture_and_triton_release() -> None:
    row = LaunchRow(
        label="a", num_warps=4, num_stages=1, blocks={}, sizes={}, limits=Limits(registers=1)
    )
    major, minor = triton_minor()
    newer = replace(row, triton_from=(major, minor + 1))
    older = replace(row, triton_below=(major, minor))
    here = replace(row, triton_from=(major, minor), triton_below=(major, minor + 1), archs=(80,))
    assert fitting([newer, row, older, here], 80) == [row, here]
    assert fitting([newer, row, older, here], 90) == [row]


def test_kernels_register_by_their_file(tmp_path: Path) -> None:
    assert registered(tmp_path) == []
    for op in ("queue_topk", "info_nce"):
        (tmp_path / op).mkdir()
        (tmp_path / op / "triton_kernel.py").touch()
    (tmp_path / "info_nce" / "gluon_kernel.py").touch()
    (tmp_path / "_common").mkdir()
    names = [f"maect_fast.kernels.info_nce.{kind}_kernel" for kind in ("gluon", "triton")]
    assert registered(tmp_path) == [*names, "maect_fast.kernels.queue_topk.triton_kernel"]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, where kernels are compiled: this one may interpret them."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_block_may_do_without_shared_memory() -> None:
    """Then the cubin of sm_90 does not count what the system takes either."""
    module = "maect_fast.kernels.queue_topk.triton_kernel"
    source = (
        f"from importlib import import_module; kernels = import_module('{module}')\n"
        "from maect_fast.benchmarks.machine_code.compile import compile_source, jobs\n"
        "launches = [x for x in kernels.machine_code(90) if x.row.label == 'pointer']\n"
        "(job,) = jobs('queue_topk', launches[0], 90)\n"
        "found = compile_source(job.source)\n"
        "assert found.static_shared == found.dynamic_shared == 0\n"
        "assert found.blocks_per_sm == 32\n"
    )
    done = python("-c", source)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[dict[str, str]]]:
    """Lines and table of a run over the controls and over kernels that break the rules."""
    table = tmp_path_factory.mktemp("machine_code") / "table.csv"
    modules = ("--module", CONTROLS, "machine_code_kernels")
    done = python("-m", "maect_fast.benchmarks.machine_code", *modules, "--csv", str(table))
    assert done.returncode == 1, done.stderr
    with table.open() as file:
        return done.stdout.splitlines(), list(csv.DictReader(file))


@pytest.mark.parametrize("arch", [80, 90])
def test_the_controls_are_judged_rightly(
    refused: tuple[list[str], list[dict[str, str]]], arch: int
) -> None:
    lines, _ = refused
    name = "REFUSED controls.group_maxima_kernel [{}] sm_{}: {}"
    assert not [line for line in lines if line.startswith(name.format("good", arch, ""))]
    assert [line for line in lines if line.startswith(name.format("spilling", arch, "stack bytes"))]
    waste = "waste: found 1.6, expected at most 1"
    assert name.format("padded", arch, waste) in lines
    for control, word in (("dropped", "empty tensor-core"), ("folded", "share of the products'")):
        found = [line for line in lines if line.startswith(name.format(control, arch, ""))]
        if arch == 90 and drops_work(ptxas_in_use(arch)[1]):
            assert found[0].startswith(name.format(control, arch, word))
        else:
            # This ptxas keeps the work.
            assert found == []
            assert f"control {control:<9} sm_{arch}  passes" in lines


def test_the_table_has_what_the_machine_code_holds(
    refused: tuple[list[str], list[dict[str, str]]],
) -> None:
    rows = {(row["row"], row["arch"]): row for row in refused[1]}
    good80, good90 = rows["good", "sm_80"], rows["good", "sm_90"]
    assert int(good80["HMMA"]) >= 32
    assert good80["HGMMA"] == good90["HMMA"] == good90["LDL"] == good90["STL"] == "0"
    assert int(good90["HGMMA"]) >= 4
    assert " x HGMMA: " in good90["innermost loop, per tensor-core instruction"]
    assert good80["dynamic shared"] == "16384"
    assert good80["backing"] == "compiled"
    assert good80["static shared"] == good90["static shared"] == "0"
    spilling = rows["spilling", "sm_90"]
    assert min(int(spilling[name]) for name in ("stack", "LDL", "STL")) > 0
    assert int(good90["128-bit loads"]) == int(good90["LDGSTS"]) == 16


@pytest.mark.parametrize(
    "message",
    [
        "machine_code_kernels.atomic_kernel [small] sm_80: global atomics: found 1, expected",
        "machine_code_kernels.wrong_kernel [small] sm_80: does not compile: ",
        "machine_code_kernels.atomic_kernel [forgotten]: expected the call to launch the kernel",
        "machine_code_kernels.atomic_kernel [stale]: expected a launch with {'BLOCK': 128, 'num_wa",
        "machine_code_kernels.group_maxima_kernel [undeclared fp16] sm_80: tensor-core instruction",
        "machine_code_kernels.group_maxima_kernel [crowded fp16] sm_80: registers: found ",
        "machine_code_kernels.group_maxima_kernel [crowded fp16] sm_80: shared bytes: found 16384,",
        "machine_code_kernels.group_maxima_kernel [crowded fp16] sm_80: blocks per multiprocessor",
        "machine_code_kernels: expected a launch for sm_90, got none",
    ],
)
def test_every_broken_rule_is_listed(
    refused: tuple[list[str], list[dict[str, str]]], message: str
) -> None:
    assert len([line for line in refused[0] if line.startswith(f"REFUSED {message}")]) == 1


RUN = "from maect_fast.benchmarks.machine_code import run; "


@pytest.mark.slow
def test_without_kernels_the_controls_decide() -> None:
    done = python("-c", RUN + "raise SystemExit(run.run([], csv=None))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\ncontrol ") == 10
    assert "no Triton kernel is registered yet" in done.stdout
    blind = "run.ARCHS = (90,); run.failures = lambda *_: []; "
    done = python("-c", RUN + blind + "raise SystemExit(run.run([], csv=None))")
    assert done.returncode == 1
    assert "[spilling] sm_90: expected stack bytes, got pass" in done.stdout


def test_an_interpreted_kernel_is_no_evidence() -> None:
    done = python("-m", "maect_fast.benchmarks.machine_code", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.startswith("machine_code: TRITON_INTERPRET=1")
    assert len(done.stderr.splitlines()) == 1


def ptxas_line(monkeypatch: pytest.MonkeyPatch, release: tuple[int, int] | None) -> str:
    """What `doctor` says on a Hopper machine with this ptxas."""

    def in_use(arch: int) -> tuple[str, tuple[int, int]]:
        assert arch == 90
        if release is None:
            raise ModuleNotFoundError("No module named 'triton'")
        return "/bin/ptxas", release

    monkeypatch.setattr(doctor, "ptxas_in_use", in_use)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (line,) = [line for line in doctor.report() if line.startswith("  ptxas")]
    return line


def test_doctor_counts_the_rows_that_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "registered", lambda: [CONTROLS])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    timed = replace(controls.GOOD, backing=f"measured: 1 ms, alone, {H200}")
    for good, words in ((controls.GOOD, "0 of 5"), (timed, "1 of 5")):
        monkeypatch.setattr(controls, "GOOD", good)
        (line,) = [line for line in doctor.report() if line.startswith("  launch rows")]
        assert line.endswith(f"; {words} were timed on an H200")


def test_doctor_warns_of_a_ptxas_that_drops_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "12.8 at /bin/ptxas, known to drop work" in ptxas_line(monkeypatch, (12, 8))
    assert ptxas_line(monkeypatch, (13, 1)).endswith("13.1 at /bin/ptxas")
    assert ptxas_line(monkeypatch, None).endswith("missing: comes with triton")


@pytest.mark.skipif(triton_minor() not in GLUON_RELEASES, reason="compiled with another Triton")
def test_a_kernel_of_three_roles_compiles_within_its_limits() -> None:
    """Twelve warps, 232 registers for each consumer, all products on the tensor cores."""
    source = (
        "from maect_fast.benchmarks.machine_code.assembly import roles\n"
        "from maect_fast.benchmarks.machine_code.compile import compile_source, jobs\n"
        "from maect_fast.benchmarks.machine_code.gate import failures\n"
        "from maect_fast.kernels.masked_attention import gluon_kernel as kernels\n"
        "launch = next(iter(kernels.machine_code(90)))\n"
        "(job,) = jobs('masked_attention', launch, 90)\n"
        "found = compile_source(job.source)\n"
        "assert failures(job.limits, 90, found) == []\n"
        "assert found.num_warps == 4 and found.blocks_per_sm == 1\n"
        "assert sorted(x.registers for x in roles(found.code)) == [40, 232, 232]\n"
        "print([(x.products, x.spills) for x in roles(found.code)])\n"
    )
    done = python("-c", source)
    assert done.returncode == 0, done.stderr
