from pathlib import Path

import pytest
from omegaconf import OmegaConf

from maect_fast.config import Stage

TINY = """
encoder:
  {name: vit_tiny_patch16_224, img_size: 8, in_chans: 1, patch_size: 2, embed_dim: 16, depth: 2,
   num_heads: 2}
decoder: {embed_dim: 16, depth: 1, num_heads: 2}
head:
  {pooling: mean_patch, projector_hidden: 16, predictor_hidden: 16, output_dim: 8, queue_size: 50,
   topk: 3, temperature: 0.2}
data: {source: synthetic, num_images: 64}
augment: {scale: [0.5, 1.0], noise: 0.05, mean: [0.5], std: [0.25]}
optim: {encoder_lr: 1e-2, other_lr: 1e-2, warmup: 0.2}
epochs: 4
batch_size: 16
mask_ratio: 0.6
threads: 1
log_every: 3
device: cpu
"""


@pytest.fixture
def recipes(tmp_path: Path) -> dict[Stage, Path]:
    """A YAML file per stage: a model of two narrow blocks on 64 synthetic images of 8 x 8."""
    tune = {
        "head": {"target_ema": 0.9},
        "frozen_blocks": 1,
        "encoder_ema": 0.9,
        "optim": {"layer_decay": 0.65},
    }
    changes: dict[Stage, dict[str, object]] = {
        "pretrain": {"epochs": 2},
        "prepare-head": {"epochs": 2, "head": {"topk": 1}},
        "tune": tune,
    }
    paths = {}
    for stage, change in changes.items():
        paths[stage] = tmp_path / f"{stage}.yaml"
        config = OmegaConf.merge(OmegaConf.create(TINY), {"stage": stage}, change)
        OmegaConf.save(config, paths[stage])
    return paths
