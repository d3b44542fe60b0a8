import os

# Before torch: its thread pools are sized once. Child processes of the tests inherit all three.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# cuBLAS repeats itself bitwise only with a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import importlib.util
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from allocation import NoSync

# Triton reads this when a kernel is decorated, so it comes before any import of a kernel.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


from maect_fast.kernels._common import gpu  # noqa: E402 (Triton reads the variable above)


def _let_the_interpreter_prepare_once() -> None:
    """Triton 3.6 replaces the language's functions anew in every call of a device function.

    Once per launch is enough, and most of the time of an interpreted kernel is saved.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    prepared: set[str] = set()

    def patched(function: Any) -> Any:
        modules = (language, language.core)
        seen = {x.__name__ for x in function.__globals__.values() if x in modules}
        if seen <= prepared:
            return interpreter._LangPatchScope()
        scope = patch(function)
        prepared.update(seen)
        # Called at the end of a launch, of its own scope alone.
        restore = scope.restore

        def end() -> None:
            restore()
            prepared.clear()

        scope.restore = end
        return scope

    interpreter._patch_lang = patched


# Tests of single kernels pass the public functions by, which prepare the interpreter.
gpu.obstacle(torch.empty(0))
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _let_the_interpreter_prepare_once()

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append("cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpp-library",
        type=Path,
        metavar="PATH",
        help="another build of the C++ library; processes that tests spawn use the installed one",
    )


def pytest_configure(config: pytest.Config) -> None:
    library: Path | None = config.getoption("--cpp-library")
    if library is None:
        return
    from maect_fast.kernels._common import cpp

    cpp.LIBRARY = library.resolve()
    if reason := cpp.load():
        raise pytest.UsageError(f"--cpp-library: {cpp.LIBRARY}: {reason}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With pytest-xdist, tests that share a module's fixture run where it is made: once."""
    for item in items:
        assert isinstance(item, pytest.Function)
        for name, found in item._fixtureinfo.name2fixturedefs.items():
            if found[-1].scope == "module":
                item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{name}"))
                break


@pytest.fixture(
    params=[pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> torch.device:
    """For what only a GPU shows."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture
def needs_gib(cuda: torch.device) -> Iterator[Callable[[float], None]]:
    """Skips a test for which the device has too little free memory; frees what the test took."""

    def check(num_gib: float) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(cuda)[0] / 2**30
        if free < num_gib:
            pytest.skip(f"needs {num_gib} GiB of free memory on {cuda}, has {free:.1f}")

    yield check
    torch.cuda.empty_cache()


@pytest.fixture
def no_sync() -> NoSync:
    """A context in which waiting for the device is an error. Make inputs before: copies wait."""

    def set_mode(mode: int | str) -> None:
        with warnings.catch_warnings():
            # Said once in a process.
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode(mode)

    @contextmanager
    def forbid() -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        set_mode("error")
        try:
            yield
        finally:
            set_mode(before)

    return forbid


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN (integers: the largest), so forgetting to write is caught."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
