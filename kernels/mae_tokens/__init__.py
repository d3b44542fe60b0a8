"""What a masked autoencoder does with patches and tokens beside its blocks."""

from maect_fast.kernels.mae_tokens.api import masked_patch_mse, restore_tokens
from maect_fast.kernels.mae_tokens.gather import gather_patches
from maect_fast.kernels.mae_tokens.reference import patch_targets, patch_view

__all__ = ["gather_patches", "masked_patch_mse", "patch_targets", "patch_view", "restore_tokens"]
