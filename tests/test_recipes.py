"""The ImageNet recipes against the published settings, typed in again from the table.

Sources: ml-jku/MAE-CT: yamls/stage1_mae, yamls/stage2_maect*_prepare_head,
yamls/stage3_maect*_contrastive_tuning. Columns are B/16, L/16, H/16, H/14.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from maect_fast.config import RECIPES, Config, Stage, ViewConfig, load_config, load_recipe
from maect_fast.models.encoder import Encoder
from maect_fast.models.maect import PretrainModel
from maect_fast.training.stages import StageState

IMAGENET_TRAIN = 1_281_167
SIZES = ("b16", "l16", "h16", "h14")

CELLS: list[tuple[str, Stage]] = [
    *((size, "pretrain") for size in SIZES[:3]),
    *((size, "prepare-head") for size in SIZES),
    *((size, "tune") for size in SIZES),
    *((f"{size}-aug", "prepare-head") for size in SIZES),
    *((f"{size}-aug", "tune") for size in SIZES),
]

# Per column of the table and per size: (stage, augmented) -> B/16, L/16, H/16, H/14.
Column = tuple[str, bool]
PRETRAIN, HEAD, TUNE = ("pretrain", False), ("prepare-head", False), ("tune", False)
HEAD_AUG, TUNE_AUG = ("prepare-head", True), ("tune", True)

EPOCHS = {
    PRETRAIN: (800, 800, 800, None),
    HEAD: (20, 20, 20, 20),
    HEAD_AUG: (20, 20, 20, 20),
    TUNE: (20, 20, 30, 30),
    TUNE_AUG: (80, 40, 40, 40),
}
BATCH = (1024, 1024, 512, 512)
UPDATES_PER_EPOCH = (1251, 1251, 2502, 2502)
ENCODER_LR = {  # effective: base * batch * views / 256
    PRETRAIN: (1.2e-3, 1.2e-3, 6e-4, None),
    TUNE: (8e-4, 8e-4, 4e-4, 4e-4),
    TUNE_AUG: (8e-4, 8e-4, 4e-4, 4e-4),
}
OTHER_LR = {
    PRETRAIN: (1.2e-3, 1.2e-3, 6e-4, None),
    HEAD: (8e-4, 8e-4, 4e-4, 4e-4),
    HEAD_AUG: (8e-4, 8e-4, 4e-4, 4e-4),
    TUNE: (8e-4, 8e-4, 4e-4, 4e-4),
    TUNE_AUG: (4e-3, 4e-3, 2e-3, 2e-3),
}
OTHER_WEIGHT_DECAY = {PRETRAIN: 0.05, HEAD: 1e-5, HEAD_AUG: 1e-5, TUNE: 1e-5, TUNE_AUG: 1e-5}
WARMUP_UPDATES = {
    PRETRAIN: (25_020, 25_020, 50_040, None),
    HEAD: (5_004, 5_004, 10_008, 10_008),
    HEAD_AUG: (5_004, 5_004, 10_008, 10_008),
    TUNE: (5_004, 5_004, 15_012, 15_012),
    TUNE_AUG: (20_016, 10_008, 20_016, 20_016),
}
CHECKPOINT_EVERY = {
    PRETRAIN: (50, 50, 50, None),
    HEAD: (10, 1, 10, 10),
    HEAD_AUG: (10, 1, 10, 10),
    TUNE: (10, 1, 10, 10),
    TUNE_AUG: (10, 1, 10, 10),
}
TEMPERATURE = {
    HEAD: (0.15, 0.15, 0.15, 0.15),
    HEAD_AUG: (0.15, 0.15, 0.15, 0.15),
    TUNE: (0.15, 0.2, 0.3, 0.3),
    TUNE_AUG: (0.15, 0.15, 0.35, 0.35),
}
TOPK = {  # 1 is the official 0: the arg-max
    HEAD: (1, 1, 1, 1),
    HEAD_AUG: (1, 1, 1, 1),
    TUNE: (20, 20, 20, 20),
    TUNE_AUG: (10, 10, 20, 20),
}
TARGET_EMA = (0.99, 0.99, 0.995, 0.995)
FROZEN_BLOCKS = (6, 12, 16, 16)
POOLING = ("mean_patch", "class_token", "class_token", "class_token")
ENCODER_SIZES = (  # width, depth, heads, patch side, patches
    (768, 12, 12, 16, 196),
    (1024, 24, 16, 16, 196),
    (1280, 32, 16, 16, 196),
    (1280, 32, 16, 14, 256),
)
STRONG_VIEWS = [
    ViewConfig(jitter=0.8, blur=1.0, grayscale=0.2, solarize=0.0),
    ViewConfig(jitter=0.8, blur=0.1, grayscale=0.2, solarize=0.2),
]


@dataclass(frozen=True)
class Cell:
    config: Config
    size: int  # index into the four columns
    column: Column

    def expected(self, table: dict[Column, tuple[Any, ...]]) -> Any:
        return table[self.column][self.size]


@pytest.fixture(params=CELLS, ids=["/".join(cell) for cell in CELLS])
def cell(request: pytest.FixtureRequest) -> Cell:
    family, stage = request.param
    config = load_config(load_recipe(family, stage))
    size = SIZES.index(family.removesuffix("-aug"))
    return Cell(config, size, (stage, family.endswith("-aug")))


def test_every_imagenet_recipe_is_in_the_table() -> None:
    found = {(path.parent.name, path.stem) for path in Path(RECIPES).glob("*/*.yaml")}
    imagenet = {pair for pair in found if pair[0].removesuffix("-aug")[-2:] in ("14", "16")}
    assert imagenet == set(CELLS)


def test_length_and_batch(cell: Cell) -> None:
    config = cell.config
    assert config.stage == cell.column[0]
    assert config.epochs == cell.expected(EPOCHS)
    assert config.batch_size == BATCH[cell.size]
    assert config.num_views == 2
    assert IMAGENET_TRAIN // config.batch_size == UPDATES_PER_EPOCH[cell.size]
    assert config.checkpoint_every == cell.expected(CHECKPOINT_EVERY)
    assert config.seed == 5


def test_warm_up_is_exact_in_updates(cell: Cell) -> None:
    total = cell.config.epochs * UPDATES_PER_EPOCH[cell.size]
    warmup = cell.expected(WARMUP_UPDATES)
    assert lr_factor(cell.config, total, warmup - 1) == warmup / (warmup + 1)
    assert lr_factor(cell.config, total, warmup) == 1.0
    assert 0.99999 < lr_factor(cell.config, total, warmup + 1) < 1.0
    assert 0.0 < lr_factor(cell.config, total, total - 1) < 1e-6


def lr_factor(config: Config, total: int, update: int) -> float:
    """The schedule as the engine asks for it; it needs no weights."""
    no_model, no_optimizer = cast("PretrainModel", None), cast("torch.optim.Optimizer", None)
    return StageState(config, no_model, no_optimizer, None, total).lr_factor(update)


def test_effective_learning_rates(cell: Cell) -> None:
    config = cell.config
    scale = config.batch_size * config.num_views / 256
    assert config.optim.other_lr * scale == pytest.approx(cell.expected(OTHER_LR), rel=1e-12)
    if cell.column in ENCODER_LR:
        expected = cell.expected(ENCODER_LR)
        assert config.optim.encoder_lr * scale == pytest.approx(expected, rel=1e-12)


def test_optimiser(cell: Cell) -> None:
    optim = cell.config.optim
    assert optim.betas == (0.9, 0.95)
    assert optim.eps == 1e-8
    assert optim.encoder_weight_decay == 0.05
    assert optim.other_weight_decay == OTHER_WEIGHT_DECAY[cell.column]
    assert optim.layer_decay == (0.65 if cell.config.stage == "tune" else 1.0)


def test_what_is_frozen_and_averaged(cell: Cell) -> None:
    config = cell.config
    tuning = config.stage == "tune"
    assert config.frozen_blocks == (FROZEN_BLOCKS[cell.size] if tuning else 0)
    # The average of a frozen encoder is the encoder: none is kept in stage 2.
    assert config.encoder_ema == (0.9999 if tuning else None)
    assert config.reconstruction_weight == 0.0


def test_masking_and_decoder(cell: Cell) -> None:
    config = cell.config
    if config.stage != "pretrain":
        return  # contrastive passes hide nothing, whatever mask_ratio says
    assert config.mask_ratio == 0.75
    assert int(ENCODER_SIZES[cell.size][4] * (1 - config.mask_ratio)) == 49
    decoder = config.decoder
    assert (decoder.embed_dim, decoder.depth, decoder.num_heads) == (512, 8, 16)


def test_augmentation(cell: Cell) -> None:
    augment = cell.config.augment
    low = 0.2 if cell.config.stage == "pretrain" else 0.08
    assert augment.scale == (low, 1.0)
    assert augment.ratio == (3 / 4, 4 / 3)
    assert augment.flip == 0.5
    assert augment.rotation == augment.contrast == augment.noise == 0.0
    assert augment.views == (STRONG_VIEWS if cell.column[1] else [])
    assert augment.mean == [0.485, 0.456, 0.406]
    assert augment.std == [0.229, 0.224, 0.225]


def test_head(cell: Cell) -> None:
    head = cell.config.head
    if cell.config.stage == "pretrain":
        return  # stage 1 has no head
    assert head.pooling == POOLING[cell.size]
    assert (head.projector_hidden, head.predictor_hidden, head.output_dim) == (2048, 4096, 256)
    assert head.queue_size == 65_536
    assert head.temperature == cell.expected(TEMPERATURE)
    assert head.topk == cell.expected(TOPK)
    assert head.transposed is False
    # Stage 2 searches with the online projector.
    expected = TARGET_EMA[cell.size] if cell.config.stage == "tune" else None
    assert head.target_ema == expected


def test_encoder_size(cell: Cell) -> None:
    assert cell.config.encoder.img_size == 224
    assert cell.config.encoder.in_chans == 3
    with torch.device("meta"):
        encoder = Encoder(cell.config.encoder)
    heads = encoder.get_submodule("blocks.0.attn").num_heads
    patch_size = encoder.patch_embed.proj.kernel_size[0]
    sizes: tuple[Any, ...] = (
        encoder.embed_dim,
        encoder.depth,
        heads,
        patch_size,
        encoder.num_patches,
    )
    assert sizes == ENCODER_SIZES[cell.size]
