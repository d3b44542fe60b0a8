"""Every way of installing gives one working `maect_fast.kernels`, with and without C++.

`maect_fast.benchmarks` comes the same way.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import maect_fast
import maect_fast.benchmarks
import maect_fast.kernels
from maect_fast.kernels._common import cpp

ROOT = Path(maect_fast.__file__).resolve().parents[1]

PROBE = """
import sys
import maect_fast.benchmarks.cli
import maect_fast.kernels
from maect_fast.config import load_recipe
from maect_fast.kernels._common import cpp
assert not {"kernels", "benchmarks"} & set(sys.modules)
load_recipe("digits", "tune")
print(maect_fast.kernels.__file__)
print(cpp.load())
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The Python of a fresh environment that sees the installed packages, except this one."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    # A path added by a .pth file is searched, but its own .pth files, our editable install among
    # them, are not read.
    Path(site.strip(), "shared.pth").write_text(sysconfig.get_path("purelib"))
    return python


def install(python: Path, what: str | Path, *options: str, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    uv = Path(sys.executable).parent / "uv"
    return run(
        *(uv, "pip", "install", "-v", "--python", python, "--no-deps", "--no-build-isolation"),
        *(*options, what),
        cwd=python.parent,
        **{"PATH": path, **environment},
    )


def probe(python: Path, cwd: Path) -> tuple[Path, str]:
    file, library = run(python, "-c", PROBE, cwd=cwd).splitlines()
    return Path(file), library


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what git would check out."""
    files = run("git", "ls-files", "-coz", "--exclude-standard", cwd=ROOT).split("\0")
    target = tmp_path / "source"
    for name in filter(None, files):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            path.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            path.write_bytes((ROOT / name).read_bytes())
    return target


@pytest.mark.parametrize("package", [maect_fast.kernels, maect_fast.benchmarks])
def test_one_name_for_what_lies_outside(package: ModuleType) -> None:
    """The link and the mapping lead to the same files, and the bare name is never imported."""
    folder = package.__name__.rpartition(".")[2]
    assert Path(str(package.__file__)).resolve() == ROOT / folder / "__init__.py"
    assert (ROOT / "maect_fast" / folder).is_symlink()
    # In a process of its own: transformers, which other tests import, looks for PyPI's `kernels`.
    names = "maect_fast.api, maect_fast.nn, maect_fast.benchmarks.cli, maect_fast.kernels"
    done = run(sys.executable, "-c", f"import sys, {names}; print(*sys.modules)", cwd=ROOT)
    assert [name for name in done.split() if name.partition(".")[0] == folder] == []


@pytest.mark.skipif(not cpp.LIBRARY.exists(), reason="the C++ library is not built")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not there")
def test_the_library_needs_nothing_but_torch_and_the_c_runtime() -> None:
    """No second OpenMP beside PyTorch's, and no path of the machine that it was built on."""
    header = run("objdump", "-p", cpp.LIBRARY, cwd=ROOT)
    needed = {name.split(".so")[0] for name in re.findall(r"NEEDED +(\S+)", header)}
    assert {"libtorch_cpu", "libc"} <= needed
    assert needed <= {"libtorch_cpu", "libstdc++", "libgcc_s", "libm", "libc"}
    assert re.findall(r"R(?:UN)?PATH.*", header) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable(environment: Path, source: Path, mode: str) -> None:
    options = ("--config-settings", f"editable_mode={mode}")
    install(environment, source, *options, "-e")
    file, library = probe(environment, environment.parent)
    assert library == "None"
    assert source in file.parents or source / "kernels" in file.resolve().parents


@pytest.mark.slow
def test_wheel(environment: Path, source: Path, tmp_path: Path) -> None:
    """As `make wheel` builds it: for every Linux that its tag names, with nothing grafted in."""
    pytest.importorskip("auditwheel")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path)
    run(*build, source, cwd=tmp_path, PATH=path)
    (built,) = tmp_path.glob("*.whl")
    repair = ("auditwheel", "repair", "--exclude", "libtorch_cpu.so", "--wheel-dir", "dist")
    run(*repair, built, cwd=tmp_path, PATH=path)
    (wheel,) = tmp_path.glob("dist/*.whl")
    assert re.fullmatch(r".*-py3-none-manylinux_2_\d+_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "maect_fast/kernels/_C.so" in names
    assert [name for name in names if name.endswith((".cpp", ".h"))] == []
    assert [name for name in names if ".libs/" in name] == []
    install(environment, wheel)
    file, library = probe(environment, tmp_path)
    assert library == "None"
    assert environment.parents[1] in file.parents


@pytest.mark.slow
@pytest.mark.parametrize("with_cpp", [True, False])
def test_sdist(environment: Path, source: Path, tmp_path: Path, with_cpp: bool) -> None:
    build = (sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path)
    run(*build, source, cwd=tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    told = install(environment, sdist, **({} if with_cpp else {"MAECT_FAST_CPP": "0"}))
    reason = "going on without the C++ library: MAECT_FAST_CPP=0"
    assert told.count(reason) == (0 if with_cpp else 1)
    file, library = probe(environment, tmp_path)
    assert library == "None" if with_cpp else "not built" in library
    assert environment.parents[1] in file.parents


@pytest.mark.slow
def test_without_a_compiler(environment: Path, source: Path, tmp_path: Path) -> None:
    """CMake is there, the compiler is not: the install succeeds and says what is missing."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cmake", "ninja"):
        (tools / name).symlink_to(Path(sys.executable).parent / name)
    told = install(environment, source, PATH=str(tools))
    assert told.count("going on without the C++ library") == 1
    assert "not built" in probe(environment, tmp_path)[1]


def test_kernels_are_interpreted_outside_of_tests() -> None:
    """As a user would, without this suite's preparation; bf16 is refused, with the reason."""
    code = """
import torch
from maect_fast.kernels import info_nce, queue_topk, gelu
x = torch.randn(5, 16)
near = queue_topk(x, x, k=2, backend="triton").indices[:, 0].tolist()
loss = info_nce(x, x, temperature=0.1, backend="triton")
assert near == list(range(5)), near
torch.testing.assert_close(loss, info_nce(x, x, temperature=0.1, backend="reference"))
try:
    gelu(x.bfloat16(), backend="triton")
except RuntimeError as error:
    print(error)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "is interpreted, where Triton gets bfloat16 wrong" in done.stdout
