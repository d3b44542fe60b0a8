"""Hugging Face's vision transformers on the `attention` op, by their own attention interface.

transformers looks up by name, at every call, the function that attends: `fuse` registers ours and
sets the model's name for it, as `set_attn_implementation` does; nothing else changes.

Source: transformers: modeling_utils.py (AttentionInterface), models/vit, models/vit_mae.
"""

import sys
from typing import Any

from torch import Tensor, nn

from maect_fast.attention import key_mask_of
from maect_fast.kernels import attention

__all__ = ["FAMILIES", "NAME", "attend", "models", "obstacle", "set_implementation"]

NAME = "maect_fast"
# Whose attention is bidirectional and adds nothing to its scores, as the tests found.
FAMILIES = (
    *("deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa", "vit", "vit_mae"),
    "vit_msn",
)
KNOWN = tuple(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES)
# What callers say about other things than attention.
HARMLESS = ("num_items_in_batch", "output_hidden_states", "position_ids", "return_dict")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Queries [B, H, M, D], keys and values [B, H, N, D] to ([B, M, H, D], None).

    Args:
        module: who asks.
        query: gets a gradient, as the next two.
        key: see there.
        value: see there.
        attention_mask: None, or bool [B, 1, 1, N], True = takes part as a key.
        dropout: 0.
        scaling: factor of the scores.
        is_causal: False or None.
        others: what the interface passes on; what would change the result is refused.

    Raises:
        ValueError: anything that the op does not compute.
    """
    given = [k for k, v in others.items() if v is not None and v is not False]
    asked = [name for name in given if name not in HARMLESS]
    asked += ["dropout"] * (dropout > 0) + ["is_causal"] * bool(is_causal)
    if asked:
        remedy = "unfuse(model) has it; maect_fast.nn.attention_maps gives weights"
        raise ValueError(f"{', '.join(asked)}: expected none of {type(module).__name__}: {remedy}")
    key_mask = None if attention_mask is None else key_mask_of(attention_mask, query.shape[0])
    rows = [x.transpose(1, 2) for x in (query, key, value)]
    return attention(rows[0], rows[1], rows[2], key_mask=key_mask, scale=scaling), None


def models(model: nn.Module) -> dict[str, Any]:
    """Hugging Face's models with an attention that ours can replace, by name.

    Not those inside of others, with which they share a configuration. Models of other families are
    left alone, as a text tower beside a ViT.
    """
    # Where transformers is not loaded, there is none.
    library = sys.modules.get("transformers.modeling_utils")
    found: dict[str, Any] = {}
    if library is not None:
        for name, module in model.named_modules():
            is_inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
            is_theirs = isinstance(module, library.PreTrainedModel) and not is_inside
            if is_theirs and any(map(_is_known, _attentions(module))):
                found[name] = module
    return found


def obstacle(model: nn.Module) -> str | None:
    """Why a Hugging Face model cannot attend by ours; None if it can."""
    for module in _attentions(model):
        kind = type(module)
        if not _is_known(module):
            got = f"{kind.__module__}.{kind.__qualname__}"
            return f"expected attention of {', '.join(FAMILIES)} alone, got {got} too"
        dropout: Any = getattr(module, "attention_dropout", getattr(module, "dropout", 0.0))
        if dropout > 0:
            return f"it drops attention weights in training (dropout {dropout})"
    return None


def _attentions(model: nn.Module) -> list[nn.Module]:
    """Who asks the interface for a function."""
    return [module for module in model.modules() if hasattr(module, "is_causal")]


def _is_known(attention: nn.Module) -> bool:
    return type(attention).__module__ in KNOWN


def set_implementation(model: Any, name: str) -> str:
    """Let a Hugging Face model attend by the function of that name; the name it had before."""
    library = sys.modules["transformers.modeling_utils"]
    if NAME not in library.ALL_ATTENTION_FUNCTIONS:
        library.ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    before: str = model.config._attn_implementation
    model.set_attn_implementation(name)
    return before
