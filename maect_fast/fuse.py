"""How our modules get into other people's models."""

from typing import Any, TypeVar

from torch import Tensor, nn

from maect_fast.attention import FusedAttention, FusedMultiheadAttention
from maect_fast.block import FusedBlock, layout_obstacle, obstacle

__all__ = ["fuse", "unfuse", "why_not"]

ModelT = TypeVar("ModelT", bound=nn.Module)


_FUSED = (FusedAttention, FusedBlock, FusedMultiheadAttention)


def fuse(model: ModelT) -> ModelT:
    """Let every attention inside `model` compute by `masked_attention`, in place.

    Modules get another class, `FusedAttention` or `FusedMultiheadAttention`, and nothing else
    changes: parameters, state-dict keys, hooks and modes stay; numbers stay up to rounding (on the
    CPU both run the kernel behind `F.scaled_dot_product_attention`). Nothing is replaced unless
    everything can be; a model that is fused already is left alone. `unfuse` takes it back.

    timm's plain `Block` becomes a `FusedBlock`, which fuses norms, biases and GELU as well: on a
    GPU, under autocast or in bfloat16 or float16. `why_not` says where a block does not, and why.

    Args:
        model: any model with timm's `Attention`, MAE-CT's `FlashAttentionWrapper` or torchvision's
            ViT `EncoderBlock`.

    Returns:
        The same model.

    Raises:
        ValueError: no attention found, or one that computes something else: queries and keys
            rotated, dropout of attention weights, a position bias; the message names it.

    Source: timm: layers/attention.py; ml-jku/MAE-CT: models/modules/flash_attention_wrapper.py;
        torchvision: models/vision_transformer.py.
    """
    _check_module(model)
    attentions = _attentions(model)
    if not attentions:
        expected = "a model that contains an attention of timm, MAE-CT or torchvision"
        raise ValueError(f"model: expected {expected}, got {type(model).__qualname__}")
    plain = {name: m for name, m in attentions.items() if not isinstance(m, _FUSED)}
    for name, module in plain.items():
        if reason := _obstacle(module):
            raise ValueError(f"model: cannot replace {name or 'the model itself'}: {reason}")
    for module in plain.values():
        module._unfused = type(module)
        is_torch = isinstance(module, nn.MultiheadAttention)
        module.__class__ = FusedMultiheadAttention if is_torch else FusedAttention
    for block in _blocks(model).values():
        if not isinstance(block, FusedBlock) and layout_obstacle(block) is None:
            block._unfused = type(block)
            block.__class__ = FusedBlock
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
        if type(module) not in _FUSED:
            kind = type(module).__qualname__
            raise ValueError(f"model: cannot restore {name or 'the model itself'}: it is a {kind}")
    for module in fused.values():
        module.__class__ = vars(module).pop("_unfused")
        vars(module).pop("is_int8", None)
    return model


def why_not(model: nn.Module, x: Tensor | None = None) -> list[str]:
    """Which of timm's blocks compute by timm's own forward, and why: one line each, none if none.

    Args:
        model: any model.
        x: tokens [B, N, C] as the blocks would get them, under the autocast that they would run in;
            None: as the blocks' parameters are.
    """
    _check_module(model)
    lines = []
    for name, block in _blocks(model).items():
        if isinstance(block, FusedBlock):
            like = block.norm1.weight
            reason = obstacle(block, like.new_empty((1, 1, len(like))) if x is None else x)
        else:
            is_fused = isinstance(block.attn, FusedAttention)
            reason = (layout_obstacle(block) if is_fused else None) or "it is not fused"
        if reason is not None:
            lines.append(f"{name or 'the model itself'}: timm's forward: {reason}")
    return lines


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")


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


def _obstacle(module: Any) -> str | None:
    """Why no class of ours can compute what `module` does; None if one can."""
    from timm.layers.attention import Attention

    kind = type(module)
    if kind is nn.MultiheadAttention:
        return _obstacle_of_torch(module)
    # The official code is no package: its classes have no module name to know them by.
    names = (kind.__name__, type(getattr(module, "attn", None)).__name__)
    is_official = names == ("FlashAttentionWrapper", "FlashAttention")
    if kind is not Attention and not is_official:
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
