"""Runs side by side: one table, one report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from maect_fast.config import Config
from maect_fast.data import build_source, eval_batches
from maect_fast.evaluation import METHODS, Features, Method, evaluate_features
from maect_fast.evaluation.features import cls_attention, concatenate
from maect_fast.evaluation.figures import (
    plot_attention,
    plot_confusion,
    plot_curves,
    plot_reconstructions,
    plot_tsne,
)
from maect_fast.evaluation.report import format_table, write_report
from maect_fast.evaluation.runs import load_run, run_encoder, run_pretrain_model, split_features
from maect_fast.models.encoder import Encoder
from maect_fast.training.log import read_metrics

__all__ = ["Measured", "Subject", "compare_runs", "draw", "measure"]

PICTURES = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """Something whose features are measured."""

    config: Config
    """Says which images, and how features are pooled."""
    encoder: Encoder | None
    """None: the raw pixels."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Metrics, and the features they were measured on."""

    metrics: dict[str, float]
    train: Features
    test: Features


def measure(subject: Subject, *, methods: Sequence[Method] = METHODS, seed: int = 0) -> Measured:
    """Extract the features of both splits and evaluate them."""
    train = split_features(subject.config, "train", subject.encoder)
    test = split_features(subject.config, "test", subject.encoder)
    return Measured(evaluate_features(train, test, methods=methods, seed=seed), train, test)


def compare_runs(
    runs: Sequence[Path],
    out: Path,
    *,
    methods: Sequence[Method] = METHODS,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> str:
    """Evaluate run directories, write the report to `out`, return the table as text.

    In the pictures the first run is "before" and the last one "after".
    """
    subjects, measured = {}, {}
    for run in runs:
        config, state = load_run(run, overrides)
        name = f"{run.name} ({config.stage})"
        subjects[name] = Subject(config, run_encoder(config, state))
        measured[name] = measure(subjects[name], methods=methods, seed=seed)
    rows = {name: result.metrics for name, result in measured.items()}
    figures = draw({run.name: run for run in runs}, subjects, measured, seed=seed)
    path = write_report(out, title="Evaluation", tables={"Metrics": rows}, figures=figures)
    return f"{format_table(rows)}\n\nreport: {path}"


def draw(
    runs: Mapping[str, Path],
    subjects: Mapping[str, Subject],
    measured: Mapping[str, Measured],
    *,
    seed: int,
) -> dict[str, Figure]:
    """The report's pictures; those that need classes only where there are labels.

    Args:
        runs: run directories by title: their training curves, and the reconstructions of the first
            pretrain run among them.
        subjects: encoders by title; the first is "before", the last "after".
        measured: what `measure` returned for them.
        seed: of t-SNE, k-means and masks.
    """
    before, after = next(iter(subjects)), list(subjects)[-1]
    last = subjects[after]
    test = measured[after].test
    images = _test_images(last.config)
    classes = build_source(last.config.data, last.config.encoder, split="test").class_names
    figures = {}
    curves = {name: lines for name, run in runs.items() if (lines := read_metrics(run))}
    if curves:
        figures["Training"] = plot_curves(curves)
    panels = {name: measured[name].test for name in dict.fromkeys((before, after))}
    figures["t-SNE of the test images"] = plot_tsne(panels, class_names=classes, seed=seed)
    everything = concatenate(measured[after].train, test)
    if len(torch.unique(everything.labelled().label)) >= 2:
        figures["Clusters and classes"] = plot_confusion(everything, class_names=classes, seed=seed)
    for run in runs.values():
        config, state = load_run(run)
        if config.stage == "pretrain":
            figures["Reconstructions"] = _reconstructions(config, state, images)
            break
    if last.encoder is not None:
        device = next(last.encoder.parameters()).device
        attention = cls_attention(last.encoder, images.to(device))
        figures["Attention of the class token"] = plot_attention(
            _pixels(images, last.config), attention
        )
    return figures


def _reconstructions(config: Config, state: dict[str, Any], images: Tensor) -> Figure:
    model = run_pretrain_model(config, state)
    drawn = model.reconstruct(images.to(next(model.parameters()).device))
    return plot_reconstructions(
        _pixels(images, config), _pixels(drawn.masked, config), _pixels(drawn.filled, config)
    )


def _test_images(config: Config) -> Tensor:
    """The first few test images, normalised."""
    source = build_source(config.data, config.encoder, split="test")
    batches = eval_batches(
        source, config.augment, img_size=config.encoder.img_size, batch_size=PICTURES
    )
    return next(iter(batches))[0]


def _pixels(images: Tensor, config: Config) -> npt.NDArray[np.float32]:
    """Undo the normalisation: [n, H, W, C] in [0, 1]."""
    mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (config.augment.mean, config.augment.std)
    )
    pixels = (images.cpu() * std + mean).clamp(0, 1)
    array: npt.NDArray[np.float32] = pixels.permute(0, 2, 3, 1).numpy()
    return array
