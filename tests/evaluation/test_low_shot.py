import importlib

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from maect_fast.evaluation import Features
from maect_fast.evaluation.low_shot import C, centre_rows, draw_shots, low_shot


def test_centred_rows() -> None:
    found = centre_rows(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    expected = torch.tensor([[-(0.5**0.5), 0.0, 0.5**0.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(found, expected)


def test_draws_take_each_class_equally_without_repeats(
    digits: tuple[Features, Features],
) -> None:
    label = digits[0].label
    rows = draw_shots(label, shots=5, generator=torch.Generator().manual_seed(0))
    assert len(torch.unique(rows)) == 50
    assert label[rows].tolist() == [c for c in range(10) for _ in range(5)]
    again = draw_shots(label, shots=5, generator=torch.Generator().manual_seed(0))
    other = draw_shots(label, shots=5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rows, again)
    assert not torch.equal(rows, other)


def test_strength_is_the_official_one(digits: tuple[Features, Features]) -> None:
    """At scikit-learn's solution the gradient of mean loss + lambda / 2 |W|^2 vanishes."""
    train, _ = digits
    rows = draw_shots(train.label, shots=5, generator=torch.Generator().manual_seed(0))
    x = centre_rows(train.x[rows]).double()
    model = LogisticRegression(C=C, fit_intercept=False, max_iter=10_000, tol=1e-10)
    model.fit(x.numpy(), train.label[rows].numpy())
    weight = torch.from_numpy(model.coef_).requires_grad_()
    n = len(rows)
    penalty = 0.00025 / n / 2 * weight.square().sum()
    loss = torch.nn.functional.cross_entropy(x @ weight.T, train.label[rows])
    (grad,) = torch.autograd.grad(loss + penalty, weight)
    (grad_loss,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(x @ weight.T, train.label[rows]), weight
    )
    assert grad.abs().max() < 1e-3 * grad_loss.abs().max()


@pytest.mark.parametrize("shots", [1, 5])
def test_centring_test_rows_changes_no_prediction(
    digits: tuple[Features, Features], shots: int
) -> None:
    """The official code leaves test rows as they are, MSN centres them: the same arg-max."""
    train, test = digits
    generator = torch.Generator().manual_seed(0)
    rows = draw_shots(train.label, shots=shots, generator=generator)
    model = LogisticRegression(C=C, fit_intercept=False, max_iter=2000)
    model.fit(centre_rows(train.x[rows]).numpy(), train.label[rows].numpy())
    assert np.array_equal(model.predict(test.x.numpy()), model.predict(centre_rows(test.x).numpy()))
    assert np.abs(model.coef_.sum(axis=1)).max() < 1e-4 * np.abs(model.coef_).max()


def test_accuracy_is_that_of_a_model_without_intercept(
    blobs: tuple[Features, Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = blobs
    # Unequal numbers, so that an intercept would say something.
    rows = torch.arange(40)[(torch.arange(40) % 3 != 1) | (torch.arange(40) < 4)]
    # By name, because the package's attribute low_shot is the function.
    module = importlib.import_module("maect_fast.evaluation.low_shot")
    monkeypatch.setattr(module, "draw_shots", lambda *_, **__: rows)
    model = LogisticRegression(C=4000, fit_intercept=False, max_iter=2000)
    model.fit(centre_rows(train.x[rows]).numpy(), train.label[rows].numpy())
    expected = model.score(centre_rows(test.x).numpy(), test.label.numpy())
    mean, std = low_shot(train, test, shots=1, draws=2)
    assert mean == pytest.approx(expected)
    assert std == 0


def test_separated_classes_need_one_image() -> None:
    centres = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    label = torch.arange(60) % 3
    some = Features(x=centres[label] + 0.01 * torch.randn(60, 3), label=label + 4)
    assert low_shot(some, some, shots=1, draws=3) == (1.0, 0.0)


def test_raw_digits(digits: tuple[Features, Features]) -> None:
    mean, std = low_shot(*digits, shots=5)
    assert mean == pytest.approx(0.857, abs=0.02)
    assert 0 < std < 0.05
    assert mean > low_shot(*digits, shots=1)[0] + 0.1


def test_the_seed_decides(blobs: tuple[Features, Features]) -> None:
    first = low_shot(*blobs, shots=2, draws=3, seed=0)
    assert low_shot(*blobs, shots=2, draws=3, seed=0) == first
    assert low_shot(*blobs, shots=2, draws=3, seed=1) != first


def test_errors(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    with pytest.raises(ValueError, match=r"expected at most 100 \(images of class 0\), got 101"):
        low_shot(train, test, shots=101)
    one_class = Features(x=train.x, label=torch.zeros_like(train.label))
    with pytest.raises(ValueError, match="at least two classes"):
        low_shot(one_class, test, shots=1)
    unknown = Features(x=train.x, label=torch.full_like(train.label, -1))
    with pytest.raises(ValueError, match="label in every row"):
        low_shot(unknown, test, shots=1)
    with pytest.raises(ValueError, match="shots and draws of at least 1, got 0, 10"):
        low_shot(train, test, shots=0)
