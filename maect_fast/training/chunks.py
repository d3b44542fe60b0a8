"""A batch in chunks, with the gradient of one pass.

The first pass runs all chunks without a graph; what follows on the whole batch (batch statistics,
search, loss) gives the gradient of its result. The second pass repeats the trained part chunk by
chunk and differentiates that. Exact where a row's result depends on no other row: in the encoder
and the decoder, neither of which draws random numbers.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["in_chunks"]

Chunk = tuple[Tensor | None, ...]


def in_chunks(
    keep: Callable[..., Chunk],
    run: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    parameters: Iterable[Tensor],
    *,
    size: int | None,
) -> Tensor:
    """`run(*keep(*inputs))`, of which no more than `size` rows are in memory for the backward.

    The parameters get their gradients at once, after the last chunk: to their hooks, and so to
    DistributedDataParallel, a chunked pass looks like one operator.

    Args:
        keep: what is not differentiated, done once; its results stay in memory until the backward.
        run: is done twice, the second time with autograd. Its results are concatenated.
        inputs: split along their first dimension, all of one length; they get no gradient.
        parameters: those that `run` uses; gradients go to those that train.
        size: rows of a chunk, the last one may be shorter; None, or as many rows as there are, is
            one pass with autograd.
    """
    if size is None or size >= len(inputs[0]):
        return run(*keep(*inputs))
    chunks = list(zip(*(torch.split(x, size) for x in inputs), strict=True))
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return torch.cat([run(*keep(*chunk)) for chunk in chunks])
    return _TwoPass.apply(keep, run, chunks, *trained)  # type: ignore[no-any-return, no-untyped-call]


class _TwoPass(Function):
    @staticmethod
    def forward(
        ctx: Any,
        keep: Callable[..., Chunk],
        run: Callable[..., Tensor],
        chunks: list[tuple[Tensor, ...]],
        *parameters: Tensor,
    ) -> Tensor:
        device = parameters[0].device.type
        # Without the cache: a weight cast here, without a graph, would be found by later passes.
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            "cache_enabled": False,
        }
        kept, outputs = [], []
        with torch.autocast(**ctx.autocast):
            for chunk in chunks:
                kept.append(keep(*chunk))
                outputs.append(run(*kept[-1]))
        ctx.run = run
        ctx.sizes = [len(output) for output in outputs]
        ctx.num_parameters = len(parameters)
        ctx.save_for_backward(*parameters, *(x for chunk in kept for x in chunk))
        return torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors[: ctx.num_parameters]
        kept = ctx.saved_tensors[ctx.num_parameters :]
        width = len(kept) // len(ctx.sizes)
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for i, part in enumerate(torch.split(gradient, ctx.sizes)):
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                output = ctx.run(*kept[i * width : (i + 1) * width])
            torch._foreach_add_(sums, torch.autograd.grad(output, parameters, part))
            # Or it would outlive the next chunk's.
            del output
        return None, None, None, *sums
