import pytest
import torch
from torch import Tensor

from maect_fast.kernels import Pick
from maect_fast.kernels._common.philox import philox4x32, philox_uniform
from maect_fast.kernels.queue_topk.reference import draw_ranks

# DEShawResearch/random123: tests/kat_vectors, philox 4x32 with 10 rounds.
KNOWN_ANSWERS = [
    (
        (0, 0),
        (0, 0, 0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN_ANSWERS)
def test_known_answers(
    key: tuple[int, int],
    counter: tuple[int, int, int, int],
    expected: tuple[int, int, int, int],
    device: torch.device,
) -> None:
    assert tuple(int(word) for word in philox4x32(key, counter)) == expected
    c0, c1, c2, c3 = (torch.tensor([word], device=device) for word in counter)
    words = philox4x32(key, (c0, c1, c2, c3))
    assert all(word.device.type == device.type and word.dtype == torch.int64 for word in words)
    assert tuple(int(word) for word in words) == expected


def test_words_broadcast_and_only_their_low_32_bits_count() -> None:
    rows = torch.arange(5)
    together = philox4x32((7, 1), (rows, torch.arange(3)[:, None], 2, 0))
    assert all(word.shape == (3, 5) for word in together)
    alone = philox4x32((7 + 2**32, 1 - 2**32), (4, 2, 2 + 2**40, 0))
    assert [int(word[2, 4]) for word in together] == [int(word) for word in alone]


def unbounded_philox(key: list[int], counter: list[int]) -> list[int]:
    """The same in Python's unbounded integers, an independent second opinion."""
    k0, k1, c0, c1, c2, c3 = *key, *counter
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        low = 2**32 - 1
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def test_random_counters_against_unbounded_integers() -> None:
    words = torch.randint(2**32, (6, 50))
    k0, k1, c0, c1, c2, c3 = words
    result = torch.stack(philox4x32((k0, k1), (c0, c1, c2, c3)))
    for column, found in zip(words.T.tolist(), result.T.tolist(), strict=True):
        assert found == unbounded_philox(column[:2], column[2:])


@pytest.mark.parametrize("seed", [5, 2**40 + 5, 2**64 - 1, -1])
def test_uniform_is_in_range_and_a_function_of_the_seed(seed: int) -> None:
    numbers = philox_uniform(seed, (torch.arange(1000), 0, 0, 0))
    assert numbers.shape == (1000, 4)
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # Mean of 4,000 uniform numbers: standard deviation 0.0046.
    assert abs(numbers.mean() - 0.5) < 0.02
    words = philox4x32((seed & (2**32 - 1), seed >> 32), (torch.arange(1000), 0, 0, 0))
    assert torch.equal((numbers * 2**24).long(), torch.stack(words, dim=1) >> 8)


def ranks(pick: Pick, num_rows: int, k: int = 20) -> list[int]:
    drawn = draw_ranks(pick, torch.Size([num_rows]), k, torch.device("cpu"))
    return [int(rank) for rank in drawn]


def test_pick_known_answers() -> None:
    assert ranks(Pick(0, 0, 0), 8) == [7, 19, 0, 15, 18, 9, 14, 13]
    assert ranks(Pick(2**40 + 5, 2**33 + 1, 0, row=511), 4) == [10, 8, 13, 4]


def test_pick_takes_tensors_and_row_numbers() -> None:
    expected = ranks(Pick(2**40 + 5, 2**33 + 1, 0, row=511), 4)
    tensors = Pick(*(torch.tensor(x) for x in (2**40 + 5, 2**33 + 1, 0, 511)))
    assert ranks(tensors, 4) == expected
    rows = torch.tensor([514, 511, 513, 512])
    assert ranks(Pick(2**40 + 5, 2**33 + 1, 0, row=rows), 4) == [expected[i] for i in (3, 0, 2, 1)]


def test_pick_of_two_views_and_of_two_ranks() -> None:
    both = draw_ranks(Pick(3, 9, 0), torch.Size([2, 6]), 20, torch.device("cpu"))
    assert both.tolist() == [ranks(Pick(3, 9, 0), 6), ranks(Pick(3, 9, 1), 6)]
    assert both[0].tolist() != both[1].tolist()
    assert ranks(Pick(3, 9, 1), 3) + ranks(Pick(3, 9, 1, row=3), 3) == both[1].tolist()


@pytest.mark.parametrize("k", [1, 2, 20, 64])
def test_pick_covers_the_ranks_evenly(k: int) -> None:
    counts = torch.bincount(torch.tensor(ranks(Pick(1, 2, 3), 6400, k)), minlength=k)
    assert len(counts) == k
    # Chi-square with k - 1 degrees of freedom, five standard deviations above its mean.
    expected = 6400 / k
    assert ((counts - expected) ** 2 / expected).sum() <= k - 1 + 5 * (2 * k) ** 0.5


def test_philox_compiles() -> None:
    compiled = torch.compile(philox_uniform, fullgraph=True, backend="aot_eager")
    steps: tuple[int | Tensor, ...] = (3, 4, 2**33, torch.tensor(5))
    for step in steps:
        counter = (torch.arange(7), 1, step, 0)
        assert torch.equal(compiled(2**40, counter), philox_uniform(2**40, counter))
