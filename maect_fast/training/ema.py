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

    @torch.no_grad()
    def update(self, encoder: Encoder) -> None:
        """Follow the parameters that train, after a step; the others are equal already."""
        pairs = [
            (average, parameter)
            for average, parameter in zip(
                self.encoder.parameters(), encoder.parameters(), strict=True
            )
            if parameter.requires_grad
        ]
        if pairs:
            averages, parameters = zip(*pairs, strict=True)
            torch._foreach_lerp_(averages, parameters, 1 - self.decay)
        for average, buffer in zip(self.encoder.buffers(), encoder.buffers(), strict=True):
            average.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged encoder's bare state dict, as MAE-CT's `ema=0.9999 model.th` holds it."""
        return self.encoder.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved average."""
        self.encoder.load_state_dict(state)
