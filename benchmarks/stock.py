"""Stage 3 as one writes it in stock PyTorch: what `maect-fast bench step` compares with.

timm's ViT with SDPA, its blocks compiled one by one, eager search and loss, torch's fused AdamW:
the sizes, the batch, the parameter groups, the EMAs and the queue of a recipe, none of our code.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from maect_fast.config import Config, HeadConfig

__all__ = ["StockTuning"]


class StockTuning:
    """A tuning run that can do updates.

    Args:
        config: a recipe of the stage `tune`.
        device: where it runs.
        dtype: of matrix products; autocast unless it is fp32.
        compile_blocks: torch.compile for every transformer block.
        batch: views [2, n, C, H, W] and ids [n] on the device.

    Raises:
        ValueError: the recipe asks for what this program does not do.
    """

    def __init__(
        self,
        config: "Config",
        device: torch.device,
        dtype: torch.dtype,
        *,
        compile_blocks: bool,
        batch: tuple[Tensor, Tensor],
    ) -> None:
        if config.stage != "tune" or config.reconstruction_weight > 0:
            raise ValueError("stock: expected the stage tune without a reconstruction loss")
        self.config, self.device, self.dtype = config, device, dtype
        self.views, self.sample_id = batch
        # Drawn on the device: the weights of a ViT-H take a CPU many seconds.
        with torch.device(device):
            self.encoder = _encoder(config)
            width = self.encoder.embed_dim
            self.projector = _projector(config.head, width)
            self.target = _projector(config.head, width).requires_grad_(False)
            self.predictor = _predictor(config.head)
            size, dim = config.head.queue_size, config.head.output_dim
            self.queue = F.normalize(torch.randn(size, dim), dim=-1)
            self.queue_id = torch.arange(size)
            self.queue_ptr = 0
        for module in (self.encoder, self.projector, self.target, self.predictor):
            module.train()
        if compile_blocks:
            for block in self.encoder.blocks:
                block.compile(dynamic=False)
        groups = self._groups([self.encoder, self.projector, self.predictor])
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.tuned = [p for p in self.encoder.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.tuned]

    def _groups(self, modules: Sequence[nn.Module]) -> list[dict[str, Any]]:
        """Parameters by rate and weight decay: by layer, and biases and norms apart."""
        optim, depth = self.config.optim, len(self.encoder.blocks)
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for module in modules:
            for name, parameter in module.named_parameters():
                lr, weight_decay = optim.other_lr, optim.other_weight_decay
                if module is self.encoder:
                    lr, weight_decay = optim.encoder_lr, optim.encoder_weight_decay
                    if not name.startswith("norm."):
                        block = int(name.split(".")[1]) if name.startswith("blocks.") else -1
                        lr *= optim.layer_decay ** (depth - block)
                if parameter.ndim <= 1:
                    weight_decay = 0.0
                if parameter.requires_grad:
                    groups.setdefault((lr, weight_decay), []).append(parameter)
        return [
            {"params": parameters, "lr": lr, "weight_decay": weight_decay}
            for (lr, weight_decay), parameters in groups.items()
        ]

    def update(self) -> None:
        """Forward, backward, optimiser, EMAs, queue. No host sync."""
        with self._autocast():
            features = self._features(self.views.flatten(0, 1)).chunk(2)
            # Batch statistics belong to one view.
            projected = [self.projector(view) for view in features]
            predicted = [self.predictor(view) for view in projected]
            with torch.no_grad():
                has_target = self.config.head.target_ema is not None
                searched = [self.target(view) for view in features] if has_target else projected
        neighbours = [self._neighbour(view) for view in searched]
        loss = (
            self._loss(predicted[0], neighbours[1]) + self._loss(predicted[1], neighbours[0])
        ) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self._follow(searched[0].detach())

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def _features(self, images: Tensor) -> Tensor:
        """Pooled features [images, D]."""
        encoder, num_frozen = self.encoder, self.config.frozen_blocks
        with torch.no_grad() if num_frozen else torch.enable_grad():
            x = encoder._pos_embed(encoder.patch_embed(images))
            for block in encoder.blocks[:num_frozen]:
                x = block(x)
        for block in encoder.blocks[num_frozen:]:
            x = block(x)
        x = encoder.norm(x)
        pooled: Tensor = x[:, 0] if self.config.head.pooling == "class_token" else x[:, 1:].mean(1)
        return pooled

    @torch.no_grad()
    def _neighbour(self, searched: Tensor) -> Tensor:
        """One of the nearest rows of the queue, own ones excluded."""
        similarity = F.normalize(searched.float(), dim=-1) @ self.queue.T
        similarity.masked_fill_(self.queue_id == self.sample_id[:, None], -1)
        index = similarity.topk(self.config.head.topk).indices
        rank = torch.randint(index.shape[1], (len(index), 1), device=self.device)
        return self.queue[index.gather(1, rank)[:, 0]]

    def _loss(self, predicted: Tensor, neighbour: Tensor) -> Tensor:
        logits = neighbour @ F.normalize(predicted.float(), dim=-1).T
        labels = torch.arange(len(logits), device=self.device)
        return F.cross_entropy(logits / self.config.head.temperature, labels)

    def _follow(self, searched: Tensor) -> None:
        """Both EMAs, and the first view into the queue."""
        head, ema = self.config.head, self.config.encoder_ema
        if head.target_ema is not None:
            target, source = (tuple(m.parameters()) for m in (self.target, self.projector))
            torch._foreach_lerp_(target, source, 1 - head.target_ema)
            for copied, buffer in zip(self.target.buffers(), self.projector.buffers(), strict=True):
                copied.copy_(buffer)
        if ema is not None:
            torch._foreach_lerp_(self.ema, self.tuned, 1 - ema)
        slots = (torch.arange(len(searched), device=self.device) + self.queue_ptr) % len(self.queue)
        self.queue[slots] = F.normalize(searched.float(), dim=-1)
        self.queue_id[slots] = self.sample_id
        self.queue_ptr = (self.queue_ptr + len(searched)) % len(self.queue)


def _encoder(config: "Config") -> Any:
    """timm's model, frozen as the recipe freezes it."""
    sizes = {
        name: getattr(config.encoder, name)
        for name in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
    }
    given = {name: size for name, size in sizes.items() if size is not None}
    encoder: Any = timm.create_model(config.encoder.name, num_classes=0, **given)
    if config.frozen_blocks:
        for part in (encoder.patch_embed, *encoder.blocks[: config.frozen_blocks]):
            part.requires_grad_(False)
        encoder.cls_token.requires_grad_(False)
        encoder.pos_embed.requires_grad_(False)
    return encoder


def _projector(head: "HeadConfig", width: int) -> nn.Sequential:
    hidden, out = head.projector_hidden, head.output_dim
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out),
    )


def _predictor(head: "HeadConfig") -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(head.output_dim, head.predictor_hidden, bias=False),
        nn.BatchNorm1d(head.predictor_hidden),
        nn.ReLU(),
        nn.Linear(head.predictor_hidden, head.output_dim, bias=False),
    )
