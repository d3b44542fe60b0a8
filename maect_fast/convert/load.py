"""An encoder of ours with the weights of a file."""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from maect_fast.convert.find import ConvertError, FoundEncoder, find_encoder, summary
from maect_fast.models.encoder import TIMM_EPS, Encoder
from maect_fast.names import listed

__all__ = ["check_fit", "check_possible", "export_timm", "load_encoder"]


def load_encoder(
    encoder: Encoder, source: str | Path | Mapping[str, Any] | FoundEncoder
) -> list[str]:
    """Fill the encoder with the weights of a file.

    `pos_embed` may have a row for the class token, which is added into `cls_token`, and another
    grid, from which it is resampled bicubically without antialiasing. Without one, the encoder's
    fixed positions stay.

    Args:
        encoder: changed in place.
        source: a `.safetensors` file, a file of `torch.save` (read without running code of its
            own), what it holds, or what `find_encoder` found there.

    Returns:
        Lines that say where the encoder was found, what was changed on the way, and which names
        were missing in the source or had no use here.

    Raises:
        ConvertError: the source holds no encoder, or one of other sizes or with other layers; the
            message names the parameters.
    """
    found = source if isinstance(source, FoundEncoder) else find_encoder(source)
    missing = check_fit(encoder, found)
    lines = [f"encoder from {found.where}"]
    if found.others:
        lines.append(
            f"{found.name} was taken, not {listed(found.others)} (maect-fast convert import "
            "--encoder takes another)"
        )
    if found.stated.eps is None and found.norm_eps != TIMM_EPS:
        own = encoder.config.norm_eps
        lines.append(
            f"norms have eps {own:g} here; nothing says theirs, of which {found.norm_eps:g} is the "
            "default there (encoder.norm_eps= sets ours)"
        )
    state = dict(found.weights)
    if "pos_embed" in state:
        state |= _adapt_positions(state, encoder.grid_size, lines)
    encoder.load_state_dict(encoder.state_dict() | state)
    if missing:
        lines.append(f"missing there, kept as it was: {listed(summary(missing))}")
    if found.beside:
        lines.append(f"there, but not used: {listed(summary(found.beside))}")
    return lines


def export_timm(encoder: Encoder, *, class_row: bool = True) -> dict[str, Tensor]:
    """State dict of timm's (and facebookresearch/mae's) ViT without a classifier.

    Args:
        encoder: what to export.
        class_row: True prepends the zero row for the class token that timm's ViTs expect in
            `pos_embed` ([1, 1 + L, D]); False is for models that were built with
            `no_embed_class=True`, and MAE-CT's ([1, L, D]).
    """
    state = {name: value.detach().clone() for name, value in encoder.state_dict().items()}
    if class_row:
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    return state


def check_fit(encoder: Encoder, found: FoundEncoder) -> list[str]:
    """Refuse weights that cannot become the encoder's, which may be on the meta device.

    Returns:
        Names that the source lacks.

    Raises:
        ConvertError: see `load_encoder`.
    """
    check_possible(found)
    where, weights = found.where, found.weights
    own = encoder.state_dict()
    missing = [key for key in own if key not in weights]
    lacking = [key for key in missing if key != "pos_embed"]
    extra = [*(key for key in weights if key not in own), *found.extra]
    for keys, verb in ((lacking, "lacks"), (extra, "has, beyond this encoder,")):
        if keys:
            raise ConvertError(f"{where} {verb} {listed(keys)}")
    for key, value in weights.items():
        if reason := _unfit(key, value, own[key]):
            raise ConvertError(f"{where}: {key} {reason} ({encoder.config.name})")
    attn: Any = encoder.blocks[0].attn
    if found.stated.num_heads not in (None, attn.num_heads):
        raise ConvertError(
            f"{where}: its blocks have {found.stated.num_heads} heads, this encoder's "
            f"{attn.num_heads}; set encoder.num_heads={found.stated.num_heads}"
        )
    if found.stated.eps not in (None, encoder.config.norm_eps):
        raise ConvertError(
            f"{where}: its norms have eps {found.stated.eps:g}, this encoder's "
            f"{encoder.config.norm_eps:g}; set encoder.norm_eps={found.stated.eps:g}"
        )
    return missing


def check_possible(found: FoundEncoder) -> None:
    """Refuse weights that no encoder of ours can have.

    Raises:
        ConvertError: says why, and what to use instead.
    """
    if reasons := found.obstacles():
        raise ConvertError(
            f"{found.where} ({found.format.name}): an encoder of maect-fast cannot have "
            f"{listed(reasons)}; {found.instead()}"
        )


def _unfit(key: str, value: Tensor, own: Tensor) -> str | None:
    """Why a tensor cannot become the encoder's; positions may be those of another grid."""
    shape, wanted = list(value.shape), list(own.shape)
    if shape != wanted and not (key == "pos_embed" and shape[::2] == wanted[::2]):
        return f"is {shape}, this encoder needs {wanted}"
    if key == "pos_embed" and not _is_grid(shape[1]):
        return f"should have the rows of a square grid, got {shape[1]}"
    if not value.is_floating_point():
        return f"is {value.dtype}, this encoder needs floating point"
    if not value.is_meta and not bool(value.isfinite().all()):
        return "holds NaN or infinity"
    return None


def _is_grid(rows: int) -> bool:
    """Whether they are those of a square grid of patches, perhaps with the class token's."""
    return rows > 0 and rows - isqrt(rows) ** 2 in (0, 1)


def _adapt_positions(
    state: Mapping[str, Tensor], grid_size: int, lines: list[str]
) -> dict[str, Tensor]:
    """`pos_embed` without a class row and on the wanted grid; `cls_token` plus that row."""
    pos_embed, cls_token = state["pos_embed"].float(), state["cls_token"].float()
    file_size = isqrt(pos_embed.shape[1])
    if pos_embed.shape[1] == file_size**2 + 1:
        class_row, pos_embed = pos_embed[:, :1], pos_embed[:, 1:]
        if class_row.any():
            cls_token = cls_token + class_row
            lines.append("pos_embed: the class token's row was added into cls_token")
    if file_size != grid_size:
        grid = pos_embed.transpose(1, 2).reshape(1, -1, file_size, file_size)
        grid = F.interpolate(grid, size=(grid_size, grid_size), mode="bicubic", antialias=False)
        pos_embed = grid.flatten(2).transpose(1, 2)
        lines.append(
            f"pos_embed: resampled from {file_size}x{file_size} to {grid_size}x{grid_size}"
        )
    return {"pos_embed": pos_embed, "cls_token": cls_token}
