"""Encoders side by side: one table, one report."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from maect_fast.config import AugmentConfig, Config, ConfigError
from maect_fast.data import build_source, eval_batches, told_once
from maect_fast.evaluation import METHODS, NUM_CLUSTERS, Method, evaluate_features, no_labels
from maect_fast.evaluation.clustering import kmeans
from maect_fast.evaluation.encoders import TIMM, Opened, check_encoder, is_run, open_encoder
from maect_fast.evaluation.features import concatenate, pooled_attention
from maect_fast.evaluation.figures import (
    plot_attention,
    plot_confusion,
    plot_curves,
    plot_reconstructions,
    plot_tsne,
)
from maect_fast.evaluation.report import format_table, write_report
from maect_fast.evaluation.runs import (
    Extracted,
    Weights,
    run_pretrain_model,
    split_features,
    view_features,
)
from maect_fast.evaluation.unlabelled import num_unlabelled_clusters
from maect_fast.models.maect import PretrainModel
from maect_fast.names import printable
from maect_fast.training.log import progress, read_metrics
from maect_fast.training.run_directory import check_writable

__all__ = ["Measured", "Subject", "about_report", "compare", "describe", "draw", "measure"]

PICTURES = 8
# Images below which an embedding says nothing; plot_tsne refuses them.
MIN_TSNE = 4
NEED_LABELS = ("knn", "linear_probe", "low_shot")
VERSIONS = ("maect-fast", "torch", "timm", "scikit-learn")


@dataclass(frozen=True, slots=True)
class Subject:
    """Something whose features are measured."""

    config: Config
    """Says which images, and how features are pooled."""
    encoder: nn.Module | None
    """None: the raw pixels."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Metrics, and the features they were measured on."""

    metrics: dict[str, float]
    train: Extracted
    test: Extracted

    @property
    def no_labels(self) -> str | None:
        """See `no_labels` of the package."""
        return no_labels(self.train.features.label, self.test.features.label)


def measure(
    subject: Subject,
    *,
    methods: Sequence[Method] = METHODS,
    seed: int = 0,
    num_clusters: int = NUM_CLUSTERS,
    augment: AugmentConfig | None = None,
    title: str = "",
) -> Measured:
    """Extract the features of both splits and evaluate them.

    Args:
        subject: what is measured.
        methods: which protocols; `views` only where there are no labels, or where it is named among
            fewer than all.
        seed: see `evaluate_features`.
        num_clusters: of images without labels.
        augment: of the two views; None is the subject's own.
        title: of the progress bars.
    """
    config, encoder = subject.config, subject.encoder
    train, test = (split_features(config, s, encoder, title=title) for s in ("train", "test"))
    found = Measured({}, train, test)
    for method in progress(methods, f"{title} metrics".strip(), total=len(methods)):
        views = None
        if method == "views":
            is_wanted = found.no_labels is not None or len(methods) < len(METHODS)
            if encoder is None or not is_wanted:
                continue
            views = view_features(
                config, encoder, augment or config.augment, seed=seed, title=title
            )
        found.metrics.update(
            evaluate_features(
                train.features,
                test.features,
                methods=(method,),
                seed=seed,
                num_clusters=num_clusters,
                views=views,
            )
        )
    return found


def compare(
    words: Sequence[str],
    out: Path,
    *,
    methods: Sequence[Method] = METHODS,
    seed: int = 0,
    overrides: Sequence[str] = (),
    weights: Weights = "ema",
    num_clusters: int = NUM_CLUSTERS,
    command: str = "",
) -> str:
    """Evaluate encoders, write the report to `out`, return the table as text.

    In the pictures the first encoder is "before" and the last one "after". Weights, images and
    `out` are looked at before anything is computed.

    Args:
        words: what `open_encoder` takes.
        out: folder of the report.
        methods: which protocols.
        seed: of probe, draws, k-means, views and the choice of pictures.
        overrides: `key=value` changes of their configurations.
        weights: of the runs, see `encoder_weights`.
        num_clusters: of images without labels.
        command: what the user typed, for the report.
    """
    titles = _titles(words)
    with told_once():
        configs = {}
        for word in words:
            configs[word], labels = check_encoder(word, overrides, "train", "test")
            why = no_labels(*labels)
            if why is not None and set(methods) <= set(NEED_LABELS):
                raise ConfigError(
                    f"--methods: {', '.join(methods)} need class folders; {why} (clustering and "
                    "views need no labels)"
                )
        check_writable(out)
        # Views are those of the last run, as files and timm's models say nothing of them.
        last = ([word for word in words if is_run(word)] or words)[-1]
        return _compare(
            words,
            titles,
            out,
            methods=methods,
            augment=configs[last].augment,
            seed=seed,
            overrides=overrides,
            weights=weights,
            num_clusters=num_clusters,
            command=command,
        )


def _compare(
    words: Sequence[str],
    titles: Sequence[str],
    out: Path,
    *,
    methods: Sequence[Method],
    augment: AugmentConfig,
    seed: int,
    overrides: Sequence[str],
    weights: Weights,
    num_clusters: int,
    command: str,
) -> str:
    """`compare` after its checks."""
    subjects, measured, taken = {}, {}, {}
    about = about_report(command, seed=seed)
    pretrained = None
    for word, title in zip(words, titles, strict=True):
        opened = open_encoder(word, overrides, weights=weights)
        name = f"{title} ({opened.kind})"
        subjects[name] = Subject(opened.config, opened.encoder)
        taken[name] = opened.weights
        try:
            measured[name] = measure(
                subjects[name],
                methods=methods,
                seed=seed,
                num_clusters=num_clusters,
                augment=augment,
                title=title,
            )
        except ValueError as error:
            raise ConfigError(f"{printable(word)}: {error}") from error
        about[name] = describe(opened, measured[name])
        if opened.kind == "pretrain" and opened.state is not None and pretrained is None:
            pretrained = run_pretrain_model(opened.config, opened.state)
    rows = {name: result.metrics for name, result in measured.items()}
    named = zip(words, titles, strict=True)
    curves = {title: read_metrics(Path(word)) for word, title in named if is_run(word)}
    figures = draw(
        curves, subjects, measured, pretrained=pretrained, seed=seed, num_clusters=num_clusters
    )
    # The same for encoders on the same images, which is once.
    notes = list(dict.fromkeys(m.no_labels for m in measured.values() if m.no_labels is not None))
    path = write_report(
        out,
        title="Evaluation",
        tables={"Metrics": rows},
        figures=figures,
        notes=notes,
        about=about,
    )
    lines = [f"{printable(name)}: {line}" for name, line in taken.items()]
    told = [*lines, *notes, "", format_table(rows), "", f"report: {printable(path)}"]
    return "\n".join(told)


def about_report(command: str, *, seed: int) -> dict[str, str]:
    """What a report says of itself: how it was made, when, by what."""
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": ", ".join(f"{name} {version(name)}" for name in VERSIONS),
        "seed of the evaluation": str(seed),
    }


def describe(opened: Opened, measured: Measured) -> str:
    """A sentence on an encoder: what it is, and on which images it was measured, and how."""
    config = opened.config
    data, augment, side = config.data, config.augment, config.encoder.img_size
    where: str = data.source
    if data.source == "folder":
        folders = (os.path.abspath(str(root)) for root in (data.root, data.test_root))
        where = " and ".join(dict.fromkeys(folders))
    counts = [f"{len(part.features):,}" for part in (measured.train, measured.test)]
    return (
        f"{opened.origin}; {opened.weights}; {side} x {side} pixels, mean {_short(augment.mean)}, "
        f"deviation {_short(augment.std)}; {config.head.pooling} pooling; {counts[0]} training and "
        f"{counts[1]} test images of {where}"
    )


def _short(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _titles(words: Sequence[str]) -> list[str]:
    """The last parts of the names, or all of them whole where two have the same last part."""
    whole = [str(Path(word)) for word in words]
    if len(set(whole)) < len(whole):
        raise ConfigError("RUN: expected different runs, files or models, got one of them twice")
    names = [Path(word.removeprefix(TIMM)).name for word in words]
    return names if len(set(names)) == len(names) else whole


def draw(
    metrics: Mapping[str, Sequence[Mapping[str, float]]],
    subjects: Mapping[str, Subject],
    measured: Mapping[str, Measured],
    *,
    pretrained: PretrainModel | None,
    seed: int,
    num_clusters: int = NUM_CLUSTERS,
) -> dict[str, Figure]:
    """The report's pictures; where there are no classes, clusters take their place.

    Args:
        metrics: lines of metrics.jsonl by the run's title, for the training curves.
        subjects: encoders by title; the first is "before", the last "after".
        measured: what `measure` returned for them.
        pretrained: paints the reconstructions, if it takes the images of the last subject.
        seed: of t-SNE, k-means and the choice of images.
        num_clusters: of images without labels.
    """
    before, after = next(iter(subjects)), list(subjects)[-1]
    last, test = subjects[after], measured[after].test
    everything = concatenate(measured[after].train.features, test.features)
    has_classes = len(torch.unique(everything.labelled().label)) >= 2
    group, names, groups = test.features.label, test.source.class_names, "class"
    count = num_unlabelled_clusters(len(test.features), num_clusters)
    if not has_classes and count >= 2:
        group = kmeans(test.features, num_clusters=count, restarts=1, seed=seed).cluster
        names, groups = [f"cluster {i}" for i in range(count)], f"k-means cluster of {after}"
    chosen = spread(group, PICTURES, seed=seed)
    shown = [names[g] if 0 <= g < len(names) else "" for g in group[chosen].tolist()]
    images = _images(last.config, test.sample_id[chosen].tolist())
    pixels = _pixels(images, last.config)
    figures = {}
    if any(metrics.values()):
        figures["Training"] = plot_curves(metrics)
    panels = {name: measured[name].test.features for name in dict.fromkeys((before, after))}
    same_images = len({len(features) for features in panels.values()}) == 1
    if same_images and len(group) >= MIN_TSNE:
        figures["t-SNE of the test images"] = plot_tsne(
            panels, group, group_names=names, coloured_by=groups, seed=seed
        )
    if has_classes:
        figures["Clusters and classes"] = plot_confusion(everything, class_names=names, seed=seed)
    if pretrained is not None and pretrained.encoder.config == last.config.encoder:
        drawn = pretrained.reconstruct(images.to(next(pretrained.parameters()).device))
        figures["Reconstructions"] = plot_reconstructions(
            pixels,
            *(_pixels(x, last.config) for x in drawn),
            titles=shown,
            mask_ratio=pretrained.mask_ratio,
            is_normalised=pretrained.decoder.normalize_pixels,
        )
    if last.encoder is not None:
        device, pooling = next(last.encoder.parameters()).device, last.config.head.pooling
        attention = pooled_attention(last.encoder, images.to(device), pooling)
        figures["Attention"] = plot_attention(pixels, attention, pooling=pooling, titles=shown)
    return figures


def spread(group: Tensor, count: int, *, seed: int) -> Tensor:
    """Row numbers of up to `count` images, drawn in turn from all groups, in their order.

    Args:
        group: [N] int64, the class or cluster of each row.
        count: images wanted.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(group), generator=generator)
    rank = torch.empty_like(order)
    for number in torch.unique(group).tolist():
        own = order[group[order] == number]
        rank[own] = torch.arange(len(own))
    # All first images of their group, then all second ones; within a round by chance.
    drawn = order[torch.argsort(rank[order], stable=True)][:count]
    return drawn[torch.argsort(group[drawn], stable=True)]


def _images(config: Config, indices: Sequence[int]) -> Tensor:
    """Some test images, normalised."""
    source = build_source(config.data, config.encoder, split="test")
    batches = eval_batches(
        source,
        config.augment,
        img_size=config.encoder.img_size,
        batch_size=len(indices),
        indices=indices,
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
