"""What a whole update of ViT-L/16 in stage 3 launches, counted on meta tensors.

`PYTHONPATH=tests python tests/test_update_ledger.py` prints it, part by part.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_block_ledger import ALLOCATIONS, BF16, FP32, LAUNCHES
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from maect_fast import block as block_module
from maect_fast import profiling
from maect_fast.config import load_config, load_recipe
from maect_fast.data import Batch
from maect_fast.models import encoder as encoder_module
from maect_fast.training.distributed import World
from maect_fast.training.stages import build_stage
from maect_fast.training.update import Update

META = torch.device("meta")
BOUND = 650
# Kernels behind an op of ours that reaches the dispatcher once, beside those of a block.
OURS = LAUNCHES | {"queue_topk": 3, "queue_enqueue": 2, "info_nce_fwd": 2, "info_nce_bwd": 2}
# Of PyTorch's lists: tensors and chunks of 65,536 numbers that one launch takes, by how many lists
# it reads or writes (MultiTensorApply.cuh, built with CUDA 13 as PyTorch's wheels are).
LISTS = {
    "_foreach_add_": 1,
    "_foreach_copy_": 2,
    "_foreach_lerp_": 2,
    "_fused_adamw_": 4,
    "_fused_sgd_": 2,
}
MAX_TENSORS, MAX_CHUNKS, CHUNK = {1: 770, 2: 448, 4: 252}, 2240, 65536
NOT_LAUNCHED = {*ALLOCATIONS, "_unsafe_view", "_record_function_enter_new", "_record_function_exit"}


class Autocast(TorchFunctionMode):
    """What CUDA's does, for tensors that have no device: products in bf16, norms in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        dtype = {F.linear: BF16, F.layer_norm: FP32}.get(func)
        if dtype is not None:
            args, kwargs = tree_map(lambda x: self._cast(x, dtype), (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _cast(self, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or x.dtype == dtype:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self.kept:
            self.kept[id(x)] = x.to(dtype)
        return self.kept[id(x)]


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts launches by part and operator; refuses what a capture does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted: Counter[tuple[str, str]] = Counter()
        self.parts = ["other"]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.parts.append(name)
        yield
        self.parts.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        # With a tensor for the rate they have no meta form.
        out = None if name.startswith("_fused_") else func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        on_cpu = [x for x in tensors if x.device.type == "cpu"]
        if on_cpu and len(on_cpu) < len(tensors):
            # A number that the host passes by value, or else a copy for which it waits.
            assert func.namespace == "maect_fast", f"{func} has a tensor of the CPU"
            assert all(x.ndim == 0 for x in on_cpu), f"{func} has a tensor of the CPU"
        if not func.is_view and name not in NOT_LAUNCHED and len(on_cpu) < len(tensors):
            count = list_launches(name, args) if name in LISTS else OURS.get(name, 1)
            self.counted[self.parts[-1], name] += count
        return out


def list_launches(name: str, args: Any) -> int:
    """As multi_tensor_apply fills its launches."""
    tensors = args[0]
    if len({x.dtype for x in tensors}) > 1:
        return len(tensors)
    launches = in_launch = chunks = 0
    for x in tensors:
        in_launch += 1
        for _ in range(-(-x.numel() // CHUNK)):
            chunks += 1
            if chunks == MAX_CHUNKS:
                launches, chunks, in_launch = launches + 1, 0, 1
        if in_launch == MAX_TENSORS[LISTS[name]]:
            launches, chunks, in_launch = launches + 1, 0, 0
    return launches + (chunks > 0)


def count(*, stream: str = "fp32") -> Counter[tuple[str, str]]:
    """Of one update, 256 images, after another one."""
    overrides = ["batch_size=256", f"encoder.stream={stream}"]
    config = load_config(load_recipe("l16", "tune"), overrides=overrides)
    world = World(rank=0, size=1, local_rank=0, group=None, device=META)
    with META:
        state = build_stage(config, world, total=10)
        views, ids = torch.empty(2, 256, 3, 224, 224), torch.empty(256, dtype=torch.int64)
    update, batch = Update(state, state.model, world), Batch(views, ids, ids)
    patch = mock.patch.object
    with ExitStack() as stack:
        for patched in (
            patch(block_module, "is_gpu", return_value=True),
            patch(encoder_module, "is_gpu", return_value=True),
            patch(torch, "autocast", lambda *_, **__: nullcontext()),
            patch(torch, "is_autocast_enabled", lambda device: True),
            patch(torch, "get_autocast_dtype", lambda device: BF16),
            mock.patch("torch.optim.adam._device_dtype_check_for_fused"),
        ):
            stack.enter_context(patched)
        for _ in range(2):
            # The first one makes AdamW's averages.
            ledger = Ledger()
            with patch(profiling, "_open", ledger.part), Autocast(), ledger:
                update(batch)
    return ledger.counted


@pytest.mark.parametrize("stream", ["fp32", "bf16"])
def test_launches_of_an_update(stream: str) -> None:
    counted = count(stream=stream)
    assert sum(counted.values()) <= BOUND
    ops: Counter[str] = Counter()
    for (_, name), number in counted.items():
        ops[name] += number
    # 23 whole blocks, and the last one for the class token.
    assert (ops["masked_attention_fwd"], ops["gelu_fwd"], ops["masked_attention_bwd"]) == (
        23,
        23,
        11,
    )
    assert ops["residual_norm_fwd"] == 2 * 23 + 1
    # All weights of the frozen, then of the tuned blocks.
    assert ops["_foreach_copy_"] <= 2 + 1 + 2
    assert ops["_foreach_add_"] == 1


def test_a_copy_from_the_host_would_be_seen() -> None:
    with Ledger(), pytest.raises(AssertionError, match="tensor of the CPU"):
        torch.tensor([1.0, 2.0]).to(META)


def test_lists_are_cut_as_pytorch_cuts_them() -> None:
    def launches(name: str, *sizes: int) -> int:
        return list_launches(name, [[torch.empty(size, device=META) for size in sizes]])

    assert launches("_foreach_lerp_", 5, 6) == 1
    assert launches("_foreach_lerp_", CHUNK * MAX_CHUNKS) == 1
    assert launches("_foreach_lerp_", CHUNK * MAX_CHUNKS + 1) == 2
    assert launches("_foreach_lerp_", *[1] * 449) == 2
    assert launches("_foreach_add_", *[1] * 449) == 1
    mixed = [torch.empty(1, device=META), torch.empty(1, device=META, dtype=torch.int64)]
    assert list_launches("_foreach_copy_", [mixed]) == 2


def main() -> None:
    columns = [count(stream=stream) for stream in ("fp32", "bf16")]
    parts = dict.fromkeys(part for counted in columns for part, _ in counted)
    lines = [f"{'launches of an update, ViT-L/16, 256 images':46}{'fp32 stream':>12}{'bf16':>8}"]
    for part in [*parts, "all"]:
        sums = [
            sum(number for (p, _), number in counted.items() if part in (p, "all"))
            for counted in columns
        ]
        lines.append(f"{part:46}{sums[0]:12}{sums[1]:8}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
