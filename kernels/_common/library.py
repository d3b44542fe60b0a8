"""Registration of ops with torch.library, and their gradients.

Ops are registered by `torch.library.Library` itself: a call costs the host 3 us, through
`custom_op` 49 (measured on an H200's host, torch 2.11). They have no gradients of their own; those
are a `Differentiable` around a forward and a backward op.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Function, forward_ad

__all__ = ["LIBRARY", "Differentiable", "needs_gradient", "operator"]

Result = TypeVar("Result")

LIBRARY = torch.library.Library("maect_fast", "FRAGMENT")  # type: ignore[no-untyped-call]


def operator(
    name: str, *, fake: Callable[..., Any], mutates_args: Sequence[str] = ()
) -> Callable[[Callable[..., Result]], OpOverload[..., Result]]:
    """Register the decorated function, whose annotations are the schema, as ``maect_fast::name``.

    It runs on every device and chooses by its arguments. What it returns shares no memory with what
    it is given.

    Args:
        name: of the op.
        fake: makes empty results of the right shapes, dtypes and strides.
        mutates_args: tensors that the function writes to.

    Returns:
        A decorator; in the function's place it leaves the registered op.
    """

    def register(function: Callable[..., Result]) -> OpOverload[..., Result]:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        tags = (torch.Tag.pt2_compliant_tag,)
        LIBRARY.define(name + schema, tags=tags)  # type: ignore[no-untyped-call]
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"maect_fast::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.maect_fast, name).default  # type: ignore[no-any-return]

    return register


def needs_gradient(op: str, *tensors: Tensor) -> bool:
    """Whether autograd is to differentiate a call.

    Args:
        op: public name, for the message.
        tensors: its differentiable inputs.

    Raises:
        NotImplementedError: forward mode, whose tangents an op without a rule would drop silently.
    """
    if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in tensors):
        raise NotImplementedError(
            f"{op}: expected differentiation in reverse mode, got forward mode (jvp), which only "
            "backend='reference' has"
        )
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return True
    return False


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


class Differentiable(Function):
    """Base of the ops' gradients: `forward`, `setup_context` and `backward`, all static.

    `torch.func.grad` and `vmap` work; second derivatives are errors.
    """

    generate_vmap_rule = True
    op: ClassVar[str]
    """Public name of the op, for messages."""

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        """`apply`, whose look-up of signatures takes longer than an op: 25 of 33 us."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return cls.apply(*arguments)  # type: ignore[no-untyped-call]
        return super(Function, cls).apply(*arguments)  # type: ignore[misc]

    @classmethod
    def last(cls, of: Sequence[Tensor], *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """A backward's results, to differentiate which again is an error.

        Args:
            of: what they depend on.
            gradients: the results.
        """
        if not torch.is_grad_enabled():
            return gradients
        found: tuple[Tensor | None, ...] = _Last.apply(cls.op, len(of), *of, *gradients)  # type: ignore[no-untyped-call]
        return found


class _Last(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, num_of: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.clone() for x in tensors[num_of:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{ctx.op} has no second derivative")
