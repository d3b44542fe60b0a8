"""How good frozen features are: k-NN, linear probe, low-shot, clustering, and the report."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from maect_fast.evaluation.clustering import kmeans
from maect_fast.evaluation.features import (
    Features,
    concatenate,
    extract_features,
    load_features,
    raw_pixels,
    save_features,
)
from maect_fast.evaluation.knn import knn_accuracy
from maect_fast.evaluation.linear_probe import linear_probe, probe_schedule
from maect_fast.evaluation.low_shot import low_shot
from maect_fast.evaluation.unlabelled import Views, score_unlabelled_clusters, score_views

__all__ = [
    "METHODS",
    "NUM_CLUSTERS",
    "Features",
    "Method",
    "Views",
    "evaluate_features",
    "extract_features",
    "load_features",
    "no_labels",
    "raw_pixels",
    "save_features",
]

Method = Literal["knn", "linear_probe", "low_shot", "clustering", "views"]

METHODS: tuple[Method, ...] = get_args(Method)

SHOTS = (1, 2, 5)
# Of images without labels, where nothing says how many there are.
NUM_CLUSTERS = 10


def no_labels(train: Tensor, test: Tensor) -> str | None:
    """Why there are no metrics by class, in a line; None where there are.

    Args:
        train: labels of the training images, [N] int64, -1 for none.
        test: the same of the test images.
    """
    known_train, known_test = train[train >= 0], test[test >= 0]
    if len(known_train) == 0 and len(known_test) == 0:
        why = "the images lie in no class folders"
    elif len(known_train) == 0 or len(known_test) == 0:
        without = "test" if len(known_test) == 0 else "training"
        why = f"the {without} images lie in no class folders"
    elif len(torch.unique(known_train)) < 2:
        why = "all training images are of one class"
    else:
        return None
    return (
        f"no labels: {why}, so there is no k-NN, linear probe or low-shot accuracy; what is "
        "measured instead needs none"
    )


def evaluate_features(
    train: Features,
    test: Features,
    *,
    seed: int = 0,
    methods: Sequence[Method] = METHODS,
    cluster: Literal["all", "test"] = "all",
    num_clusters: int = NUM_CLUSTERS,
    views: Views | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Measure features by every protocol that the labels allow; without labels by what needs none.

    Args:
        train: features of the training images: gallery of the k-NN, training set of the linear
            classifiers.
        test: features of the test images; accuracies are measured on these.
        seed: of the probe's initial weights and batches, of the low-shot draws and of the k-means
            starts.
        methods: which protocols.
        cluster: the images that k-means clusters and is measured on: `all` for both sets (it trains
            on no labels, so nothing is held out), or `test` alone, which is what fits for large
            data sets.
        num_clusters: of images without labels, of which the test images alone are clustered.
        views: features of two views of the test images, for the method `views`.
        device: where k-NN and probe run.

    Returns:
        By name, each in [0, 1] except for ARI, which may be below 0: `knn`, `knn_standardised`;
        `linear_probe` (best head and epoch on the test set, as the paper reports),
        `linear_probe_last`; `low_shot_1`, `_2`, `_5` with `_std` over the draws; `kmeans_acc` with
        `_std` over the restarts, `kmeans_acc_best` (the restart of lowest inertia), `kmeans_nmi`,
        `kmeans_ari`, `kmeans_purity`; where there are no two classes to compare with, `silhouette`,
        `cluster_smallest`, `cluster_largest` instead; `view_agreement`, `alignment`, `uniformity`
        of `views`. Rows without a label are left out of everything but the clustering itself;
        metrics that cannot be computed (no labels, a single class, a class with fewer images than
        shots) are left out of the result.

    Raises:
        ValueError: an unknown method, feature dimensions that differ, fewer than 10 labelled
            training rows for the k-NN.
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {unknown[0]!r}")
    if train.x.shape[1] != test.x.shape[1]:
        raise ValueError(
            f"test: expected features of dimension {train.x.shape[1]} as in train, got "
            f"{test.x.shape[1]}"
        )
    known_train, known_test = train.labelled(), test.labelled()
    class_sizes = torch.unique(known_train.label, return_counts=True)[1]
    result: dict[str, float] = {}
    if len(class_sizes) >= 2 and len(known_test):
        if "knn" in methods:
            result["knn"] = knn_accuracy(known_train, known_test, device=device)
            result["knn_standardised"] = knn_accuracy(
                known_train, known_test, standardise=True, device=device
            )
        if "linear_probe" in methods:
            epochs, batch_size = probe_schedule(len(known_train))
            probe = linear_probe(
                known_train,
                known_test,
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                device=device,
            )
            result |= {"linear_probe": probe.best, "linear_probe_last": probe.last}
        if "low_shot" in methods:
            for shots in SHOTS:
                if shots <= int(class_sizes.min()):
                    mean, std = low_shot(known_train, known_test, shots=shots, seed=seed)
                    result |= {f"low_shot_{shots}": mean, f"low_shot_{shots}_std": std}
    if "clustering" in methods:
        features = concatenate(train, test) if cluster == "all" else test
        num_classes = len(torch.unique(features.labelled().label))
        if num_classes >= 2:
            runs = kmeans(features, num_clusters=num_classes, seed=seed)
            scores, acc_std = runs.scores(features.label)
            result |= {
                "kmeans_acc": scores.acc,
                "kmeans_acc_std": acc_std,
                "kmeans_acc_best": runs.best_scores(features.label).acc,
                "kmeans_nmi": scores.nmi,
                "kmeans_ari": scores.ari,
                "kmeans_purity": scores.purity,
            }
        else:
            result |= score_unlabelled_clusters(test, num_clusters=num_clusters, seed=seed)
    if "views" in methods and views is not None:
        result |= score_views(views, seed=seed)
    return result
