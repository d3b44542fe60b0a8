"""How our modules get into other people's models."""

import functools
from typing import Any, TypeVar

from torch import Tensor, nn

from maect_fast import huggingface
from maect_fast.attention import FusedAttention, FusedMultiheadAttention, is_bare
from maect_fast.block import FusedBlock, layout_obstacle, obstacle

__all__ = ["fuse", "unfuse", "why_not"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def fuse(model: ModelT) -> ModelT:
    """Let every attention inside `model` compute by `masked_attention`, in place.

    Modules get another class, as `FusedAttention`, and nothing else changes: parameters, state-dict
    keys, hooks and modes stay; numbers stay up to rounding (on the CPU both run the kernel behind
    `F.scaled_dot_product_attention`). Hugging Face's models get another function by their own
    `set_attn_implementation` instead, and share it with models of the same configuration. Nothing
    is replaced unless everything can be; a model that is fused already is left alone. `unfuse`
    takes it back.

    timm's plain `Block` becomes a `FusedBlock`, which fuses norms, biases and GELU as well: on a
    GPU, under autocast or in bfloat16 or float16. `why_not` says where a block does not, and why.
    timm's `NaFlexVit` masks keys instead of pairs; what it makes of padding is not the same.

    Args:
        model: any model with timm's `Attention`, or its rotary ones (EVA, DINOv3), MAE-CT's
            `FlashAttentionWrapper`, torchvision's ViT `EncoderBlock`, or Hugging Face's ViT,
            ViTMAE, DeiT, MSN, I-JEPA, DINOv2 or DINOv3.

    Returns:
        The same model.

    Raises:
        ValueError: no attention found, or one that computes something else: dropout of attention
            weights, a position bias; the message names it.

    Source: timm: layers/attention.py, models/eva.py; ml-jku/MAE-CT:
        models/modules/flash_attention_wrapper.py; torchvision: models/vision_transformer.py;
        transformers: modeling_utils.py.
    """
    _check_module(model)
    attentions, others = _attentions(model), huggingface.models(model)
    if not attentions and not others:
        families = ", ".join(huggingface.FAMILIES)
        expected = (
            "a model that contains an attention of timm, MAE-CT, torchvision or Hugging Face's"
        )
        expected = f"{expected} {families}"
        raise ValueError(f"model: expected {expected}, got {type(model).__qualname__}")
    if refused := _obstacles(model):
        name, reason = next(iter(refused.items()))
        raise ValueError(f"model: cannot replace {name}: {reason}")
    for module in attentions.values():
        _change(module, _fused_class(module))
    for block in _blocks(model).values():
        if layout_obstacle(block) is None:
            _change(block, FusedBlock)
    for module in model.modules():
        if type(module) in _timm_fused():
            _change(module, _timm_fused()[type(module)])
    for other in others.values():
        if other.config._attn_implementation != huggingface.NAME:
            other._unfused = huggingface.set_implementation(other, huggingface.NAME)
    return model


def unfuse(model: ModelT) -> ModelT:
    """Take `fuse` back, in place: every module it changed has the class that it had.

    Args:
        model: any model. A `FusedAttention` that was built as such stays.

    Returns:
        The same model.

    Raises:
        ValueError: a fused module's class has been changed since (a parametrisation and FSDP do
            that); the message names it.
    """
    _check_module(model)
    fused = {name: m for name, m in model.named_modules() if "_unfused" in vars(m)}
    for name, module in fused.items():
        if type(module) not in _fused_classes() and not isinstance(vars(module)["_unfused"], str):
            kind = type(module).__qualname__
            raise ValueError(f"model: cannot restore {name or 'the model itself'}: it is a {kind}")
    for module in fused.values():
        before = vars(module).pop("_unfused")
        if isinstance(before, str):
            huggingface.set_implementation(module, before)
        else:
            module.__class__ = before
        vars(module).pop("is_int8", None)
    return model


def why_not(model: nn.Module, x: Tensor | None = None) -> list[str]:
    """What is not fused, or would not be, and why: one line each, none if nothing.

    Attentions that `fuse` refuses, timm's blocks that compute by timm's own forward, and hooks that
    wait for attention weights in vain, as those of timm's AttentionExtract.

    Args:
        model: any model.
        x: tokens [B, N, C] as the blocks would get them, under the autocast that they would run in;
            None: as the blocks' parameters are.
    """
    _check_module(model)
    lines = [f"{name}: cannot be fused: {reason}" for name, reason in _obstacles(model).items()]
    for name, block in _blocks(model).items():
        if isinstance(block, FusedBlock):
            like = block.norm1.weight
            reason = obstacle(block, like.new_empty((1, 1, len(like))) if x is None else x)
        else:
            is_fused = isinstance(block.attn, FusedAttention)
            reason = (layout_obstacle(block) if is_fused else None) or "it is not fused"
        if reason is not None:
            lines.append(f"{name or 'the model itself'}: timm's forward: {reason}")
    for name, module in model.named_modules():
        drop = getattr(module, "attn_drop", None)
        if isinstance(module, FusedAttention) and isinstance(drop, nn.Module) and not is_bare(drop):
            remedy = "attention_maps(model, images) computes them"
            lines.append(
                f"{name}.attn_drop: its hooks see no weights, which are never held: {remedy}"
            )
    return lines


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")


def _change(module: Any, kind: type[nn.Module]) -> None:
    """Give a module another class, unless it has one of ours."""
    if not isinstance(module, _fused_classes()):
        module._unfused = type(module)
        module.__class__ = kind


@functools.cache
def _timm_fused() -> dict[type[nn.Module], type[nn.Module]]:
    """Ours for classes that only timm has."""
    from timm.layers.attention import AttentionRope
    from timm.models.eva import EvaAttention
    from timm.models.naflexvit import NaFlexVit

    from maect_fast.timm_fused import FusedNaFlexVit, FusedRotaryAttention

    return {
        AttentionRope: FusedRotaryAttention,
        EvaAttention: FusedRotaryAttention,
        NaFlexVit: FusedNaFlexVit,
    }


@functools.cache
def _fused_classes() -> tuple[type[nn.Module], ...]:
    own = (FusedAttention, FusedBlock, FusedMultiheadAttention)
    return (*own, *_timm_fused().values())


def _fused_class(attention: nn.Module) -> type[nn.Module]:
    if isinstance(attention, nn.MultiheadAttention):
        return FusedMultiheadAttention
    return _timm_fused().get(type(attention), FusedAttention)


def _blocks(model: nn.Module) -> dict[str, Any]:
    """Plain blocks of timm, fused or not, by name."""
    from timm.models.vision_transformer import Block

    return {n: m for n, m in model.named_modules() if type(m) in (Block, FusedBlock)}


def _attentions(model: nn.Module) -> dict[str, Any]:
    """What `fuse` has to do with, by name."""
    from torchvision.models.vision_transformer import EncoderBlock

    # Elsewhere nn.MultiheadAttention may be asked for more than self-attention.
    in_blocks = {m.self_attention for m in model.modules() if isinstance(m, EncoderBlock)}

    def is_attention(module: nn.Module) -> bool:
        return "Attention" in type(module).__name__ and hasattr(module, "qkv")

    return {n: m for n, m in model.named_modules() if m in in_blocks or is_attention(m)}


def _obstacles(model: nn.Module) -> dict[str, str]:
    """By name, why `fuse` cannot replace an attention or a Hugging Face model."""
    plain = {n: m for n, m in _attentions(model).items() if not isinstance(m, _fused_classes())}
    found = {name: _obstacle(module) for name, module in plain.items()}
    others = huggingface.models(model)
    found |= {name: huggingface.obstacle(module) for name, module in others.items()}
    return {n or "the model itself": reason for n, reason in found.items() if reason is not None}


def _obstacle(module: Any) -> str | None:
    """Why no class of ours can compute what `module` does; None if one can."""
    from timm.layers.attention import Attention

    kind = type(module)
    is_rotary = kind in _timm_fused()
    if kind is nn.MultiheadAttention:
        return _obstacle_of_torch(module)
    # The official code is no package: its classes have no module name to know them by.
    names = (kind.__name__, type(getattr(module, "attn", None)).__name__)
    is_official = names == ("FlashAttentionWrapper", "FlashAttention")
    if kind is not Attention and not is_official and not is_rotary:
        expected = "timm.layers.Attention, FlashAttentionWrapper or torch.nn.MultiheadAttention"
        return f"expected {expected}, got {kind.__module__}.{kind.__qualname__}"
    if module.attn_drop.p > 0:
        return f"it drops attention weights in training (attn_drop {module.attn_drop.p})"
    scale = module.attn.softmax_scale if is_official else module.scale
    if scale != (module.scale if is_official else module.head_dim**-0.5):
        return f"its scale {scale} is not head_dim ** -0.5"
    return None


def _obstacle_of_torch(module: nn.MultiheadAttention) -> str | None:
    if module.dropout > 0:
        return f"it drops attention weights in training (dropout {module.dropout})"
    if not module.batch_first:
        return "its tokens come first, not its samples (batch_first=False)"
    if not module._qkv_same_embed_dim:
        return "its keys or values have a width of their own (kdim, vdim)"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys of its own (add_bias_kv, add_zero_attn)"
    return None
