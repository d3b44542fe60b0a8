import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from maect_fast.evaluation import Features


@pytest.fixture(scope="session")
def digits() -> tuple[Features, Features]:
    """Raw pixels in [0, 1] of scikit-learn's digits: 1,437 to train on, 360 to test on."""
    x, label = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, label, test_size=360, random_state=0, stratify=label)
    train_x, test_x, train_label, test_label = (torch.from_numpy(part) for part in parts)
    return (
        Features(x=train_x.float(), label=train_label.long()),
        Features(x=test_x.float(), label=test_label.long()),
    )


@pytest.fixture(scope="session")
def blobs() -> tuple[Features, Features]:
    """Three overlapping classes in 16 dimensions, 300 and 200 rows: no method solves them."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, generator=generator)

    def draw(num_rows: int) -> Features:
        label = torch.arange(num_rows) % 3
        noise = 1.5 * torch.randn(num_rows, 16, generator=generator)
        return Features(x=centres[label] + noise, label=label)

    return draw(300), draw(200)
