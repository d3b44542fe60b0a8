import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from maect_fast.evaluation import Features, knn
from maect_fast.evaluation.knn import knn_accuracy, knn_predict
from maect_fast.kernels import queue_topk


def row(cosine: float) -> list[float]:
    """A row at this cosine from the query [1, 0], not of unit length."""
    return [3 * cosine, 3 * math.sqrt(1 - cosine**2)]


# One near row of class 0 against two of class 1, and a far one of class 2.
GALLERY = Features(
    x=torch.tensor([row(0.99), row(0.9), row(0.9), row(-0.5)]), label=torch.tensor([0, 1, 1, 2])
)
QUERY = torch.tensor([[2.0, 0.0]])


@pytest.mark.parametrize(
    ("k", "temperature", "expected"),
    [
        (1, 0.07, 0),
        (3, 0.07, 0),  # exp(0.99 / 0.07) = 1.39e6 against 2 exp(0.9 / 0.07) = 7.7e5
        (3, 1.0, 1),  # 2.69 against 4.92
        (4, 0.07, 0),
    ],
)
def test_votes_by_hand(k: int, temperature: float, expected: int) -> None:
    assert knn_predict(GALLERY, QUERY, k=k, temperature=temperature).tolist() == [expected]


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("k", [1, 10, 33])
def test_against_scikit_learn(blobs: tuple[Features, Features], k: int, standardise: bool) -> None:
    train, test = blobs
    # One direction of large offset and scale: without it standardising would change little.
    scale, shift = torch.ones(16), torch.zeros(16)
    scale[0], shift[0] = 20.0, 30.0
    train = Features(x=train.x * scale + shift, label=train.label)
    test = Features(x=test.x * scale + shift, label=test.label)
    fit_x, test_x = train.x.double().numpy(), test.x.double().numpy()
    if standardise:
        mean, std = fit_x.mean(axis=0), fit_x.std(axis=0)
        fit_x, test_x = (fit_x - mean) / (std + 1e-5), (test_x - mean) / (std + 1e-5)
    model = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(fit_x, train.label.numpy())
    expected = model.predict(test_x)
    found = knn_predict(train, test.x, k=k, standardise=standardise)
    assert found.tolist() == expected.tolist()
    accuracy = knn_accuracy(train, test, k=k, standardise=standardise)
    assert accuracy == pytest.approx(model.score(test_x, test.label.numpy()))
    assert 0.5 < accuracy < 1.0


def test_standardising_changes_the_answer() -> None:
    # The second coordinate carries the class, the first an offset that hides it.
    offset = torch.tensor([100.0, 0.0])
    x = torch.tensor([[1.0, 0.2], [-1.0, 0.2], [1.0, -0.2], [-1.0, -0.2]])
    train = Features(x=x + offset, label=torch.tensor([0, 0, 1, 1]))
    query = torch.tensor([[0.9, 0.19], [0.9, -0.19]]) + offset
    assert knn_predict(train, query, k=1, standardise=True).tolist() == [0, 1]


def test_standardising_survives_a_constant_feature() -> None:
    x = torch.cat([GALLERY.x, torch.full((4, 1), 0.5)], dim=1)
    query = torch.tensor([[*row(-0.6), 0.5]])
    train = Features(x=x, label=GALLERY.label)
    with_constant = knn_predict(train, query, k=1, standardise=True)
    without = knn_predict(GALLERY, query[:, :2], k=1, standardise=True)
    assert with_constant.tolist() == without.tolist() == [2]


def test_queries_are_searched_in_chunks(
    digits: tuple[Features, Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = digits
    whole = knn_predict(train, test.x)
    sizes: list[int] = []

    def spy(query: Tensor, queue: Tensor, *, k: int) -> object:
        sizes.append(len(query))
        return queue_topk(query, queue, k=k)

    monkeypatch.setattr(knn, "queue_topk", spy)
    monkeypatch.setattr(knn, "QUERY_ROWS", 100)
    assert torch.equal(knn_predict(train, test.x), whole)
    assert sizes == [100, 100, 100, 60]


def test_raw_digits(digits: tuple[Features, Features]) -> None:
    assert knn_accuracy(*digits) == pytest.approx(0.978, abs=0.003)


@pytest.mark.parametrize("temperature", [0.05, 0.005, 1e-3, 1e-6, 1e-30])
def test_small_temperatures_do_not_overflow(
    blobs: tuple[Features, Features], temperature: float
) -> None:
    train, test = blobs
    found = knn_predict(train, test.x, temperature=temperature)
    x = F.normalize(train.x.double(), dim=1)
    cosine, index = (F.normalize(test.x.double(), dim=1) @ x.T).topk(10)
    one_hot = F.one_hot(train.label[index]).double()
    votes = (cosine / temperature)[..., None] + one_hot.log()
    assert torch.equal(found, votes.logsumexp(dim=1).argmax(dim=1))
    if temperature < 1e-3:
        # The nearest alone decides.
        assert torch.equal(found, train.label[index[:, 0]])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperatures_without_a_meaning(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature: expected above 0"):
        knn_predict(GALLERY, QUERY, k=1, temperature=temperature)


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_gallery(k: int) -> None:
    with pytest.raises(ValueError, match=rf"^k: expected 1 to 4 .*, got {k}$"):
        knn_predict(GALLERY, QUERY, k=k)


def test_gallery_without_labels_and_other_dimensions() -> None:
    unknown = Features(x=torch.ones(2, 2), label=torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="label in every row"):
        knn_predict(unknown, QUERY, k=1)
    with pytest.raises(ValueError, match=r"query: expected \[M, 2\], got \[1, 3\]"):
        knn_predict(GALLERY, torch.ones(1, 3), k=1)


def test_one_class_and_no_queries() -> None:
    one = Features(x=torch.randn(5, 3), label=torch.full((5,), 7))
    assert knn_predict(one, torch.randn(2, 3), k=5).tolist() == [7, 7]
    assert knn_predict(one, torch.empty(0, 3), k=5).shape == (0,)
