"""The demo: the paper's claim on 1,797 real images, on a CPU, in minutes.

A masked autoencoder is trained on handwritten digits, its head is prepared, and its upper half is
tuned. No stage sees a label. The table then says how good the features of each stage are, beside
raw pixels and a random encoder.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure

from maect_fast.config import Config, Stage, load_config, load_recipe
from maect_fast.evaluation.compare import (
    Measured,
    Subject,
    about_report,
    describe,
    draw,
    measure,
)
from maect_fast.evaluation.encoders import open_encoder
from maect_fast.evaluation.report import format_table, write_report
from maect_fast.evaluation.runs import (
    load_run,
    run_encoder,
    run_pretrain_model,
)
from maect_fast.models.encoder import Encoder
from maect_fast.training.engine import run_stage
from maect_fast.training.log import read_metrics

__all__ = ["run_demo"]

RECIPE = "digits"
COLUMNS = ("knn", "linear_probe", "low_shot_5", "kmeans_acc", "kmeans_nmi", "kmeans_ari")


def run_demo(out: Path, *, seeds: Sequence[int], control: bool) -> int:
    """Run all three stages for every seed, print one table, write `out`/report.

    A demo that was stopped continues where it was.

    Args:
        out: folder of the run directories, one sub-folder per seed.
        seeds: of initial weights, masks, crops and neighbour picks; several give a mean row.
        control: also prepare and tune a random encoder, without pre-training.

    Returns:
        0, or the number of the signal that stopped it.
    """
    began = time.monotonic()
    given = f"--out {out} --seeds {' '.join(map(str, seeds))}{' --control' if control else ''}"
    about = about_report(f"maect-fast demo {given}", seed=seeds[0])
    tables: dict[str, dict[str, dict[str, float]]] = {}
    figures: dict[str, Figure] = {}
    for seed in seeds:
        folder = out / f"seed-{seed}"
        if stopped_by := _train(folder, seed, control=control):
            return stopped_by
        subjects = _subjects(folder, seed, control=control)
        measured = {name: _measure(name, subject, seed) for name, subject in subjects.items()}
        tables[f"Seed {seed}"] = {
            name: {key: result.metrics[key] for key in COLUMNS} for name, result in measured.items()
        }
        if not figures:
            trained = {name: subjects[name] for name in ("MAE", "MAE-CT")}
            metrics = {name: read_metrics(folder / name) for name in ("mae", "head", "mae-ct")}
            pretrained = run_pretrain_model(*load_run(folder / "mae"))
            figures = draw(metrics, trained, measured, pretrained=pretrained, seed=seed)
            for name, run in (("MAE", folder / "mae"), ("MAE-CT", folder / "mae-ct")):
                about[name] = describe(open_encoder(str(run)), measured[name])
    if len(seeds) > 1:
        tables = {f"Mean of {len(seeds)} seeds": _mean(tables), **tables}
    minutes = (time.monotonic() - began) / 60
    notes = [
        "Digits of scikit-learn, 8 x 8 pixels: 1,437 training and 360 test images. No stage sees a "
        "label. k-NN, probe and 5-shot are accuracies on the test images; k-means clusters all.",
        f"{torch.get_num_threads()} CPU thread(s), {minutes:.1f} minutes.",
    ]
    path = write_report(
        out / "report",
        title="MAE-CT on digits",
        tables=tables,
        figures=figures,
        notes=notes,
        about=about,
    )
    for heading, rows in tables.items():
        print(f"\n{heading}\n\n{format_table(rows)}")  # noqa: T201 (the demo's result)
    print(f"\n{minutes:.1f} minutes; report: {path}")  # noqa: T201
    return 0


def _train(folder: Path, seed: int, *, control: bool) -> int:
    """The three stages, and the control's two; the number of a signal that stopped one."""
    steps: list[tuple[Stage, str, str | None]] = [
        ("pretrain", "mae", None),
        ("prepare-head", "head", "mae"),
        ("tune", "mae-ct", "head"),
    ]
    if control:
        steps += [("prepare-head", "control-head", None), ("tune", "control", "control-head")]
    for stage, name, init in steps:
        start = None if init is None else folder / init
        config = _config(stage, seed)
        if stopped_by := run_stage(config, folder / name, init=start, recipe=RECIPE):
            return stopped_by
    return 0


def _config(stage: Stage, seed: int) -> Config:
    return load_config(load_recipe(RECIPE, stage), overrides=[f"seed={seed}"])


def _subjects(folder: Path, seed: int, *, control: bool) -> dict[str, Subject]:
    """The rows of the table, in its order."""
    tune = _config("tune", seed)
    torch.manual_seed(seed)
    subjects = {
        "raw pixels": Subject(tune, None),
        "random encoder": Subject(tune, Encoder(tune.encoder).eval()),
    }
    rows = {"MAE": "mae", "MAE, head prepared": "head", "MAE-CT": "mae-ct"}
    if control:
        rows["MAE-CT without MAE"] = "control"
    for name, run in rows.items():
        config, state = load_run(folder / run)
        subjects[name] = Subject(config, run_encoder(config, state))
    return subjects


def _measure(name: str, subject: Subject, seed: int) -> Measured:
    print(f"evaluating {name}", file=sys.stderr)  # noqa: T201 (progress)
    return measure(subject, seed=seed, title=name)


def _mean(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Average every row and metric over the seeds."""
    first, *_ = tables.values()
    return {
        name: {key: mean(table[name][key] for table in tables.values()) for key in row}
        for name, row in first.items()
    }
