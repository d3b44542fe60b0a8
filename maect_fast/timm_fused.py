"""What `fuse` makes of timm's modules that only timm has: rotary attention and NaFlexViT.

B samples, N tokens, C features, H heads, D features of a head.

Source: timm: models/eva.py, layers/attention.py, models/naflexvit.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from maect_fast.attention import FusedAttention, key_mask_of
from maect_fast.kernels import attention

__all__ = ["FusedNaFlexVit", "FusedRotaryAttention"]


class FusedRotaryAttention(FusedAttention):
    """timm's `EvaAttention` or `AttentionRope` on `attention`: EVA, ViTs with RoPE, DINOv3.

    Queries and keys are normalised and rotated by timm's own functions before the op, grouped keys
    and values are repeated as timm does it. Layers and their names are timm's; the gradient goes
    to x and to the parameters.
    """

    num_prefix_tokens: int

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Any = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Tokens [B, N, C] to the same rows of `proj`'s width.

        Args:
            x: tokens.
            rope: sine and cosine, [N', 2 * D] or [.., N', 2 * D], of the tokens behind the prefix.
            attn_mask: None, or bool [B, 1, 1, N], True = the token takes part as a key.
            is_causal: False.

        Raises:
            ValueError: a causal or an [.., N, N] mask.
        """
        self._check_tokens(x, is_causal)
        q, k, v = self._projections(x)  # [B, H, N, D] each
        layers: Any = self
        q, k = layers.q_norm(q), layers.k_norm(k)
        if rope is not None:
            q, k = self._rotated(q, rope), self._rotated(k, rope)
        groups = getattr(self, "num_kv_groups", 1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        # Norms and rotation may have run in fp32 under autocast.
        rows = [t.to(v.dtype).transpose(1, 2) for t in (q, k, v)]
        key_mask = None if attn_mask is None else key_mask_of(attn_mask, x.shape[0])
        return self._project(attention(rows[0], rows[1], rows[2], key_mask=key_mask), x)

    @property
    def has_first_token(self) -> bool:
        """False: the query of the first token needs what `forward` does to all of them."""
        return False

    def _projections(self, x: Tensor) -> tuple[Tensor, ...]:
        layers: Any = self
        if self.qkv is None:
            projections = (layers.q_proj, layers.k_proj, layers.v_proj)
            rows = (proj(x).unflatten(-1, (-1, layers.head_dim)) for proj in projections)
            return tuple(t.transpose(1, 2) for t in rows)
        if getattr(self, "q_bias", None) is None:
            qkv = self.qkv(x)
        else:
            bias = torch.cat((layers.q_bias, layers.k_bias, layers.v_bias))
            if layers.qkv_bias_separate:
                qkv = self.qkv(x) + bias
            else:
                qkv = F.linear(x, layers.qkv.weight, bias)
        packed = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return tuple(packed.unbind(0))

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        prefix, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
        rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)
        return torch.cat((x[:, :, :prefix], rotated.to(x.dtype)), dim=2)


class FusedNaFlexVit(NaFlexVit):
    """timm's `NaFlexVit`, whose own masks say which keys take part instead of which pairs.

    Rows of valid tokens stay the same. Those of padding, which timm's pooling leaves out, do not:
    in timm they see every token alike, here what is valid.
    """

    def _forward_embeds(
        self, x: Any, patch_coord: Any, patch_valid: Any, attn_mask: Any
    ) -> dict[str, Any]:
        embeds: dict[str, Any] = super()._forward_embeds(x, patch_coord, patch_valid, attn_mask)
        valid = embeds["patch_valid"]
        if attn_mask is None and valid is not None:
            key_mask = F.pad(valid.bool(), (self.num_prefix_tokens, 0), value=True)
            embeds["attn_mask"] = key_mask[:, None, None]  # [B, 1, 1, N] bool
        return embeds
