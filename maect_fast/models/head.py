"""The NNCLR head: projector, predictor, target projector, and the loss with its queue.

n images per view, D width of the encoder, P width of the projection.

Source: MAE-CT (arXiv 2304.10520, section 3.2); ml-jku/MAE-CT: models/contrastive_heads.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from maect_fast.config import HeadConfig
from maect_fast.nn import NNCLRLoss, NNCLROutput
from maect_fast.profiling import profile_range
from maect_fast.training.distributed import SyncBatchNorm1d

__all__ = ["NNCLRHead"]


class NNCLRHead(nn.Module):
    """From pooled features of two views to the contrastive loss.

    The queue is searched with the projections: those of `target_projector`, an exponential moving
    average of `projector`, where `config.target_ema` is set, and of `projector` where it is None.
    Only the predictions carry gradient. State-dict names of the layers equal those of
    ml-jku/MAE-CT's files: `projector.{0,1,3,4,6,7}.*`, `predictor.{0,1,3}.*`, `target_projector.*`.

    Args:
        config: widths, queue, temperature, top-k, EMA.
        embed_dim: D.
        seed: of the neighbour picks and of the queue's first rows.
        group: the ranks that share batch statistics, negatives and the queue; None for one process.
    """

    def __init__(
        self,
        config: HeadConfig,
        embed_dim: int,
        *,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.target_ema = config.target_ema
        self.projector = _projector(config, embed_dim, group)
        self.predictor = _predictor(config, group)
        self.target_projector: nn.Sequential | None = None
        if config.target_ema is not None:
            self.target_projector = _projector(config, embed_dim, group).requires_grad_(False)
            self.start_target()
        self.loss = NNCLRLoss(
            queue_size=config.queue_size,
            dim=config.output_dim,
            topk=config.topk,
            temperature=config.temperature,
            transposed=config.transposed,
            seed=seed,
            group=group,
        )

    def forward(
        self,
        pooled: Tensor,
        *,
        step: int | Tensor,
        sample_id: Tensor | None = None,
        label: Tensor | None = None,
    ) -> NNCLROutput:
        """Project, predict, and compare with the neighbours of the other view.

        Args:
            pooled: [2, n, D], one feature per view and image; gets the gradient.
            step: number of the update, a 0-d tensor where no host value may enter the graph.
            sample_id: [n] int64, the images' own ids, which their searches exclude.
            label: [n] int64, -1 where unknown; for the metric only.

        Returns:
            loss, nn_accuracy and searched_again, 0-d.
        """
        with profile_range("head"):
            # One pass per view: batch statistics belong to one view, running statistics advance in
            # view order.
            projections = [self.projector(view) for view in pooled]
            predicted = torch.stack([self.predictor(view) for view in projections])
            with torch.no_grad():
                if self.target_projector is not None:
                    # Detached, because even here views of a tensor that requires gradients do, and
                    # torch's FlopCounterMode then looks for their missing graph.
                    projections = [self.target_projector(view) for view in pooled.detach()]
            projected = torch.stack(projections).detach()
        return self.loss(  # type: ignore[no-any-return]
            projected, predicted, step=step, sample_id=sample_id, label=label
        )

    @torch.no_grad()
    def update_target(self) -> None:
        """Follow the projector, after an optimiser step: `t = ema * t + (1 - ema) * s`.

        Buffers, the batch statistics, are copied.
        """
        if self.target_projector is None or self.target_ema is None:
            return
        torch._foreach_lerp_(
            list(self.target_projector.parameters()),
            list(self.projector.parameters()),
            1 - self.target_ema,
        )
        targets, sources = list(self.target_projector.buffers()), list(self.projector.buffers())
        for dtype in dict.fromkeys(source.dtype for source in sources):
            # Of one dtype they are one launch.
            torch._foreach_copy_(
                [target for target in targets if target.dtype == dtype],
                [source for source in sources if source.dtype == dtype],
            )

    def start_target(self) -> None:
        """Make the target a copy of the projector: at the start of stage 3, not on resume."""
        if self.target_projector is not None:
            self.target_projector.load_state_dict(self.projector.state_dict())


def _projector(
    config: HeadConfig, embed_dim: int, group: dist.ProcessGroup | None
) -> nn.Sequential:
    """Three linear layers, each followed by a BatchNorm; torch's default initialisation."""
    hidden, out = config.projector_hidden, config.output_dim
    return nn.Sequential(
        nn.Linear(embed_dim, hidden, bias=False),
        SyncBatchNorm1d(hidden, group),
        nn.ReLU(),
        nn.Linear(hidden, hidden, bias=False),
        SyncBatchNorm1d(hidden, group),
        nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
        SyncBatchNorm1d(out, group),
    )


def _predictor(config: HeadConfig, group: dist.ProcessGroup | None) -> nn.Sequential:
    """Two linear layers with a BatchNorm between them; torch's default initialisation."""
    return nn.Sequential(
        nn.Linear(config.output_dim, config.predictor_hidden, bias=False),
        SyncBatchNorm1d(config.predictor_hidden, group),
        nn.ReLU(),
        nn.Linear(config.predictor_hidden, config.output_dim, bias=False),
    )
