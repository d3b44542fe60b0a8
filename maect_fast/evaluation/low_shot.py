"""Logistic regression from a handful of labelled images per class.

Source: arXiv 2304.10520; `facebookresearch/msn: logistic_eval.py`;
`ml-jku/MAE-CT: loggers/offline_logistic_regression_logger.py`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from maect_fast.evaluation.features import Features

__all__ = ["centre_rows", "draw_shots", "low_shot"]

# The official solver (cyanure) minimises mean_i loss_i + lambda / 2 |W|^2 with lambda = 0.00025 /
# n; scikit-learn minimises C sum_i loss_i + 1 / 2 |W|^2. Dividing the first by lambda gives C = 1 /
# (n lambda) = 1 / 0.00025, whatever n.
C = 1 / 0.00025


def centre_rows(x: Tensor) -> Tensor:
    """Subtract each row's own mean, then scale the row to unit length.

    This is cyanure's `preprocess(normalize=True, columns=False, centering=True)`.
    """
    return F.normalize(x - x.mean(dim=1, keepdim=True), dim=1)


def draw_shots(label: Tensor, *, shots: int, generator: torch.Generator) -> Tensor:
    """Row numbers of `shots` images of every class, drawn without replacement, in class order.

    Raises:
        ValueError: a class has fewer images.
    """
    picked = []
    for c in torch.unique(label).tolist():
        rows = (label == c).nonzero().squeeze(1)
        if len(rows) < shots:
            raise ValueError(
                f"shots: expected at most {len(rows)} (images of class {c}), got {shots}"
            )
        picked.append(rows[torch.randperm(len(rows), generator=generator)[:shots]])
    return torch.cat(picked)


def low_shot(
    train: Features, test: Features, *, shots: int, draws: int = 10, seed: int = 0
) -> tuple[float, float]:
    """Test accuracy of a linear classifier trained on `shots` images per class.

    L2-regularised multinomial logistic regression without intercept on row-centred unit rows, at
    the official strength (scikit-learn's C = 4000). The official code centres the training rows
    only, MSN's also the test rows. Both predict the same: W lies in the span of training rows
    orthogonal to the ones vector, so W 1 = 0 and a constant added to a test row changes no score,
    while scaling the row changes no arg-max. Test rows are centred here.

    Args:
        train: images to draw from, all rows labelled.
        test: all of them are classified, all rows labelled.
        shots: labelled images per class.
        draws: independent draws; draw i depends on (seed, shots, i) alone, so all feature sets of
            the same images are compared on the same draws.
        seed: of the draws.

    Returns:
        Mean and (population) standard deviation over the draws.

    Raises:
        ValueError: fewer than two classes, a class with fewer than `shots` images, or a row without
            a label.
    """
    if bool((train.label < 0).any()) or bool((test.label < 0).any()):
        raise ValueError("low-shot: expected a label in every row of train and test")
    if len(torch.unique(train.label)) < 2:
        raise ValueError("low-shot: expected at least two classes in train, got one")
    if shots < 1 or draws < 1:
        raise ValueError(f"low-shot: expected shots and draws of at least 1, got {shots}, {draws}")
    x, label = centre_rows(test.x).numpy(), test.label.numpy()
    accuracy = []
    for i in range(draws):
        # Large odd strides keep the generators of neighbouring (seed, shots, draw) apart.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + shots * 1_009 + i)
        rows = draw_shots(train.label, shots=shots, generator=generator)
        model = LogisticRegression(C=C, fit_intercept=False, max_iter=2000)
        model.fit(centre_rows(train.x[rows]).numpy(), train.label[rows].numpy())
        accuracy.append(float((model.predict(x) == label).mean()))
    return float(np.mean(accuracy)), float(np.std(accuracy))
