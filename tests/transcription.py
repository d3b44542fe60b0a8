"""A second transcription of the three stages of MAE-CT, for tests only.

Plain eager PyTorch on dictionaries of tensors, written from the paper (arXiv 2304.10520) and the
official files (ml-jku/MAE-CT, facebookresearch/mae) without looking at this package, so that a
misreading in one of the two shows as a difference. Nothing here is fast, and every number has the
dtype of the state that comes in (fp32 or fp64).

Legend: V views (2), n images, B = V * n rows in view-major order, L patches, N = L + 1 tokens,
D encoder width, E projection width, Q queue rows, k neighbours.

State: one dictionary per sub-model with the official names. Encoder: `cls_token`, `pos_embed`,
`patch_embed.proj.*`, `blocks.i.*`, `norm.*`. Decoder: `embed.*`, `mask_token`, `pos_embed`,
`blocks.i.*`, `norm.*`, `pred.*`. Head: `projector.*`, `predictor.*`, `target_projector.*`,
`queue`, `queue_y`, `queue_id`, `queue_ptr`. The steps change these dictionaries in place.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

State = dict[str, Tensor]

MASK32 = (1 << 32) - 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The hyper-parameters of a run that the formulas name."""

    num_heads: int
    pooling: str = "class_token"
    decoder_heads: int = 1
    topk: int = 1
    temperature: float = 0.15
    target_ema: float | None = None
    encoder_ema: float | None = None
    frozen_blocks: int | None = 0  # None: the whole encoder
    layer_decay: float = 1.0
    encoder_lr: float = 0.0
    other_lr: float = 0.0
    encoder_weight_decay: float = 0.0
    other_weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    batch_size: int
    num_views: int = 2
    total_updates: int
    warmup_updates: int
    seed: int = 0


@dataclass
class Moments:
    """AdamW's state of one sub-model."""

    first: State = field(default_factory=dict)
    second: State = field(default_factory=dict)
    updates: int = 0


@dataclass(frozen=True)
class StepRecord:
    """What one update computed, for comparison; rates are those of this update."""

    loss: Tensor
    grads: dict[str, State]  # per sub-model
    rates: dict[str, dict[str, float]]
    nn_accuracy: float = 0.0


def philox4x32(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 in Python integers (Salmon et al., SC 2011, section 3.3)."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return [c0, c1, c2, c3]


def picked_ranks(k: int, *, seed: int, step: int, view: int, rows: Iterable[int]) -> Tensor:
    """One of k ranks per row, 0 = the nearest: the high half of (32 random bits) * k."""
    key = (seed & MASK32, seed >> 32)
    words = (philox4x32(key, (row, view, step & MASK32, step >> 32))[0] for row in rows)
    return torch.tensor([(word * k) >> 32 for word in words])


def masking_ids(
    num_rows: int, num_patches: int, mask_ratio: float, *, seed: int, step: int, view: int
) -> tuple[Tensor, Tensor]:
    """ids_keep [n, Nk] and ids_restore [n, L] of one view.

    `argsort(noise)`, keep the first int(L * (1 - ratio)) (mae: models_mae.py, random_masking). The
    noise of patch p is word p % 4 of the Philox block p // 4 with the seed moved by 2^32.
    """
    seed += 1 << 32
    key = (seed & MASK32, seed >> 32)
    blocks = range((num_patches + 3) // 4)
    noise = torch.tensor(
        [
            [word for block in blocks for word in philox4x32(key, (row, view, step, block))]
            for row in range(num_rows)
        ]
    )[:, :num_patches]
    ids_shuffle = noise.argsort(dim=1)
    return ids_shuffle[:, : int(num_patches * (1 - mask_ratio))], ids_shuffle.argsort(dim=1)


def sincos_positions(dim: int, side: int) -> Tensor:
    """Fixed positions [1, side^2, dim] fp64; row-major patches, the first half encodes the column.

    mae: util/pos_embed.py, get_2d_sincos_pos_embed.
    """
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = []
    for coordinate in (columns, rows):
        angle = coordinate.flatten()[:, None] * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1)[None]


def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    """Eps 1e-6 everywhere (ml-jku/MAE-CT: models/vit/vit_mae.py)."""
    centred = x - x.mean(dim=-1, keepdim=True)
    x = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    x = x @ state[f"{name}.weight"].T
    return x + state[f"{name}.bias"] if f"{name}.bias" in state else x


def attention(state: State, name: str, x: Tensor, num_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, heads concatenated, then the output projection."""
    B, N, D = x.shape
    qkv = linear(state, f"{name}.qkv", x).reshape(B, N, 3, num_heads, D // num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, head_dim]
    weights = (q @ k.transpose(-1, -2) / math.sqrt(D // num_heads)).softmax(dim=-1)
    return linear(state, f"{name}.proj", (weights @ v).transpose(1, 2).reshape(B, N, D))


def run_blocks(state: State, x: Tensor, num_heads: int) -> Tensor:
    """Pre-norm blocks with exact GELU, then the final norm (models/modules/vit_block.py)."""
    for i in range(count_blocks(state)):
        x = x + attention(
            state, f"blocks.{i}.attn", layer_norm(state, f"blocks.{i}.norm1", x), num_heads
        )
        hidden = linear(state, f"blocks.{i}.mlp.fc1", layer_norm(state, f"blocks.{i}.norm2", x))
        x = x + linear(state, f"blocks.{i}.mlp.fc2", functional.gelu(hidden))
    return layer_norm(state, "norm", x)


def count_blocks(state: State) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def encode(state: State, images: Tensor, num_heads: int, ids_keep: Tensor | None = None) -> Tensor:
    """Tokens [B, 1 + N, D] after the final norm (models/vit/masked_encoder.py).

    Positions are added before patches are dropped; the class token comes last and has none.
    """
    weight = state["patch_embed.proj.weight"]
    x = functional.conv2d(images, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    if ids_keep is not None:
        x = x[torch.arange(len(x))[:, None], ids_keep]
    x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x], dim=1)
    return run_blocks(state, x, num_heads)


def pool(tokens: Tensor, pooling: str) -> Tensor:
    """Token 0, or the mean of the patch tokens, both after the final norm."""
    return tokens[:, 0] if pooling == "class_token" else tokens[:, 1:].mean(dim=1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, L, p * p * C], channel last (losses/mae_vit_loss.py)."""
    B, C, H, W = images.shape
    h, w = H // patch_size, W // patch_size
    x = images.reshape(B, C, h, patch_size, w, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, h * w, patch_size * patch_size * C)


def decode(state: State, tokens: Tensor, ids_restore: Tensor, num_heads: int) -> Tensor:
    """Predicted patches [B, L, p * p * C] (models/vit/masked_decoder.py)."""
    x = linear(state, "embed", tokens)
    B, L = ids_restore.shape
    num_masked = L - (x.shape[1] - 1)
    patches = torch.cat([x[:, 1:], state["mask_token"].expand(B, num_masked, -1)], dim=1)
    patches = patches[torch.arange(B)[:, None], ids_restore] + state["pos_embed"]
    x = run_blocks(state, torch.cat([x[:, :1], patches], dim=1), num_heads)
    return linear(state, "pred", x)[:, 1:]


def reconstruction_loss(
    predicted: Tensor, images: Tensor, ids_restore: Tensor, num_keep: int
) -> Tensor:
    """Mean squared error to the patch-normalised pixels over masked patches (mae_vit_loss.py)."""
    patch_size = round(math.sqrt(predicted.shape[-1] / images.shape[1]))
    target = patchify(images, patch_size)
    mean = target.mean(dim=-1, keepdim=True)
    variance = (target - mean).square().sum(dim=-1, keepdim=True) / (target.shape[-1] - 1)
    target = (target - mean) / (variance + 1e-6).sqrt()
    mask = (ids_restore >= num_keep).to(predicted.dtype)  # 1 = removed
    return ((predicted - target).square().mean(dim=-1) * mask).sum() / mask.sum()


def batch_norm(state: State, name: str, x: Tensor) -> Tensor:
    """Statistics of these rows; running ones move by 0.1 towards them, with unbiased variance."""
    mean = x.mean(dim=0)
    variance = (x - mean).square().mean(dim=0)
    with torch.no_grad():
        unbiased = variance * len(x) / (len(x) - 1)
        state[f"{name}.running_mean"] = 0.9 * state[f"{name}.running_mean"] + 0.1 * mean
        state[f"{name}.running_var"] = 0.9 * state[f"{name}.running_var"] + 0.1 * unbiased
        state[f"{name}.num_batches_tracked"] = state[f"{name}.num_batches_tracked"] + 1
    x = (x - mean) / (variance + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def projector(state: State, name: str, x: Tensor) -> Tensor:
    """Three layers, each linear and batch norm, ReLU between (contrastive_heads/nnclr_head.py)."""
    x = batch_norm(state, f"{name}.1", linear(state, f"{name}.0", x)).relu()
    x = batch_norm(state, f"{name}.4", linear(state, f"{name}.3", x)).relu()
    return batch_norm(state, f"{name}.7", linear(state, f"{name}.6", x))


def predictor(state: State, x: Tensor) -> Tensor:
    x = batch_norm(state, "predictor.1", linear(state, "predictor.0", x)).relu()
    return linear(state, "predictor.3", x)


def normalize(x: Tensor) -> Tensor:
    return x / x.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)


def search(head: State, z: Tensor, sample_id: Tensor, ranks: Tensor) -> Tensor:
    """Slot of the neighbour of the given rank; own entries score -1 (losses/nnclr_loss.py)."""
    similarity = z @ head["queue"].T
    similarity[head["queue_id"] == sample_id[:, None]] = -1
    order = similarity.sort(dim=1, descending=True, stable=True).indices
    return order[torch.arange(len(z)), ranks]


def crossed_info_nce(
    predicted: list[Tensor], neighbours: list[Tensor], temperature: float
) -> Tensor:
    """Rows are the neighbours of the other view, columns the predictions (losses/nnclr_loss.py)."""
    labels = torch.arange(len(predicted[0]))
    logits0 = neighbours[1] @ normalize(predicted[0]).T / temperature
    logits1 = neighbours[0] @ normalize(predicted[1]).T / temperature
    return (
        functional.cross_entropy(logits0, labels) + functional.cross_entropy(logits1, labels)
    ) / 2


def enqueue(head: State, z: Tensor, label: Tensor, sample_id: Tensor) -> None:
    """First in, first out, one slot at a time, wrapping round (contrastive_head_base.py)."""
    pointer = int(head["queue_ptr"])
    for row in range(len(z)):
        for name, source in (("queue", z), ("queue_y", label), ("queue_id", sample_id)):
            head[name][pointer] = source[row]
        pointer = (pointer + 1) % len(head["queue"])
    head["queue_ptr"] = torch.tensor([pointer])


def label_hit_rate(label: Tensor, neighbour_label: Tensor) -> float:
    """Share of equal labels among the rows where both are known (-1: none)."""
    labelled = (label >= 0) & (neighbour_label >= 0)
    hits = labelled & (label == neighbour_label)
    return float(hits.sum()) / max(1, int(labelled.sum()))


def nnclr(
    head: State,
    pooled: tuple[Tensor, ...],
    sample_id: Tensor,
    label: Tensor,
    settings: Settings,
    step: int,
) -> tuple[Tensor, float]:
    """Loss and neighbour accuracy; then view 0 enters the queue (nnclr_ema_queue_head.py).

    Each view is a forward of its own through the head, so that batch statistics are per view.
    """
    predicted, z, slots = [], [], []
    for view, x in enumerate(pooled):
        online = projector(head, "projector", x)
        if settings.target_ema is None:
            projected = online.detach()
        else:
            with torch.no_grad():
                projected = projector(head, "target_projector", x)
        predicted.append(predictor(head, online))
        z.append(normalize(projected))
        rows = range(len(x))
        ranks = picked_ranks(settings.topk, seed=settings.seed, step=step, view=view, rows=rows)
        slots.append(search(head, z[view], sample_id, ranks))
    neighbours = [head["queue"][slots[0]], head["queue"][slots[1]]]
    accuracy = label_hit_rate(label, head["queue_y"][slots[0]])
    loss = crossed_info_nce(predicted, neighbours, settings.temperature)
    enqueue(head, z[0], label, sample_id)
    return loss, accuracy


def start_target(head: State) -> None:
    """From stage 2 to stage 3: the target projector starts as a copy of the online one."""
    for name in [name for name in head if name.startswith("projector.")]:
        head[f"target_{name}"] = head[name].detach().clone()


@torch.no_grad()
def update_target(head: State, decay: float) -> None:
    """t = f * t + (1 - f) * s for parameters, buffers copied, after the optimiser's step."""
    for name in [name for name in head if name.startswith("projector.")]:
        if name.endswith((".weight", ".bias")):
            head[f"target_{name}"] = decay * head[f"target_{name}"] + (1 - decay) * head[name]
        else:
            head[f"target_{name}"] = head[name].clone()


@torch.no_grad()
def update_encoder_ema(average: State, encoder: State, decay: float) -> None:
    """All parameters, frozen ones too; the positions are a buffer (loggers/ema_logger.py)."""
    for name, value in encoder.items():
        average[name] = (
            value.clone() if name == "pos_embed" else decay * average[name] + (1 - decay) * value
        )


def trainable_encoder(state: State, frozen_blocks: int | None) -> list[str]:
    """Without the stem (patch_embed, cls_token) and the first blocks when any block is frozen."""
    if frozen_blocks is None:
        return []
    frozen = [f"blocks.{i}." for i in range(frozen_blocks)]
    frozen += ["patch_embed.", "cls_token"] if frozen_blocks > 0 else []
    return [name for name in state if name != "pos_embed" and not name.startswith(tuple(frozen))]


def trainable_head(state: State) -> list[str]:
    return [
        name
        for name in state
        if name.startswith(("projector.", "predictor.")) and name.endswith((".weight", ".bias"))
    ]


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Stem decay^(depth + 1), block i decay^(depth - i), final norm 1 (freezers and lr scaling)."""
    if name.startswith("norm."):
        return 1.0
    if name.startswith("blocks."):
        return decay ** (depth - int(name.split(".")[1]))
    return decay ** (depth + 1)


def schedule(update: int, total: int, warmup: int) -> float:
    """(t + 1) / (W + 1) during W warm-up updates, then (1 + cos(pi * t / (T - W))) / 2."""
    if update < warmup:
        return (update + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (update - warmup) / (total - warmup))) / 2


def encoder_rates(
    state: State, names: list[str], settings: Settings, update: int
) -> dict[str, float]:
    """base lr * batch * views / 256 * schedule * layer scale, per parameter."""
    lr = settings.encoder_lr * settings.batch_size * settings.num_views / 256
    lr *= schedule(update, settings.total_updates, settings.warmup_updates)
    depth = count_blocks(state)
    return {name: lr * layer_scale(name, depth, settings.layer_decay) for name in names}


def other_rates(names: list[str], settings: Settings, update: int) -> dict[str, float]:
    """The same for the decoder or the head, without layer decay."""
    lr = settings.other_lr * settings.batch_size * settings.num_views / 256
    lr *= schedule(update, settings.total_updates, settings.warmup_updates)
    return dict.fromkeys(names, lr)


@torch.no_grad()
def adamw(
    state: State,
    grads: State,
    moments: Moments,
    rates: dict[str, float],
    weight_decay: float,
    settings: Settings,
) -> None:
    """Decoupled weight decay (Loshchilov & Hutter, algorithm 2); none on biases and ndim <= 1."""
    beta1, beta2 = settings.betas
    moments.updates += 1
    for name, g in grads.items():
        p, lr = state[name], rates[name]
        decays = p.ndim > 1 and not name.endswith(".bias")
        p = p * (1 - lr * weight_decay) if decays else p
        zero = torch.zeros_like(g)
        m = moments.first[name] = beta1 * moments.first.get(name, zero) + (1 - beta1) * g
        v = moments.second[name] = beta2 * moments.second.get(name, zero) + (1 - beta2) * g * g
        m = m / (1 - beta1**moments.updates)
        v = v / (1 - beta2**moments.updates)
        state[name] = p - lr * m / (v.sqrt() + settings.eps)


def leaves(state: State, names: list[str]) -> State:
    """A copy of the dictionary in which exactly these entries require a gradient."""
    return {n: v.detach().clone().requires_grad_(n in names) for n, v in state.items()}


def gradients(loss: Tensor, parts: dict[str, State]) -> dict[str, State]:
    """Gradient of the loss to every leaf of every sub-model."""
    named = [(part, name) for part in parts for name, v in parts[part].items() if v.requires_grad]
    values = torch.autograd.grad(loss, [parts[part][name] for part, name in named])
    grads: dict[str, State] = {part: {} for part in parts}
    for (part, name), value in zip(named, values, strict=True):
        grads[part][name] = value
    return grads


def update_parameters(
    parts: dict[str, State],
    grads: dict[str, State],
    moments: dict[str, Moments],
    settings: Settings,
    update: int,
) -> dict[str, dict[str, float]]:
    """One AdamW per sub-model, each with its own rates and weight decay; returns the rates."""
    rates = {}
    for part, state in parts.items():
        if part == "encoder":
            rates[part] = encoder_rates(state, list(grads[part]), settings, update)
            weight_decay = settings.encoder_weight_decay
        else:
            rates[part] = other_rates(list(grads[part]), settings, update)
            weight_decay = settings.other_weight_decay
        adamw(state, grads[part], moments[part], rates[part], weight_decay, settings)
    return rates


@dataclass(frozen=True)
class MaskedPass:
    """A decoder, the patches of this update, and the weight of the reconstruction loss."""

    decoder: State
    ids_keep: Tensor  # [B, Nk], rows in view-major order
    ids_restore: Tensor  # [B, L]
    weight: float = 1.0

    def leaves(self) -> State:
        return leaves(self.decoder, [name for name in self.decoder if name != "pos_embed"])

    def loss(self, graph: dict[str, State], images: Tensor, settings: Settings) -> Tensor:
        tokens = encode(graph["encoder"], images, settings.num_heads, self.ids_keep)
        predicted = decode(graph["decoder"], tokens, self.ids_restore, settings.decoder_heads)
        num_keep = self.ids_keep.shape[1]
        return self.weight * reconstruction_loss(predicted, images, self.ids_restore, num_keep)


def pretrain_step(
    encoder: State,
    masked: MaskedPass,
    moments: dict[str, Moments],
    views: Tensor,
    settings: Settings,
    update: int,
) -> StepRecord:
    """Stage 1 (paper, section 3): one MAE update on views [V, n, C, H, W]."""
    graph = {
        "encoder": leaves(encoder, trainable_encoder(encoder, settings.frozen_blocks)),
        "decoder": masked.leaves(),
    }
    loss = masked.loss(graph, views.flatten(0, 1), settings)
    grads = gradients(loss, graph)
    parts = {"encoder": encoder, "decoder": masked.decoder}
    rates = update_parameters(parts, grads, moments, settings, update)
    return StepRecord(loss.detach(), grads, rates)


def contrastive_step(
    encoder: State,
    head: State,
    average: State | None,
    moments: dict[str, Moments],
    batch: tuple[Tensor, Tensor, Tensor],
    settings: Settings,
    update: int,
    masked: MaskedPass | None = None,
) -> StepRecord:
    """Stage 2 (no target projector, frozen encoder) and stage 3 (paper, sections 3.2 and 3.3).

    `masked` adds a second encoder pass and its loss, which the paper's stage 3 does not have.
    """
    views, sample_id, label = batch  # [2, n, C, H, W], [n], [n]
    images, parts = views.flatten(0, 1), {"encoder": encoder, "head": head}
    graph = {
        "encoder": leaves(encoder, trainable_encoder(encoder, settings.frozen_blocks)),
        "head": leaves(head, trainable_head(head)),
    }
    pooled = pool(encode(graph["encoder"], images, settings.num_heads), settings.pooling).chunk(2)
    loss, accuracy = nnclr(graph["head"], pooled, sample_id, label, settings, update)
    if masked is not None:
        graph["decoder"], parts["decoder"] = masked.leaves(), masked.decoder
        loss = loss + masked.loss(graph, images, settings)
    grads = gradients(loss, graph)
    head.update({name: value.detach() for name, value in graph["head"].items()})
    rates = update_parameters(parts, grads, moments, settings, update)
    update_averages(encoder, head, average, settings)
    return StepRecord(loss.detach(), grads, rates, accuracy)


def update_averages(encoder: State, head: State, average: State | None, settings: Settings) -> None:
    """Both moving averages, after the optimiser's step."""
    if settings.target_ema is not None:
        update_target(head, settings.target_ema)
    if average is not None and settings.encoder_ema is not None:
        update_encoder_ema(average, encoder, settings.encoder_ema)
