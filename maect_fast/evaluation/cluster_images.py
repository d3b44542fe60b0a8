"""From a folder of images to its clusters: a table with a row per image, and a gallery."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maect_fast.config import Config, ConfigError
from maect_fast.data import told_once
from maect_fast.evaluation.cluster_gallery import write_gallery
from maect_fast.evaluation.clustering import (
    ClusterScores,
    kmeans,
    score_clusters,
    score_numbers,
    silhouette,
)
from maect_fast.evaluation.compare import about_report
from maect_fast.evaluation.encoders import check_encoder, open_encoder
from maect_fast.evaluation.feature_file import file_columns, write_table
from maect_fast.evaluation.features import Features
from maect_fast.evaluation.runs import Extracted, Weights, split_features
from maect_fast.names import printable
from maect_fast.training.run_directory import check_writable

__all__ = ["Clusters", "Number", "TableFormat", "cluster_features", "cluster_images"]

Number: TypeAlias = int | Literal["auto"]
TableFormat: TypeAlias = Literal["csv", "parquet"]

STARTS = 10
START_ROWS = 100_000
NO_LABELS = "no labels: the images lie in no class folders, so there is no purity, NMI, ARI or ACC"


class Clusters(NamedTuple):
    """Images in clusters, the largest cluster first."""

    cluster: Tensor
    """[N] int64."""
    distance: Tensor
    """[N] float32: cosine distance of each image to the centre of its cluster, in [0, 2]."""
    sizes: list[int]
    """Images of each cluster."""
    silhouette: float | None
    """See `clustering.silhouette`."""
    scores: ClusterScores | None
    """Agreement with the classes, of the images that have one; None without two classes."""
    tried: dict[int, float]
    """What was looked at to choose the number of clusters, see `score_numbers`."""


def cluster_features(features: Features, *, number: Number, seed: int = 0) -> Clusters:
    """K-means of the L2-normalised rows, the best in inertia of several starts.

    Starts are ten up to 10,000 rows and fewer beyond, so that they see 100,000 rows together.

    Args:
        features: N rows; labels are for the scores alone.
        number: of clusters; "auto" takes that of the largest silhouette, see `score_numbers`.
        seed: of the starts and of the rows that silhouettes are measured on.

    Raises:
        ConfigError: fewer rows than clusters, or rows of which nothing says how many there are.
    """
    tried: dict[int, float] = {}
    if number == "auto":
        tried = score_numbers(features, seed=seed)
        if not tried:
            raise ConfigError(
                f"--k: {len(features)} images, all alike or fewer than 4, say nothing about a "
                "number of clusters; give it"
            )
        wanted = max(tried, key=lambda k: tried[k])
    else:
        wanted = number
    if wanted > len(features):
        raise ConfigError(
            f"--k: expected at most as many clusters as images ({len(features)}), got {wanted}"
        )
    starts = max(1, min(STARTS, START_ROWS // len(features)))
    runs = kmeans(features, num_clusters=wanted, restarts=1, num_init=starts, seed=seed)
    found = runs.cluster
    # Of equal images there may be fewer clusters than were asked for.
    order = torch.argsort(torch.bincount(found), descending=True, stable=True)
    cluster = torch.argsort(order)[found]
    sizes = [size for size in torch.bincount(cluster).tolist() if size]
    known = features.label >= 0
    has_classes = len(torch.unique(features.label[known])) >= 2
    return Clusters(
        cluster=cluster,
        distance=_distances(features.x, cluster, len(sizes)),
        sizes=sizes,
        silhouette=silhouette(features, cluster, seed=seed),
        scores=score_clusters(features.label[known], cluster[known]) if has_classes else None,
        tried=tried,
    )


def _distances(x: Tensor, cluster: Tensor, number: int) -> Tensor:
    """Cosine distance of each row to its cluster's centre."""
    distance = torch.empty(len(x))
    for i in range(number):
        rows = cluster == i
        own = F.normalize(x[rows], dim=1)
        distance[rows] = 1 - own @ F.normalize(own.mean(dim=0), dim=0)
    # Rounding may take the cosine of a lone image beyond 1.
    return distance.clamp_(min=0)


def cluster_images(
    word: str,
    out: Path,
    *,
    number: Number = "auto",
    table: TableFormat = "csv",
    weights: Weights = "ema",
    seed: int = 0,
    overrides: Sequence[str] = (),
    command: str = "",
) -> str:
    """Cluster the training images by an encoder's features, write table and gallery.

    `out`/clusters.csv (or .parquet) has a row for every image that was asked for: path, id, label
    and class (empty for none), cluster (0 is the largest), distance (cosine, to the cluster's
    centre), missing (why the image could not be read; cluster and distance are empty then).
    `out`/gallery.html is described in `cluster_gallery`.

    Args:
        word: what `open_encoder` takes.
        out: folder, made if there is none; each file is written as a whole or not at all.
        number: of clusters, see `cluster_features`.
        table: format of the table.
        weights: of runs, see `encoder_weights`.
        seed: see `cluster_features`.
        overrides: `key=value` changes of the configuration, such as data.root=FOLDER.
        command: what the user typed, for the gallery.

    Returns:
        What is to be told: weights, number and sizes of the clusters, scores, files.

    Raises:
        CheckpointError, ConfigError: see `check_encoder` and `cluster_features`; all but a wrong
            number is known before anything is computed.
        DataError: more images cannot be read than `data.max_broken`.
    """
    with told_once():
        check_encoder(word, overrides, "train")
        check_writable(out)
        opened = open_encoder(word, overrides, weights=weights)
        extracted = split_features(opened.config, "train", opened.encoder, title=Path(word).name)
        clusters = cluster_features(extracted.features, number=number, seed=seed)
        lines = [f"{printable(word)}: {opened.weights}", *told(opened.config, extracted, clusters)]
        out.mkdir(parents=True, exist_ok=True)
        files = [out / f"clusters.{table}", out / "gallery.html"]
        write_table(_columns(extracted, clusters), files[0])
        write_gallery(
            files[1],
            extracted,
            clusters.cluster,
            clusters.distance,
            config=opened.config,
            # Sizes have bars there.
            notes=[line for line in lines[1:] if not line.startswith("sizes")],
            about=about_report(command, seed=seed)
            | {"encoder": f"{opened.origin}; {opened.weights}"},
        )
    return "\n".join([*lines, *(printable(file) for file in files)])


def told(config: Config, extracted: Extracted, clusters: Clusters) -> list[str]:
    """Lines about the clusters."""
    features = extracted.features
    missing = f", {len(extracted.missing):,} could not be read" if extracted.missing else ""
    number, scores = len(clusters.sizes), clusters.scores
    folder = config.data.root if config.data.source == "folder" else None
    where = config.data.source if folder is None else printable(os.path.abspath(folder))
    lines = [f"{len(features):,} images of {where}{missing}"]
    if clusters.tried:
        tried = ", ".join(f"{k}: {score:.3f}" for k, score in clusters.tried.items())
        lines.append(f"{number} clusters have the largest silhouette of those tried ({tried})")
    lines.append(f"sizes of the {number} clusters: {' '.join(f'{s:,}' for s in clusters.sizes)}")
    if clusters.silhouette is not None:
        lines.append(f"silhouette {clusters.silhouette:.3f} (cosine; 1 is apart, 0 overlapping)")
    if scores is None:
        return [*lines, NO_LABELS]
    known = features.labelled().label
    lines.append(
        f"purity {scores.purity:.3f}, NMI {scores.nmi:.3f}, ARI {scores.ari:.3f}, ACC "
        f"{scores.acc:.3f} ({len(known):,} images of {len(torch.unique(known))} classes)"
    )
    return lines


def _columns(extracted: Extracted, clusters: Clusters) -> dict[str, Any]:
    """Columns with a row for each image of the source, null where there is no cluster."""
    import pyarrow as pa

    columns, ids = file_columns(extracted), extracted.sample_id
    number = len(extracted.source)
    is_missing = np.ones(number, dtype=bool)
    is_missing[ids] = False
    missing = columns.pop("missing")
    for name, values in (("cluster", clusters.cluster), ("distance", clusters.distance)):
        whole = torch.zeros(number, dtype=values.dtype)
        whole[ids] = values
        columns[name] = pa.array(whole.numpy(), mask=is_missing)
    return {**columns, "missing": missing}
