import math

import pytest
import torch
import torch.nn.functional as F

from maect_fast.evaluation import METHODS, Features, Method, Views, evaluate_features, no_labels
from maect_fast.evaluation.clustering import kmeans, score_clusters
from maect_fast.evaluation.features import concatenate
from maect_fast.evaluation.knn import knn_accuracy
from maect_fast.evaluation.linear_probe import linear_probe
from maect_fast.evaluation.low_shot import low_shot
from maect_fast.evaluation.unlabelled import score_views

KEYS = {
    "knn": {"knn", "knn_standardised"},
    "linear_probe": {"linear_probe", "linear_probe_last"},
    "low_shot": {f"low_shot_{shots}{part}" for shots in (1, 2, 5) for part in ("", "_std")},
    "clustering": {
        *(
            "kmeans_acc",
            "kmeans_acc_std",
            "kmeans_acc_best",
            "kmeans_nmi",
            "kmeans_ari",
            "kmeans_purity",
        ),
    },
    "views": {"view_agreement", "alignment", "uniformity"},
}
WITHOUT_CLASSES = {"silhouette", "cluster_smallest", "cluster_largest"}


def relabel(features: Features, label: int, rows: slice = slice(None)) -> Features:
    labels = features.label.clone()
    labels[rows] = label
    return Features(x=features.x, label=labels)


def some_views(features: Features) -> Views:
    noise = torch.randn(features.x.shape, generator=torch.Generator().manual_seed(3))
    return Views(features.x, features.x + noise, torch.arange(len(features)))


def test_every_metric_is_there_and_repeats(blobs: tuple[Features, Features]) -> None:
    views = some_views(blobs[1])
    whole = evaluate_features(*blobs, seed=1, views=views)
    assert set(whole) == set().union(*KEYS.values())
    found = evaluate_features(*blobs, seed=1)
    assert set(found) == set(whole) - KEYS["views"]
    assert all(0 <= value <= 1 for value in found.values())
    assert evaluate_features(*blobs, seed=1) == found
    assert evaluate_features(*blobs, seed=2) != found


def test_figures_are_those_of_the_single_functions(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    found = evaluate_features(train, test, seed=2)
    assert found["knn"] == knn_accuracy(train, test)
    assert found["knn_standardised"] == knn_accuracy(train, test, standardise=True)
    probe = linear_probe(train, test, epochs=200, batch_size=37, seed=2)
    assert (found["linear_probe"], found["linear_probe_last"]) == (probe.best, probe.last)
    for shots in (1, 2, 5):
        mean, std = low_shot(train, test, shots=shots, seed=2)
        assert (found[f"low_shot_{shots}"], found[f"low_shot_{shots}_std"]) == (mean, std)
    both = concatenate(train, test)
    scores, std = kmeans(both, num_clusters=3, seed=2).scores(both.label)
    assert (found["kmeans_acc"], found["kmeans_acc_std"]) == (scores.acc, std)
    best = kmeans(both, num_clusters=3, seed=2).cluster
    assert found["kmeans_acc_best"] == score_clusters(both.label, best).acc
    assert (found["kmeans_nmi"], found["kmeans_ari"]) == (scores.nmi, scores.ari)
    assert found["kmeans_purity"] == scores.purity


@pytest.mark.parametrize("method", METHODS)
def test_one_method_at_a_time(blobs: tuple[Features, Features], method: Method) -> None:
    found = evaluate_features(*blobs, methods=(method,), views=some_views(blobs[1]))
    assert set(found) == KEYS[method]


def test_without_labels_there_are_metrics_that_need_none(
    blobs: tuple[Features, Features],
) -> None:
    train, test = (relabel(features, -1) for features in blobs)
    found = evaluate_features(train, test, views=some_views(test), num_clusters=3)
    assert set(found) == WITHOUT_CLASSES | KEYS["views"]
    # Three classes of one size, whose clusters overlap.
    assert 0 < found["silhouette"] < 0.5
    assert 0.2 < found["cluster_smallest"] <= 1 / 3 <= found["cluster_largest"] < 0.5
    apart = Features(x=torch.eye(16)[torch.arange(200) % 4], label=test.label)
    clear = evaluate_features(train, apart, num_clusters=4)
    assert clear["silhouette"] == pytest.approx(1)
    assert clear["cluster_smallest"] == clear["cluster_largest"] == 0.25


@pytest.mark.parametrize("number", [1, 2, 3, 4, 11])
def test_few_images_without_labels_have_metrics_too(number: int) -> None:
    few = Features(x=torch.randn(number, 8), label=torch.full((number,), -1))
    found = evaluate_features(few, few, views=some_views(few))
    assert found
    assert all(map(math.isfinite, found.values()))


def test_views_that_agree_and_views_that_do_not(blobs: tuple[Features, Features]) -> None:
    x, ids = blobs[1].x, torch.arange(200)
    same = score_views(Views(x, x, ids))
    assert same["view_agreement"] == 1
    assert same["alignment"] == 0
    other = torch.randn(200, 16, generator=torch.Generator().manual_seed(5))
    chance = score_views(Views(x, other, ids))
    # Ten of 199 others.
    assert 0.02 < chance["view_agreement"] < 0.1
    assert 1.5 < chance["alignment"] < 2.5
    assert chance["uniformity"] == same["uniformity"]
    spread = F.normalize(x, dim=1)
    squared = (spread[:, None] - spread).square().sum(dim=2)[~torch.eye(200, dtype=torch.bool)]
    assert same["uniformity"] == pytest.approx(float((-2 * squared).exp().mean().log()), rel=1e-5)
    collapsed = score_views(Views(x[:1].expand(200, -1), x[:1].expand(200, -1), ids))
    assert collapsed["uniformity"] == pytest.approx(0, abs=1e-6)


def test_own_views_do_not_count_as_neighbours() -> None:
    """Where one image stands in for another, its rows are not each other's neighbours."""
    x = torch.eye(6)[torch.tensor([0, 0, 1, 2, 3, 4])]
    ids = torch.tensor([7, 7, 1, 2, 3, 4])
    assert score_views(Views(x, x, ids))["view_agreement"] == 1


def test_why_there_are_no_metrics_by_class() -> None:
    none, some, one = torch.tensor([-1, -1]), torch.tensor([0, 1]), torch.tensor([3, 3])
    assert no_labels(some, some) is None
    assert str(no_labels(none, none)).startswith("no labels: the images lie in no class folders")
    assert "test images lie in no class" in str(no_labels(some, none))
    assert "training images lie in no class" in str(no_labels(none, some))
    assert "one class" in str(no_labels(one, some))


def test_labels_on_one_side_allow_the_clustering_only(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    assert set(evaluate_features(train, relabel(test, -1))) == KEYS["clustering"]
    assert set(evaluate_features(relabel(train, -1), test)) == KEYS["clustering"]
    found = evaluate_features(train, relabel(test, -1), cluster="test")
    assert set(found) == WITHOUT_CLASSES


def test_rows_without_a_label_do_not_count(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    some = slice(0, 120)
    partly = evaluate_features(
        relabel(train, -1, some), relabel(test, -1, some), methods=("knn", "low_shot")
    )
    rest = evaluate_features(
        Features(x=train.x[120:], label=train.label[120:]),
        Features(x=test.x[120:], label=test.label[120:]),
        methods=("knn", "low_shot"),
    )
    assert partly == rest


def test_a_single_class_says_nothing(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    assert set(evaluate_features(relabel(train, 4), relabel(test, 4))) == WITHOUT_CLASSES


def test_shots_that_a_class_cannot_give_are_left_out(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    keep = (train.label != 2) | (torch.arange(len(train)) < 10)  # three images of class 2
    few = Features(x=train.x[keep], label=train.label[keep])
    found = evaluate_features(few, test, methods=("low_shot",))
    assert set(found) == KEYS["low_shot"] - {"low_shot_5", "low_shot_5_std"}


def test_clustering_of_the_test_images_alone(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    alone = evaluate_features(train, test, methods=("clustering",), cluster="test")
    other = Features(x=torch.randn_like(train.x), label=train.label)
    assert evaluate_features(other, test, methods=("clustering",), cluster="test") == alone
    assert evaluate_features(train, test, methods=("clustering",)) != alone


def test_errors(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    with pytest.raises(ValueError, match=r"^methods: expected some of knn, .*, got 'probe'$"):
        evaluate_features(train, test, methods=("knn", "probe"))  # type: ignore[arg-type]
    narrow = Features(x=test.x[:, :8], label=test.label)
    with pytest.raises(ValueError, match=r"^test: expected features of dimension 16 .* got 8$"):
        evaluate_features(train, narrow)
    few = Features(x=train.x[:9], label=train.label[:9])
    with pytest.raises(ValueError, match=r"^k: expected 1 to 9"):
        evaluate_features(few, test, methods=("knn",))
