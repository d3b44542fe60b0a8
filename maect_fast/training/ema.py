"""The encoder's exponential moving average: the model that MAE-CT publishes.

Source: ml-jku/MAE-CT: loggers/ema_logger.py; the warm-up is that of timm's ModelEmaV3
(huggingface/pytorch-image-models@aa4b585: timm/utils/model_ema.py).
"""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from maect_fast.models.encoder import Encoder

__all__ = ["EncoderEma", "ema_decay", "half_lives"]

# In time constants, 1 / (1 - decay). The paper's shortest runs, ViT-B's and L's 20 epochs of 1,251
# updates, are of 2.502, and their averages hold 8 % of what they started from.
LONG = 2.5
# timm's default: an average over the last t^(2/3) of t updates.
POWER = 2 / 3


def ema_decay(decay: float, *, update: int, total: int) -> float:
    """By how much the average stays what it is in an update.

    A run that is long against `1 / (1 - decay)`, as all of the paper's are, has no warm-up. The
    average of a shorter one would be what it started from, and warms up by timm's formula,
    ``min(decay, 1 - update^(-2/3))``.

    Args:
        decay: in [0, 1).
        update: which of the run's, from 1 on.
        total: updates of the whole run.
    """
    if total >= LONG / (1 - decay):
        return decay
    return min(decay, 1 - math.pow(update, -POWER))


def half_lives(decay: float, updates: int) -> float:
    """How many times the weight of a parameter in the average halves in so many updates."""
    return -updates * math.log2(decay) if decay > 0 else math.inf


class EncoderEma:
    """A copy of the encoder that follows it: `ema = decay * ema + (1 - decay) * encoder`.

    Args:
        encoder: what to follow; the average starts as a copy of it.
        decay: in [0, 1).
        total: updates of the whole run, see `ema_decay`.
    """

    def __init__(self, encoder: Encoder, decay: float, *, total: int) -> None:
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.decay = decay
        self.total = total
        # Looking for them takes longer than averaging a small encoder. Buffers are not kept: moving
        # or converting a module replaces them.
        self._pairs = list(zip(self.encoder.parameters(), encoder.parameters(), strict=True))
        self._modules = [
            (average, module)
            for average, module in zip(self.encoder.modules(), encoder.modules(), strict=True)
            if module._buffers
        ]
        device = self._pairs[0][0].device
        # What torch's fused kernels read on the device; on a CPU they take the number out.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self._weight = torch.empty((), dtype=dtype, device=device)
        self.weigh(1)

    def weigh(self, update: int) -> None:
        """Set the encoder's weight in the averages to come: that of the run's update number.

        It lies on the device, where a CUDA graph reads it anew in each replay.
        """
        self._weight.fill_(1 - ema_decay(self.decay, update=update, total=self.total))

    @torch.no_grad()
    def update(self) -> None:
        """Follow the parameters that train, after a step; the others are equal already."""
        pairs = [pair for pair in self._pairs if pair[1].requires_grad]
        if pairs:
            averages, parameters = map(list, zip(*pairs, strict=True))
            # A step of gradient descent on |average - parameter|^2 / 2, of which the average's half
            # of the gradient is a weight decay: one pass, as a lerp of lists is, but that takes no
            # weight on the device.
            torch._fused_sgd_(
                averages,
                parameters,
                [],
                weight_decay=1.0,
                momentum=0.0,
                lr=self._weight,
                dampening=0.0,
                nesterov=False,
                maximize=True,
                is_first_step=False,
            )
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
