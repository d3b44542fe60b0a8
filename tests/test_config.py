from pathlib import Path

import pytest

from maect_fast.config import Config, ConfigError, load_config, load_recipe, save_config


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("head.tpk=3", "head.tpk: Key 'tpk' not in 'HeadConfig'"),
        ("optimiser.lr=3", "optimiser: Key 'optimiser' not in 'Config'"),
        ("epochs=many", "epochs: Value 'many' of type 'str' could not be converted to Integer"),
        ("data.source=web", "data.source: Invalid value 'web', expected one of ['folder'"),
        ("head.queue_size=3", "head.queue_size: expected at least head.topk = 20, got 3"),
        ("head.topk=0", "head.topk: expected at least 1, got 0"),
        ("batch_size=1", "batch_size: expected at least 2"),
        ("mask_ratio=1", "mask_ratio: expected in [0, 1), got 1.0"),
        ("augment.scale=[0.9,0.1]", "augment.scale: expected 0 < low <= high <= 1"),
        ("augment.mean=[0.5]", "augment.mean, augment.std: expected encoder.in_chans = 3"),
        ("augment.views=[{blur: 1}]", "augment.views: expected no entry or num_views = 2, got 1"),
        ("augment.views=[{sharpen: 1}]", "sharpen"),
        ("head.target_ema=1", "head.target_ema: expected in [0, 1)"),
        ("optim.warmup=1.5", "optim.warmup: expected in [0, 1)"),
        ("save_minutes=-1", "save_minutes: expected 0"),
        ("epochs", "override 'epochs': expected key=value"),
    ],
)
def test_a_bad_setting_is_named(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(overrides=[override])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_contrastive_stages_need_two_views() -> None:
    with pytest.raises(ConfigError, match=r"num_views: expected 2 .*, got 3"):
        load_config({"stage": "tune", "num_views": 3})


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'l17' for tune; .* digits, .* l16, l16-aug"):
        load_recipe("l17", "tune")
    with pytest.raises(ConfigError, match="no recipe 'h14' for pretrain"):
        load_recipe("h14", "pretrain")


def test_later_layers_count() -> None:
    config = load_config({"epochs": 3}, {"epochs": 4, "seed": 1}, overrides=["seed=2"])
    assert (config.epochs, config.seed) == (4, 2)


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    config = load_config(load_recipe("h16-aug", "tune"), overrides=["data.root=/images"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(load_recipe(str(tmp_path / "config.yaml"), "tune")) == config
    assert config != Config()
