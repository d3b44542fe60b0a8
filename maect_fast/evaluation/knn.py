"""Weighted k-nearest-neighbour classification, streamed through the exact top-k search.

Source: arXiv 2304.10520; `ml-jku/MAE-CT: eval_knn.py, metrics/functional/knn.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from maect_fast.evaluation.features import Features
from maect_fast.kernels import queue_topk

__all__ = ["knn_accuracy", "knn_predict"]

# Queries per search; bounds the votes [rows, classes] and, on a GPU, the queries held there.
QUERY_ROWS = 4096


def knn_predict(
    train: Features,
    query: Tensor,
    *,
    k: int = 10,
    temperature: float = 0.07,
    standardise: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Class of each query by a weighted vote of its nearest neighbours.

    ``argmax_c sum_i exp(cos_i / temperature) [label_i = c]`` over the k rows of largest cosine.

    Args:
        train: the gallery, all rows labelled.
        query: [M, D] float32.
        k: neighbours that vote.
        temperature: a smaller one gives nearer neighbours more weight.
        standardise: True maps both sides by (x - mean) / (std + 1e-5), statistics of the gallery,
            before the L2 normalisation (the official in-training logger); False is the official
            library's default.
        device: where the search runs; the M x N matrix of cosines is never held.

    Returns:
        [M] int64 on the CPU. Equal votes go to the smaller class.

    Raises:
        ValueError: `k` is below 1 or above the gallery's size, the temperature is not above 0, a
            gallery row has no label, or D differs.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected above 0, got {temperature}")
    if not 1 <= k <= len(train):
        raise ValueError(f"k: expected 1 to {len(train)} (rows of the gallery), got {k}")
    if bool((train.label < 0).any()):
        raise ValueError("train: expected a label in every row of the gallery")
    if query.ndim != 2 or query.shape[1] != train.x.shape[1]:
        raise ValueError(f"query: expected [M, {train.x.shape[1]}], got {list(query.shape)}")
    gallery = train.x.to(device)
    label = train.label.to(device)
    num_classes = int(train.label.max()) + 1
    mean, divisor = torch.zeros_like(gallery[0]), torch.ones_like(gallery[0])
    if standardise:
        mean, divisor = gallery.mean(dim=0), gallery.std(dim=0, correction=0) + 1e-5
    gallery = F.normalize((gallery - mean) / divisor, dim=1)
    predicted = []
    for rows in torch.split(query, QUERY_ROWS):
        found = queue_topk((rows.to(device) - mean) / divisor, gallery, k=k)
        # Against the nearest row, or a small temperature overflows: a common factor of the votes.
        weight = ((found.values - found.values[:, :1]) / temperature).exp()
        votes = gallery.new_zeros(len(rows), num_classes)
        votes.scatter_add_(1, label[found.indices], weight)
        predicted.append(votes.argmax(dim=1).cpu())
    return torch.cat(predicted)


def knn_accuracy(
    train: Features,
    test: Features,
    *,
    k: int = 10,
    temperature: float = 0.07,
    standardise: bool = False,
    device: torch.device | str = "cpu",
) -> float:
    """Share of the test rows whose class `knn_predict` finds; arguments and errors as there."""
    predicted = knn_predict(
        train, test.x, k=k, temperature=temperature, standardise=standardise, device=device
    )
    return float((predicted == test.label).double().mean())
