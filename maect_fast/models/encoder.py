"""The ViT encoder with MAE's token dropping, on timm's modules.

B images, C channels, p patch side, L = h * w patches, N kept patches, D width.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377);
ml-jku/MAE-CT: models/vit/vit_mae.py, models/vit/mask_generators; facebookresearch/mae:
models_mae.py.
"""

from typing import Any, Literal, NamedTuple, Self

import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models import is_model_in_modules
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from maect_fast.attention import FusedAttention, is_bare
from maect_fast.block import FusedBlock, Stream, normed, obstacle, run_blocks
from maect_fast.config import EncoderConfig
from maect_fast.fuse import fuse
from maect_fast.kernels import gather_patches, patch_view, residual_norm
from maect_fast.kernels._common.gpu import is_gpu
from maect_fast.kernels._common.philox import philox_uniform
from maect_fast.profiling import profile_range

__all__ = [
    "Encoder",
    "Masking",
    "init_weights",
    "masking_noise",
    "paste_patches",
    "pool",
    "pooled_features",
    "random_masking",
    "sincos_pos_embed",
    "start_stream",
]

# What timm's plain ViTs have, before `norm_eps` replaces it.
TIMM_EPS = 1e-6
# Added to the run's seed, so that masks, neighbour picks and crops are separate streams.
MASKING_STREAM = 1 << 32


class Encoder(nn.Module):
    """A plain pre-norm ViT with a class token and fixed sin-cos positions; its blocks are fused.

    State-dict names equal those of ml-jku/MAE-CT's files: `cls_token` [1, 1, D], `pos_embed` [1, L,
    D] (a buffer without a row for the class token), `patch_embed.proj.*`, `blocks.i.*`, `norm.*`.

    Args:
        config: a timm model name, and what to override of it.

    Raises:
        ValueError: the name is no timm model, or a ViT that has more than a plain one; the message
            says what.
    """

    pos_embed: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        vit = _build_vit(config)
        self.config = config
        self.embed_dim: int = vit.embed_dim
        self.depth: int = len(vit.blocks)
        self.img_size = config.img_size
        self.in_chans = config.in_chans
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.grid_size: int = vit.patch_embed.grid_size[0]
        self.num_patches: int = vit.patch_embed.num_patches
        self.num_frozen = 0

        self.cls_token = nn.Parameter(torch.empty(1, 1, self.embed_dim))
        self.register_buffer("pos_embed", sincos_pos_embed(self.embed_dim, self.grid_size))
        self.patch_embed = vit.patch_embed
        self.blocks = fuse(vit.blocks)
        self.norm = vit.norm
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.norm_eps

        init_weights(self)
        nn.init.normal_(self.cls_token, std=0.02)
        # The bias keeps Conv2d's default, as in both official programs.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.detach().flatten(1))

    def freeze(self, num_blocks: int | None, *, int8: bool = False) -> None:
        """Stop the training of the lowest layers, and of those only.

        Frozen layers run without autograd and in eval mode, whatever `train()` says.

        Args:
            num_blocks: 0 freezes nothing; k the stem (patch_embed, cls_token) and blocks[:k]; None
                everything including the final norm.
            int8: their blocks multiply in int8; where the last one is computed for the class token
                alone, it does not.

        Raises:
            ValueError: there are fewer blocks.
        """
        if num_blocks is not None and not 0 <= num_blocks <= self.depth:
            raise ValueError(f"frozen_blocks: expected 0 to {self.depth} blocks, got {num_blocks}")
        self.num_frozen = self.depth + 1 if num_blocks is None else num_blocks
        self.requires_grad_(True)
        self.cls_token.requires_grad_(self.num_frozen == 0)
        for module in self._frozen_modules():
            module.requires_grad_(False)
        blocks: Any = self.blocks
        for i, block in enumerate(blocks):
            block.is_int8 = int8 and i < self.num_frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the layers that are not frozen."""
        super().train(mode and self.num_frozen <= self.depth)
        for module in self._frozen_modules():
            module.eval()
        return self

    def forward(
        self,
        images: Tensor,
        ids_keep: Tensor | None = None,
        *,
        class_token_only: bool = False,
        trunk: Tensor | None = None,
    ) -> Tensor:
        """Encode the images, or their kept patches.

        Args:
            images: [B, C, H, W] normalised; no gradient is needed for them.
            ids_keep: [B, N] patches to encode; None encodes all L in their own order.
            class_token_only: what the last block and the final norm compute for the other tokens is
                left out: all but their keys and values.
            trunk: what the method `trunk` gave for these arguments; None runs it.

        Returns:
            [B, 1 + N, D] tokens after the final norm, the class token first; with
            `class_token_only` [B, 1, D], the same row. Autograd reaches down to the first layer
            that is not frozen.
        """
        num_frozen = min(self.num_frozen, self.depth)
        if trunk is None:
            stream = self._frozen_stream(images, ids_keep, class_token_only)
        else:
            stream = Stream(trunk)
        trains = self.num_frozen <= self.depth
        with (
            profile_range("tuned blocks" if trains else "frozen blocks"),
            torch.set_grad_enabled(torch.is_grad_enabled() and trains),
        ):
            blocks = list(self.blocks)[num_frozen:]
            return normed(self.norm, self._run_blocks(blocks, stream, class_token_only))

    @torch.no_grad()
    def trunk(
        self, images: Tensor, ids_keep: Tensor | None = None, *, class_token_only: bool = False
    ) -> Tensor | None:
        """The tokens after the frozen stem and blocks; None where nothing is frozen.

        Args are those of `forward`.
        """
        if self.num_frozen == 0:
            return None
        return self._frozen_stream(images, ids_keep, class_token_only).added()

    def _frozen_stream(
        self, images: Tensor, ids_keep: Tensor | None, class_token_only: bool
    ) -> Stream:
        """The stream behind the frozen blocks; where nothing is frozen, behind the embedding."""
        with profile_range("frozen blocks" if self.num_frozen else "tuned blocks"):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.num_frozen == 0):
                tokens = self.embed(images, ids_keep)
            stream = start_stream(tokens, self.config.stream)
            blocks = list(self.blocks)[: min(self.num_frozen, self.depth)]
            with torch.no_grad():
                return self._run_blocks(blocks, stream, class_token_only)

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Embed the patches, add their positions, prepend the class token, which has no position.

        Args and result are those of `forward`, before the first block.

        Raises:
            ValueError: images of another size than the configured one.
        """
        size = [self.in_chans, self.img_size, self.img_size]
        # The batch by its shape, as len() is a number to torch.export.
        if list(images.shape[1:]) != size:
            expected = [len(images), *size]
            raise ValueError(f"images: expected {expected}, got {list(images.shape)}")
        pos_embed = self.pos_embed if ids_keep is None else self.pos_embed[0, ids_keep]
        tokens = self._embed_patches(images, ids_keep) + pos_embed
        cls_token = self.cls_token.expand(tokens.shape[0], -1, -1)
        return torch.cat([cls_token, tokens], dim=1)

    def _embed_patches(self, images: Tensor, ids_keep: Tensor | None) -> Tensor:
        """What `patch_embed` makes of the kept patches [B, N, D]."""
        # Of whole images a CPU's convolution is faster (16 of ViT-Ti/16: 12 against 18 ms, one
        # core of an AMD EPYC), CUDA's a product in fp32 that takes 5.6 ms per update of ViT-L/16.
        is_product = ids_keep is not None or is_gpu(images)
        if not is_product or not _is_plain_patch_embed(self.patch_embed):
            tokens: Tensor = self.patch_embed(images)
            if ids_keep is None:
                return tokens
            return tokens[torch.arange(tokens.shape[0], device=tokens.device)[:, None], ids_keep]
        if ids_keep is None:
            all_patches = torch.arange(self.num_patches, device=images.device)
            ids_keep = all_patches.expand(images.shape[0], -1)
        # Gathering pixels instead of embeddings makes this GEMM L / N times smaller.
        patches = gather_patches(images, ids_keep, self.patch_size, dtype=_product_dtype(images))
        proj = self.patch_embed.proj
        return F.linear(patches, proj.weight.flatten(1), proj.bias)

    def _run_blocks(
        self, blocks: list[nn.Module], stream: Stream, class_token_only: bool
    ) -> Stream:
        """Some blocks, the last one for the class token alone where no more is asked for."""
        if not class_token_only or not blocks or blocks[-1] is not self.blocks[-1]:
            return run_blocks(blocks, stream)
        if not _can_skip_tokens(blocks[-1]):
            return Stream(run_blocks(blocks, stream).added()[:, :1])
        return Stream(_first_token(blocks[-1], run_blocks(blocks[:-1], stream)))

    def _frozen_modules(self) -> list[nn.Module]:
        """The modules that `freeze` turned off, lowest first."""
        modules = [self.patch_embed, *self.blocks, self.norm]
        return modules[: self.num_frozen + 1] if self.num_frozen else []


def _is_plain_patch_embed(module: nn.Module) -> bool:
    """Whether it computes one product of patches and weight, and nobody watches or changes it."""
    if type(module) is not PatchEmbed or type(module.proj) is not nn.Conv2d:
        return False
    proj = module.proj
    geometry = (proj.stride, proj.padding, proj.dilation, proj.groups)
    return (
        geometry == (proj.kernel_size, (0, 0), (1, 1), 1)
        and module.flatten
        and isinstance(module.norm, nn.Identity)
        and all(is_bare(part) for part in (module, proj, module.norm))
    )


def _can_skip_tokens(block: nn.Module) -> bool:
    """Whether the block computes timm's `Block`, and nobody watches or changes what it skips."""
    if type(block) not in (Block, FusedBlock) or not is_bare(block):
        return False
    attn = block.attn
    # Any other attention is called as a module, whole.
    return not isinstance(attn, FusedAttention) or (is_bare(attn) and attn.has_first_token)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of a matrix product's input: it leaves fp64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def pool(tokens: Tensor, pooling: Literal["class_token", "mean_patch"]) -> Tensor:
    """Reduce the encoder's tokens [B, 1 + N, D] to one feature per image [B, D].

    `class_token` is token 0, `mean_patch` the mean of the others, both after the final norm.
    """
    if pooling == "class_token":
        return tokens[:, 0]
    return tokens[:, 1:].mean(dim=1)


def pooled_features(
    encoder: nn.Module, images: Tensor, pooling: Literal["class_token", "mean_patch"]
) -> Tensor:
    """`pool(encoder(images), pooling)` [B, D], without what an `Encoder` would compute in vain.

    Args:
        encoder: maps images to tokens [B, 1 + L, D]; of an `Encoder`'s last block the class token
            costs about a sixth.
        images: [B, C, H, W] normalised.
        pooling: see `pool`.
    """
    if pooling == "class_token" and isinstance(encoder, Encoder):
        return pool(encoder(images, class_token_only=True), pooling)
    return pool(encoder(images), pooling)


class Masking(NamedTuple):
    """A random split of every image's patches into kept and removed ones."""

    ids_keep: Tensor
    """[B, N] int64, the patches that the encoder sees, in shuffled order."""
    ids_removed: Tensor
    """[B, L - N] int64, the others."""
    ids_restore: Tensor
    """[B, L] int64, position of every patch in `cat([ids_keep, ids_removed])`."""

    @property
    def mask(self) -> Tensor:
        """[B, L] float, 0 = kept, 1 = removed (MAE's polarity)."""
        return (self.ids_restore >= self.ids_keep.shape[1]).float()


def random_masking(noise: Tensor, mask_ratio: float) -> Masking:
    """Keep the `int(L * (1 - mask_ratio))` patches of lowest noise.

    Args:
        noise: [B, L], see `masking_noise`.
        mask_ratio: share of the patches to remove.
    """
    num_keep = int(noise.shape[1] * (1 - mask_ratio))
    # Stable, because 24-bit noise has ties and their order must not depend on the device.
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masking(ids_shuffle[:, :num_keep], ids_shuffle[:, num_keep:], ids_restore)


def masking_noise(
    num_views: int,
    num_rows: int,
    num_patches: int,
    *,
    seed: int,
    step: int | Tensor,
    first_row: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform noise [V * n, L] fp32 in [0, 1), view-major.

    A pure function of (seed, global row, view, step, patch): world size and device do not enter.

    Args:
        num_views: V.
        num_rows: n, images of this rank.
        num_patches: L.
        seed: the run's seed.
        step: number of the update; an int or a 0-d tensor on `device`.
        first_row: position of this rank's first image in the global batch.
        device: where the noise is needed.
    """
    view = torch.arange(num_views, device=device)[:, None, None]
    row = torch.arange(first_row, first_row + num_rows, device=device)[:, None]
    quad = torch.arange(-(-num_patches // 4), device=device)
    noise = philox_uniform(seed + MASKING_STREAM, (row, view, step, quad))  # [V, n, L / 4, 4] fp32
    return noise.flatten(2)[..., :num_patches].flatten(0, 1)


def paste_patches(images: Tensor, ids: Tensor, pixels: Tensor, patch_size: int) -> Tensor:
    """Copy of images [B, C, H, W] with patches ids [B, N] replaced by pixels [B, N, p * p * C]."""
    images = images.clone()
    row = torch.arange(len(images), device=images.device)[:, None]
    pixels = pixels.view(*ids.shape, patch_size, patch_size, -1).permute(0, 1, 4, 2, 3)
    patches, grid_width = patch_view(images, patch_size), images.shape[3] // patch_size
    patches[row, ids // grid_width, ids % grid_width] = pixels.to(images.dtype)
    return images


def sincos_pos_embed(dim: int, grid_size: int) -> Tensor:
    """Fixed 2-D positions of a square grid, row by row: [1, grid_size**2, dim] fp32.

    The first half of a row encodes the column w, the second half the row h; each half is [sin |
    cos] of `position * omega_i` with `omega_i = 10000 ** (-i / (dim / 4))`.

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"embed_dim: expected a multiple of 4 for sin-cos positions, got {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.outer(torch.arange(grid_size, dtype=torch.float64), omega)
    encoded = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid_size, dim / 2] fp64
    w = encoded.expand(grid_size, -1, -1)
    h = encoded[:, None].expand(-1, grid_size, -1)
    return torch.cat([w, h], dim=2).flatten(0, 1)[None].float()


def init_weights(module: nn.Module) -> None:
    """MAE's: Linear xavier-uniform (qkv as one matrix) with zero bias, LayerNorm 1 and 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def start_stream(tokens: Tensor, dtype: Literal["fp32", "bf16"]) -> Stream:
    """The residual stream that the blocks add to, in bf16 only under autocast."""
    if dtype == "bf16" and torch.is_autocast_enabled(tokens.device.type):
        tokens = tokens.bfloat16()
    return Stream(tokens)


def _first_token(block: Any, stream: Stream) -> Tensor:
    """Row 0 of the block's result, for a timm `Block`: [B, N, D] to [B, 1, D].

    Source: timm: models/vision_transformer.py, Block.forward.
    """
    r, branch, bias = stream
    attn, norm = block.attn, block.norm1
    if branch is not None and isinstance(block, FusedBlock) and obstacle(block, r) is None:
        columns = {"weight": norm.weight, "bias": norm.bias}
        tokens, x = residual_norm(r, branch, bias, eps=norm.eps, **columns)
    else:
        tokens = stream.added()
        x = norm(tokens)
    # Whoever took `fuse` back gets the same row from all of them.
    attended = attn.first_token(x) if isinstance(attn, FusedAttention) else attn(x)[:, :1]
    x = tokens[:, :1] + block.drop_path1(block.ls1(attended))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))  # type: ignore[no-any-return]


def _build_vit(config: EncoderConfig) -> VisionTransformer:
    """Build timm's model and refuse what is not a plain ViT."""
    name = config.name
    if not timm.is_model(name):
        raise ValueError(f"encoder.name: timm has no model {name!r}")
    if not is_model_in_modules(name, {"vision_transformer", "deit"}):
        raise ValueError(f"encoder.name: {name} is not one of timm's plain ViTs")
    overrides = {
        key: value
        for key in ("patch_size", "embed_dim", "depth", "num_heads")
        if (value := getattr(config, key)) is not None
    }
    embed_dim, num_heads = config.embed_dim, config.num_heads
    if embed_dim is not None and num_heads is not None and embed_dim % num_heads:
        raise ValueError(f"encoder.embed_dim: {embed_dim} is no multiple of num_heads {num_heads}")
    vit = timm.create_model(
        name,
        pretrained=False,
        img_size=config.img_size,
        in_chans=config.in_chans,
        num_classes=0,
        weight_init="skip",
        **overrides,
    )
    if type(vit) is not VisionTransformer:
        raise ValueError(f"encoder.name: {name} is no plain ViT: it is a {type(vit).__name__}")
    if reason := _not_plain(vit):
        raise ValueError(f"encoder.name: {name} is no plain ViT: {reason}")
    patch_size = vit.patch_embed.patch_size[0]
    if config.img_size % patch_size:
        raise ValueError(
            f"encoder.img_size: expected a multiple of the patch size {patch_size}, "
            f"got {config.img_size}"
        )
    return vit


def _not_plain(vit: VisionTransformer) -> str | None:
    """Say what this ViT has beyond, or lacks of, the one of the paper; None for a plain one."""
    if vit.cls_token is None:
        return "it has no class token"
    if vit.reg_token is not None:
        return "it has register tokens"
    if not isinstance(vit.norm_pre, nn.Identity):
        return "it normalises the tokens before the first block"
    if not isinstance(vit.patch_embed.norm, nn.Identity):
        return "it normalises the patch embedding"
    if not _is_layer_norm(vit.norm):
        return f"its final norm is not a LayerNorm with eps {TIMM_EPS}"
    return next((reason for block in vit.blocks if (reason := _not_plain_block(block))), None)


def _not_plain_block(block: nn.Module) -> str | None:
    """The same for one block."""
    if type(block) is not Block:
        return f"its blocks are {type(block).__name__}"
    if not isinstance(block.ls1, nn.Identity):
        return "its blocks have LayerScale"
    if not (_is_layer_norm(block.norm1) and _is_layer_norm(block.norm2)):
        return f"its norms are not LayerNorms with eps {TIMM_EPS}"
    attn, mlp = block.attn, block.mlp
    if type(attn) is not Attention:
        return f"its attention is {type(attn).__name__}"
    if attn.qkv.bias is None:
        return "its attention has no qkv bias"
    extras = (attn.q_norm, attn.k_norm, attn.norm)
    if attn.gate is not None or not all(isinstance(extra, nn.Identity) for extra in extras):
        return "its attention is gated or normalised (qk-norm)"
    if type(mlp) is not Mlp or not isinstance(mlp.norm, nn.Identity):
        return f"its MLP is {type(mlp).__name__} or normalised"
    if not isinstance(mlp.act, nn.GELU) or mlp.act.approximate != "none":
        return f"its activation is not the exact GELU ({mlp.act})"
    return None


def _is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) and module.eps == TIMM_EPS and module.bias is not None
