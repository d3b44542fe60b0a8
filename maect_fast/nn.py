"""Module faces of the ops: they hold hyper-parameters and buffers and call the functions."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from maect_fast.kernels import (
    Pick,
    QueueState,
    Shadow,
    TopK,
    enqueue,
    info_nce,
    masked_attention,
    queue_topk,
    with_shadow,
)
from maect_fast.kernels._common.collectives import all_gather_rows, group_rank
from maect_fast.profiling import profile_range

__all__ = ["FeatureQueue", "FusedAttention", "NNCLRLoss", "NNCLROutput", "fuse"]

ModelT = TypeVar("ModelT", bound=nn.Module)


class FeatureQueue(nn.Module):
    """A ring buffer of unit feature vectors with their labels and sample ids, and the search in it.

    Starts with random directions without label and id, which take part in searches. The buffers
    have the names of the official checkpoints: `queue` [Q, D] fp32, `queue_y` and `queue_id` [Q]
    int64 (-1 = none), `queue_ptr` [1] int64.

    Args:
        size: Q, the number of entries.
        dim: D, the length of a vector.
        shadow: on a GPU, the type of the rounded copy in which candidates are looked for:
            torch.float16, or torch.int8 for faster products; no result depends on it.
        generator: draws the initial directions; None is torch's default generator.

    Source: ml-jku/MAE-CT: models/contrastive_heads/base/contrastive_head_base.py.
    """

    queue: Tensor
    queue_y: Tensor
    queue_id: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        shadow: torch.dtype = torch.float16,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        rows = torch.randn(size, dim, generator=generator)
        self.register_buffer("queue", nn.functional.normalize(rows, dim=-1))
        self.register_buffer("queue_y", torch.full((size,), -1))
        self.register_buffer("queue_id", torch.full((size,), -1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.shadow_dtype = shadow
        self._shadow: Shadow | None = None
        self.register_load_state_dict_post_hook(_renew_shadow)  # type: ignore[no-untyped-call]

    @property
    def state(self) -> QueueState:
        """The buffers, as the ops take them."""
        return QueueState(self.queue, self.queue_y, self.queue_id, self.queue_ptr, self._shadow)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the buffers."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _renew_shadow(self)
        return self

    def search(
        self,
        query: Tensor,
        *,
        k: int,
        sample_id: Tensor | None = None,
        label: Tensor | None = None,
        pick: Pick | Tensor | None = None,
    ) -> TopK:
        """The k nearest entries to each row of query [n, D] or [V, n, D]; see `queue_topk`.

        Args:
            query: rows of any norm.
            k: number of neighbours.
            sample_id: int64 [n]; entries with the row's own id are excluded.
            label: int64 [n]; reports whether the picked entry has the row's label.
            pick: chooses one of the k.
        """
        return queue_topk(query, self.state, k=k, query_id=sample_id, query_label=label, pick=pick)

    @torch.no_grad()
    def enqueue(
        self, rows: Tensor, *, sample_id: Tensor | None = None, label: Tensor | None = None
    ) -> None:
        """Overwrite the oldest entries with rows [B, D], normalised; B may be any number.

        Args:
            rows: vectors of any norm.
            sample_id: int64 [B], None = none.
            label: int64 [B], None = none.
        """
        enqueue(self.state, rows, sample_id=sample_id, label=label)


def _renew_shadow(queue: FeatureQueue, _: object = None) -> None:
    """Round the queue anew, after it was moved or loaded."""
    queue._shadow = None
    if _is_on_gpu(queue.queue):
        queue._shadow = with_shadow(queue.state, dtype=queue.shadow_dtype).shadow


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


class NNCLROutput(NamedTuple):
    """Result of `NNCLRLoss`, 0-d tensors on the device."""

    loss: Tensor
    """Mean over the rows of this rank and both directions."""
    nn_accuracy: Tensor
    """Share of view 0's picked neighbours with the row's label, among pairs where both have one.

    Rows of this rank; 0 if there is no such pair. A health signal, no part of the loss.
    """


class NNCLRLoss(nn.Module):
    """NNCLR's loss with a neighbour drawn from the k nearest, and its queue.

    One search for both views, the loss of each view's predictions against the other view's
    neighbours, then, in training mode only, view 0 enters the queue: of all ranks, in rank order,
    so that every rank holds the same queue. Nothing waits for the device.

    Args:
        queue_size: entries of the queue.
        dim: D of projections and predictions.
        topk: the neighbour is drawn uniformly from so many; 1 takes the nearest.
        temperature: divisor of the cosines.
        transposed: softmax rows are predictions instead of neighbours.
        seed: of the draws and of the queue's initial rows.
        group: ranks that share a batch, which is split evenly; None is one process.

    Source: arXiv 2304.10520 section 3; ml-jku/MAE-CT: losses/nnclr_loss.py.
    """

    def __init__(
        self,
        *,
        queue_size: int,
        dim: int,
        topk: int,
        temperature: float,
        transposed: bool = False,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= topk <= queue_size:
            raise ValueError(f"topk: expected 1 .. {queue_size} (queue_size), got {topk}")
        self.topk = topk
        self.temperature = temperature
        self.transposed = transposed
        self.seed = seed
        self.group = group
        self.queue = FeatureQueue(queue_size, dim, generator=torch.Generator().manual_seed(seed))

    def forward(
        self,
        projected: Tensor,
        predicted: Tensor,
        *,
        step: int | Tensor,
        sample_id: Tensor | None = None,
        label: Tensor | None = None,
    ) -> NNCLROutput:
        """Loss of one batch; the gradient goes to `predicted`.

        Args:
            projected: [2, n, D], what is searched and enqueued; normalised inside, no gradient.
            predicted: [2, n, D]; normalised inside.
            step: number of the update, which keys the draws; an int or a 0-d int64 tensor.
            sample_id: int64 [n]; a sample is not its own neighbour. -1 = none.
            label: int64 [n], only for `nn_accuracy`; negative = none.
        """
        first_row = group_rank(self.group) * projected.shape[1]
        with profile_range("search"):
            found = self.queue.search(
                projected,
                k=self.topk,
                sample_id=sample_id,
                label=label,
                pick=Pick(self.seed, step, view=0, row=first_row),
            )
        assert found.picked_index is not None
        assert found.picked_neighbour is not None
        with profile_range("loss"):
            loss = info_nce(
                predicted,
                found.picked_neighbour,
                temperature=self.temperature,
                group=self.group,
                transposed=self.transposed,
            )
        accuracy = torch.zeros_like(loss)
        if label is not None and found.label_hit is not None:
            known = (label >= 0) & (self.queue.queue_y[found.picked_index[0]] >= 0)
            accuracy = found.label_hit[0].sum() / known.sum().clamp_min(1)
        if self.training:
            # Only now: the search must not find this batch.
            with profile_range("enqueue"):
                self.queue.enqueue(
                    all_gather_rows(projected[0], self.group),
                    sample_id=None if sample_id is None else all_gather_rows(sample_id, self.group),
                    label=None if label is None else all_gather_rows(label, self.group),
                )
        return NNCLROutput(loss, accuracy)


class FusedAttention(nn.Module):
    """Multi-head self-attention on `masked_attention`, with the layers of timm's `Attention`.

    ``proj(softmax(scale * Q K^T) V)`` with Q, K, V = qkv(x) and scale = D ** -0.5. The layers are
    shared, not copied: parameters stay the same objects, state-dict keys are `qkv.*` and `proj.*`.

    Args:
        qkv: maps C features to 3 * H * D, ordered (3, H, D).
        proj: maps H * D features to the output.
        num_heads: H.
        proj_drop: what follows `proj`; None is nothing.

    Source: timm: layers/attention.py; ml-jku/MAE-CT: models/modules/flash_attention_wrapper.py.
    """

    def __init__(
        self,
        qkv: nn.Module,
        proj: nn.Module,
        *,
        num_heads: int,
        proj_drop: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = qkv
        self.proj = proj
        self.proj_drop = nn.Identity() if proj_drop is None else proj_drop

    def forward(
        self,
        x: Tensor,
        attn_mask: Any = None,
        is_causal: bool = False,
        *,
        keep: Tensor | None = None,
        seqlens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, N, C], with `cu_seqlens` [T, C], to the same rows of `proj`'s width.

        Rows outside a sample come out as `proj` of zeros, that is its bias.

        Args:
            x: tokens.
            attn_mask: what a timm block passes on: None; bool [B, 1, 1, N], True = the token takes
                part as a key; or, for x [1, T, C], a BlockDiagonalMask of xformers.
            is_causal: False; timm's blocks pass it on.
            keep: see `masked_attention`, as for the rest.
            seqlens: see there.
            cu_seqlens: see there.
            max_seqlen: see there.
            key_mask: see there.

        Raises:
            ValueError: a causal or an [.., N, N] mask, or what `masked_attention` refuses.
            TypeError: as `masked_attention`.
        """
        if is_causal:
            raise ValueError("is_causal: expected False, got True: attention here is bidirectional")
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        block_diagonal = _is_block_diagonal(attn_mask)
        if attn_mask is not None:
            given = (keep, seqlens, cu_seqlens, max_seqlen, key_mask)
            if any(argument is not None for argument in given):
                raise ValueError("attn_mask: expected None with another mode, got a mask")
            if block_diagonal:
                cu_seqlens, max_seqlen = _segments(attn_mask, x)
                qkv = qkv.squeeze(0)
            else:
                key_mask = _key_mask(attn_mask, x)
        o = masked_attention(
            qkv,
            keep=keep,
            seqlens=seqlens,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            key_mask=key_mask,
        )
        out: Tensor = self.proj_drop(self.proj(o.flatten(-2)))
        return out.unsqueeze(0) if block_diagonal else out


def fuse(model: ModelT) -> ModelT:
    """Replace every timm `Attention` inside `model` by `FusedAttention`, in place.

    Parameters are shared and state-dict keys stay; numbers stay up to rounding. On the CPU both run
    the kernel behind `F.scaled_dot_product_attention`; on CUDA `masked_attention` has no kernel of
    its own yet, see its README. Nothing is replaced unless everything can be; a model that is fused
    already is left alone.

    Args:
        model: any model with timm's ViT blocks.

    Returns:
        The same model.

    Raises:
        ValueError: no attention found, or one that computes something else: q and k normalised or
            rotated, dropout of attention weights, a position bias, a gate; the message names it.
    """
    from timm.layers.attention import Attention

    attentions = {
        name: module
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__ and hasattr(module, "qkv")
    }
    if not attentions or model in attentions.values():
        expected = "a model that contains timm.layers.Attention"
        raise ValueError(f"model: expected {expected}, got {type(model).__qualname__}")
    for name, module in attentions.items():
        obstacle = None if isinstance(module, FusedAttention) else _obstacle(module, Attention)
        if obstacle is not None:
            raise ValueError(f"model: cannot replace {name}: {obstacle}")
    fused = {
        module: FusedAttention(
            module.qkv, module.proj, num_heads=module.num_heads, proj_drop=module.proj_drop
        ).train(module.training)
        for module in attentions.values()
        if isinstance(module, Attention)
    }
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in fused:
                setattr(parent, name, fused[child])
    return model


def _obstacle(module: Any, attention: type[nn.Module]) -> str | None:
    """Why FusedAttention cannot compute what `module` does; None if it can."""
    kind = type(module)
    if kind is not attention:
        return f"expected timm.layers.Attention, got {kind.__module__}.{kind.__qualname__}"
    if not isinstance(module.q_norm, nn.Identity) or not isinstance(module.k_norm, nn.Identity):
        return "it normalises q and k (qk_norm)"
    if not isinstance(module.norm, nn.Identity):
        return "it normalises its output (scale_norm)"
    if module.gate is not None:
        return "its output has a gate"
    if module.attn_drop.p > 0:
        return f"it drops attention weights in training (attn_drop {module.attn_drop.p})"
    if module.scale != module.head_dim**-0.5:
        return f"its scale {module.scale} is not head_dim ** -0.5"
    return None


def _is_block_diagonal(mask: object) -> bool:
    """Whether it is xformers' BlockDiagonalMask itself; subclasses mean more (causal, padded)."""
    kind = type(mask)
    return kind.__name__ == "BlockDiagonalMask" and kind.__module__.startswith("xformers.")


def _segments(mask: Any, x: Tensor) -> tuple[Tensor, int]:
    """Arguments `cu_seqlens` and `max_seqlen` of a BlockDiagonalMask for x [1, T, C]."""
    bounds, shape = mask.q_seqinfo.seqstart_py, list(x.shape)
    if mask.k_seqinfo.seqstart_py != bounds:
        raise ValueError("attn_mask: expected equal blocks of queries and keys, got different ones")
    if x.ndim != 3 or x.shape[0] != 1 or x.shape[1] != bounds[-1]:
        raise ValueError(f"x: expected [1, {bounds[-1]}, C] with this attn_mask, got {shape}")
    return mask.q_seqinfo.seqstart.to(x.device), mask.q_seqinfo.max_seqlen


def _key_mask(mask: object, x: Tensor) -> Tensor:
    """The [B, N] mask in a [B, 1, 1, N] one."""
    if not isinstance(mask, Tensor):
        kind = type(mask).__qualname__
        raise ValueError(f"attn_mask: expected a tensor or a BlockDiagonalMask, got {kind}")
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        got = f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"attn_mask: expected bool [B, 1, 1, N], no N x N bias, got {got}")
    return mask[:, 0, 0].expand(len(x), -1) if len(mask) == 1 else mask[:, 0, 0]
