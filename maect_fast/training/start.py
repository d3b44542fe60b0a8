"""From what a user gives to a run: the recipe, what the stage before was given, own settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maect_fast.checkpoint import peek_checkpoint
from maect_fast.config import (
    Config,
    ConfigError,
    Stage,
    flat_settings,
    load_config,
    load_recipe,
    merge_config,
)
from maect_fast.names import printable
from maect_fast.training.engine import run_stage
from maect_fast.training.run_directory import (
    HANDED_ON,
    RunRecord,
    check_last,
    touches,
)
from maect_fast.training.stages import last_checkpoint, reading

__all__ = ["start_run"]


def start_run(
    stage: Stage,
    out: Path,
    *,
    recipe: str | None = None,
    init: Path | None = None,
    decoder: Path | None = None,
    from_scratch: bool = False,
    overrides: Sequence[str] = (),
    change: Sequence[str] = (),
    restart: bool = False,
    capture: bool = True,
    dataset: Any = None,
) -> int:
    """Start a run of a stage, or continue the one in `out`.

    A setting is the recipe's, unless the run `init` hands on another (`data.*`, and what it was
    given beside its own recipe of encoder, augmentation and the head's sizes), unless `overrides`
    have it.

    Args:
        stage: which.
        out: run directory.
        recipe: its name, or a YAML file; None is that of the run that is continued, or of `init`.
        init: a run of the stage before, or a file with an encoder's weights.
        decoder: see `run_stage`.
        from_scratch: start from random weights where a stage before is expected.
        overrides: `key=value` settings.
        change: those of them that a run is continued with, and that its own differ from.
        restart: see `run_stage`.
        capture: see `run_stage`.
        dataset: see `run_stage`.

    Returns:
        What `run_stage` does.

    Raises:
        ConfigError: options that do not go together, besides what `run_stage` raises.
    """
    layer = None if recipe is None else load_recipe(recipe, stage)
    last = last_checkpoint(out)
    own = peek_checkpoint(last) if last.exists() and not restart else None
    if own is None and not restart:
        check_last(out)
    if own is None and recipe is None and init is None:
        raise ConfigError(f"{out}: no run to continue there; start one with --recipe NAME")
    if init is not None and from_scratch:
        raise ConfigError("--init, --from-scratch: expected one of them, got both")
    if own is not None and from_scratch:
        origin = _record(own, out).init
        if origin is not None:
            raise ConfigError(
                f"--from-scratch: the run in {out} was started from {origin['path']}; continue it "
                "without this option, or choose another --out"
            )
    if own is None and init is None and not from_scratch and stage != "pretrain":
        raise ConfigError(
            f"--init: {stage} starts from the stage before (or give --from-scratch for a control)"
        )
    words = [*overrides, *change]
    inherited: dict[str, Any] = {}
    if own is not None:
        # config.yaml is for people: this is what the run goes by.
        layers: list[Any] = [own["config"]]
        if layer is not None:
            layers = [layer, _nested(_handed_on(own, out))]
        config = load_config(*layers, overrides=words)
    else:
        before = None if init is None else _peek_run(init)
        if layer is None:
            recipe = _recipe_of(stage, init, before)
            layer = load_recipe(recipe, stage)
        handed = {} if init is None or before is None else _handed_on(before, init)
        config = load_config(layer, _nested(handed), overrides=words)
        inherited = _effective(handed, config, merge_config(layer), words)
    if config.stage != stage:
        raise ConfigError(f"stage: the command is {stage}, the recipe is for {config.stage}")
    if decoder is not None and config.reconstruction_weight == 0:
        raise ConfigError("--decoder: expected with reconstruction_weight above 0, which uses it")
    return run_stage(
        config,
        out,
        init=init,
        decoder=decoder,
        capture=capture,
        restart=restart,
        change=[_key(word) for word in change],
        recipe=recipe,
        inherited=inherited,
        dataset=dataset,
    )


def _peek_run(init: Path) -> dict[str, Any] | None:
    """The last checkpoint of a run, None where `init` is none."""
    return peek_checkpoint(last_checkpoint(init)) if init.is_dir() else None


def _record(state: dict[str, Any], run: Path) -> RunRecord:
    with reading("record", run):
        return RunRecord.read(state.get("record", {}))


def _recipe_of(stage: Stage, init: Path | None, before: dict[str, Any] | None) -> str:
    """The recipe of the run `init`, whose last checkpoint is `before`."""
    if init is None or before is None:
        raise ConfigError(f"{init}: a file says no recipe; give --recipe NAME")
    recipe = _record(before, init).recipe
    if recipe is None:
        raise ConfigError(f"{init}: the run does not say its recipe; give --recipe NAME")
    if recipe.endswith((".yaml", ".yml")):
        raise ConfigError(
            f"{init}: made from {printable(recipe)}, the recipe of another stage than {stage}; "
            "give --recipe NAME"
        )
    return recipe


def _handed_on(state: dict[str, Any], run: Path) -> dict[str, Any]:
    """What a run with this checkpoint hands on, by dotted key."""
    with reading("config", run):
        settings = flat_settings(load_config(state["config"]))
    given = _record(state, run).given
    handed = {key: value for key, value in settings.items() if key.startswith("data.")}
    return handed | {key: value for key, value in given.items() if key.startswith(HANDED_ON)}


def _effective(
    handed: dict[str, Any], config: Config, recipe: Config, words: Sequence[str]
) -> dict[str, Any]:
    """The part that is neither the recipe's nor typed."""
    settings, plain = flat_settings(config), flat_settings(recipe)
    typed = {_key(word) for word in words}
    return {
        key: settings[key]
        for key in handed
        if settings[key] != plain[key] and not touches(typed, key)
    }


def _key(word: str) -> str:
    return word.partition("=")[0]


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """A layer of the configuration, from dotted keys."""
    layer: dict[str, Any] = {}
    for key, value in settings.items():
        *groups, name = key.split(".")
        node = layer
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return layer
