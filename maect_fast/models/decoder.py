"""The MAE decoder and its loss, on the removed patches only.

B images, C channels, p patch side, L patches, N kept patches, D width.

Source: He et al. (arXiv 2111.06377); ml-jku/MAE-CT: models/vit/masked_decoder.py,
    losses/mae_vit_loss.py.
"""

from functools import partial
from typing import cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maect_fast.config import DecoderConfig
from maect_fast.fuse import fuse
from maect_fast.models.encoder import (
    NORM_EPS,
    Encoder,
    Masking,
    gather_patches,
    init_weights,
    sincos_pos_embed,
)

__all__ = ["Decoder", "patch_targets", "reconstruction_loss"]


class Decoder(nn.Module):
    """Predict the pixels of the removed patches from the encoder's tokens.

    State-dict names equal those of ml-jku/MAE-CT's files: `embed.*`, `mask_token` [1, 1, D],
    `pos_embed` [1, L, D] (a buffer), `blocks.i.*`, `norm.*`, `pred.*`.

    Args:
        config: width, depth and heads.
        encoder: gives the sizes of tokens, grid and patches.
    """

    pos_embed: Tensor

    def __init__(self, config: DecoderConfig, encoder: Encoder) -> None:
        super().__init__()
        self.normalize_pixels = config.normalize_pixels
        dim, norm = config.embed_dim, cast("type[nn.Module]", partial(nn.LayerNorm, eps=NORM_EPS))
        if dim % config.num_heads:
            raise ValueError(
                f"decoder.embed_dim: {dim} is no multiple of num_heads {config.num_heads}"
            )
        self.embed = nn.Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("pos_embed", sincos_pos_embed(dim, encoder.grid_size))
        blocks = (
            Block(dim, config.num_heads, qkv_bias=True, norm_layer=norm)
            for _ in range(config.depth)
        )
        self.blocks = fuse(nn.Sequential(*blocks))
        self.norm = norm(dim)
        self.pred = nn.Linear(dim, encoder.in_chans * encoder.patch_size**2)
        init_weights(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, masking: Masking) -> Tensor:
        """Predict the removed patches.

        Args:
            tokens: [B, 1 + N, D] of the encoder, for the patches `masking.ids_keep`.
            masking: which patches those are.

        Returns:
            [B, L - N, p * p * C] normalised pixels, channel last, in the order of
            `masking.ids_removed`.
        """
        tokens = self.embed(tokens)
        cls_token, kept = tokens[:, :1], tokens[:, 1:]
        mask_tokens = self.mask_token.to(kept.dtype).expand(
            len(kept), masking.ids_removed.shape[1], -1
        )
        patches = _gather_rows(torch.cat([kept, mask_tokens], dim=1), masking.ids_restore)
        tokens = self.blocks(torch.cat([cls_token, patches + self.pos_embed], dim=1))
        # The norm and the predictor work per token, so the kept ones can leave here.
        removed = _gather_rows(tokens[:, 1:], masking.ids_removed)
        return self.pred(self.norm(removed))  # type: ignore[no-any-return]


def reconstruction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error on the removed patches, 0-d, in at least fp32.

    Equals `sum(mean((predicted - target) ** 2, -1) * mask) / sum(mask)` over all patches.

    Args:
        predicted: [B, M, p * p * C], gets the gradient.
        target: the same shape, see `patch_targets`.
    """
    return (predicted.to(target.dtype) - target).square().mean()


def patch_targets(
    images: Tensor, ids: Tensor, patch_size: int, *, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the decoder is to predict, and how to get back to pixels: `target * std + mean`.

    Args:
        images: [B, C, H, W].
        ids: [B, M] patches.
        patch_size: p.
        normalize: take every patch's own mean and deviation out.

    Returns:
        target [B, M, p * p * C] channel last; mean [B, M, 1]; std [B, M, 1], the root of the
        unbiased variance + 1e-6. Without `normalize` mean and std are 0 and 1. All in at least
        fp32.
    """
    patches = gather_patches(images, ids, patch_size).permute(0, 1, 3, 4, 2).flatten(2)
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    var, mean = torch.var_mean(patches, dim=2, keepdim=True)
    if not normalize:
        return patches, torch.zeros_like(mean), torch.ones_like(var)
    std = (var + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


def _gather_rows(tokens: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens [B, L, D] by ids [B, M]: [B, M, D]."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))
