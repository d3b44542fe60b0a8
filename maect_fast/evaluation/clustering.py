"""K-means on features, compared with classes that took no part in it.

Source: arXiv 2304.10520 (version 2) reports cluster accuracies without code; this is the field's
usual reading: k is the number of classes, and clusters are matched to classes one to one (Hungarian
method) for the accuracy.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import (
    adjusted_rand_score,
    confusion_matrix,
    normalized_mutual_info_score,
    silhouette_score,
)
from torch import Tensor

from maect_fast.evaluation.features import Features

__all__ = [
    "ClusterScores",
    "Clustering",
    "kmeans",
    "match_clusters",
    "score_clusters",
    "score_numbers",
    "silhouette",
    "some_rows",
]

MAX_ROWS = 4096
MAX_CLUSTERS = 30


@dataclass(frozen=True, slots=True)
class ClusterScores:
    """Agreement of a clustering with classes; 1 is perfect in each."""

    acc: float
    """Accuracy under the best one-to-one matching of clusters to classes."""
    nmi: float
    """Normalised mutual information, arithmetic mean of the entropies."""
    ari: float
    """Adjusted Rand index; 0 is chance."""
    purity: float
    """Share of the rows that are of their cluster's most frequent class; grows with the number of
    clusters."""


@dataclass(frozen=True, slots=True)
class Clustering:
    """Several k-means runs on the same features."""

    cluster: Tensor
    """[N] int64: the run of lowest inertia."""
    runs: tuple[Tensor, ...]
    """The clusters [N] of every run."""

    def scores(self, label: Tensor) -> tuple[ClusterScores, float]:
        """Mean of each score over the runs, and the standard deviation of ACC.

        `label` is [N] int64; rows labelled -1 do not count.
        """
        known = label >= 0
        scores = [score_clusters(label[known], run[known]) for run in self.runs]
        mean = ClusterScores(
            acc=float(np.mean([s.acc for s in scores])),
            nmi=float(np.mean([s.nmi for s in scores])),
            ari=float(np.mean([s.ari for s in scores])),
            purity=float(np.mean([s.purity for s in scores])),
        )
        return mean, float(np.std([s.acc for s in scores]))

    def best_scores(self, label: Tensor) -> ClusterScores:
        """Those of `cluster`; `label` as for `scores`."""
        known = label >= 0
        return score_clusters(label[known], self.cluster[known])


def kmeans(
    features: Features, *, num_clusters: int, restarts: int = 10, num_init: int = 10, seed: int = 0
) -> Clustering:
    """Cluster the L2-normalised rows; labels are not looked at.

    Accuracy varies by some points between local optima, so there are `restarts` independent runs,
    whose scores are averaged; each is the best in inertia of `num_init` starts, which is what one
    call of a user would give.

    Raises:
        ValueError: fewer rows than clusters, or no cluster or run asked for.
    """
    if not 1 <= num_clusters <= len(features):
        raise ValueError(f"num_clusters: expected 1 to {len(features)} (rows), got {num_clusters}")
    if restarts < 1:
        raise ValueError(f"restarts: expected at least 1, got {restarts}")
    x = F.normalize(features.x, dim=1).numpy()
    models = [
        # Seeds 1,000 apart: seed s + 1 must not repeat the later restarts of seed s.
        KMeans(num_clusters, n_init=num_init, random_state=1000 * seed + i).fit(x)
        for i in range(restarts)
    ]
    runs = tuple(torch.from_numpy(model.labels_.astype(np.int64)) for model in models)
    best = int(np.argmin([model.inertia_ for model in models]))
    return Clustering(cluster=runs[best], runs=runs)


def match_clusters(label: Tensor, cluster: Tensor) -> tuple[Tensor, Tensor]:
    """One-to-one matching of clusters to classes that keeps the most images.

    Args:
        label: [N] int64, all 0 or more.
        cluster: [N] int64, all 0 or more.

    Returns:
        confusion: [S, S] int64 with S = max(classes, clusters): images of class (row) in the
            cluster matched to it (column); the trace counts the matched images.
        order: [S] int64, the cluster in each column.
    """
    size = int(max(label.max(), cluster.max())) + 1
    counts = confusion_matrix(label, cluster, labels=range(size))
    _, order = linear_sum_assignment(counts, maximize=True)
    return torch.from_numpy(counts[:, order]), torch.from_numpy(order)


def score_clusters(label: Tensor, cluster: Tensor) -> ClusterScores:
    """All scores of one clustering; label and cluster [N] int64, all 0 or more.

    Raises:
        ValueError: no rows, or different lengths.
    """
    if len(label) == 0 or label.shape != cluster.shape:
        raise ValueError(
            f"expected labels and clusters [N] with N >= 1, got {list(label.shape)} and "
            f"{list(cluster.shape)}"
        )
    confusion, _ = match_clusters(label, cluster)
    return ClusterScores(
        acc=int(confusion.trace()) / len(label),
        nmi=float(normalized_mutual_info_score(label.numpy(), cluster.numpy())),
        ari=float(adjusted_rand_score(label.numpy(), cluster.numpy())),
        purity=int(confusion.max(dim=0).values.sum()) / len(label),
    )


def silhouette(features: Features, cluster: Tensor, *, seed: int = 0) -> float | None:
    """Mean silhouette by cosine distance, in [-1, 1], over at most 4,096 rows.

    Args:
        features: N rows.
        cluster: [N] int64.
        seed: of the choice of rows.

    Returns:
        None where there are no two clusters, or no two rows of one, among them.
    """
    rows = some_rows(len(features), seed)
    if not 2 <= len(torch.unique(cluster[rows])) < len(rows):
        return None
    return float(silhouette_score(features.x[rows], cluster[rows], metric="cosine"))


def score_numbers(features: Features, *, seed: int = 0) -> dict[int, float]:
    """The silhouette of k-means for 2 to 30 clusters, by which their number can be chosen.

    Source: Rousseeuw 1987, doi 10.1016/0377-0427(87)90125-7: the number with the largest mean
    silhouette. At most 4,096 rows are clustered, each time the best of three starts.

    Returns:
        By number of clusters, as many as one for every two of the rows.
    """
    rows = some_rows(len(features), seed)
    some = Features(x=features.x[rows], label=features.label[rows])
    scores = {}
    for number in range(2, min(MAX_CLUSTERS, len(some) // 2) + 1):
        found = kmeans(some, num_clusters=number, restarts=1, num_init=3, seed=seed)
        score = silhouette(some, found.cluster, seed=seed)
        if score is not None:
            scores[number] = score
    return scores


def some_rows(num_rows: int, seed: int) -> Tensor:
    """At most 4,096 of them: what looks at all pairs of rows looks at these."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))[:MAX_ROWS]
