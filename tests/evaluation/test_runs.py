"""Which weights, which images and which views an evaluation takes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from maect_fast.checkpoint import CheckpointError, save_checkpoint
from maect_fast.config import AugmentConfig, Config, load_config, load_recipe
from maect_fast.data import build_source
from maect_fast.evaluation.compare import spread
from maect_fast.evaluation.features import extract_features
from maect_fast.evaluation.runs import view_features, weights_line
from maect_fast.models.encoder import Encoder
from maect_fast.training import log
from maect_fast.training.stages import last_checkpoint, load_state


@pytest.fixture
def config() -> Config:
    """Of 64 synthetic images, 16 of which are for tests, in a narrow encoder."""
    small = ["encoder.embed_dim=16", "encoder.depth=1", "encoder.num_heads=2", "device=cpu"]
    return load_config(
        load_recipe("digits", "tune"),
        overrides=[*small, "data.source=synthetic", "data.num_images=64", "frozen_blocks=0"],
    )


def state_of(config: Config, *, update: int, decay: float | None) -> dict[str, Any]:
    state = {"update": update, "total": 25_020, "encoder_ema": {"x": torch.zeros(1)}}
    return state if decay is None else {**state, "encoder_ema_decay": decay}


def test_the_line_on_the_weights(config: Config) -> None:
    config.encoder_ema = 0.9999
    state = state_of(config, update=25_020, decay=0.9999)
    paper = "the encoder's EMA of decay 0.9999 after 25,020 of 25,020 updates: 3.6 half-lives"
    assert weights_line(config, state) == paper
    assert weights_line(config, state, "model") == (
        "the encoder as trained, not its EMA, after 25,020 of 25,020 updates"
    )
    assert weights_line(config, {**state, "encoder_ema": None}) == (
        "the encoder as trained, after 25,020 of 25,020 updates"
    )


def test_an_average_that_has_hardly_moved_is_told(config: Config) -> None:
    """A run of before the warm-up, which has no decay of its own in its checkpoint."""
    config.encoder_ema = 0.9999
    line = weights_line(config, state_of(config, update=660, decay=None))
    assert "660 of 25,020 updates: 0.1 half-lives, so that 94% of it are what the run" in line
    assert line.endswith("--weights model takes the encoder as trained")


@pytest.mark.parametrize("decay", [1.0, -0.5, float("nan"), "0.9"])
def test_a_decay_that_cannot_be(tmp_path: Path, decay: object) -> None:
    state = {"stage": "tune", "config": {}, "update": 1, "total": 2, "model": {}, "optimizer": {}}
    state |= {"encoder_ema": None, "random_states": [], "encoder_ema_decay": decay}
    save_checkpoint(last_checkpoint(tmp_path), state)
    with pytest.raises(CheckpointError, match=r"encoder_ema_decay .* cannot be"):
        load_state(tmp_path)


def test_pictures_are_spread_over_groups() -> None:
    group = torch.tensor([0] * 50 + [1] * 3 + [2] * 2 + [5])
    chosen = spread(group, 8, seed=0)
    assert len(torch.unique(chosen)) == 8
    counts = torch.bincount(group[chosen])
    # In turn: all four groups, three groups, then one of those with a third image.
    assert counts.tolist()[1:] in ([3, 2, 0, 0, 1], [2, 2, 0, 0, 1])
    assert group[chosen].tolist() == sorted(group[chosen].tolist())
    assert torch.equal(spread(group, 8, seed=0), chosen)
    assert any(not torch.equal(spread(group, 8, seed=s), chosen) for s in (1, 2, 3))
    # Not the first ones.
    assert chosen.tolist() != list(range(8))
    assert len(spread(group[:5], 8, seed=0)) == 5


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(log.progress("abc", "mae train images", total=3)) == list("abc")
    assert not capsys.readouterr().err
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(log.progress("abc", "mae train images", total=3)) == list("abc")
    told = [line.partition("  ETA")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["mae train images  1/3", "mae train images  2/3"]


def test_views_are_of_the_same_images(config: Config) -> None:
    torch.manual_seed(0)
    encoder = Encoder(config.encoder).eval()
    plain = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    views = view_features(config, encoder, plain, seed=0)
    assert sorted(views.sample_id.tolist()) == list(range(16))
    # A crop of everything is the image itself.
    torch.testing.assert_close(views.first, views.second)
    source = build_source(config.data, config.encoder, split="test")
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (config.augment.mean, config.augment.std))
    images = (source.images / 255 - mean) / std  # type: ignore[attr-defined]
    whole = extract_features(encoder, [(images, source.labels)], pooling="mean_patch")
    torch.testing.assert_close(views.first, whole.x[views.sample_id], rtol=1e-3, atol=1e-3)
    cropped = view_features(config, encoder, config.augment, seed=0)
    assert not torch.allclose(cropped.first, cropped.second, atol=1e-3)
