"""The encoder's exponential moving average: the model that MAE-CT publishes.

Source: ml-jku/MAE-CT: loggers/ema_logger.py.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from maect_fast.models.encoder import Encoder

__all__ = ["EncoderEma"]


class EncoderEma:
    """A copy of the encoder that follows it: `ema = decay * ema + (1 - decay) * encoder`.

    There is no bias correction.

    Args:
        encoder: what to follow; the average starts as a copy of it.
        decay: in [0, 1).
    """

    def __init__(self, encoder: Encoder, decay: float) -> None:
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.decay = decay
        # Looking for them takes longer than averaging a small encoder. Buffers are not kept: moving
        # or converting a module replaces them.
        self._pairs = list(zip(self.encoder.parameters(), encoder.parameters(), strict=True))
        self._modules = [
            (average, module)
            for average, module in zip(self.encoder.modules(), encoder.modules(), strict=True)
            if module._buffers
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the parameters that train, after a step; the others are equal already."""
        pairs = [pair for pair in self._pairs if pair[1].requires_grad]
        if pairs:
            averages, parameters = zip(*pairs, strict=True)
            torch._foreach_lerp_(averages, parameters, 1 - self.decay)
        for average, module in self._modules:
            buffers = zip(
                average.buffers(recurse=False), module.buffers(recurse=False), strict=True
            )
            for copied, buffer in buffers:
                copied.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged encoder's bare state dict, as MAE-CT's `ema=0.9999 model.th` holds it."""
        return self.encoder.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved average."""
        self.encoder.load_state_dict(state)
