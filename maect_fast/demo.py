"""The demo: the paper's claim on 1,797 real images, or on a folder, on a CPU, in minutes.

A masked autoencoder is trained on handwritten digits, its head is prepared, and its upper half is
tuned. No stage sees a label. The table then says how good the features of each stage are, beside
raw pixels and a random encoder. With a folder of images in the digits' place there is also a
gallery of its clusters.
"""

import math
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure

from maect_fast.config import Config, ConfigError, Stage, load_config, load_recipe
from maect_fast.data import build_source
from maect_fast.evaluation import METHODS, Method
from maect_fast.evaluation.cluster_images import Number, cluster_images
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
from maect_fast.names import printable
from maect_fast.training.engine import run_stage
from maect_fast.training.log import read_metrics

__all__ = ["run_demo"]

RECIPE = "digits"
COLUMNS = ("knn", "linear_probe", "low_shot_5", "kmeans_acc", "kmeans_nmi", "kmeans_ari")
DIGITS = (
    "Digits of scikit-learn, 8 x 8 pixels: 1,437 training and 360 test images. No stage sees a "
    "label. k-NN, probe and 5-shot are accuracies on the test images; k-means clusters all."
)
# Of a user's folder there are no test images, so that nothing can be said about classifiers.
FOLDER_RECIPE = "small"
FOLDER_METHODS: tuple[Method, ...] = ("clustering",)
FOLDER_COLUMNS = (
    *("kmeans_purity", "kmeans_acc", "kmeans_nmi", "kmeans_ari"),
    *("silhouette", "cluster_smallest", "cluster_largest"),
)
# Images for which the epochs of FOLDER_RECIPE were chosen.
FOLDER_IMAGES = 300


def run_demo(
    out: Path,
    *,
    seeds: Sequence[int],
    control: bool,
    data: Path | None = None,
    number: Number = "auto",
) -> int:
    """Run all three stages for every seed, print one table, write `out`/report.

    A demo that was stopped continues where it was.

    Args:
        out: folder of the run directories, one sub-folder per seed.
        seeds: of initial weights, masks, crops and neighbour picks; several give a mean row.
        control: also prepare and tune a random encoder, without pre-training.
        data: a folder of images instead of the digits, with or without class sub-folders; their
            clusters and a gallery go to clusters/ beside the runs. Training takes as many updates
            as for 300 images, however many there are.
        number: of clusters in the gallery, see `cluster_features`.

    Returns:
        0, or the number of the signal that stopped it.
    """
    began = time.monotonic()
    command = _command(out, seeds, data, number, control=control)
    about = about_report(command, seed=seeds[0])
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data: expected a folder of images, got {printable(data)}")
    methods = METHODS if data is None else FOLDER_METHODS
    columns: Sequence[str] = COLUMNS if data is None else FOLDER_COLUMNS
    tables: dict[str, dict[str, dict[str, float]]] = {}
    figures: dict[str, Figure] = {}
    for seed in seeds:
        folder = out / f"seed-{seed}"
        if stopped_by := _train(folder, seed, data, control=control):
            return stopped_by
        subjects = _subjects(folder, seed, data, control=control)
        measured = {
            name: _measure(name, subject, seed, methods) for name, subject in subjects.items()
        }
        tables[f"Seed {seed}"] = {
            name: {key: result.metrics[key] for key in columns if key in result.metrics}
            for name, result in measured.items()
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
        DIGITS if data is None else _about_folder(data, measured["MAE-CT"]),
        f"{torch.get_num_threads()} CPU thread(s), {minutes:.1f} minutes.",
    ]
    path = write_report(
        out / "report",
        title=f"MAE-CT on {'digits' if data is None else printable(data)}",
        tables=tables,
        figures=figures,
        notes=notes,
        about=about,
    )
    for heading, rows in tables.items():
        print(f"\n{heading}\n\n{format_table(rows)}")  # noqa: T201 (the demo's result)
    print(f"\n{minutes:.1f} minutes; report: {printable(path)}")  # noqa: T201
    for seed in seeds if data is not None else ():
        run, clusters = out / f"seed-{seed}" / "mae-ct", out / f"seed-{seed}" / "clusters"
        told = cluster_images(str(run), clusters, number=number, seed=seed, command=command)
        print(f"\nClusters, seed {seed}\n\n{told}")  # noqa: T201
    return 0


def _command(
    out: Path, seeds: Sequence[int], data: Path | None, number: Number, *, control: bool
) -> str:
    """What a user would type for this."""
    given = ["maect-fast", "demo", "--out", str(out), "--seeds", *map(str, seeds)]
    given += ["--control"] if control else []
    given += [] if data is None else ["--data", str(data), "--k", str(number)]
    return shlex.join(given)


def _about_folder(data: Path, measured: Measured) -> str:
    return (
        f"{len(measured.test.features):,} images of {os.path.abspath(data)}: the encoders were "
        "trained on them from scratch, and k-means clusters them. No stage sees a label."
    )


def _train(folder: Path, seed: int, data: Path | None, *, control: bool) -> int:
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
        config = _config(stage, seed, data)
        recipe = RECIPE if data is None else FOLDER_RECIPE
        if stopped_by := run_stage(config, folder / name, init=start, recipe=recipe):
            return stopped_by
    return 0


def _config(stage: Stage, seed: int, data: Path | None) -> Config:
    if data is None:
        return load_config(load_recipe(RECIPE, stage), overrides=[f"seed={seed}"])
    layer = load_recipe(FOLDER_RECIPE, stage)
    own = [f"seed={seed}", f"data.root={data}", f"data.test_root={data}"]
    config = load_config(layer, overrides=own)
    found = len(build_source(config.data, config.encoder, split="train"))
    batch_size = min(config.batch_size, found)
    epochs = math.ceil(config.epochs * FOLDER_IMAGES / found)
    return load_config(layer, overrides=[*own, f"batch_size={batch_size}", f"epochs={epochs}"])


def _subjects(folder: Path, seed: int, data: Path | None, *, control: bool) -> dict[str, Subject]:
    """The rows of the table, in its order."""
    tune = _config("tune", seed, data)
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


def _measure(name: str, subject: Subject, seed: int, methods: Sequence[Method]) -> Measured:
    print(f"evaluating {name}", file=sys.stderr)  # noqa: T201 (progress)
    return measure(subject, methods=methods, seed=seed, title=name)


def _mean(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Average every row and metric over the seeds."""
    first, *_ = tables.values()
    return {
        name: {key: mean(table[name][key] for table in tables.values()) for key in row}
        for name, row in first.items()
    }
