"""Runs side by side: one table, one report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from maect_fast.config import Config, ConfigError
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
from maect_fast.evaluation.runs import (
    check_run,
    load_run,
    run_encoder,
    run_pretrain_model,
    split_features,
)
from maect_fast.models.encoder import Encoder
from maect_fast.models.maect import PretrainModel
from maect_fast.names import printable
from maect_fast.training.log import read_metrics
from maect_fast.training.run_directory import check_writable

__all__ = ["Measured", "Subject", "compare_runs", "draw", "measure"]

PICTURES = 8
# Images below which an embedding says nothing; plot_tsne refuses them.
MIN_TSNE = 4


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

    In the pictures the first run is "before" and the last one "after". Runs, images and `out` are
    looked at before anything is computed.
    """
    titles = _titles(runs)
    for run in runs:
        check_run(run, overrides, "train", "test")
    check_writable(out)
    subjects, measured = {}, {}
    pretrained = None
    for run, title in zip(runs, titles, strict=True):
        config, state = load_run(run, overrides)
        name = f"{title} ({config.stage})"
        subjects[name] = Subject(config, run_encoder(config, state))
        try:
            measured[name] = measure(subjects[name], methods=methods, seed=seed)
        except ValueError as error:
            raise ConfigError(f"{printable(run)}: {error}") from error
        if config.stage == "pretrain" and pretrained is None:
            pretrained = run_pretrain_model(config, state)
    rows = {name: result.metrics for name, result in measured.items()}
    curves = {title: read_metrics(run) for run, title in zip(runs, titles, strict=True)}
    figures = draw(curves, subjects, measured, pretrained=pretrained, seed=seed)
    path = write_report(out, title="Evaluation", tables={"Metrics": rows}, figures=figures)
    return f"{format_table(rows)}\n\nreport: {printable(path)}"


def _titles(runs: Sequence[Path]) -> list[str]:
    """The folders' names, or the whole paths where two folders have the same name."""
    if len(set(runs)) < len(runs):
        raise ConfigError("RUN: expected different run directories, got one of them twice")
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def draw(
    metrics: Mapping[str, Sequence[Mapping[str, float]]],
    subjects: Mapping[str, Subject],
    measured: Mapping[str, Measured],
    *,
    pretrained: PretrainModel | None,
    seed: int,
) -> dict[str, Figure]:
    """The report's pictures; those that need classes only where there are labels.

    Args:
        metrics: lines of metrics.jsonl by the run's title, for the training curves.
        subjects: encoders by title; the first is "before", the last "after".
        measured: what `measure` returned for them.
        pretrained: paints the reconstructions, if it takes the images of the last subject.
        seed: of t-SNE and k-means.
    """
    before, after = next(iter(subjects)), list(subjects)[-1]
    last = subjects[after]
    test = measured[after].test
    images = _test_images(last.config)
    classes = build_source(last.config.data, last.config.encoder, split="test").class_names
    figures = {}
    if any(metrics.values()):
        figures["Training"] = plot_curves(metrics)
    panels = {name: measured[name].test for name in dict.fromkeys((before, after))}
    same_images = len({len(features) for features in panels.values()}) == 1
    if same_images and len(test) >= MIN_TSNE:
        figures["t-SNE of the test images"] = plot_tsne(panels, class_names=classes, seed=seed)
    everything = concatenate(measured[after].train, test)
    if len(torch.unique(everything.labelled().label)) >= 2:
        figures["Clusters and classes"] = plot_confusion(everything, class_names=classes, seed=seed)
    if pretrained is not None and pretrained.encoder.config == last.config.encoder:
        drawn = pretrained.reconstruct(images.to(next(pretrained.parameters()).device))
        pictures = (_pixels(x, last.config) for x in (images, drawn.masked, drawn.filled))
        figures["Reconstructions"] = plot_reconstructions(*pictures)
    if last.encoder is not None:
        device = next(last.encoder.parameters()).device
        attention = cls_attention(last.encoder, images.to(device))
        figures["Attention of the class token"] = plot_attention(
            _pixels(images, last.config), attention
        )
    return figures


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
