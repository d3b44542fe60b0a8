"""Runs whose frozen blocks multiply in int8, and the gate before them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from maect_fast.checkpoint import load_checkpoint, save_checkpoint
from maect_fast.cli import main
from maect_fast.config import ConfigError, Stage, load_config, load_recipe
from maect_fast.training import int8_gate
from maect_fast.training.engine import run_stage
from maect_fast.training.stages import last_checkpoint

INT8 = "frozen_precision=int8"


def stage(name: Stage, recipes: dict[Stage, Path], out: Path, *rest: str) -> list[str]:
    return [name, "--recipe", str(recipes[name]), "--out", str(out), *rest]


@pytest.fixture
def mae(recipes: dict[Stage, Path], tmp_path: Path) -> Path:
    assert main(stage("pretrain", recipes, tmp_path / "mae")) == 0
    return tmp_path / "mae"


def test_runs_in_int8_say_what_it_does_to_the_features_and_resume(
    recipes: dict[Stage, Path], mae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head, tuned = tmp_path / "head", tmp_path / "tuned"
    assert main(stage("prepare-head", recipes, head, "--init", str(mae), INT8)) == 0
    line = "frozen blocks in int8: features keep a cosine of 0.99"
    assert line in capsys.readouterr().err
    plain = tmp_path / "plain"
    assert main(stage("tune", recipes, tuned, "--init", str(head), INT8)) == 0
    assert line in capsys.readouterr().err
    assert main(stage("tune", recipes, plain, "--init", str(head))) == 0
    assert "frozen blocks in int8" not in capsys.readouterr().err
    models = [load_checkpoint(last_checkpoint(run))["model"] for run in (tuned, plain)]
    assert models[0].keys() == models[1].keys()
    # The trunk is the same, what trains on it has seen other features, and not by much.
    trained = "encoder.blocks.1.mlp.fc1.weight"
    assert torch.equal(*(model["encoder.blocks.0.mlp.fc1.weight"] for model in models))
    assert not torch.equal(*(model[trained] for model in models))
    torch.testing.assert_close(*(model[trained] for model in models), rtol=0, atol=0.02)
    # It makes a run what it is.
    assert main(stage("tune", recipes, plain, INT8)) == 2
    assert "frozen_precision: the run in" in capsys.readouterr().err
    assert main(["tune", "--out", str(tuned)]) == 0


def test_weights_with_features_that_stand_out_are_refused(
    recipes: dict[Stage, Path], mae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same function: one of the norms' features times 1000, its weights by 1000."""
    path = last_checkpoint(mae)
    state: dict[str, Any] = load_checkpoint(path)
    model = state["model"]
    for block in range(2):
        for norm, linear in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            for part in ("weight", "bias"):
                model[f"encoder.blocks.{block}.{norm}.{part}"][3] *= 1000
            model[f"encoder.blocks.{block}.{linear}.weight"][:, 3] /= 1000
    save_checkpoint(path, state)
    out = tmp_path / "head"
    assert main(stage("prepare-head", recipes, out, "--init", str(mae), INT8)) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if "frozen_precision" in x]
    assert "int8 changes these weights' features too much: expected a cosine of 0.999" in error
    assert not out.exists()
    assert main(stage("prepare-head", recipes, out, "--init", str(mae), "epochs=1")) == 0


def test_features_that_are_no_number_are_refused(
    recipes: dict[Stage, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_gate, "_cosines", lambda *_: torch.tensor([1.0, float("nan")]))
    with pytest.raises(ConfigError, match="got nan at least"):
        run_head(recipes, tmp_path)


def test_a_block_that_cannot_is_named(
    recipes: dict[Stage, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_gate, "why_not", lambda *_: ["1: timm's forward: it has LayerScale"])
    with pytest.raises(ConfigError, match="int8 is not for block 1: timm's forward: it has Layer"):
        run_head(recipes, tmp_path)


def run_head(recipes: dict[Stage, Path], tmp_path: Path) -> None:
    config = load_config(
        load_recipe(str(recipes["prepare-head"]), "prepare-head"), overrides=[INT8]
    )
    run_stage(config, tmp_path / "out")


@pytest.mark.parametrize("overrides", [["stage=pretrain"], ["stage=tune", "frozen_blocks=0"]])
def test_int8_needs_frozen_blocks(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match="frozen_precision: expected same where no block is"):
        load_config(overrides=[*overrides, INT8])
