"""Who may import whom, by syntax tree; and what the package needs, in fresh processes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"
PACKAGE = "maect_fast.kernels"

# A file of an op imports only files further down, never one beside it.
RANK = {
    "__init__": 10,
    "api": 9,
    "buffer": 9,
    "symmetric": 9,
    "gather": 8,
    "op": 7,
    "gluon_kernel": 6,
    "padded": 5,
    "triton_kernel": 5,
    "reference": 5,
    "_common": 0,
    # What kernels of several ops share.
    "_common.triton": 0,
}
# Parts of an op's triton_kernel.py, each on the ones before.
RANK |= {
    "triton_device": 1,
    "triton_queue": 1,
    "triton_score": 2,
    "triton_exact": 3,
    "triton_rank": 4,
}
RANK |= {"triton_rows": 1, "triton_forward": 2, "triton_backward": 2, "triton_table": 2}
RANK |= {"gluon_rows": 2, "gluon_forward": 3, "gluon_backward": 3}
ALLOWED_OUTSIDE = {"torch", "triton", "numpy"} | set(sys.stdlib_module_names)
TRITON_FILES = {name for name in RANK if name.startswith(("triton_", "gluon_"))}
TRITON_FILES |= {"_common", "_common.triton"}

FRONT_END_PACKAGES = (
    *("timm", "torchvision", "sklearn", "scipy", "omegaconf", "yaml", "matplotlib", "tqdm"),
    *("tensorboard", "safetensors", "nvtx", "xformers", "PIL"),
)


def imports(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[tuple[str, bool]]:
    """Absolute names of imported modules (`from a import b` as `a.b`), and whether at top level."""
    nested = {id(n) for f in ast.walk(tree) if is_function(f) for n in ast.walk(f)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                depth = node.level - is_package
                parents = module.split(".")[: len(module.split(".")) - depth]
                base = ".".join([*parents, *filter(None, [base])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        yield from ((name, id(node) not in nested) for name in names)


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def place(name: str) -> tuple[str, str]:
    """The op and the file of a dotted name under `maect_fast.kernels`; '' is the package."""
    parts = name.removeprefix(PACKAGE).strip(".").split(".")
    op = parts[0]
    if op == "_common":
        needs_triton = len(parts) > 1 and parts[1].startswith("triton_")
        return "_common", "_common.triton" if needs_triton else "_common"
    file = parts[1] if len(parts) > 1 and parts[1] in RANK else "__init__"
    return op, file


def violations(path: Path, source: str) -> list[str]:
    """Broken layering rules of one file, in words; `path` is relative to kernels/."""
    is_package = path.stem == "__init__"
    module = ".".join([PACKAGE, *path.parent.parts, *([] if is_package else [path.stem])])
    op, file = place(module)
    if op not in ("", "_common") and path.stem not in RANK:
        return [f"{path}: no such file in an op"]
    found = []
    for name, top_level in imports(ast.parse(source), module, is_package=is_package):
        reason = broken_rule(op, file, name, top_level=top_level)
        if reason:
            found.append(f"{path}: imports {name}: {reason}")
    return found


def broken_rule(op: str, file: str, name: str, *, top_level: bool) -> str | None:
    if not f"{name}.".startswith("maect_fast."):
        package = name.split(".")[0]
        if package not in ALLOWED_OUTSIDE:
            return "kernels need nothing but torch, triton and numpy"
        if package == "triton" and (file not in TRITON_FILES or (file == "_common" and top_level)):
            return "triton is imported by {triton,gluon}_*.py, so that all else works without it"
        return None
    if not f"{name}.".startswith(f"{PACKAGE}."):
        return "kernels never import the front end"
    other_op, other_file = place(name)
    if op == "":
        return None if other_file == "__init__" else "the index re-exports the ops' public names"
    if other_file == "_common.triton" and (file not in TRITON_FILES or file == "_common"):
        return "what needs triton is imported by {triton,gluon}_*.py alone"
    if other_op == "_common":
        return None
    if other_op != op:
        return "an op imports no other op"
    if RANK[other_file] >= RANK[file]:
        return "imports run api -> op -> {triton_kernel, cpu, reference} -> _common"
    inside_triton = file in TRITON_FILES and other_file in TRITON_FILES
    if other_file in TRITON_FILES and not inside_triton and (file != "op" or top_level):
        return "only op.py imports the Triton launchers, and lazily"
    return None


SOURCES = sorted(path.relative_to(KERNELS) for path in KERNELS.rglob("*.py"))


OPS = (
    *("masked_attention", "queue_topk", "info_nce", "mae_tokens", "residual_norm", "gelu"),
    "int8_linear",
)


def test_every_op_is_checked() -> None:
    expected = {
        Path(op, file) for op in OPS for file in ("__init__.py", "api.py", "op.py", "reference.py")
    }
    assert expected <= set(SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_kernels_import_one_way(path: Path) -> None:
    assert violations(path, (KERNELS / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("info_nce/api.py", "from maect_fast.models import Encoder"),
        ("info_nce/api.py", "import maect_fast.config"),
        ("info_nce/op.py", "from .api import info_nce"),
        ("info_nce/reference.py", "from maect_fast.kernels.info_nce import info_nce"),
        ("info_nce/reference.py", "from . import op"),
        ("info_nce/triton_kernel.py", "from .reference import info_nce"),
        ("info_nce/op.py", "from maect_fast.kernels.queue_topk.reference import queue_topk"),
        ("info_nce/op.py", "from ..queue_topk import api"),
        ("info_nce/op.py", "from .triton_kernel import forward"),
        ("info_nce/triton_device.py", "from .triton_kernel import forward"),
        ("info_nce/api.py", "def f():\n    from .triton_kernel import forward"),
        ("info_nce/op.py", "def f():\n    import triton"),
        ("queue_topk/op.py", "from .triton_queue import enqueue"),
        ("queue_topk/triton_queue.py", "from .triton_score import score"),
        ("queue_topk/triton_queue.py", "from .reference import enqueue"),
        ("info_nce/reference.py", "import scipy.special"),
        ("info_nce/helpers.py", "import torch"),
        ("_common/philox.py", "from ..info_nce.op import forward"),
        ("_common/triton_int8.py", "from ..gelu.op import gelu"),
        ("_common/int8.py", "from .triton_int8 import larger"),
        ("gelu/op.py", "def f():\n    from .._common.triton_int8 import larger"),
        ("_common/philox.py", "import triton.language as tl"),
        ("__init__.py", "from .info_nce.api import info_nce"),
    ],
)
def test_a_wrong_import_is_noticed(path: str, source: str) -> None:
    assert len(violations(Path(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from .info_nce import info_nce"),
        ("info_nce/__init__.py", "from .api import info_nce"),
        ("info_nce/api.py", "from . import op\nfrom .reference import info_nce"),
        ("info_nce/op.py", "def f():\n    from .triton_kernel import forward"),
        ("queue_topk/op.py", "def f():\n    from .triton_queue import enqueue"),
        ("queue_topk/triton_kernel.py", "from .triton_score import score"),
        ("info_nce/triton_kernel.py", "import torch, triton\nfrom .._common.philox import M"),
        ("info_nce/reference.py", "from maect_fast.kernels._common import philox"),
        ("_common/triton_int8.py", "import triton\nfrom .int8 import LEVELS"),
        ("gelu/triton_kernel.py", "from .._common.triton_int8 import larger"),
        ("_common/philox.py", "import torch\ndef f():\n    import triton"),
    ],
)
def test_a_right_import_passes(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


BLOCK = """
import sys
from importlib.machinery import PathFinder

ABSENT = set({absent!r})

class WithoutPackages(PathFinder):
    # Exactly as if the packages were not installed: the path-based search finds no such name.
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        absent = fullname.partition(".")[0] in ABSENT
        return None if absent else PathFinder.find_spec(fullname, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutPackages
sys.path.insert(0, {root!r})
"""

USE_EVERY_OP = """
import torch
from maect_fast.kernels import gather_patches, info_nce, masked_attention, masked_patch_mse
from maect_fast.kernels import queue_topk, restore_tokens
torch.manual_seed(0)
qkv = torch.randn(2, 5, 3, 2, 16, requires_grad=True)
masked_attention(qkv).sum().backward()
found = queue_topk(torch.randn(3, 16), torch.randn(9, 16), k=2)
assert found.indices.shape == (3, 2)
predicted = torch.randn(2, 3, 16, requires_grad=True)
neighbour = torch.nn.functional.normalize(torch.randn(2, 3, 16), dim=-1)
info_nce(predicted, neighbour, temperature=0.2).backward()
assert qkv.grad is not None and predicted.grad is not None
images, ids = torch.randn(2, 3, 4, 4), torch.arange(4).expand(2, 4)
patches = gather_patches(images, ids[:, :1], 2).requires_grad_()
tokens = restore_tokens(patches, torch.zeros(1, 1, 12), torch.zeros(1, 4, 12), ids)
masked_patch_mse(tokens[:, 1:], images, ids, 2, normalize=True).backward()
assert patches.grad is not None
import maect_fast.nn
import benchmarks.__main__
"""


def run_python(source: str) -> None:
    # -W error: a warning while importing would greet every user.
    command = [sys.executable, "-W", "error", "-c", source]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("absent", [(), ("triton",)], ids=["with-triton", "without-triton"])
def test_kernels_and_benchmarks_work_with_torch_and_numpy_alone(absent: tuple[str, ...]) -> None:
    block = BLOCK.format(absent=sorted({*FRONT_END_PACKAGES, *absent}), root=str(ROOT))
    run_python(block + USE_EVERY_OP + "assert not ABSENT & set(sys.modules)\n")


def test_blocked_packages_are_blocked() -> None:
    block = BLOCK.format(absent=["sklearn"], root=str(ROOT))
    run_python(
        block
        + "try:\n    import sklearn\nexcept ModuleNotFoundError:\n    sys.exit(0)\nsys.exit(1)"
    )


def test_importing_the_package_is_light() -> None:
    source = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport maect_fast\n"
    slow = ["torchvision", "timm", "sklearn", "scipy", "matplotlib", "tensorboard", "triton"]
    run_python(source + f"loaded = set({slow}) & set(sys.modules)\nassert not loaded, loaded")
