from itertools import permutations

import pytest
import torch
from torch import Tensor

from maect_fast.evaluation import Features
from maect_fast.evaluation.clustering import kmeans, match_clusters, score_clusters
from maect_fast.evaluation.features import concatenate


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


def test_renamed_clusters_are_perfect() -> None:
    scores = score_clusters(ints(0, 0, 1, 1, 2, 2), ints(2, 2, 0, 0, 1, 1))
    assert (scores.acc, scores.nmi, scores.ari) == pytest.approx((1, 1, 1))


def test_scores_by_hand() -> None:
    # Class 0 split 3 : 1, class 1 split 0 : 2. ARI: pairs together in both 3 + 0 + 1 = 4, in the
    # classes 6 + 1 = 7, in the clusters 3 + 3 = 6, of 15; (4 - 42/15) / (6.5 - 42/15) = 12/37.
    scores = score_clusters(ints(0, 0, 0, 0, 1, 1), ints(1, 1, 1, 0, 0, 0))
    assert scores.acc == pytest.approx(5 / 6)
    assert scores.ari == pytest.approx(12 / 37)
    # H(class) = 0.6365, H(cluster) = ln 2, mutual information 0.3183 nats.
    assert scores.nmi == pytest.approx(0.3183 / (0.5 * (0.6365 + 0.6931)), abs=1e-4)


def test_one_cluster_for_everything() -> None:
    scores = score_clusters(ints(0, 0, 1, 1), ints(0, 0, 0, 0))
    assert (scores.acc, scores.nmi, scores.ari) == (0.5, 0.0, 0.0)


def test_matching_is_the_best_of_all_permutations() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(5, (60,), generator=generator)
    cluster = torch.randint(5, (60,), generator=generator)
    best = max(
        int((label == torch.tensor(names)[cluster]).sum()) for names in permutations(range(5))
    )
    confusion, order = match_clusters(label, cluster)
    assert int(confusion.trace()) == best
    assert score_clusters(label, cluster).acc == best / 60
    for row in range(5):
        for column in range(5):
            hits = (label == row) & (cluster == order[column])
            assert int(confusion[row, column]) == int(hits.sum())


def test_more_clusters_than_classes_leaves_some_unmatched() -> None:
    assert score_clusters(ints(0, 0, 0, 1), ints(0, 0, 2, 1)).acc == 0.75


def test_kmeans_looks_at_directions_only() -> None:
    directions = torch.eye(3)[torch.arange(30) % 3] + 0.05 * torch.randn(30, 3)
    # Lengths over two orders of magnitude would dominate Euclidean k-means.
    some = Features(x=directions * 10 ** (2 * torch.rand(30, 1)), label=torch.arange(30) % 3)
    found = kmeans(some, num_clusters=3, restarts=2)
    scores, std = found.scores(some.label)
    assert (scores.acc, scores.nmi, scores.ari) == pytest.approx((1, 1, 1))
    assert std == 0


def test_rows_without_labels_are_clustered_and_not_counted() -> None:
    x = torch.eye(2).repeat(10, 1)
    label = torch.arange(20) % 2
    label[5:] = -1
    found = kmeans(Features(x=x, label=label), num_clusters=2, restarts=1)
    assert len(found.cluster) == 20
    assert found.scores(label)[0].acc == 1


def test_raw_digits(digits: tuple[Features, Features]) -> None:
    """All 1,797 images: ACC about .79 but for a poor local optimum, NMI .74, ARI .66."""
    both = concatenate(*digits)
    found = kmeans(both, num_clusters=10)
    scores, std = found.scores(both.label)
    assert scores.acc == pytest.approx(0.78, abs=0.02)
    assert scores.nmi == pytest.approx(0.74, abs=0.01)
    assert scores.ari == pytest.approx(0.66, abs=0.02)
    assert 0 < std < 0.06
    best = score_clusters(both.label, found.cluster)
    assert best.acc == pytest.approx(0.794, abs=0.003)


def test_restarts_differ_and_the_seed_decides(blobs: tuple[Features, Features]) -> None:
    runs = [kmeans(blobs[0], num_clusters=8, restarts=3, num_init=1, seed=s) for s in (0, 0, 1)]
    first, again, other = (torch.stack(run.runs) for run in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_the_chosen_run_is_the_tightest(blobs: tuple[Features, Features]) -> None:
    found = kmeans(blobs[0], num_clusters=8, restarts=5, num_init=1)
    x = torch.nn.functional.normalize(blobs[0].x, dim=1)

    def spread(cluster: Tensor) -> float:
        centres = torch.stack([x[cluster == c].mean(dim=0) for c in range(8)])
        return float((x - centres[cluster]).square().sum())

    spreads = [spread(run) for run in found.runs]
    assert spread(found.cluster) == min(spreads) < max(spreads) - 0.1


def test_errors(blobs: tuple[Features, Features]) -> None:
    with pytest.raises(ValueError, match=r"num_clusters: expected 1 to 300 \(rows\), got 301"):
        kmeans(blobs[0], num_clusters=301)
    with pytest.raises(ValueError, match="restarts: expected at least 1, got 0"):
        kmeans(blobs[0], num_clusters=3, restarts=0)
    with pytest.raises(ValueError, match="N >= 1"):
        score_clusters(ints(), ints())
