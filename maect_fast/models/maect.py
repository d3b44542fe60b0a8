"""The models of the three stages: what one update computes from one batch of views.

V views, n images of this rank, C channels, L patches, D width. Views are concatenated view-major
(rows `v * n + i`), so that one encoder pass serves all of them.

Source: MAE-CT (arXiv 2304.10520); ml-jku/MAE-CT: yamls/stage1_mae, stage2_maect_prepare_head,
stage3_maect_contrastive_tuning.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from maect_fast.config import Config
from maect_fast.kernels import masked_patch_mse, patch_targets
from maect_fast.models.decoder import Decoder
from maect_fast.models.encoder import (
    Encoder,
    Masking,
    masking_noise,
    paste_patches,
    pool,
    random_masking,
)
from maect_fast.models.head import NNCLRHead
from maect_fast.profiling import profile_range
from maect_fast.training.chunks import in_chunks
from maect_fast.training.distributed import World

__all__ = [
    "ContrastiveModel",
    "PretrainModel",
    "Reconstruction",
    "build_contrastive",
    "build_pretrain",
]


class PretrainModel(nn.Module):
    """Stage 1: masked autoencoding, every view masked on its own.

    Args:
        encoder: sees the kept patches.
        decoder: predicts the removed ones.
        mask_ratio: share of the patches that is removed.
        seed: of the masks, together with the step and the image's row in the global batch.
        rank: of this process, whose rows of the global batch start at `rank * n`.
        chunk_size: images that are in memory for the backward at a time; None for all.

    Raises:
        ValueError: the ratio removes no patch, or every one.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        *,
        mask_ratio: float,
        seed: int = 0,
        rank: int = 0,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        _check_mask_ratio(mask_ratio, encoder)
        self.encoder = encoder
        self.decoder = decoder
        self.mask_ratio = mask_ratio
        self.seed = seed
        self.rank = rank
        self.chunk_size = chunk_size

    def forward(
        self,
        views: Tensor,
        *,
        step: int | Tensor,
        sample_id: Tensor | None = None,
        label: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Reconstruct the removed patches.

        Args:
            views: [V, n, C, H, W] normalised.
            step: number of the update; a 0-d tensor where no host value may enter the graph.
            sample_id: not used; the three stages are called alike.
            label: not used, alike.

        Returns:
            "loss", 0-d.
        """
        return {"loss": _masked_loss(self, self.decoder, views, step)}

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> "Reconstruction":
        """What the decoder paints into the removed patches of images [n, C, H, W], for pictures."""
        noise = masking_noise(
            1,
            len(images),
            self.encoder.num_patches,
            seed=self.seed,
            step=0,
            device=images.device,
        )
        masking = random_masking(noise, self.mask_ratio)
        predicted = self.decoder(self.encoder(images, masking.ids_keep), masking).float()
        ids, p = masking.ids_removed, self.encoder.patch_size
        _, mean, std = patch_targets(images, ids, p, normalize=self.decoder.normalize_pixels)
        return Reconstruction(
            paste_patches(images, ids, torch.zeros_like(predicted), p),
            paste_patches(images, ids, predicted * std + mean, p),
        )


class Reconstruction(NamedTuple):
    """Pictures of one masked pass, [n, C, H, W], normalised as the images were."""

    masked: Tensor
    """The removed patches set to 0, the data set's mean colour."""
    filled: Tensor
    """The removed patches predicted, with each patch's true mean and deviation."""


class ContrastiveModel(nn.Module):
    """Stages 2 and 3: both views through the encoder in one pass, pooled, into the NNCLR head.

    Args:
        encoder: frozen as far as its `freeze` was told; stage 2 freezes all of it.
        head: projector, predictor, queue and loss.
        pooling: which feature enters the head.
        decoder: of stage 1, for an added MAE loss, which costs a second, masked pass; None for
            none.
        reconstruction_weight: of that loss.
        mask_ratio: of that loss.
        seed: of that loss's masks.
        rank: of this process, whose rows of the global batch start at `rank * n`.
        chunk_size: images that are in memory for the backward at a time; None for all.

    Raises:
        ValueError: a weight without a decoder or the reverse; or a mask ratio that `PretrainModel`
            refuses.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: NNCLRHead,
        *,
        pooling: Literal["class_token", "mean_patch"],
        decoder: Decoder | None = None,
        reconstruction_weight: float = 0.0,
        mask_ratio: float = 0.75,
        seed: int = 0,
        rank: int = 0,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if (decoder is None) != (reconstruction_weight == 0):
            raise ValueError(
                "reconstruction_weight: a decoder is needed exactly where the weight is not 0, "
                f"got {reconstruction_weight} with {'no' if decoder is None else 'a'} decoder"
            )
        if decoder is not None:
            _check_mask_ratio(mask_ratio, encoder)
        self.encoder = encoder
        self.head = head
        self.decoder = decoder
        self.pooling = pooling
        self.reconstruction_weight = reconstruction_weight
        self.mask_ratio = mask_ratio
        self.seed = seed
        self.rank = rank
        self.chunk_size = chunk_size

    def forward(
        self,
        views: Tensor,
        *,
        step: int | Tensor,
        sample_id: Tensor | None = None,
        label: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Contrast each view's prediction with the other view's neighbour.

        Args:
            views: [2, n, C, H, W] normalised.
            step: number of the update; a 0-d tensor where no host value may enter the graph.
            sample_id: [n] int64, the images' own ids, which their searches exclude.
            label: [n] int64, -1 where unknown; for the metric only.

        Returns:
            "loss" and the signals of `NNCLROutput`, 0-d; with a decoder also "contrastive" and
            "reconstruction".
        """
        pooled = self.pooled(views).view(*views.shape[:2], -1)  # [V, n, D] fp32
        outputs: dict[str, Tensor] = self.head(
            pooled, step=step, sample_id=sample_id, label=label
        )._asdict()
        if self.decoder is None:
            return outputs
        reconstruction = _masked_loss(self, self.decoder, views, step)
        return {
            **outputs,
            "loss": outputs["loss"] + self.reconstruction_weight * reconstruction,
            "contrastive": outputs["loss"].detach(),
            "reconstruction": reconstruction.detach(),
        }

    def pooled(self, views: Tensor) -> Tensor:
        """What enters the head, [V * n, D], of views [V, n, C, H, W]."""
        encoder, first_only = self.encoder, self.pooling == "class_token"

        def keep(images: Tensor) -> tuple[Tensor, Tensor | None]:
            return images, encoder.trunk(images, class_token_only=first_only)

        def run(images: Tensor, trunk: Tensor | None) -> Tensor:
            return pool(encoder(images, class_token_only=first_only, trunk=trunk), self.pooling)

        images, chunk_rows = views.flatten(0, 1), _chunk_rows(self, views)
        return in_chunks(keep, run, [images], encoder.parameters(), size=chunk_rows)


def build_pretrain(config: Config, world: World) -> PretrainModel:
    """Stage 1's model with fresh weights, a function of `config.seed` alone."""
    with _seeded(config.seed):
        encoder = Encoder(config.encoder)
        decoder = Decoder(config.decoder, encoder)
    return PretrainModel(
        encoder,
        decoder,
        mask_ratio=config.mask_ratio,
        seed=config.seed,
        rank=world.rank,
        chunk_size=config.chunk_size,
    )


def build_contrastive(config: Config, world: World) -> ContrastiveModel:
    """Stage 2's or 3's model with fresh weights, a function of `config.seed` alone.

    The caller freezes the encoder as far as the stage asks.
    """
    with _seeded(config.seed):
        encoder = Encoder(config.encoder)
        head = NNCLRHead(config.head, encoder.embed_dim, seed=config.seed, group=world.group)
        decoder = Decoder(config.decoder, encoder) if config.reconstruction_weight else None
    return ContrastiveModel(
        encoder,
        head,
        pooling=config.head.pooling,
        decoder=decoder,
        reconstruction_weight=config.reconstruction_weight,
        mask_ratio=config.mask_ratio,
        seed=config.seed,
        rank=world.rank,
        chunk_size=config.chunk_size,
    )


def _masked_loss(
    model: PretrainModel | ContrastiveModel, decoder: Decoder, views: Tensor, step: int | Tensor
) -> Tensor:
    """The MAE loss of one batch of views [V, n, C, H, W], 0-d."""
    num_views, num_rows = views.shape[:2]
    noise = masking_noise(
        num_views,
        num_rows,
        model.encoder.num_patches,
        seed=model.seed,
        step=step,
        first_row=model.rank * num_rows,
        device=views.device,
    )
    masking = random_masking(noise, model.mask_ratio)
    images, encoder = views.flatten(0, 1), model.encoder

    def keep(images: Tensor, *ids: Tensor) -> tuple[Tensor | None, ...]:
        return images, *ids, encoder.trunk(images, Masking(*ids).ids_keep)

    def run(images: Tensor, *ids_and_trunk: Tensor) -> Tensor:
        *ids, trunk = ids_and_trunk
        masking = Masking(*ids)
        tokens = encoder(images, masking.ids_keep, trunk=trunk)
        with profile_range("decoder"):
            predicted = decoder(tokens, masking)
        with profile_range("loss"):
            loss = masked_patch_mse(
                predicted,
                images,
                masking.ids_removed,
                encoder.patch_size,
                normalize=decoder.normalize_pixels,
            )
        # Its share in the mean over all rows.
        return loss[None] * (len(images) / (num_views * num_rows))

    parameters = [*encoder.parameters(), *decoder.parameters()]
    chunk_rows = _chunk_rows(model, views)
    return in_chunks(keep, run, [images, *masking], parameters, size=chunk_rows).sum()


def _chunk_rows(model: PretrainModel | ContrastiveModel, views: Tensor) -> int | None:
    """Rows of a chunk of `views.flatten(0, 1)`: those of chunk_size images."""
    return model.chunk_size * len(views) if model.chunk_size else None


def _check_mask_ratio(mask_ratio: float, encoder: Encoder) -> None:
    num_keep = int(encoder.num_patches * (1 - mask_ratio))
    if not 0 < num_keep < encoder.num_patches:
        raise ValueError(
            f"mask_ratio: expected to keep some and remove some of {encoder.num_patches} patches, "
            f"got {mask_ratio}, which keeps {num_keep}"
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from `seed`, in fp32, and leave torch's CPU generator as it was."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(dtype)
