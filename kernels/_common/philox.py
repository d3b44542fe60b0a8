"""Philox4x32-10, the counter-based generator behind every random choice of this project.

A draw is a pure function of (seed, counter): grid, block size, device, number of workers and number
of ranks do not enter. Integer arithmetic on int64 tensors, so it runs on every device torch has.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11); known answers from
DEShawResearch/random123: tests/kat_vectors.
"""

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["philox4x32", "philox_uniform"]

MASK32 = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

Word: TypeAlias = Tensor | int


def philox4x32(
    key: tuple[Word, Word], counter: tuple[Word, Word, Word, Word]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words per counter.

    Args:
        key: two words; ints or integer tensors that broadcast with the counter. Only the low 32
            bits of each count.
        counter: four words, alike.

    Returns:
        Four int64 tensors with values in [0, 2**32), of the broadcast shape.
    """
    device = next((w.device for w in (*counter, *key) if isinstance(w, Tensor)), None)
    words = [_word(word, device) for word in (*key, *counter)]
    k0, k1, c0, c1, c2, c3 = torch.broadcast_tensors(*words)  # type: ignore[no-untyped-call]
    for _ in range(ROUNDS):
        # The int64 products wrap; their low and high halves are the unsigned ones all the same.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            (product0 >> 32 & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def _word(word: Word, device: torch.device | None) -> Tensor:
    """The low 32 bits as an int64 tensor on `device`."""
    if isinstance(word, Tensor):
        return word.to(device, torch.int64) & MASK32
    # full, not as_tensor: a fill needs no copy from the host, so it is legal in a CUDA graph.
    return torch.full((), word & MASK32, dtype=torch.int64, device=device)


def philox_uniform(seed: Word, counter: tuple[Word, Word, Word, Word]) -> Tensor:
    """Uniform fp32 numbers in [0, 1), four per counter: shape [..., 4], 24 random bits each.

    Args:
        seed: 64 bits, split into the two key words.
        counter: as in `philox4x32`.
    """
    words = philox4x32((seed & MASK32, seed >> 32), counter)
    return (torch.stack(words, dim=-1) >> 8).float() * 2.0**-24
