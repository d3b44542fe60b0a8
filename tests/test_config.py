import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from maect_fast.cli import main
from maect_fast.config import Config, ConfigError, _numbers, load_config, load_recipe, save_config
from maect_fast.settings import list_settings

# Every setting that may be absent is there.
FULL = load_config(
    {
        "encoder": {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2},
        "head": {"target_ema": 0.9},
        "augment": {"views": [{}, {}]},
        "chunk_size": 2,
        "encoder_ema": 0.9,
        "threads": 1,
    }
)


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """Dotted keys, with positions in lists, and plain values."""
    if isinstance(node, list | tuple):
        parts = {f"{key}[{i}]": value for i, value in enumerate(node)}
    elif dataclasses.is_dataclass(node):
        names = (field.name for field in dataclasses.fields(node))
        parts = {f"{key}.{name}".removeprefix("."): getattr(node, name) for name in names}
    else:
        return {key: node}
    return {k: v for name, part in parts.items() for k, v in flat(part, name).items()}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("head.tpk=3", "head.tpk: Key 'tpk' not in 'HeadConfig'"),
        ("optimiser.lr=3", "optimiser: Key 'optimiser' not in 'Config'"),
        ("epochs=many", "epochs: Value 'many' of type 'str' could not be converted to Integer"),
        ("data.source=web", "data.source: Invalid value 'web', expected one of ['folder'"),
        ("head.queue_size=3", "head.queue_size: expected at least head.topk = 20, got 3"),
        ("encoder.norm_eps=0", "encoder.norm_eps: expected a number in (0, 0.01), got 0.0"),
        ("head.topk=0", "head.topk: expected a number in [1, 1000000000], got 0"),
        ("batch_size=1", "batch_size: expected a number in [2, 16777216], got 1"),
        ("mask_ratio=1", "mask_ratio: expected a number in [0, 1), got 1.0"),
        ("augment.scale=[0.9,0.1]", "augment.scale: expected low <= high, got (0.9, 0.1)"),
        ("augment.mean=[0.5]", "augment.mean, augment.std: expected encoder.in_chans = 3"),
        ("augment.views=[{blur: 1}]", "augment.views: expected no entry or num_views = 2, got 1"),
        ("augment.views=[{sharpen: 1}]", "sharpen"),
        ("head.target_ema=1", "head.target_ema: expected a number in [0, 1)"),
        ("optim.warmup=1.5", "optim.warmup: expected a number in [0, 1), got 1.5"),
        ("save_minutes=-1", "save_minutes: expected a number in [0, 1000000], got -1.0"),
        ("epochs", "override 'epochs': expected key=value"),
    ],
)
def test_a_bad_setting_is_named(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(overrides=[override])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_every_number_has_an_interval_and_keeps_it() -> None:
    """With the bounds of every interval refused or taken as its brackets say."""
    found = {key: interval for key, _, interval in _numbers(FULL)}
    numbers = {key for key, value in flat(FULL).items() if type(value) in (int, float)}
    assert found.keys() == numbers
    for interval in set(found.values()):
        low, high = (float(bound) for bound in interval.text[1:-1].split(","))
        assert (low in interval) == (interval.text[0] == "[")
        assert (high in interval) == (interval.text[-1] == "]")
        assert (low + high) / 2 in interval
        for outside in (low - 1, high + 1, math.nan, math.inf, -math.inf):
            assert outside not in interval


@pytest.mark.parametrize(
    "text",
    ["/d/set #2", "null", "~", "1:30", "${oc.env:HOME}", "a: b", "[x", "\\${x}", "'q'", "10", " "],
)
def test_texts_are_taken_to_the_letter(text: str, tmp_path: Path) -> None:
    config = load_config(overrides=[f"data.root={text}"])
    assert config.data.root == text
    save_config(config, tmp_path / "config.yaml")
    assert load_config(load_recipe(str(tmp_path / "config.yaml"), "tune")) == config
    assert load_config(dataclasses.asdict(config)) == config
    assert load_config({"data": {"root": "/d"}}, overrides=["data.root="]).data.root is None


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


def test_every_setting_is_described_as_it_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    settings = list(list_settings())
    assert {setting.key for setting in settings} | {"stage"} == set(settings_of(Config()))
    typed = [f"{setting.key}={setting.default}" for setting in settings]
    assert load_config(overrides=typed) == Config()
    assert all(setting.meaning.endswith(".") for setting in settings)
    by_key = {setting.key: setting for setting in settings}
    assert by_key["optim.betas"].values == "2 of: number in [0, 1)"
    assert by_key["chunk_size"].values == "integer in [0, 16777216] | none"
    assert by_key["head.pooling"].values == "class_token | mean_patch"
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    printed = capsys.readouterr().out
    assert all(
        f"  {one}    {setting.values}" in printed
        for one, setting in zip(typed, settings, strict=True)
    )


def settings_of(node: Any, key: str = "") -> list[str]:
    """Dotted keys of what is set as a whole."""
    if not dataclasses.is_dataclass(node):
        return [key]
    names = (field.name for field in dataclasses.fields(node))
    parts = ((f"{key}.{name}".removeprefix("."), getattr(node, name)) for name in names)
    return [k for name, part in parts for k in settings_of(part, name)]


@pytest.mark.parametrize("key", ["accumulate", "accum_iter", "optim.grad_accum"])
def test_gradient_accumulation_is_called_chunk_size(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: unknown key: use chunk_size, which is gradie"):
        load_config(overrides=[f"{key}=4"])
