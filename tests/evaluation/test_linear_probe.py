import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from maect_fast.evaluation import Features
from maect_fast.evaluation.linear_probe import BASE_LRS, linear_probe, probe_schedule


def one_head_at_a_time(
    train: Features,
    test: Features,
    *,
    epochs: int,
    batch_size: int,
    lrs: tuple[float, ...],
    seed: int,
) -> Tensor:
    """The protocol transcribed with torch's own modules and optimiser: [epochs, heads]."""
    D, num_classes = train.x.shape[1], int(train.label.max()) + 1
    columns = []
    for h, lr in enumerate(lrs):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(D, len(lrs), num_classes)
        nn.init.trunc_normal_(weight, std=0.01, generator=generator)
        model = nn.Sequential(nn.BatchNorm1d(D, affine=False), nn.Linear(D, num_classes))
        linear = model[1]
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(weight[:, h].T)
            linear.bias.zero_()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        updates = len(train) // batch_size
        total, update, column = epochs * updates, 0, []
        warmup = total // 10
        for _ in range(epochs):
            model.train()
            order = torch.randperm(len(train), generator=generator)
            for rows in order[: updates * batch_size].view(updates, batch_size):
                if update < warmup:
                    factor = update / (warmup - 1)
                else:
                    done = (update - warmup) / (total - warmup - 1)
                    factor = (1 + math.cos(math.pi * done)) / 2
                optimizer.param_groups[0]["lr"] = factor * lr * batch_size / 256
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(train.x[rows]), train.label[rows])
                torch.autograd.backward(loss)
                optimizer.step()
                update += 1
            model.eval()
            with torch.no_grad():
                column.append((model(test.x).argmax(dim=1) == test.label).float().mean())
        columns.append(torch.stack(column))
    return torch.stack(columns, dim=1)


def test_against_one_head_at_a_time(blobs: tuple[Features, Features]) -> None:
    lrs = (1.0, 0.1, 0.001)
    expected = one_head_at_a_time(*blobs, epochs=8, batch_size=64, lrs=lrs, seed=3)
    found = linear_probe(*blobs, epochs=8, batch_size=64, base_lrs=lrs, seed=3)
    torch.testing.assert_close(found.accuracy, expected)
    # Otherwise the heads, or the epochs, would be interchangeable.
    assert len(torch.unique(found.accuracy)) > 8
    assert found.best == float(expected.max())
    assert found.last == float(expected[-1].max())


def test_raw_digits_reach_logistic_regression(digits: tuple[Features, Features]) -> None:
    train, test = digits
    epochs, batch_size = probe_schedule(len(train))
    found = linear_probe(train, test, epochs=epochs, batch_size=batch_size)
    model = LogisticRegression(max_iter=3000).fit(train.x.numpy(), train.label.numpy())
    converged = model.score(test.x.numpy(), test.label.numpy())
    assert found.accuracy.shape == (epochs, len(BASE_LRS))
    assert 0.958 <= found.last <= found.best
    assert found.last >= converged - 0.01


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [(1_281_167, (50, 1024)), (8192, (200, 1024)), (1437, (200, 179)), (9, (400, 2))],
)
def test_schedule(num_rows: int, expected: tuple[int, int]) -> None:
    assert probe_schedule(num_rows) == expected


def test_the_seed_decides(blobs: tuple[Features, Features]) -> None:
    runs = [linear_probe(*blobs, epochs=4, batch_size=50, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0].accuracy, runs[1].accuracy)
    assert not torch.equal(runs[0].accuracy, runs[2].accuracy)


def test_trains_where_gradients_are_off(blobs: tuple[Features, Features]) -> None:
    with torch.no_grad():
        assert linear_probe(*blobs, epochs=10, batch_size=50).last > 0.6


def test_a_test_class_that_training_lacks(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    shifted = Features(x=test.x, label=torch.full_like(test.label, 5))
    assert linear_probe(train, shifted, epochs=1, batch_size=50).best == 0.0


@pytest.mark.parametrize(
    ("epochs", "batch_size", "message"),
    [
        (0, 10, "^epochs: expected at least 1, got 0$"),
        (1, 301, r"^batch_size: expected 2 to 300 \(rows of train\), got 301$"),
        (1, 1, "^batch_size: expected 2 to 300"),
    ],
)
def test_errors(
    blobs: tuple[Features, Features], epochs: int, batch_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_probe(*blobs, epochs=epochs, batch_size=batch_size)


def test_rows_without_labels(blobs: tuple[Features, Features]) -> None:
    train, test = blobs
    unknown = Features(x=test.x, label=torch.full_like(test.label, -1))
    with pytest.raises(ValueError, match="label in every row"):
        linear_probe(train, unknown)
