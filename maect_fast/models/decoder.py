"""The MAE decoder, which predicts the removed patches only.

B images, C channels, p patch side, L patches, N kept patches, D width.

Source: He et al. (arXiv 2111.06377); ml-jku/MAE-CT: models/vit/masked_decoder.py.
"""

from functools import partial
from typing import cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maect_fast.block import Stream, normed, run_blocks
from maect_fast.config import DecoderConfig
from maect_fast.fuse import fuse
from maect_fast.kernels import restore_tokens
from maect_fast.models.encoder import (
    Encoder,
    Masking,
    init_weights,
    sincos_pos_embed,
    start_stream,
)

__all__ = ["Decoder"]


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
        self.stream = encoder.config.stream
        dim = config.embed_dim
        norm = cast("type[nn.Module]", partial(nn.LayerNorm, eps=encoder.config.norm_eps))
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
        tokens = restore_tokens(
            self.embed(tokens), self.mask_token, self.pos_embed, masking.ids_restore
        )
        r, branch, bias = run_blocks(self.blocks, start_stream(tokens, self.stream))
        # The norm and the predictor work per token, so the kept ones can leave here.
        r = _gather_rows(r[:, 1:], masking.ids_removed)
        if branch is not None:
            branch = _gather_rows(branch[:, 1:], masking.ids_removed)
        return self.pred(normed(self.norm, Stream(r, branch, bias)))  # type: ignore[no-any-return]


def _gather_rows(tokens: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens [B, L, D] by ids [B, M]: [B, M, D]."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))
