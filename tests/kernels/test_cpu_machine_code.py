"""What the compiler makes of the C++ kernels, and that the checks of it can refuse."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from maect_fast.benchmarks.machine_code import cpu
from maect_fast.kernels._common import cpp

ROOT = Path(cpp.__file__).resolve().parents[2]
FLAGS = {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f"]}

TABLE = """
#include "kernels/_common/simd.h"

BEFORE

namespace maect_fast::queue_topk {
namespace {
void score(const Word* a, const Word* b, const ptrdiff_t num_words, float* out) {
  LOOP
}
}  // namespace

struct Simd {
  void (*score)(const Word*, const Word*, ptrdiff_t, float*);
};
extern const Simd SIMD;
const Simd SIMD = {score};
}  // namespace maect_fast::queue_topk
"""
GOOD = """
  Floats acc[kTileRows][2] = {};
  for (ptrdiff_t w = 0; w < num_words; ++w, a += kTileRows, b += kLanes) {
    const Ints b0 = load<Ints>(b), b1 = load<Ints>(b + kVector);
    MAECT_UNROLL for (int r = 0; r < kTileRows; ++r) {
      acc[r][0] = Fp32::multiply_add(acc[r][0], a[r], b0);
      acc[r][1] = Fp32::multiply_add(acc[r][1], a[r], b1);
    }
  }
  MAECT_UNROLL for (int r = 0; r < kTileRows; ++r) {
    store(out + r * kLanes, acc[r][0]);
    store(out + r * kLanes + kVector, acc[r][1]);
  }
"""
IN_MEMORY = """
  for (ptrdiff_t w = 0; w < num_words; ++w, b += kLanes) {
    MAECT_UNROLL for (int r = 0; r < kTileRows; ++r) {
      float* at = out + r * kLanes;
      store(at, Fp32::multiply_add(load<Floats>(at), a[r], load<Ints>(b)));
      store(at + kVector, Fp32::multiply_add(load<Floats>(at + kVector), a[r], load<Ints>(b)));
    }
  }
"""
OLD = "int add(const int* a, int n) { int s = 0; for (int i = 0; i < n; ++i) s += a[i]; return s; }"


def compiler() -> str:
    found = shutil.which("c++")
    if found is None or platform.machine() not in {"x86_64", "AMD64"}:
        pytest.skip("needs a C++ compiler for x86-64")
    return found


def compiled(folder: Path, source: str, *flags: str) -> Path:
    """An object file."""
    path = folder / f"{len(list(folder.iterdir()))}.cpp"
    path.write_text(source)
    command = [compiler(), "-std=c++17", "-O3", "-fPIC", "-I", str(ROOT), *flags, "-c", str(path)]
    subprocess.run([*command, "-o", str(path.with_suffix(".o"))], check=True)
    return path.with_suffix(".o")


def refused(folder: Path, *objects: Path) -> list[str]:
    """What the check says of a library, but for what it misses of other ops."""
    library = folder / "library.so"
    subprocess.run([compiler(), "-shared", *map(str, objects), "-o", str(library)], check=True)
    if reason := cpu.why_not(library):
        pytest.skip(reason)
    found = cpu.failures(cpu.read(library))
    return [line for line in found if not line.startswith("info_nce: expected tables")]


def table(folder: Path, simd: str, loop: str, *flags: str) -> Path:
    return compiled(
        folder, TABLE.replace("LOOP", loop), f"-DSIMD={simd}", "-DBEFORE=", *FLAGS[simd], *flags
    )


def weak_symbols(path: Path) -> list[str]:
    """Functions of which the linker keeps any one object's copy."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not there: install binutils")
    listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
    return re.findall(r"^[0-9a-f]+ [WVu] (.*)$", listing.stdout, re.MULTILINE)


def test_the_library_passes() -> None:
    if reason := cpu.why_not(cpp.LIBRARY):
        pytest.skip(reason)
    assert list(cpu.failures(cpu.read(cpp.LIBRARY))) == []


@pytest.mark.parametrize("simd", FLAGS)
@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        (GOOD, None),
        (GOOD.replace("kTileRows", "16"), "vectors on the stack"),
        (GOOD.replace("MAECT_UNROLL", '_Pragma("GCC unroll 1")'), "a loop of"),
        (IN_MEMORY, "vectors written"),
    ],
    ids=["good", "crowded", "rolled", "in memory"],
)
def test_products_stay_in_registers(
    tmp_path: Path, simd: str, loop: str, reason: str | None
) -> None:
    found = refused(tmp_path, table(tmp_path, simd, loop))
    assert all(line.startswith(f"queue_topk {simd} score: expected ") for line in found)
    assert bool(found) == bool(reason)
    assert not reason or any(reason in line for line in found)


def test_products_fill_the_registers_of_their_instruction_set(tmp_path: Path) -> None:
    found = refused(tmp_path, table(tmp_path, "avx512", GOOD, "-mno-avx512f", *FLAGS["avx2"]))
    assert found == ["queue_topk avx512 score: expected a loop of 16 products, found 0"]


def test_an_op_that_the_check_does_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = table(tmp_path, "avx2", GOOD)
    monkeypatch.delitem(cpu.PRODUCTS, "queue_topk")
    assert refused(tmp_path, library)[0].startswith("queue_topk: expected ")


def test_code_of_an_instruction_set_does_not_run_when_loaded(tmp_path: Path) -> None:
    found = refused(
        tmp_path, table(tmp_path, "avx2", GOOD, "-DBEFORE=int once(); int when = once();")
    )
    assert found == ["queue_topk avx2: expected no code that runs when loaded"]


@pytest.mark.parametrize("flags", [[], ["-mavx2"], ["-mbmi2"]], ids=str)
def test_code_that_old_cpus_lack_is_chosen_at_run_time(tmp_path: Path, flags: list[str]) -> None:
    """Outside of an op's tables no instruction may need more than the first x86-64 CPUs have."""
    source = OLD + "unsigned shift(unsigned a, unsigned n) { return a << n; }"
    objects = table(tmp_path, "avx2", GOOD), compiled(tmp_path, source, *flags)
    found = refused(tmp_path, *objects)
    assert len(found) == len(flags)
    assert all(": expected code for every x86-64 CPU, found " in line for line in found)


# One worker builds the library, once.
pytestmark = pytest.mark.xdist_group("library")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a build with the installed library's options, and what the compiler said."""
    compiler()
    folder, tools = tmp_path_factory.mktemp("build"), Path(sys.executable).parent
    said = ""
    for arguments in (
        [
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
        ],
        ["--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(
            [str(tools / "cmake"), *arguments],
            env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        said += done.stdout + done.stderr
        assert done.returncode == 0, said
    return folder, said


@pytest.mark.slow
def test_the_library_compiles_without_warnings(build: tuple[Path, str]) -> None:
    assert "warning" not in build[1], build[1]


@pytest.mark.slow
def test_no_instruction_set_lends_its_functions(build: tuple[Path, str]) -> None:
    """Of equal inline functions the linker keeps one, perhaps the copy that an old CPU lacks."""
    objects = list(build[0].glob("CMakeFiles/*/kernels/*/cpu_simd.cpp.o"))
    assert {path.parent.name for path in objects} == cpu.PRODUCTS.keys()
    assert {str(path): weak_symbols(path) for path in objects if weak_symbols(path)} == {}


def test_a_template_of_the_standard_library_is_noticed(tmp_path: Path) -> None:
    source = "#include <vector>\nvoid f(std::vector<int>& x) { x.push_back(1); }"
    assert any("_M_realloc_insert" in name for name in weak_symbols(compiled(tmp_path, source)))
