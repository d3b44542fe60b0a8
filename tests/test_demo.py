import json
from pathlib import Path

import pytest

from maect_fast import demo
from maect_fast.config import Config, Stage, load_config, load_recipe
from maect_fast.training.engine import run_stage
from maect_fast.training.log import read_metrics

ROWS = ["raw pixels", "random encoder", "MAE", "MAE, head prepared", "MAE-CT", "MAE-CT without MAE"]


def test_demo_prints_one_table_and_writes_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole demo, control included, at one epoch per stage."""

    def short(stage: Stage, seed: int) -> Config:
        overrides = [f"seed={seed}", "epochs=1", "threads=1"]
        return load_config(load_recipe(demo.RECIPE, stage), overrides=overrides)

    monkeypatch.setattr(demo, "_config", short)
    assert demo.run_demo(tmp_path, seeds=[3, 4], control=True) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert list(report["tables"]) == ["Mean of 2 seeds", "Seed 3", "Seed 4"]
    for heading, rows in report["tables"].items():
        assert heading in printed
        assert list(rows) == ROWS
        assert all(list(row) == list(demo.COLUMNS) for row in rows.values())
        # Head preparation must not touch the encoder.
        assert rows["MAE"] == rows["MAE, head prepared"]
    first, second = report["tables"]["Seed 3"]["MAE-CT"], report["tables"]["Seed 4"]["MAE-CT"]
    mean = report["tables"]["Mean of 2 seeds"]["MAE-CT"]
    assert mean["knn"] == pytest.approx((first["knn"] + second["knn"]) / 2)
    assert len(report["figures"]) == 5
    # Pooled is the mean of the patches.
    assert "recipe digits, seed 3" in report["about"]["MAE-CT"]
    assert report["about"]["command"] == f"maect-fast demo --out {tmp_path} --seeds 3 4 --control"
    for file in report["figures"].values():
        assert (tmp_path / "report" / file).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report" / "report.html").stat().st_size > 100_000


def test_the_stages_learn(tmp_path: Path) -> None:
    """A few of the demo's epochs: losses fall, neighbours get better."""
    lines = {}
    init = None
    for stage, name, epochs in (
        ("pretrain", "mae", 5),
        ("prepare-head", "head", 20),
        ("tune", "mae-ct", 12),
    ):
        overrides = [f"epochs={epochs}", "threads=1", "seed=0"]
        config = load_config(load_recipe("digits", stage), overrides=overrides)  # type: ignore[arg-type]
        assert run_stage(config, tmp_path / name, init=init) == 0
        init = tmp_path / name
        lines[name] = read_metrics(init)
    for name in ("mae", "head", "mae-ct"):
        assert lines[name][-1]["loss"] < 0.9 * lines[name][0]["loss"]
    for name in ("head", "mae-ct"):
        assert lines[name][-1]["nn_accuracy"] > lines[name][0]["nn_accuracy"] + 0.05
