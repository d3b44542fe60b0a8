"""Other people's encoders in and out.

Read: ml-jku/MAE-CT's `.th`, facebookresearch/mae's `.pth`, timm's files, safetensors, and
checkpoints that hold such an encoder somewhere inside (MSN's `target_encoder`, MoCo v3's
`base_encoder`, iBOT's `state_dict`, a whole model's `encoder.`). All use the same names within the
encoder; they differ in what surrounds it and in `pos_embed`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from maect_fast.models.encoder import Encoder
from maect_fast.names import listed, printable, shortened
from maect_fast.tensor_file import read_tensor_file

__all__ = ["FoundEncoder", "check_fit", "export_timm", "find_encoder", "load_encoder"]

# The parameter that every encoder has, by which it is found within a file.
ANCHOR = "patch_embed.proj.weight"
# Where a file holds several encoders, the one whose features are meant: MSN's, MoCo v3's, our EMA.
PREFERRED = ("target_encoder", "base_encoder", "encoder_ema")
# Extra parameters under these names would change the encoder's function, so they are never dropped.
ENCODER_NAMES = (
    "blocks.",
    "patch_embed.",
    "norm.",
    "norm_pre.",
    "cls_token",
    "reg_token",
    "dist_token",
)
# Attention heads of the published ViTs (T, S, B, L, H) by their width: no weight tells them.
NUM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


class FoundEncoder(NamedTuple):
    """An encoder's weights within what a file holds."""

    where: str
    weights: dict[str, Tensor]
    beside: list[str]
    """Names of the tensors around the encoder."""

    def sizes(self) -> dict[str, int]:
        """The settings `encoder.*` that the weights fit, but for what they do not tell.

        `img_size` is missing where there is no `pos_embed`, `num_heads` where the width is none of
        the published ViTs'.

        Raises:
            ValueError: tensors of another number of dimensions than an encoder's.
        """
        proj, pos_embed = self.weights[ANCHOR], self.weights.get("pos_embed")
        for key, value, ndim in ((ANCHOR, proj, 4), ("pos_embed", pos_embed, 3)):
            if value is not None and value.ndim != ndim:
                raise ValueError(
                    f"{self.where}: {key} is {list(value.shape)}, expected {ndim} dimensions"
                )
        width, in_chans, _, patch_size = proj.shape
        blocks = {key.split(".")[1] for key in self.weights if key.startswith("blocks.")}
        sizes = {"in_chans": in_chans, "patch_size": patch_size, "embed_dim": width}
        sizes["depth"] = len(blocks)
        if pos_embed is not None:
            # With or without the class token's row.
            sizes["img_size"] = isqrt(pos_embed.shape[1]) * patch_size
        if width in NUM_HEADS:
            sizes["num_heads"] = NUM_HEADS[width]
        return sizes


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
        ValueError: the source holds no encoder, or one of other sizes or with other layers; the
            message names the parameters.
    """
    found = source if isinstance(source, FoundEncoder) else find_encoder(source)
    missing, dropped = check_fit(encoder, found)
    lines = [f"encoder from {found.where}"]
    own = encoder.state_dict()
    state = {key: value for key, value in found.weights.items() if key in own}
    if "pos_embed" in state:
        state |= _adapt_positions(state, encoder.grid_size, lines)
    encoder.load_state_dict(own | state)
    if missing:
        lines.append(f"missing there, kept as it was: {_summary(missing)}")
    if dropped or found.beside:
        lines.append(f"there, but not used: {_summary([*dropped, *found.beside])}")
    return lines


def find_encoder(source: str | Path | Mapping[str, Any]) -> FoundEncoder:
    """The one encoder in a file, or in what it holds: within nested dicts and name prefixes.

    Raises:
        ValueError: there is none, or more than one.
    """
    name = "a state dict" if isinstance(source, Mapping) else printable(source)
    content = source if isinstance(source, Mapping) else _read(Path(source))
    places = list(_places(content, name))
    if len(places) > 1:
        places = [place for place in places if place.preferred] or places
    if not places:
        raise ValueError(f"{name}: expected a ViT encoder, found nothing named {ANCHOR}")
    if len(places) > 1:
        shown = listed([place.where for place in places], "; ")
        raise ValueError(f"{name}: expected one ViT encoder, found {len(places)}: {shown}")
    where, prefix, tensors, _ = places[0]
    return FoundEncoder(
        where,
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)},
        [k for k in tensors if not k.startswith(prefix)],
    )


def check_fit(encoder: Encoder, found: FoundEncoder) -> tuple[list[str], list[str]]:
    """Refuse weights that cannot become the encoder's, which may be on the meta device.

    Returns:
        Names that the source lacks, and that it has beyond the encoder's.

    Raises:
        ValueError: see `load_encoder`.
    """
    where, weights, _ = found
    own = encoder.state_dict()
    missing, dropped = _compare(own, weights, where)
    for key in (key for key in weights if key in own):
        if reason := _unfit(key, weights[key], own[key]):
            raise ValueError(f"{where}: {key} {reason} ({encoder.config.name})")
    return missing, dropped


def export_timm(encoder: Encoder, *, class_row: bool = True) -> dict[str, Tensor]:
    """State dict of timm's (and facebookresearch/mae's) ViT without a classifier.

    Args:
        encoder: what to export.
        class_row: True prepends the zero row for the class token that timm's ViTs expect in
            `pos_embed` ([1, 1 + L, D]); False is for models that were built with
            `no_embed_class=True` ([1, L, D]).
    """
    state = {name: value.detach().clone() for name, value in encoder.state_dict().items()}
    if class_row:
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    return state


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return read_tensor_file(path)
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {error}") from error


class _Place(NamedTuple):
    where: str
    prefix: str
    """What the names of the encoder's tensors start with."""
    tensors: dict[str, Tensor]
    preferred: bool


def _places(content: Mapping[str, Any], name: str) -> Iterator[_Place]:
    """Where encoders are; each dict is looked into once, however deep it lies."""
    pending, seen = [(content, name, False)], {id(content)}
    while pending:
        inside, where, preferred = pending.pop()
        names = {k: v for k, v in inside.items() if isinstance(k, str)}
        tensors = {k: v for k, v in names.items() if isinstance(v, Tensor)}
        for key in tensors:
            if key.endswith(ANCHOR):
                prefix = key.removesuffix(ANCHOR)
                yield _Place(
                    f"{where}, {shortened(prefix, 80)}*" if prefix else where,
                    prefix,
                    tensors,
                    preferred or any(p in prefix for p in PREFERRED),
                )
        for key, value in reversed(names.items()):
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                below = shortened(f"{where}, {key}", 300)
                pending.append((value, below, preferred or any(p in key for p in PREFERRED)))


def _compare(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str
) -> tuple[list[str], list[str]]:
    """Names that the source lacks, and that it has beyond the encoder's; refuses what matters."""
    missing = [key for key in own if key not in weights]
    dropped = [key for key in weights if key not in own]
    lacking = [key for key in missing if key != "pos_embed"]
    extra = [key for key in dropped if key.startswith(ENCODER_NAMES)]
    for keys, verb in ((lacking, "lacks"), (extra, "has, beyond this encoder,")):
        if keys:
            raise ValueError(f"{where} {verb} {listed(keys)}")
    return missing, dropped


def _unfit(key: str, value: Tensor, own: Tensor) -> str | None:
    """Why a tensor cannot become the encoder's; positions may be those of another grid."""
    shape, wanted = list(value.shape), list(own.shape)
    if shape != wanted and not (key == "pos_embed" and shape[::2] == wanted[::2]):
        return f"is {shape}, this encoder needs {wanted}"
    if key == "pos_embed" and not _is_grid(shape[1]):
        return f"should have the rows of a square grid, got {shape[1]}"
    if not value.is_floating_point():
        return f"is {value.dtype}, this encoder needs floating point"
    if not bool(value.isfinite().all()):
        return "holds NaN or infinity"
    return None


def _is_grid(rows: int) -> bool:
    """Whether they are those of a square grid of patches, perhaps with the class token's."""
    return rows > 0 and rows - isqrt(rows) ** 2 in (0, 1)


def _summary(names: Iterable[str]) -> str:
    """The names, those below one module counted: `cls_token, decoder_blocks.* (96)`."""
    counts = Counter(name.split(".")[0] + (".*" if "." in name else "") for name in names)
    return listed([name if count == 1 else f"{name} ({count})" for name, count in counts.items()])


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
