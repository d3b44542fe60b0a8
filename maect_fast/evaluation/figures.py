"""The report's pictures: arrays in, matplotlib figures out, no state between calls.

Colours are Paul Tol's "muted" set, which colour-blind readers can tell apart. Figures are made
without pyplot, so none of them stays alive in a global list and no display is needed.

Legend: n images, H and W pixels, C channels (1 or 3), h and w patches.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from maect_fast.evaluation.clustering import kmeans, match_clusters
from maect_fast.evaluation.features import Features
from maect_fast.names import mathless

__all__ = ["plot_attention", "plot_confusion", "plot_curves", "plot_reconstructions", "plot_tsne"]

Array = npt.NDArray[Any]

COLOURS = (
    "#332288", "#88CCEE", "#117733", "#DDCC77", "#CC6677",
    "#44AA99", "#882255", "#999933", "#AA4499", "#777777",
)  # fmt: skip
MARKERS = "osD^v"
MAX_CLASSES = 20  # beyond, a legend or numbers in cells are unreadable
MAX_HEADS = 6

CURVES = {
    "loss": "loss",
    "nn_accuracy": "neighbour accuracy",
    "knn": "k-NN accuracy",
    "view_agreement": "agreement of views",
    "lr": "largest learning rate",
    "images_per_second": "images / s",
}
POOLED = {
    "class_token": "the class token, whose feature is used",
    "mean_patch": "the patches, whose mean is the feature (mean over all of them)",
}


def plot_curves(stages: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss, neighbour accuracy, learning rate and speed over the epochs, one column per stage.

    Args:
        stages: lines of metrics.jsonl by the stage's title. A row of the figure exists when some
            stage has its metric; a stage without it leaves its cell empty.

    Raises:
        ValueError: no stage has a line.
    """
    stages = {title: lines for title, lines in stages.items() if lines}
    if not stages:
        raise ValueError("stages: expected at least one line of metrics, got none")
    found = [
        key for key in CURVES if any(key in line for lines in stages.values() for line in lines)
    ]
    figure = _figure(max(3.2 * len(stages) + 0.6, 5.5), 1.9 * len(found) + 1.0)
    figure.suptitle(
        "Loss: of pretrain the mean squared error of removed patches, else cross-entropy in nats;\n"
        "neighbour accuracy: share of drawn neighbours with the image's own label",
        fontsize=8,
    )
    axes = figure.subplots(len(found), len(stages), squeeze=False, sharex="col")
    for column, (title, lines) in enumerate(stages.items()):
        axes[0, column].set_title(mathless(title))
        axes[-1, column].set_xlabel("epoch")
        for row, key in enumerate(found):
            ax = axes[row, column]
            points = [(line["epoch"], line[key]) for line in lines if key in line]
            if not points:
                ax.set_axis_off()
                continue
            _curve(ax, points)
            ax.set_ylabel(CURVES[key])
            if key in ("nn_accuracy", "knn", "view_agreement"):
                ax.set_ylim(0, 1.02)
            if key == "lr":
                ax.ticklabel_format(axis="y", scilimits=(0, 0))
            if key == "images_per_second":
                ax.set_ylim(bottom=0)
    figure.align_ylabels()
    return figure


def plot_tsne(
    panels: Mapping[str, Features],
    group: Tensor,
    *,
    group_names: Sequence[str] = (),
    coloured_by: str = "class",
    max_points: int = 600,
    seed: int = 0,
) -> Figure:
    """Embed features in two dimensions, one panel per feature set.

    Args:
        panels: features by title, row i of each being the same image.
        group: [N] int64, the class or cluster by which images are coloured; those of -1 are grey.
        group_names: name of each group; empty uses the numbers.
        coloured_by: what a group is.
        max_points: images shown, a random subset when there are more (the cost grows faster than
            linearly: 600 points take about 1 s).
        seed: of the subset and the embedding.

    Raises:
        ValueError: feature sets of different lengths, or fewer than 4 images.
    """
    first = next(iter(panels.values()))
    if any(len(features) != len(group) for features in panels.values()):
        raise ValueError(
            f"panels: expected the same images, got {[len(f) for f in panels.values()]}"
        )
    if len(first) < 4:
        raise ValueError(f"panels: expected at least 4 images, got {len(first)}")
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
    rows = order[:max_points]
    # The title needs some width, whatever the number of panels.
    figure = _figure(max(4.6 * len(panels), 6.0), 5.3)
    of_all = "" if len(rows) == len(first) else f" of {len(first):,}, drawn at random"
    figure.suptitle(
        f"t-SNE of {len(rows):,} images{of_all}, by cosine\ncoloured by {mathless(coloured_by)}\n"
        "(near points are similar; axes and distances between groups have no unit)",
        fontsize=10,
    )
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    groups: dict[int, PathCollection] = {}
    for ax, (title, features) in zip(axes, panels.items(), strict=True):
        # A perplexity above a third of the points has no meaning; cosine is what k-NN and k-means
        # use.
        embedding = TSNE(
            perplexity=min(30.0, len(rows) / 4), metric="cosine", init="pca", random_state=seed
        )
        points = embedding.fit_transform(features.x[rows].numpy())
        groups = _scatter(ax, points, group[rows].numpy())
        ax.set_title(mathless(title))
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel("t-SNE 1")
        ax.set_ylabel("t-SNE 2")
    if 1 < len(groups) <= MAX_CLASSES:
        names = [_name(number, group_names) for number in groups]
        # In inches, of the default font.
        entry = 0.3 + 0.09 * max(map(len, names))
        columns = min(10, max(1, int(figure.get_figwidth() / entry)))
        style = {"ncols": columns, "frameon": False, "handletextpad": 0.1, "columnspacing": 1.2}
        legend = figure.legend(
            groups.values(), map(str, groups), loc="outside lower center", **style
        )
        # Set afterwards: a label that begins with an underscore would be left out.
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(name)
    return figure


def plot_confusion(features: Features, *, class_names: Sequence[str] = (), seed: int = 0) -> Figure:
    """Heat map of classes against k-means clusters, with matched clusters on the diagonal.

    A cluster has the name of the class that it is matched to.

    Args:
        features: all rows are clustered, into as many clusters as there are classes; rows labelled
            -1 are not counted. Shown is the restart of lowest inertia, one of ten.
        class_names: name of each label; empty uses the numbers.
        seed: of k-means.

    Raises:
        ValueError: no row has a label.
    """
    known = features.label >= 0
    if not bool(known.any()):
        raise ValueError("features: expected at least one labelled image, got none")
    num_clusters = len(torch.unique(features.label[known]))
    found = kmeans(features, num_clusters=num_clusters, seed=seed)
    cluster = found.cluster
    confusion, order = match_clusters(features.label[known], cluster[known])
    counts = confusion.numpy()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(counts)
    side = min(8.0, 1.8 + 0.42 * size)
    # The title needs some width, whatever the number of classes, and names some height.
    figure = _figure(max(side + 0.8, 5.5), side + 0.7)
    ax = figure.subplots()
    picture = ax.imshow(share, cmap="cividis", vmin=0, vmax=1)
    figure.colorbar(picture, ax=ax, label="share of the class", shrink=0.8)
    accuracy = counts.trace() / counts.sum()
    figure.suptitle(
        f"k-means: {accuracy:.1%} of {counts.sum():,} images on the diagonal\n"
        f"(of {len(found.runs)} runs that of lowest inertia, which sees no labels)",
        fontsize=10,
    )
    ax.set_xlabel("cluster: class that it is matched to (its number)")
    ax.set_ylabel("class; in cells images")
    if size <= MAX_CLASSES:
        names = [_name(c, class_names) for c in range(size)]
        matched = [f"{name} ({c})" for name, c in zip(names, order.tolist(), strict=True)]
        ax.set_xticks(range(size), matched, rotation=90)
        ax.set_yticks(range(size), names)
        for row, column in np.argwhere(counts):
            colour = "black" if share[row, column] > 0.6 else "white"
            text = str(counts[row, column])
            ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


def plot_reconstructions(
    original: Array,
    masked: Array,
    filled: Array,
    *,
    titles: Sequence[str],
    mask_ratio: float,
    is_normalised: bool,
) -> Figure:
    """Rows original, masked, reconstruction; one column per image.

    Args:
        original: [n, H, W, C] float, pixel values in [0, 1], as the other two.
        masked: what the encoder saw, with removed patches blanked.
        filled: with removed patches predicted.
        titles: of the n columns.
        mask_ratio: share of the patches that were removed.
        is_normalised: whether predicted patches have the originals' mean and deviation.

    Raises:
        ValueError: different shapes.
    """
    rows = {"original": original, "masked": masked, "reconstruction": filled}
    shapes = [list(pictures.shape) for pictures in rows.values()]
    if shapes.count(shapes[0]) < len(shapes):
        raise ValueError(f"original, masked, filled: expected one shape, got {shapes}")
    figure = _figure(max(1.0 * len(original) + 0.4, 5.5), 4.0)
    given = "; they are given each patch's true mean and deviation" if is_normalised else ""
    figure.suptitle(
        f"{mask_ratio:.0%} of the patches are removed, and what the decoder makes of them\n"
        f"(pixel values 0 to 1, removed patches in one colour{given})",
        fontsize=10,
    )
    axes = figure.subplots(len(rows), len(original), squeeze=False)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(mathless(title), fontsize=7)
    for row, (title, pictures) in enumerate(rows.items()):
        axes[row, 0].set_ylabel(title)
        for ax, picture in zip(axes[row], pictures, strict=True):
            _show(ax, picture)
    return figure


def plot_attention(
    images: Array, attention: Tensor, *, pooling: str, titles: Sequence[str]
) -> Figure:
    """What the pooled tokens look at: per image, the mean over all heads, then six of the heads.

    Args:
        images: [n, H, W, C] float, pixel values in [0, 1].
        attention: [n, heads, h, w] weights of the patches, as `pooled_attention` returns them. Each
            map has its own scale: black is 0 and the brightest patch its maximum, stated below it.
        pooling: whose attention it is.
        titles: of the n rows.

    Raises:
        ValueError: different numbers of images.
    """
    if len(images) != len(attention):
        raise ValueError(f"attention: expected maps of {len(images)} images, got {len(attention)}")
    shown = attention[:, :MAX_HEADS]
    maps = torch.cat([attention.mean(dim=1, keepdim=True), shown], dim=1).numpy()
    headings = ["image", "mean", *(f"head {i}" for i in range(shown.shape[1]))]
    figure = _figure(max(1.1 * len(headings), 5.5), 1.3 * len(images) + 0.9)
    h, w = maps.shape[2:]
    figure.suptitle(
        f"Attention of {POOLED[pooling]}, last block\n"
        f"(share of the weight per patch; black is 0, the palest each map's maximum, stated below "
        f"it; even is {1 / (h * w):.1%})",
        fontsize=9,
    )
    axes = figure.subplots(len(images), len(headings), squeeze=False)
    for ax, heading in zip(axes[0], headings, strict=True):
        ax.set_title(heading, fontsize=9)
    for row, title in enumerate(titles):
        _show(axes[row, 0], images[row])
        axes[row, 0].set_xlabel(mathless(title), fontsize=7)
        for ax, weights in zip(axes[row, 1:], maps[row], strict=True):
            ax.imshow(weights, cmap="inferno", vmin=0)
            ax.set_xlabel(f"{weights.max():.1%}", fontsize=7)
            ax.set_xticks([])
            ax.set_yticks([])
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(max(width, 3.0), height), dpi=150, layout="constrained")


def _curve(ax: Axes, points: Sequence[tuple[float, float]]) -> None:
    x, y = zip(*points, strict=True)
    ax.plot(x, y, color=COLOURS[0], linewidth=1.2, marker="o" if len(points) == 1 else None)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _scatter(ax: Axes, points: Array, label: Array) -> dict[int, PathCollection]:
    """One colour and marker per class; what was drawn, by label."""
    drawn = {}
    for number, colour, marker in _styles(label):
        x, y = points[label == number].T
        drawn[number] = ax.scatter(x, y, s=14, c=colour, marker=marker, linewidths=0)
    return drawn


def _styles(label: Array) -> Iterator[tuple[int, str, str]]:
    for number in np.unique(label).tolist():
        if number < 0:
            yield number, "#BBBBBB", "."
        else:
            marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
            yield number, COLOURS[number % len(COLOURS)], marker


def _name(number: int, class_names: Sequence[str]) -> str:
    if number < 0:
        return "no label"
    return mathless(class_names[number]) if number < len(class_names) else str(number)


def _show(ax: Axes, picture: Array) -> None:
    """One image [H, W, C] without ticks; nearest neighbour, so that small images stay honest."""
    shown = np.clip(picture, 0, 1)
    if shown.shape[2] == 1:
        ax.imshow(shown[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        ax.imshow(shown, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
