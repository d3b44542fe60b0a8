import math

import pytest

from maect_fast.training.schedule import probe_warmup_cosine, warmup_cosine


def test_main_pair() -> None:
    factors = [warmup_cosine(t, total=10, warmup=4) for t in range(10)]
    assert factors[:4] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5])
    assert factors[4] == 1
    assert factors[7] == pytest.approx(0.5)
    assert factors[9] == pytest.approx((1 + math.cos(math.pi * 5 / 6)) / 2)
    assert all(0 < factor <= 1 for factor in factors)


def test_main_pair_of_the_recipe_for_l16() -> None:
    total, warmup = 25020, 5004
    assert warmup_cosine(0, total=total, warmup=warmup) == pytest.approx(1 / 5005)
    assert warmup_cosine(warmup - 1, total=total, warmup=warmup) == pytest.approx(5004 / 5005)
    assert warmup_cosine(warmup, total=total, warmup=warmup) == 1
    last = warmup_cosine(total - 1, total=total, warmup=warmup)
    assert last == pytest.approx((math.pi / 20016) ** 2 / 4, rel=1e-6)


def test_main_pair_without_warmup() -> None:
    assert [warmup_cosine(t, total=2, warmup=0) for t in range(2)] == pytest.approx([1, 0.5])


def test_probe_pair_includes_both_ends() -> None:
    factors = [probe_warmup_cosine(t, total=10, warmup=3) for t in range(10)]
    assert factors[:4] == [0, 0.5, 1, 1]
    assert factors[6] == pytest.approx(0.5)
    assert factors[9] == 0


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (1, 1)])
def test_probe_pair_of_few_updates(total: int, warmup: int) -> None:
    factors = [probe_warmup_cosine(t, total=total, warmup=warmup) for t in range(total)]
    assert factors == [0.0] * warmup + [1.0] * (total - warmup)
