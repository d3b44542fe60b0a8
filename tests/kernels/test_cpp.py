import sys
from pathlib import Path

import pytest
import torch

from maect_fast.kernels._common import cpp

NO_LIBRARY = cpp.load()


@pytest.mark.skipif(NO_LIBRARY is not None, reason=f"C++ library: {NO_LIBRARY}")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/cpuinfo")
def test_cpu_features_are_those_of_the_kernel() -> None:
    """Linux lists the extensions that CPU and kernel support: an independent reading."""
    words = set(Path("/proc/cpuinfo").read_text().replace("\n", " ").split())
    known = "avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16"
    known += " amx_tile amx_bf16 amx_int8"
    assert set(cpp.cpu_features()) == set(known.split()) & words


@pytest.mark.skipif(NO_LIBRARY is not None, reason=f"C++ library: {NO_LIBRARY}")
def test_cpu_features_has_a_schema() -> None:
    assert str(torch.ops.maect_fast.cpu_features.default._schema).endswith("cpu_features() -> str")


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpp, "LIBRARY", tmp_path / "_C.so")
    cpp.load.cache_clear()
    try:
        assert cpp.cpu_features() == []
        assert "make install" in cpp.status()
        (tmp_path / "_C.so").write_text("not a library")
        cpp.load.cache_clear()
        assert "does not load" in cpp.status()
    finally:
        cpp.load.cache_clear()
