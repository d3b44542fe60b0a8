"""How good features are where no image has a label.

Sources: alignment and uniformity, Wang and Isola, arXiv 2005.10242; the silhouette, scikit-learn.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maect_fast.evaluation.clustering import kmeans, silhouette, some_rows
from maect_fast.evaluation.features import Features
from maect_fast.kernels import queue_topk

__all__ = ["Views", "num_unlabelled_clusters", "score_unlabelled_clusters", "score_views"]

NEIGHBOURS = 10


class Views(NamedTuple):
    """Features of two random views of the same images."""

    first: Tensor
    """[N, D] float32."""
    second: Tensor
    """[N, D] float32."""
    sample_id: Tensor
    """[N] int64, of which image; where one stands in for a broken one, it is there twice."""


def num_unlabelled_clusters(num_rows: int, wanted: int) -> int:
    """Clusters to look for: at most one for every two images; below 2 there is nothing to find."""
    return min(wanted, num_rows // 2)


def score_unlabelled_clusters(
    features: Features, *, num_clusters: int, seed: int = 0
) -> dict[str, float]:
    """K-means of unlabelled features: how far apart its clusters are, and how large.

    Returns:
        `silhouette`: mean silhouette by cosine distance, in [-1, 1], over at most 4,096 rows;
        `cluster_smallest`, `cluster_largest`: shares of the images. Nothing for fewer than 4 rows.
    """
    count = num_unlabelled_clusters(len(features), num_clusters)
    if count < 2:
        return {}
    cluster = kmeans(features, num_clusters=count, restarts=1, seed=seed).cluster
    sizes = torch.bincount(cluster, minlength=count).double() / len(features)
    found = {"cluster_smallest": float(sizes.min()), "cluster_largest": float(sizes.max())}
    score = silhouette(features, cluster, seed=seed)
    return found if score is None else {"silhouette": score, **found}


def score_views(views: Views, *, seed: int = 0) -> dict[str, float]:
    """How near two views of an image are, and how well its neighbours agree about it.

    Returns:
        `view_agreement`: of the 10 nearest other images of a view, the mean share that are also
        among those of the image's other view, in [0, 1]; `alignment`: mean squared distance of an
        image's two views on the unit sphere, in [0, 4], less is better; `uniformity`: log of the
        mean of exp(-2 d^2) over pairs of at most 4,096 images, in [-8, 0], less is better.
    """
    first, second = (F.normalize(x, dim=1) for x in (views.first, views.second))
    found = {"alignment": float((first - second).square().sum(dim=1).mean())}
    if len(first) < 2:
        return found
    near = torch.pdist(first[some_rows(len(first), seed)].double())
    k = min(NEIGHBOURS, len(torch.unique(views.sample_id)) - 1)
    if k >= 1:
        ids = views.sample_id
        chosen = [
            ids[queue_topk(x, x, k=k, query_id=ids, queue_id=ids).indices] for x in (first, second)
        ]
        shared = (chosen[0].unsqueeze(2) == chosen[1].unsqueeze(1)).any(dim=2)
        found = {"view_agreement": float(shared.double().mean()), **found}
    return found | {"uniformity": float(near.square().mul(-2).exp().mean().log())}
