"""Stage 3 as the authors' program trains: what `maect-fast bench step` compares with as "official".

Eager, under autocast with an fp32 residual stream; its casts, its loops over tensors and its waits
for the device, on timm's blocks with SDPA instead of its FlashAttention wrapper.

Source: ml-jku/MAE-CT: models/contrastive_heads/base, losses/nnclr_loss.py, trainers,
    optimizers/optimizer_wrapper.py, loggers/ema_logger.py. Changes: the queue's end may lie inside
    a batch, as in the authors' later MIM-Refiner.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from maect_fast.benchmarks.stock import StockTuning

if TYPE_CHECKING:
    from maect_fast.config import Config

__all__ = ["OfficialTuning"]


class OfficialTuning(StockTuning):
    """A tuning run that can do updates.

    Args:
        config: a recipe of the stage `tune`.
        device: where it runs.
        dtype: of matrix products; autocast unless it is fp32.
        batch: views [2, n, C, H, W], ids [n] and labels [n] on the device.
    """

    def __init__(
        self,
        config: "Config",
        device: torch.device,
        dtype: torch.dtype,
        *,
        batch: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        super().__init__(config, device, dtype, compile_blocks=False, batch=batch[:2])
        self.label = batch[2]
        # One per sub-model, in torch's own choice of a form.
        encoder, head = self._groups([self.encoder]), self._groups([self.projector, self.predictor])
        self.optimizers = [torch.optim.AdamW(groups) for groups in (encoder, head) if groups]
        self.average = {name: p.detach().clone() for name, p in self.encoder.named_parameters()}
        self.queue_y = torch.full((len(self.queue),), -1, device=device)
        self.pointer = torch.zeros(1, dtype=torch.int64, device=device)
        self.told: dict[str, float] = {}

    def update(self) -> None:
        """Forward, backward, optimisers, averages, queue; what is logged is read at once."""
        with self._autocast():
            features = self._features(self.views.flatten(0, 1)).chunk(2)
            online = [self.projector(view) for view in features]
            predicted = [self.predictor(view) for view in online]
            # With a graph that nobody uses.
            has_target = self.config.head.target_ema is not None
            searched = [self.target(view) for view in features] if has_target else online
            projected = [F.normalize(view, dim=-1) for view in searched]
            neighbours = [self._find_nn(view.detach(), i) for i, view in enumerate(projected)]
            losses = [
                self._nnclr_loss(predicted[i], neighbours[1 - i]) for i in range(len(predicted))
            ]
            loss = sum(losses) / 2
        for i, part in enumerate(losses):
            self.told[f"loss of view {i}"] = part.detach().cpu().item()
        assert isinstance(loss, Tensor)
        self.told["loss"] = loss.detach().cpu().item()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._average()
        self._enqueue(projected[0].detach())

    @torch.no_grad()
    def _find_nn(self, query: Tensor, view: int) -> Tensor:
        similarity = query @ self.queue.T
        similarity[self.queue_id[None, :] == self.sample_id[:, None]] = -1.0
        candidates = similarity.topk(self.config.head.topk, dim=1).indices
        # The dice are thrown on the CPU.
        rank = torch.randint(size=(len(candidates),), high=candidates.shape[1])
        index = candidates[torch.arange(len(candidates)), rank]
        hits = (self.label == self.queue_y[index]).sum() / len(index)
        self.told[f"nn accuracy of view {view}"] = hits.item()
        return self.queue[index]

    def _nnclr_loss(self, predicted: Tensor, neighbour: Tensor) -> Tensor:
        logits = neighbour @ F.normalize(predicted, dim=-1).T / self.config.head.temperature
        return F.cross_entropy(logits, torch.arange(len(logits), device=self.device))

    @torch.no_grad()
    def _average(self) -> None:
        """Both averages, tensor by tensor, those of frozen parameters too."""
        decay, target_decay = self.config.encoder_ema, self.config.head.target_ema
        if target_decay is not None:
            pairs = zip(self.target.parameters(), self.projector.parameters(), strict=True)
            for average, parameter in pairs:
                average.data = average.data * target_decay + parameter.data * (1.0 - target_decay)
            buffers = zip(self.target.buffers(), self.projector.buffers(), strict=True)
            for copied, buffer in buffers:
                copied.copy_(buffer)
        if decay is not None:
            for name, parameter in self.encoder.named_parameters():
                self.average[name].mul_(decay).add_(parameter, alpha=1.0 - decay)

    @torch.no_grad()
    def _enqueue(self, rows: Tensor) -> None:
        start, size = int(self.pointer), len(self.queue)
        for first, last in ((start, min(start + len(rows), size)), (0, start + len(rows) - size)):
            if last > first:
                taken = slice(0, last - first) if first == start else slice(size - start, len(rows))
                self.queue[first:last] = rows[taken]
                self.queue_id[first:last] = self.sample_id[taken]
                self.queue_y[first:last] = self.label[taken]
        self.pointer[0] = (start + len(rows)) % size
