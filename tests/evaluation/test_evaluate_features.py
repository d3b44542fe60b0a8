import pytest
import torch

from maect_fast.evaluation import METHODS, Features, Method, evaluate_features
from maect_fast.evaluation.clustering import kmeans
from maect_fast.evaluation.features import concatenate
from maect_fast.evaluation.knn import knn_accuracy
from maect_fast.evaluation.linear_probe import linear_probe
from maect_fast.evaluation.low_shot import low_shot

KEYS = {
    "knn": {"knn", "knn_standardised"},
    "linear_probe": {"linear_probe", "linear_probe_last"},
    "low_shot": {f"low_shot_{shots}{part}" for shots in (1, 2, 5) for part in ("", "_std")},
    "clustering": {"kmeans_acc", "kmeans_acc_std", "kmeans_nmi", "kmeans_ari"},
}


def relabel(features: Features, label: int, rows: slice = slice(None)) -> Features:
    labels = features.label.clone()
    labels[rows] = label
    return Features(x=features.x, label=labels)


def test_every_metric_is_there_and_repeats(blobs: tuple[Features, Features]) -> None:
    found = evaluate_features(*blobs, seed=1)
    assert set(found) == set().union(*KEYS.values())
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
    assert (found["kmeans_nmi"], found["kmeans_ari"]) == (scores.nmi, scores.ari)


@pytest.mark.parametrize("method", METHODS)
def test_one_method_at_a_time(blobs: tuple[Features, Features], method: Method) -> None:
    assert set(evaluate_features(*blobs, methods=(method,))) == KEYS[method]


def test_no_labels_no_metrics(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    assert evaluate_features(relabel(train, -1), relabel(test, -1)) == {}


def test_labels_on_one_side_allow_the_clustering_only(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    assert set(evaluate_features(train, relabel(test, -1))) == KEYS["clustering"]
    assert set(evaluate_features(relabel(train, -1), test)) == KEYS["clustering"]
    found = evaluate_features(train, relabel(test, -1), cluster="test")
    assert found == {}


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


def test_a_single_class_leaves_nothing_to_measure(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    assert evaluate_features(relabel(train, 4), relabel(test, 4)) == {}


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
