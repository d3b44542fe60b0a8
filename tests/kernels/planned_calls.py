"""Recorded launches against the ordinary ones, in a process whose kernels are not interpreted.

Run by test_plan.py. Kernels are compiled for sm_90 and their launches go nowhere; what is compared
is what the driver is given: kernel, grid, stream, numbers, and of an address which tensor's it is.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher

from maect_fast.benchmarks.host import stub_driver
from maect_fast.kernels import (
    Pick,
    QueueState,
    Shadow,
    attention,
    enqueue,
    gather_patches,
    gelu,
    gelu_int8,
    info_nce,
    info_nce_stats,
    int8_linear,
    masked_attention,
    masked_patch_mse,
    queue_topk,
    residual_norm,
    residual_norm_int8,
    restore_tokens,
    symmetric_info_nce,
    with_shadow,
)
from maect_fast.kernels._common.plan import Plans
from maect_fast.kernels.masked_attention import op as attention_op

Case = tuple[Callable[..., object], list[Tensor]]
Launches = list[tuple[Any, ...]]

# Where a planned op begins among the launches.
OP = "op"
launched: Launches = []
launch = CudaLauncher.__call__


def note(self: Any, *arguments: Any) -> None:
    launched.append((self, *arguments))
    launch(self, *arguments)


def randn(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*size).to(dtype)


def ids(*size: int, high: int = 4) -> Tensor:
    return torch.randint(high, size)


def make_queue(dtype: torch.dtype = torch.float16) -> QueueState:
    queue = torch.nn.functional.normalize(torch.randn(300, 64), dim=1)
    return with_shadow(QueueState(queue, ids(300), ids(300), ids(1)), dtype=dtype)


def full(function: Callable[..., Tensor], *inputs: Tensor, **arguments: Any) -> list[Tensor]:
    """Outputs and gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, **arguments)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def find(
    step: int | Tensor, seed: int, rows: Tensor, state: QueueState, label: Tensor, own: Tensor
) -> Any:
    pick = Pick(seed=seed, step=step, view=1, row=5)
    return queue_topk(rows, state, k=5, query_id=own, query_label=label, pick=pick)


def quick_cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names, and what makes a call with tensors of its own."""
    yield "dense", lambda: (partial(full, masked_attention), [randn(2, 50, 3, 2, 64)])
    yield "no gradient", lambda: (masked_attention, [randn(2, 50, 3, 2, 64)])
    yield (
        "class token",
        lambda: (
            lambda qkv: full(attention, qkv[:, :1, 0], qkv[:, :, 1], qkv[:, :, 2]),
            [randn(2, 50, 3, 2, 64)],
        ),
    )
    yield (
        "loss",
        lambda: (
            lambda x, y: full(partial(info_nce, neighbour=y, temperature=torch.rand(()).item()), x),
            [randn(2, 32, 64), randn(2, 32, 64)],
        ),
    )
    yield (
        "search",
        lambda: (
            lambda x, label, own, *state: find(
                int(torch.randint(9, 99, ())), 7, x, rebuild(state), label, own
            ),
            [randn(2, 32, 64), ids(32), ids(32), *flat(make_queue())],
        ),
    )
    yield (
        "enqueue",
        lambda: (
            lambda rows, label, *state: enqueue(rebuild(state), rows, sample_id=label),
            [randn(8, 64), ids(8), *flat(make_queue())],
        ),
    )


def more_cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    for dtype in (torch.bfloat16, torch.float16):
        yield f"masked {dtype}", partial(masked_case, dtype)
    yield (
        "segments",
        lambda: (
            lambda qkv, bounds: full(masked_attention, qkv, cu_seqlens=bounds, max_seqlen=40),
            [randn(90, 3, 2, 64), torch.tensor([0, 40, 75], dtype=torch.int32)],
        ),
    )
    yield (
        "kept",
        lambda: (
            lambda qkv, keep: full(masked_attention, qkv, keep=keep),
            [randn(2, 50, 3, 2, 64), torch.arange(9).repeat(2, 1)],
        ),
    )
    yield "long", lambda: (partial(full, masked_attention), [randn(2, 257, 3, 2, 80)])
    for transposed in (False, True):
        yield f"loss, transposed {transposed}, stored temperature", partial(loss_case, transposed)
    yield (
        "loss, fp32, online",
        lambda: (
            lambda x, y: info_nce_stats(x, y, temperature=0.1),
            [randn(32, 64, dtype=torch.float32), randn(32, 64, dtype=torch.float32)],
        ),
    )
    yield (
        "symmetric loss",
        lambda: (
            lambda x, y: full(partial(symmetric_info_nce, temperature=0.1, same_view=True), x, y),
            [randn(32, 64), randn(32, 64)],
        ),
    )
    yield (
        "search, step on the device, int8",
        lambda: (
            lambda x, label, own, step, *state: find(
                step, 2**63 + 5, x, rebuild(state), label, own
            ),
            [randn(32, 64), ids(32), ids(32), ids(), *flat(make_queue(torch.int8))],
        ),
    )
    yield (
        "search, no shadow",
        lambda: (
            lambda x, queue: queue_topk(x, queue, k=3),
            [randn(8, 64), make_queue().queue],
        ),
    )
    yield (
        "gather",
        lambda: (
            lambda images, keep: gather_patches(images, keep, 16, dtype=torch.bfloat16),
            [randn(2, 3, 64, 64, dtype=torch.float32), ids(2, 4)],
        ),
    )
    yield (
        "restore",
        lambda: (
            lambda x, token, position: full(
                restore_tokens, x, token, position, ids_restore=torch.arange(16).repeat(2, 1)
            ),
            [randn(2, 5, 64), randn(1, 1, 64), randn(1, 16, 64)],
        ),
    )
    yield (
        "pixels",
        lambda: (
            lambda x, images, keep: full(
                lambda p: masked_patch_mse(p, images, keep, 16, normalize=True), x
            ),
            [randn(2, 4, 768), randn(2, 3, 64, 64, dtype=torch.float32), ids(2, 4)],
        ),
    )

    for stream in (torch.bfloat16, torch.float32):
        yield f"norm of a sum, stream {stream}", partial(norm_case, stream)
    yield (
        "norm alone, no gradient",
        lambda: (
            lambda r, w, b: residual_norm(r, weight=w, bias=b, dtype=torch.bfloat16),
            [randn(9, 384, dtype=torch.float32), *(randn(384) for _ in range(2))],
        ),
    )
    yield "gelu", lambda: (partial(full, gelu), [randn(2, 50, 256), randn(256)])
    yield "gelu, no bias", lambda: (partial(full, gelu), [randn(2, 50, 256)])
    yield "gelu in int8", lambda: (gelu_int8, [randn(2, 50, 256), randn(256)])
    yield (
        "norm in int8",
        lambda: (
            lambda r, branch, w, b: residual_norm_int8(r, branch, weight=w, bias=b),
            [randn(9, 384), randn(9, 384), *(randn(384) for _ in range(2))],
        ),
    )
    yield (
        "linear layer in int8",
        lambda: (
            int8_linear,
            [
                *(torch.ones(50, 64, dtype=torch.int8), torch.ones(50)),
                *(torch.ones(96, 64, dtype=torch.int8), torch.ones(96), randn(96)),
            ],
        ),
    )


def norm_case(stream: torch.dtype) -> Case:
    def call(r: Tensor, branch: Tensor, *columns: Tensor) -> list[Tensor]:
        bias, weight, shift = columns
        leaves = [x.detach().requires_grad_() for x in (r, branch, bias, weight, shift)]
        *inputs, weight, shift = leaves
        out = residual_norm(*inputs, weight=weight, bias=shift)
        upstream = [torch.ones_like(x) for x in out]
        return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, upstream)]

    columns = [randn(384, dtype=torch.float32) for _ in range(3)]
    return call, [randn(2, 9, 384, dtype=stream), randn(2, 9, 384), *columns]


def masked_case(dtype: torch.dtype) -> Case:
    def call(qkv: Tensor, lengths: Tensor, mask: Tensor) -> list[Tensor]:
        return full(masked_attention, qkv, seqlens=lengths, key_mask=mask)

    qkv = randn(2, 50, 3, 2, 64, dtype=dtype)
    return call, [qkv, ids(2, high=50), torch.rand(2, 50) < 0.5]


def loss_case(transposed: bool) -> Case:
    def call(x: Tensor, y: Tensor, t: Tensor) -> list[Tensor]:
        return full(partial(info_nce, neighbour=y, temperature=t, transposed=transposed), x)

    return call, [randn(2, 32, 64), randn(2, 32, 64), torch.rand(())]


def flat(state: QueueState) -> list[Tensor]:
    *buffers, shadow = state
    assert isinstance(shadow, Shadow)
    return [*buffers, *shadow]


def rebuild(tensors: Sequence[Tensor]) -> QueueState:
    queue, label, sample_id, pointer, rows, bound = tensors
    return QueueState(queue, label, sample_id, pointer, Shadow(rows, bound))


def seen(call: Callable[..., object], inputs: list[Tensor]) -> Launches:
    """What the call launches, addresses named."""
    launched.clear()
    # What is kept alive has an address of its own.
    result = call(*inputs)
    names: dict[int, str] = {}
    found = []
    for kernel, *arguments in launched:
        if kernel is OP:
            # Memory of an op before may have become its own.
            names.clear()
        named: list[Any] = []
        for x in arguments:
            address = x.data_ptr() if isinstance(x, Tensor) else x
            if isinstance(address, int) and address > 1 << 32:
                address = owner(address, inputs) or names.setdefault(address, str(len(names)))
            named.append(address)
        found.append((kernel, *named))
    del result
    return found


def owner(address: int, inputs: list[Tensor]) -> str | None:
    for i, x in enumerate(inputs):
        offset = address - x.data_ptr()
        if 0 <= offset < x.untyped_storage().nbytes():
            return f"input {i} + {offset}"
    return None


def compare(make: Callable[[], Case], *, is_recorded: bool = True) -> None:
    call, inputs = make()
    seen(call, inputs)
    call, inputs = make()
    torch.manual_seed(1)
    replayed: list[bool] = []
    replay = Plans.replay

    def watched(self: Plans, *arguments: Any) -> Any:
        launched.append((OP,))
        result = replay(self, *arguments)
        replayed.append(result is not None)
        return result

    def nothing(*_: object) -> None:
        launched.append((OP,))

    with mock.patch.object(Plans, "replay", watched):
        found = seen(call, inputs)
    torch.manual_seed(1)
    with mock.patch.object(Plans, "replay", nothing):
        expected = seen(call, inputs)
    assert set(replayed) == {is_recorded}, f"recorded: {replayed}"
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        # Without hooks the plan passes None for them and for their data.
        mine, theirs = (x[:7] + x[10:] for x in (mine, theirs))
        assert mine == theirs, f"{mine}\n{theirs}"


def other_ways() -> None:
    """Where a plan must not be taken, or not be made."""
    qkv = randn(2, 50, 3, 2, 64)
    masked_attention(qkv)
    plans = attention_op.PACKED_FORWARD
    arguments = (None, 64**-0.5, False, "auto")
    tensors = (qkv, None, None, None, None)
    assert plans.replay(tensors, arguments) is not None
    assert plans.replay((randn(3, 50, 3, 2, 64), *tensors[1:]), arguments) is None, "batch size"
    shifted = randn(2 * 50 * 3 * 2 * 64 + 1)[1:].view_as(qkv)
    assert plans.replay((shifted, *tensors[1:]), arguments) is None, "alignment"
    assert plans.replay((qkv.half(), *tensors[1:]), arguments) is None, "dtype"
    assert plans.replay(tensors, (None, 0.2, False, "auto")) is None, "scale"
    seen_by_hook: list[object] = []
    knobs.runtime.launch_enter_hook.add(seen_by_hook.append)
    try:
        assert plans.replay(tensors, arguments) is None, "hook"
        masked_attention(qkv)
        assert len(seen_by_hook) == 1
    finally:
        knobs.runtime.launch_enter_hook.remove(seen_by_hook.append)
    # Packed rows are launched with one set of strides.
    q, k, v = qkv.unbind(2)
    attention(q, k, v)
    modes = (None,) * 4
    assert attention_op.FORWARD.replay((q, k, v, *modes), arguments) is not None
    for own in ((q.contiguous(), k, v), (q, k.contiguous(), v), (q, k, v.contiguous())):
        assert attention_op.FORWARD.replay((*own, *modes), arguments) is None, "strides"
    # One tensor in three places says nothing about which address is whose.
    attention_op.FORWARD._plans.clear()
    x = randn(2, 50, 2, 64)
    attention(x, x, x)
    assert not attention_op.FORWARD._plans
    compare(lambda: (attention, [randn(2, 50, 2, 64) for _ in range(3)]))
    launched.clear()
    attention(x, x, x)
    assert launched[0].count(x.data_ptr()) >= 3, "recorded for others"


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with stub_driver(), mock.patch.object(CudaLauncher, "__call__", note):
        for name, make in (*quick_cases(), *(more_cases() if "all" in sys.argv else ())):
            try:
                # Zeros around kept tokens are PyTorch's, which a plan does not make.
                compare(make, is_recorded=name != "kept")
            except AssertionError as error:
                sys.exit(f"{name}: {error}")
            sys.stdout.write(f"{name}: right\n")
        other_ways()


if __name__ == "__main__":
    main()
