"""Features of a frozen encoder: extracted once, cached, evaluated many times."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from maect_fast.checkpoint import write_atomically
from maect_fast.data import Feed
from maect_fast.models.encoder import pooled_features
from maect_fast.names import printable, shortened
from maect_fast.tensor_file import read_tensor_file

__all__ = [
    "Features",
    "concatenate",
    "extract_features",
    "load_features",
    "pooled_attention",
    "raw_pixels",
    "save_features",
]


@dataclass(frozen=True, slots=True)
class Features:
    """One feature row and one label per image.

    Raises:
        ValueError: shapes that do not fit together, or rows that hold NaN or infinity (says how
            many).
        TypeError: a dtype other than float32 for `x` or int64 for `label`.
    """

    x: Tensor
    """[N, D] float32, on the CPU."""
    label: Tensor
    """[N] int64; -1 where the class is unknown."""

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.label.shape != self.x.shape[:1]:
            raise ValueError(
                f"features: expected x [N, D] and label [N], got {list(self.x.shape)} and "
                f"{list(self.label.shape)}"
            )
        if self.x.dtype != torch.float32 or self.label.dtype != torch.int64:
            raise TypeError(
                f"features: expected x float32 and label int64, got {self.x.dtype} and "
                f"{self.label.dtype}"
            )
        broken = int((~self.x.isfinite().all(dim=1)).sum())
        if broken:
            raise ValueError(f"features: {broken} of {len(self.x)} rows hold NaN or infinity")

    def __len__(self) -> int:
        return len(self.x)

    def labelled(self) -> "Features":
        """The rows whose class is known."""
        known = self.label >= 0
        return self if bool(known.all()) else Features(x=self.x[known], label=self.label[known])


def extract_features(
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    pooling: Literal["class_token", "mean_patch"],
    device: torch.device | str = "cpu",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> Features:
    """Run the encoder in evaluation mode and pool its final tokens.

    Args:
        encoder: maps images [n, C, H, W] to tokens [n, 1 + L, D]; already on `device`. Its training
            mode is left as it was found.
        batches: pairs (normalised images [n, C, H, W] float32, labels [n] int64).
        pooling: `class_token`, or `mean_patch` for the mean over the L patch tokens.
        device: where the encoder runs.
        precision: `bf16` runs under autocast, as the official evaluation does; `auto` is bf16 on a
            GPU, fp32 on a CPU.

    Returns:
        Features in the order of the batches, fp32 on the CPU.

    Raises:
        ValueError: no batches, or non-finite features.
    """
    device = torch.device(device)
    autocast = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    training = encoder.training
    encoder.eval()
    rows, labels = [], []
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            for images, label in Feed(device)(batches):
                rows.append(pooled_features(encoder, images, pooling).float().cpu())
                labels.append(label)
    finally:
        encoder.train(training)
    return _stack(rows, labels)


def raw_pixels(
    batches: Iterable[tuple[Tensor, Tensor]], *, mean: Sequence[float], std: Sequence[float]
) -> Features:
    """The baseline that needs no model: pixel values in [0, 1], flattened to D = C * H * W.

    `mean` and `std` are those the batches were normalised with, and are undone: cosines depend on
    where zero is.
    """
    shift = torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1)
    rows, labels = [], []
    for images, label in batches:
        rows.append((images.cpu() * scale + shift).flatten(1))
        labels.append(label)
    return _stack(rows, labels)


@torch.no_grad()
def pooled_attention(
    encoder: nn.Module, images: Tensor, pooling: Literal["class_token", "mean_patch"]
) -> Tensor:
    """Attention weights in the last block from the tokens that are pooled to the patches.

    Computed from the input of the block's attention module, so it does not matter whether that
    module ever holds the weights itself (a fused one does not).

    Args:
        encoder: a timm-style ViT: `blocks[-1].attn` has `qkv`, `num_heads` and perhaps `q_norm`,
            `k_norm`, `scale`; `patch_embed.grid_size` is the grid of patches, which are the last
            tokens of the sequence.
        images: [n, C, H, W] normalised, on the encoder's device.
        pooling: `class_token`: what that token looks at; `mean_patch`: the mean over what all
            patches look at.

    Returns:
        [n, heads, h, w] float32 on the CPU. Each head sums to one minus what goes to other tokens
        than patches.
    """
    blocks = cast("nn.Sequential", encoder.get_submodule("blocks"))
    attn: Any = blocks[-1].attn
    captured: list[Tensor] = []
    hook = attn.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    training = encoder.training
    try:
        encoder.eval()(images)
    finally:
        hook.remove()
        encoder.train(training)
    x = captured[0]
    n, N, _ = x.shape  # images, tokens
    q, k = attn.qkv(x).view(n, N, 3, attn.num_heads, -1).transpose(1, 3)[:, :, :2].unbind(2)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    scale = getattr(attn, "scale", q.shape[-1] ** -0.5)
    h, w = cast("tuple[int, int]", encoder.get_submodule("patch_embed").grid_size)
    patches = slice(N - h * w, N)
    logits: Tensor = q[:, :, patches if pooling == "mean_patch" else slice(1)] * scale @ k.mT
    weights = logits.float().softmax(dim=-1).mean(dim=2)  # [n, heads, N] fp32
    return weights[:, :, patches].reshape(n, -1, h, w).cpu()


def concatenate(first: Features, second: Features) -> Features:
    """All rows of both."""
    return Features(x=torch.cat([first.x, second.x]), label=torch.cat([first.label, second.label]))


def save_features(features: Features, path: Path) -> None:
    """Write a safetensors file with the tensors `x` and `label`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"x": features.x.contiguous(), "label": features.label.contiguous()}
    write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors)))


def load_features(path: Path) -> Features:
    """Read what `save_features`, or `maect-fast extract` to a safetensors file, wrote.

    Raises:
        ValueError: the file is not readable, or holds other tensors.
    """
    try:
        tensors = read_tensor_file(path)
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {error}") from error
    if set(tensors) - {"id"} != {"x", "label"}:
        found = shortened(sorted(tensors), 200)
        raise ValueError(f"{printable(path)}: expected the tensors x and label, got {found}")
    return Features(x=tensors["x"], label=tensors["label"])


def _stack(rows: list[Tensor], labels: list[Tensor]) -> Features:
    if not rows:
        raise ValueError("features: expected at least one batch of images, got none")
    return Features(x=torch.cat(rows), label=torch.cat(labels).cpu())
