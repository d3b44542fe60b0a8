import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import csv

from maect_fast import demo
from maect_fast.cli import main
from maect_fast.config import Config, Stage, load_config, load_recipe
from maect_fast.training.engine import run_stage
from maect_fast.training.log import read_metrics

ROWS = ["raw pixels", "random encoder", "MAE", "MAE, head prepared", "MAE-CT", "MAE-CT without MAE"]


@pytest.mark.slow
def test_demo_prints_one_table_and_writes_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole demo, control included, at one epoch per stage."""

    def short(stage: Stage, seed: int, data: Path | None) -> Config:
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of two classes."""
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "images" / ("left" if i % 2 else "right") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (40, 40, 3), dtype=np.uint8)
        pixels[:, : 20 * (i % 2) + 20] += 100
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def test_a_folder_in_the_digits_place(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From images to a gallery by one command."""
    whole = demo._config("tune", 3, folder)
    recipe = load_config(load_recipe("small", "tune"))
    assert (whole.batch_size, whole.seed, whole.data.test_root) == (12, 3, str(folder))
    # As many updates as on 300 images in batches of 100, one being an epoch here.
    assert whole.epochs == recipe.epochs * 300 / 12

    def short(stage: Stage, seed: int, data: Path | None) -> Config:
        small = ["encoder.embed_dim=24", "encoder.depth=2", "data.workers=0", "threads=1"]
        own = [f"seed={seed}", f"data.root={data}", f"data.test_root={data}", "batch_size=12"]
        return load_config(load_recipe("small", stage), overrides=[*own, *small, "epochs=1"])

    monkeypatch.setattr(demo, "_config", short)
    out = tmp_path / "out"
    command = ["demo", "--data", str(folder), "--out", str(out), "--k", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report" / "report.json").read_text())
    rows = report["tables"]["Seed 0"]
    assert list(rows) == ROWS[:-1]
    needed = {"kmeans_purity", "kmeans_acc", "kmeans_nmi", "kmeans_ari"}
    assert all(set(row) == needed for row in rows.values())
    assert f"12 images of {folder}: the encoders were trained on them" in report["notes"][0]
    assert f"{out}/seed-0/clusters/gallery.html" in printed.splitlines()
    assert "sizes of the 3 clusters" in printed
    table = csv.read_csv(out / "seed-0" / "clusters" / "clusters.csv").to_pylist()
    assert [row["class"] for row in table] == ["left"] * 6 + ["right"] * 6
    assert {row["cluster"] for row in table} == {0, 1, 2}


@pytest.mark.slow
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
