"""Build of the C++ op library and the package mapping; the metadata is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPP = "maect_fast.kernels._C"
# Folders of the top level that are installed inside the package.
INSIDE = ("kernels", "benchmarks")
PACKAGES = [
    *find_packages(include=["maect_fast", "maect_fast.*"]),
    *(f"maect_fast.{folder}" for folder in INSIDE),
    *(f"maect_fast.{folder}.{package}" for folder in INSIDE for package in find_packages(folder)),
]
# What the build of the library reads: part of the sdist, not of the wheel.
CPP_SOURCES = ["CMakeLists.txt", *glob("kernels/*/*.cpp"), *glob("kernels/*/*.h")]


class CMakeBuild(build_ext):
    """Build the library with CMake, or go on without it and say so."""

    def get_ext_filename(self, fullname):
        """The library holds no Python, so its name carries no Python version."""
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext):
        """A missing library is no error: the references take its place."""
        reason = self.build_library(Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        if reason:
            print(f"maect-fast: going on without the C++ library: {reason}", file=sys.stderr)

    def build_library(self, destination):
        """Return None, or why there is no library."""
        if os.environ.get("MAECT_FAST_CPP") == "0":
            return "MAECT_FAST_CPP=0"
        try:
            import torch  # noqa: F401
        except ImportError:
            return "torch is not there at build time; install torch, then use --no-build-isolation"
        build = Path(self.build_temp).resolve()
        # Ninja uses all cores.
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        python = f"-DPython_EXECUTABLE={sys.executable}"
        for command in (
            ["cmake", "-S", ROOT, "-B", build, python, *generator],
            ["cmake", "--build", build],
            ["cmake", "--install", build, "--prefix", destination],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except FileNotFoundError:
                return "cmake is not there (pip install cmake)"
            if done.returncode:
                lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
                return f"{' '.join(map(str, command[:2]))} failed:\n" + "\n".join(lines[-20:])
        return None

    def get_outputs(self):
        """Only what was built belongs into the wheel."""
        return [path for path in super().get_outputs() if Path(path).exists()]


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self):
        """Python- and ABI-independent, but not platform-independent."""
        return "py3", "none", super().get_tag()[2]


setup(
    packages=sorted(set(PACKAGES)),
    package_dir={f"maect_fast.{folder}": folder for folder in INSIDE},
    exclude_package_data={"": ["*.cpp", "*.h"]},
    ext_modules=[Extension(CPP, sources=[], depends=CPP_SOURCES)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
