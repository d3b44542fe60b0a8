"""Learning-rate factors per update: linear warm-up, then cosine decay.

t is the update's number, T the number of all updates, W that of the warm-up.

Source: ml-jku/MAE-CT: schedules; the probe's pair is the older one of the same folder.
"""

import math

__all__ = ["probe_warmup_cosine", "warmup_cosine"]


def warmup_cosine(update: int, *, total: int, warmup: int) -> float:
    """Factor in (0, 1] of the base rate at `update`, which is taken before the update is made.

    `(t + 1) / (W + 1)` for t < W, then `(1 + cos(pi (t - W) / (T - W))) / 2`: reaches 1 at t = W
    and ends just above 0.
    """
    if update < warmup:
        return (update + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (update - warmup) / (total - warmup))) / 2


def probe_warmup_cosine(update: int, *, total: int, warmup: int) -> float:
    """The linear probe's factor in [0, 1].

    `t / (W - 1)` for t < W, then `(1 + cos(pi (t - W) / (T - W - 1))) / 2`: starts at exactly 0,
    is 1 twice, ends at exactly 0.
    """
    if update < warmup:
        return update / max(warmup - 1, 1)
    return (1 + math.cos(math.pi * (update - warmup) / max(total - warmup - 1, 1))) / 2
