"""A transformer block on the `residual_norm`, `gelu` and `masked_attention` ops.

M tokens of all samples, C features, S features of a linear layer's output. The residual stream is
kept with what is still to be added to it, so that the add is made inside the norm behind it; biases
are added, and their gradients summed, inside the ops beside the matrix products:

    r, qkv = norm_linear(r, a, b_fc2 of the block before, norm1, qkv)
    p = linear(masked_attention(qkv), proj)
    r, h = norm_linear(r, p, b_proj, norm2, fc1)
    a = gelu_linear(h, b_fc1, fc2)

A frozen block may have qkv, fc1 and fc2 in int8: norm and GELU write rows with a scale each. What
proj reads has no such pass before it, and stays as it is.

Saved for the backward are r twice, qkv, the attention's output and h: what norm and GELU gave is
made again by the kernels of their backward.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as module_hooks
from torch.utils.module_tracker import ModuleTracker
from torch.utils.weak import WeakTensorKeyDictionary

from maect_fast.attention import FusedAttention, is_bare
from maect_fast.kernels import (
    gelu_int8,
    int8_linear,
    masked_attention,
    quantize_rows,
    residual_norm,
    residual_norm_int8,
)
from maect_fast.kernels._common.gpu import is_gpu
from maect_fast.kernels._common.library import Differentiable, needs_gradient
from maect_fast.kernels.gelu.op import gelu_bwd, gelu_fwd
from maect_fast.kernels.residual_norm.op import (
    MAX_FEATURES,
    residual_norm_bwd,
    residual_norm_fwd,
)

__all__ = [
    "FusedBlock",
    "Stream",
    "has_global_hooks",
    "layout_obstacle",
    "normed",
    "obstacle",
    "run_blocks",
]


class Stream(NamedTuple):
    """The residual stream ``r + branch + bias``, of which two are still to be added."""

    r: Tensor
    branch: Tensor | None = None
    bias: Tensor | None = None

    def added(self) -> Tensor:
        """The sum, in the dtype of r."""
        x = self.r
        if self.branch is not None:
            x = x + self.branch
        if self.bias is not None:
            x = (x + self.bias).to(x.dtype)
        return x


class FusedBlock(nn.Module):
    """timm's plain pre-norm `Block` after `fuse`: the same modules, fewer passes over memory.

    ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``. Where `obstacle` names one, and with a mask,
    the block computes by timm's own forward; with `is_int8` on a CPU too by this one.

    Source: timm: models/vision_transformer.py, Block.
    """

    norm1: nn.LayerNorm
    attn: Any
    norm2: nn.LayerNorm
    mlp: Any
    _unfused: type[nn.Module]
    is_int8 = False
    """Whether qkv, fc1 and fc2 multiply in int8, which has no gradient."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        """Tokens [B, N, C] to the same, in the dtype of x.

        Args:
            x: tokens, the residual stream.
            attn_mask: see `FusedAttention`.
            is_causal: False.
        """
        if attn_mask is None and not is_causal and obstacle(self, x) is None:
            return self.advance(Stream(x), _cast([self], x), keeps_bias=False).added()
        return self._unfused.forward(self, x, attn_mask, is_causal)  # type: ignore[no-any-return]

    def advance(self, stream: Stream, copies: "Copies", *, keeps_bias: bool) -> Stream:
        """The stream behind this block; nothing is checked, `obstacle` is the caller's to ask.

        Args:
            stream: before it.
            copies: of its weights, in the dtype of products.
            keeps_bias: the next norm is to add the last bias, or else the last product does.
        """
        if self.is_int8:
            return self._advance_int8(stream, copies, keeps_bias=keeps_bias)
        attn, mlp = self.attn, self.mlp
        r, qkv = _norm_linear(stream, self.norm1, attn.qkv.weight, attn.qkv.bias, copies)
        o = masked_attention(torch.unflatten(qkv, -1, (3, attn.num_heads, -1))).flatten(-2)
        p = _linear(o, attn.proj.weight, copies)
        r, h = _norm_linear(Stream(r, p, attn.proj.bias), self.norm2, mlp.fc1.weight, None, copies)
        bias = None if keeps_bias else mlp.fc2.bias
        a = _gelu_linear(h, mlp.fc1.bias, mlp.fc2.weight, bias, copies)
        return Stream(r, a, mlp.fc2.bias if keeps_bias else None)

    @torch.no_grad()
    def _advance_int8(self, stream: Stream, copies: "Copies", *, keeps_bias: bool) -> Stream:
        dtype = _product_dtype(stream.r)
        attn, mlp = self.attn, self.mlp
        r, y, scale = _norm_int8(stream, self.norm1)
        qkv = int8_linear(y, scale, *_quantized(attn.qkv.weight), attn.qkv.bias, dtype=dtype)
        o = masked_attention(torch.unflatten(qkv, -1, (3, attn.num_heads, -1))).flatten(-2)
        p = _linear(o, attn.proj.weight, copies)
        r, y, scale = _norm_int8(Stream(r, p, attn.proj.bias), self.norm2)
        h = int8_linear(y, scale, *_quantized(mlp.fc1.weight), dtype=dtype)
        g, scale = gelu_int8(h, mlp.fc1.bias)
        bias = None if keeps_bias else mlp.fc2.bias
        a = int8_linear(g, scale, *_quantized(mlp.fc2.weight), bias, dtype=dtype)
        return Stream(r, a, mlp.fc2.bias if keeps_bias else None)


def run_blocks(blocks: Iterable[nn.Module], stream: Stream) -> Stream:
    """Blocks one after another; what one is to add is added inside the next.

    A block that is no `FusedBlock`, that has an `obstacle` or hooks of its own, is called.
    """
    left = list(blocks)
    while left:
        # Behind a fused block the stream is as before it, as far as obstacles go.
        fused: list[Any] = []
        while len(fused) < len(left) and _is_fused(stream.r, left[len(fused)]):
            fused.append(left[len(fused)])
        copies = _cast(fused, stream.r)
        for block in fused:
            stream = block.advance(stream, copies, keeps_bias=True)
        if not fused:
            stream = Stream(left[0](stream.added()))
        left = left[max(len(fused), 1) :]
    return stream


def _is_fused(r: Tensor, block: nn.Module) -> bool:
    return isinstance(block, FusedBlock) and is_bare(block) and obstacle(block, r) is None


def normed(norm: Any, stream: Stream) -> Tensor:
    """The norm of the stream, in the dtype of r, under autocast in fp32."""
    r, branch, bias = stream
    dtype = r.dtype if _autocast_dtype(r) is None else torch.float32
    if branch is None or not (is_bare(norm) and _is_layer_norm(norm, r.shape[-1])):
        plain: Tensor = norm(stream.added().to(dtype))
        return plain
    weight, shift, eps = norm.weight, norm.bias, norm.eps
    return residual_norm(r, branch, bias, weight=weight, bias=shift, eps=eps, dtype=dtype)[1]


def layout_obstacle(block: Any) -> str | None:
    """Why a block's layers are not those that `FusedBlock` computes; None if they are."""
    # By dictionary: Module's own look-up makes this, and so every call, twice as long.
    layers: dict[str, Any] = block._modules
    types = _timm_types()
    attn, mlp = layers["attn"], layers["mlp"]
    if type(attn) is not FusedAttention:
        return f"its attention is {type(attn).__qualname__}"
    in_attn, in_mlp = attn._modules, mlp._modules
    for name in ("q_norm", "k_norm", "norm", "gate"):
        if type(in_attn.get(name)) not in (nn.Identity, type(None)):
            return "its attention is gated or normalised (qk-norm)"
    if type(mlp) is not types["Mlp"] or type(in_mlp["norm"]) is not nn.Identity:
        return f"its MLP is {type(mlp).__qualname__} or normalised"
    if type(in_mlp["act"]) is not nn.GELU or in_mlp["act"].approximate != "none":
        return f"its activation is not the exact GELU ({in_mlp['act']})"
    linears: tuple[Any, ...] = (in_attn["qkv"], in_attn["proj"], in_mlp["fc1"], in_mlp["fc2"])
    for linear in linears:
        if type(linear) is not nn.Linear:
            return f"a linear layer is {type(linear).__qualname__}"
    C: int = linears[0].in_features
    if not (_is_layer_norm(layers["norm1"], C) and _is_layer_norm(layers["norm2"], C)):
        return f"its norms are not LayerNorms of {C} features with weight and bias"
    if C > MAX_FEATURES or any(linears[i].out_features != C for i in (1, 3)):
        return f"it is wider than {MAX_FEATURES} features, or its branches differ in width"
    if type(layers["ls1"]) is not nn.Identity or type(layers["ls2"]) is not nn.Identity:
        return "it has LayerScale"
    idle = (nn.Identity, types["DropPath"])
    if type(layers["drop_path1"]) not in idle or type(layers["drop_path2"]) not in idle:
        return "its drop_path is neither timm's nor none"
    return None


def obstacle(block: Any, x: Tensor) -> str | None:
    """Why a fused block computes tokens x [B, N, C] by timm's forward, here and now; None: no."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing: it fuses the rest around our attention"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    is_int8 = block.is_int8 if isinstance(block, FusedBlock) else False
    if not is_int8 and (reason := _place_obstacle(x, _product_dtype(x))):
        return reason
    if reason := layout_obstacle(block):
        return reason
    layers = block._modules
    in_attn, in_mlp = layers["attn"]._modules, layers["mlp"]._modules
    linears: tuple[Any, ...] = (in_attn["qkv"], in_attn["proj"], in_mlp["fc1"], in_mlp["fc2"])
    if x.ndim != 3 or x.shape[-1] != linears[0].in_features or not x.is_contiguous():
        return f"its tokens are not one contiguous [B, N, C], got {list(x.shape)} {x.stride()}"
    for drop in (layers["drop_path1"], layers["drop_path2"]):
        if type(drop) is not nn.Identity and drop.training and drop.drop_prob:
            return "it drops its branch in training (drop_path)"
    for drop in (in_attn.get("proj_drop"), in_mlp["drop1"], in_mlp["drop2"]):
        if type(drop) is not nn.Identity and (type(drop) is not nn.Dropout or _drops(drop)):
            return "it drops features in training (proj_drop)"
    inside = (*layers.values(), *in_attn.values(), *in_mlp.values())
    if not all(layer is None or is_bare(layer) for layer in inside) or has_global_hooks():
        return "a layer inside has hooks or a forward of its own"
    weights = [layer.weight for layer in (layers["norm1"], layers["norm2"], *linears)]
    if any(weight.device != x.device for weight in weights):
        return f"its parameters are not on {x.device}, as its tokens are"
    if _autocast_dtype(x) is None and any(weight.dtype != x.dtype for weight in weights):
        return f"its parameters are not {x.dtype}, as its tokens are, and there is no autocast"
    if is_int8 and torch.is_grad_enabled():
        parameters = (p for layer in inside if layer is not None for p in layer.parameters())
        if x.requires_grad or any(p.requires_grad for p in parameters):
            return "something in it trains: products in int8 have no gradient"
    return None


def _place_obstacle(x: Tensor, dtype: torch.dtype) -> str | None:
    """Where it would not pay, or the ops have no kernels."""
    if not is_gpu(x):
        return f"its tokens are on {x.device.type}, where it would save nothing"
    if dtype.itemsize != 2:
        return f"its products are {dtype}: expected autocast, or modules in bfloat16 or float16"
    return None


def _product_dtype(x: Tensor) -> torch.dtype:
    return _autocast_dtype(x) or x.dtype


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast has products in, which leaves fp64 alone; None without it."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@functools.cache
def _timm_types() -> dict[str, type[nn.Module]]:
    from timm.layers.drop import DropPath
    from timm.layers.mlp import Mlp
    from timm.layers.norm import LayerNorm

    return {"DropPath": DropPath, "LayerNorm": LayerNorm, "Mlp": Mlp}


def _is_layer_norm(norm: Any, C: int) -> bool:
    if type(norm) not in (nn.LayerNorm, _timm_types()["LayerNorm"]):
        return False
    has_columns = norm.weight is not None and norm.bias is not None
    return has_columns and norm.normalized_shape == (C,)


def _drops(drop: nn.Dropout) -> bool:
    return drop.training and drop.p > 0


def has_global_hooks() -> bool:
    """Whether calling any module runs more than that. FlopCounterMode's hooks only look."""
    hooks = (
        *module_hooks._global_forward_hooks.values(),
        *module_hooks._global_forward_pre_hooks.values(),
        *module_hooks._global_backward_hooks.values(),
        *module_hooks._global_backward_pre_hooks.values(),
    )
    return any(type(getattr(hook, "__self__", None)) is not ModuleTracker for hook in hooks)


# Parameters in the dtype of products, by their identity.
Copies: TypeAlias = dict[int, Tensor]


@torch.no_grad()
def _cast(blocks: Iterable[Any], like: Tensor) -> Copies:
    """What the blocks multiply, in the dtype that products of `like` have, cast in one call.

    For one pass only: torch's fused optimisers and its foreach ops on a GPU write parameters
    without moving autograd's version counter, so nothing tells whether a kept copy is still one.
    """
    dtype = _product_dtype(like)
    copies: Copies = {}
    others = []
    for block in blocks:
        attn, mlp = block.attn, block.mlp
        rest = (*_columns(attn.qkv), mlp.fc1.weight, *_columns(mlp.fc2))
        for x in (attn.proj.weight, *(() if block.is_int8 else rest)):
            if x.dtype == dtype:
                copies[id(x)] = x.detach()
            else:
                others.append(x)
    if others:
        made = [torch.empty_like(x, dtype=dtype) for x in others]
        torch._foreach_copy_(made, others)
        copies.update(zip(map(id, others), made, strict=True))
    return copies


def _columns(linear: nn.Linear) -> tuple[Tensor, ...]:
    return (linear.weight,) if linear.bias is None else (linear.weight, linear.bias)


# Weights in int8, with their rows' scales, by parameter and as of a version of it.
_QUANTIZED = WeakTensorKeyDictionary()


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """A frozen weight in int8, and its rows' scales, made once for each of its values.

    A value is known by autograd's version counter, which `load_state_dict` moves; optimisers, whose
    fused forms do not, have no part in it. Who writes to numbers through `.data` moves nothing.
    """
    # Inference tensors have no version, fake ones no value.
    if x.is_inference() or isinstance(x, FakeTensor):
        return quantize_rows(x.detach())
    of = (x._version, x.data_ptr())
    known: tuple[Any, tuple[Tensor, Tensor]] | None = _QUANTIZED.get(x)  # type: ignore[no-untyped-call]
    if known is not None and known[0] == of:
        return known[1]
    made = quantize_rows(x.detach())
    # What a capture makes has no value until the graph runs.
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        _QUANTIZED[x] = (of, made)
    return made


def _norm_int8(stream: Stream, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the stream [.., C], of its norm int8 rows [.., C] and their scales."""
    return residual_norm_int8(*stream, weight=norm.weight, bias=norm.bias, eps=norm.eps)


def _norm_linear(
    stream: Stream, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None, copies: Copies
) -> tuple[Tensor, Tensor]:
    """The sum of the stream [.., C], and of its norm a linear layer [.., S] in products' dtype."""
    inputs = (*stream, norm.weight, norm.bias, weight, bias)
    arguments = (*inputs, copies[id(weight)], None if bias is None else copies[id(bias)], norm.eps)
    output: tuple[Tensor, ...]
    if needs_gradient(_Part.op, *(x for x in inputs if x is not None)):
        output = _NormLinear.call(*arguments)
    else:
        output = _NormLinear.forward(*arguments)
    return output[0], output[1]


def _linear(x: Tensor, weight: Tensor, copies: Copies) -> Tensor:
    """``x W^T``."""
    arguments = (x, weight, copies[id(weight)])
    result: Tensor
    if needs_gradient(_Part.op, x, weight):
        result = _Linear.call(*arguments)
    else:
        result = _Linear.forward(*arguments)
    return result


def _gelu_linear(
    h: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, copies: Copies
) -> Tensor:
    """``gelu(h + shift) W^T + bias``."""
    inputs = (h, shift, weight, bias)
    arguments = (*inputs, copies[id(weight)], None if bias is None else copies[id(bias)])
    result: Tensor
    if needs_gradient(_Part.op, *(x for x in inputs if x is not None)):
        result = _GELULinear.call(*arguments)
    else:
        result = _GELULinear.forward(*arguments)
    return result


class _Part(Differentiable):
    """A part of the block, whose `gradients` are those of its inputs."""

    op = "FusedBlock"
    gradients: Any

    @classmethod
    def backward(cls, ctx: Any, *grads: Tensor | None) -> Any:
        # Once: what a checkpoint makes again it hands out once.
        saved = ctx.saved_tensors
        with torch.no_grad():
            found = cls.gradients(ctx, saved, *grads)
        return cls.last([x for x in (*grads, *saved) if x is not None], *found)


class _NormLinear(_Part):
    @staticmethod
    def forward(
        r: Tensor,
        branch: Tensor | None,
        branch_bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        w: Tensor,
        b: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, ...]:
        inputs = (r, branch, branch_bias, gamma, beta)
        out, y, mean, rstd = residual_norm_fwd(*inputs, eps, w.dtype, "auto")
        # Through here also without a branch, so that its gradient has one way, not two to add up.
        return r.view_as(r) if branch is None else out, _product(y, w, b), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, branch, branch_bias, gamma, beta, weight, bias, w, _, _ = inputs
        r_out, _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in (branch, branch_bias, weight, bias)]
        ctx.save_for_backward(r_out, mean, rstd, gamma, beta, w)

    @staticmethod
    def gradients(
        ctx: Any, saved: Any, dr_out: Tensor | None, dz: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        *statistics, w = saved
        r_out, _, _, gamma, beta = statistics
        needs = ctx.needs_input_grad
        branch_dtype, branch_bias_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if dz is None:
            dz = w.new_zeros((*r_out.shape[:-1], len(w)))
        dz = dz.contiguous()
        dr_out = None if dr_out is None else dr_out.contiguous()
        dy = (_rows(dz) @ w).view(r_out.shape)
        need_dr = any(needs[:3])
        dr, y, sums = residual_norm_bwd(dy, dr_out, *statistics, need_dr, needs[5], "auto")
        del dy
        # Parameters of a block have one dtype.
        dgamma, dbeta, *rest = sums.to(gamma.dtype).unbind()
        return (
            dr if needs[0] else None,
            dr.to(branch_dtype) if needs[1] else None,
            rest[0].to(branch_bias_dtype) if needs[2] else None,
            dgamma if needs[3] else None,
            dbeta.to(beta.dtype) if needs[4] else None,
            _weight_gradient(dz, y, weight_dtype) if needs[5] else None,
            _rows(dz).sum(0, dtype=bias_dtype) if needs[6] else None,
            *(None,) * 3,
        )


class _Linear(_Part):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, w: Tensor) -> Tensor:
        return _product(x, w, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, w = inputs
        ctx.dtype = weight.dtype
        ctx.save_for_backward(x, w)

    @staticmethod
    def gradients(ctx: Any, saved: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, w = saved
        dz = dz.contiguous()
        return (
            (_rows(dz) @ w).view(x.shape) if ctx.needs_input_grad[0] else None,
            _weight_gradient(dz, x, ctx.dtype) if ctx.needs_input_grad[1] else None,
            None,
        )


class _GELULinear(_Part):
    @staticmethod
    def forward(
        h: Tensor,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        w: Tensor,
        b: Tensor | None,
    ) -> Tensor:
        return _product(gelu_fwd(h, shift, "auto"), w, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        h, shift, weight, bias, w, _ = inputs
        ctx.dtypes = [None if x is None else x.dtype for x in (shift, weight, bias)]
        ctx.save_for_backward(h, shift, w)

    @staticmethod
    def gradients(ctx: Any, saved: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        h, shift, w = saved
        shift_dtype, weight_dtype, bias_dtype = ctx.dtypes
        needs = ctx.needs_input_grad
        dz = dz.contiguous()
        dg = (_rows(dz) @ w).view(h.shape)
        dh, g, dshift = gelu_bwd(h, shift, dg, needs[2], "auto")
        del dg
        return (
            dh if needs[0] else None,
            dshift.to(shift_dtype) if needs[1] else None,
            _weight_gradient(dz, g, weight_dtype) if needs[2] else None,
            _rows(dz).sum(0, dtype=bias_dtype) if needs[3] else None,
            *(None,) * 2,
        )


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    rows = _rows(x)
    z = torch.mm(rows, w.t()) if b is None else torch.addmm(b, rows, w.t())
    return z.view(*x.shape[:-1], len(w))


def _weight_gradient(dz: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``dz^T x``, from the product's fp32 sums unrounded where PyTorch can hand them out."""
    dz, x = _rows(dz).t(), _rows(x)
    if dtype == torch.float32 and x.itemsize == 2 and is_gpu(x):
        return torch.mm(dz, x, out_dtype=dtype)
    return torch.mm(dz, x).to(dtype)
