"""Which encoders a file holds, and one of them under our names.

A file is what `torch.save` or safetensors wrote: dicts within dicts, names with prefixes. Every
dict is looked into for the tensors that a layout is known by; what surrounds them says the format.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maect_fast.config import NORM_EPS
from maect_fast.convert.formats import (
    FOR_TRAINING,
    FORMATS,
    LAYOUTS,
    LEFT_OUT,
    NUM_HEADS,
    OBSTACLES,
    PREFERRED,
    STEMS,
    Format,
    Names,
)
from maect_fast.errors import UserError
from maect_fast.names import listed, printable, shortened
from maect_fast.tensor_file import open_regular, read_metadata, read_tensor_file

__all__ = [
    "ConvertError",
    "FoundEncoder",
    "Stated",
    "find_encoder",
    "summary",
    "weights_file",
    "why_left_out",
]

OWN_FORMAT = "maect-fast"
# What Hugging Face's and timm's folders have beside a config.json.
FOLDER_FILE = "model.safetensors"
MAX_CONFIG = 1 << 20


class ConvertError(UserError, ValueError):
    """A file without an encoder that ours can be; the message says why, and what can be done."""


@dataclass(kw_only=True, slots=True)
class Stated:
    """What is said of an encoder beside its tensors; None where nothing is."""

    num_heads: int | None = None
    decoder_heads: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    pooling: str | None = None
    activation: str | None = None
    eps: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundEncoder:
    """An encoder's weights within what a file holds, under our names."""

    where: str
    """File and place within."""
    name: str
    """Which encoder of the file."""
    others: list[str]
    """The encoders that were not taken."""
    format: Format
    weights: dict[str, Tensor]
    """What has a name in ours."""
    extra: dict[str, Tensor]
    """What belongs to the encoder, and has none."""
    beside: list[str]
    """Names of the tensors around the encoder."""
    elsewhere: list[str]
    """Names of the tensors in other dicts of the file."""
    decoder: dict[str, Tensor]
    """MAE's decoder, whole, or nothing."""
    stated: Stated
    anchor: Tensor = field(repr=False)
    """The patch embedding's weight."""
    depth: int

    @property
    def num_heads(self) -> int | None:
        """Attention heads: as stated, or those of the published ViTs of this width."""
        width = self.anchor.shape[0]
        return self.stated.num_heads or NUM_HEADS.get(width)

    @property
    def norm_eps(self) -> float:
        """Of the LayerNorms: as stated, or what the library that wrote the file has."""
        eps = self.stated.eps
        return LAYOUTS[self.format.layout].norm_eps if eps is None else eps

    def sizes(self) -> dict[str, float]:
        """The settings `encoder.*` that the weights fit, but for what nothing tells.

        `img_size` is missing where there is no `pos_embed`, `num_heads` where the width is none of
        the published ViTs' and the file does not say.

        Raises:
            ConvertError: `pos_embed` of another number of dimensions than an encoder's.
        """
        pos_embed = self.weights.get("pos_embed")
        if pos_embed is not None and pos_embed.ndim != 3:
            raise ConvertError(
                f"{self.where}: pos_embed is {list(pos_embed.shape)}, expected 3 dimensions"
            )
        width, in_chans, _, patch_size = self.anchor.shape
        sizes: dict[str, float] = {"in_chans": in_chans, "patch_size": patch_size}
        sizes |= {"embed_dim": width, "depth": self.depth, "norm_eps": self.norm_eps}
        if pos_embed is not None:
            # With or without the class token's row.
            sizes["img_size"] = isqrt(pos_embed.shape[1]) * patch_size
        if self.num_heads is not None:
            sizes["num_heads"] = self.num_heads
        return sizes

    def settings(self) -> dict[str, Any]:
        """A layer of configuration: `sizes`, and what the file says of images and pooling."""
        stated = self.stated
        augment = {"mean": stated.mean, "std": stated.std}
        layer: dict[str, Any] = {"encoder": (sizes := self.sizes())}
        if None in augment.values() and sizes["in_chans"] == 1:
            # The configuration's own are for three channels: ImageNet's. This is their mean.
            augment = {"mean": [0.449], "std": [0.226]}
        if None not in augment.values():
            layer["augment"] = augment
        if stated.pooling is not None:
            layer["head"] = {"pooling": stated.pooling}
        return layer

    def obstacles(self) -> list[str]:
        """Why no encoder of ours computes the same, each with a name where it has one."""
        layout = LAYOUTS[self.format.layout].obstacle
        reasons = [layout] if layout else []
        for pattern, reason in OBSTACLES:
            name = next((name for name in self.extra if pattern.search(name)), None)
            if name is not None:
                reasons.append(f"{reason} ({shortened(name)})")
        if "cls_token" not in self.weights:
            reasons.append("no class token")
        elif self.weights["cls_token"].ndim == 3 and self.weights["cls_token"].shape[1] > 1:
            reasons.append(f"{self.weights['cls_token'].shape[1]} class tokens")
        if self.stated.activation not in (None, "gelu"):
            reasons.append(f"the activation {shortened(self.stated.activation)}")
        if self.norm_eps not in NORM_EPS:
            reasons.append(f"norms with eps {self.norm_eps:g} (ours is in {NORM_EPS.text})")
        return reasons

    def instead(self) -> str:
        """What to do with an encoder that has obstacles."""
        names = self.format.instead
        name = names.get(self.anchor.shape[0], names.get(None))
        if name is not None:
            return f"evaluate and extract take {name}"
        return "its own library computes its features"


def find_encoder(
    source: str | Path | Mapping[str, Any],
    *,
    encoder: str | None = None,
    with_tensors: bool = True,
) -> FoundEncoder:
    """An encoder in a file, or in what it holds: within nested dicts and name prefixes.

    Args:
        source: a `.safetensors` file, a file of `torch.save` (read without running code of its
            own), a run, a folder with a `model.safetensors`, or what such a file holds.
        encoder: which, where there are several; None takes the first of `PREFERRED`.
        with_tensors: False leaves tensors on the meta device where the file allows that.

    Raises:
        ConvertError: there is none, none of that name, or more than one and none preferred.
    """
    metadata: Mapping[str, str] = {}
    beside: Mapping[str, Any] = {}
    if isinstance(source, Mapping):
        name, content = "a state dict", source
    else:
        name, path = printable(source), weights_file(Path(source))
        try:
            content = read_tensor_file(path, with_tensors=with_tensors)
            metadata = read_metadata(path)
        except ValueError as error:
            raise ConvertError(f"{name}: {error}") from error
        beside = _config_beside(path)
    tree = list(_names(content))
    places = list(_places(content, name))
    if not places:
        stem = next((key for key in tree if STEMS.search(key)), None)
        why = f"; {shortened(stem, 80)} is of a stem of convolutions" if stem else ""
        raise ConvertError(
            f"{name}: expected a ViT encoder, found nothing named {LAYOUTS['timm'].anchor}, nor as "
            f"other libraries name it{why}"
        )
    place, others = _choose(places, encoder, name)
    layout = LAYOUTS[place.layout]
    inside, beside_names = {}, []
    for key, value in place.tensors.items():
        if key.startswith(place.prefix) and key.removeprefix(place.prefix).startswith(layout.inner):
            inside[key.removeprefix(place.prefix)] = value
        else:
            beside_names.append(key.removeprefix(place.prefix))
    weights, extra = _renamed(inside, layout.names)
    dropped = [key for key in extra if FOR_TRAINING.search(key)]
    extra = {key: value for key, value in extra.items() if key not in dropped}
    decoder, _ = _renamed(place.tensors, layout.decoder, anywhere=True)
    if place.layout == "kappamodules" and weights.get("pos_embed") is not None:
        weights["pos_embed"] = _flat_grid(weights["pos_embed"], place.where)
    found_format = _format(tree, place.layout, weights, metadata)
    anchor = place.tensors[place.prefix + layout.anchor]
    if anchor.ndim != 4:
        raise ConvertError(
            f"{place.where}: {layout.anchor} is {list(anchor.shape)}, expected 4 dimensions"
        )
    heads = found_format.num_heads.get(anchor.shape[0])
    own_names = {"/".join((*place.path, key)) for key in place.tensors}
    blocks = {match[1] for key in inside if (match := re.match(layout.block, key))}
    return FoundEncoder(
        where=place.where,
        name=place.name,
        others=others,
        format=found_format,
        weights=weights,
        extra=extra,
        beside=[*dropped, *beside_names],
        elsewhere=[key for key in _tensor_names(content) if key not in own_names],
        decoder=decoder if _is_whole(decoder) else {},
        stated=_stated(content, metadata, beside, heads, place.layout),
        anchor=anchor,
        depth=len(blocks),
    )


def weights_file(path: Path) -> Path:
    """The file that is meant: of a run its last checkpoint, of a folder its model.safetensors."""
    for name in ("checkpoints/last.pt", FOLDER_FILE):
        if (path / name).is_file():
            return path / name
    return path


def summary(names: Iterable[str]) -> list[str]:
    """The names, those below one module counted: `cls_token, decoder_blocks.* (96)`."""
    counts = Counter(re.split(r"[./]", name)[0] + (".*" if "." in name else "") for name in names)
    return [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]


class _Place(NamedTuple):
    where: str
    """In words."""
    name: str
    """Dotted path of dicts, and the prefix of names."""
    path: tuple[str, ...]
    layout: str
    prefix: str
    """What the names of the encoder's tensors start with."""
    tensors: dict[str, Tensor]
    """Of its dict."""


def _dicts(content: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every dict in there with its path; each once, however deep it lies."""
    pending: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), content)]
    seen = {id(content)}
    while pending:
        path, inside = pending.pop()
        yield path, {key: value for key, value in inside.items() if isinstance(key, str)}
        for key, value in reversed(list(inside.items())):
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                # A file can nest more deeply than a name of it is worth.
                pending.append(((*path, str(key))[:8], value))


def _names(content: Mapping[str, Any]) -> Iterator[str]:
    """All names in there, those within dicts behind their path: `state_dict/cls_token`."""
    for path, inside in _dicts(content):
        for key, value in inside.items():
            if not isinstance(value, Mapping):
                yield "/".join((*path, key))


def _tensor_names(content: Mapping[str, Any]) -> Iterator[str]:
    for path, inside in _dicts(content):
        for key, value in inside.items():
            if isinstance(value, Tensor):
                yield "/".join((*path, key))


def _places(content: Mapping[str, Any], file: str) -> Iterator[_Place]:
    """Where encoders are."""
    for path, inside in _dicts(content):
        tensors = {key: value for key, value in inside.items() if isinstance(value, Tensor)}
        found = set()
        where = shortened(", ".join((file, *path)), 300)
        for name, layout in LAYOUTS.items():
            for key in tensors:
                prefix = key.removesuffix(layout.anchor)
                ends = key.endswith(layout.anchor) and (not prefix or prefix.endswith("."))
                if not ends or prefix in found:
                    continue
                if layout.beside and prefix + layout.beside not in tensors:
                    continue
                found.add(prefix)
                place = f"{where}, {shortened(prefix, 80)}*" if prefix else where
                parts = [*path, *prefix.split(".")]
                dotted = ".".join(part for part in parts if part and part != "module")
                yield _Place(place, dotted, path, name, prefix, tensors)


def _choose(places: list[_Place], wanted: str | None, file: str) -> tuple[_Place, list[str]]:
    """One place, and the names of the others."""
    names = [place.name for place in places]
    if wanted is not None:
        found = [place for place in places if place.name == wanted]
        found = found or [place for place in places if wanted in place.name.split(".")]
    elif len(places) == 1:
        found = places
    else:
        ranked = ([p for p in places if word in p.name] for word in PREFERRED)
        found = next((some for some in ranked if some), places)
    if len(found) == 1:
        chosen = found[0]
        return chosen, [place.name for place in places if place is not chosen]
    shown = listed([name or "the file itself" for name in names], "; ")
    if wanted is not None:
        raise ConvertError(f"{file}: expected one encoder {shortened(wanted)}, there are: {shown}")
    raise ConvertError(
        f"{file}: expected one ViT encoder, found {len(places)}: {shown}; maect-fast convert "
        "import FILE --encoder NAME takes one out"
    )


@cache
def _pattern(there: str, anywhere: bool) -> re.Pattern[str]:
    """That a name there follows."""
    escaped = re.escape(there).replace(r"\#", r"(?P<block>\d+)").replace("#", r"(?P<block>\d+)")
    escaped = escaped.replace(r"\*", "(?P<kind>weight|bias)")
    return re.compile(rf"(?:.*\.)?{escaped}" if anywhere else escaped)


def _renamed(
    tensors: Mapping[str, Tensor], names: Names, *, anywhere: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those that have a name in ours, under that; and the others.

    `anywhere`: the names follow any prefix.
    """
    parts: dict[str, dict[int, tuple[str, Tensor]]] = {}
    counts: dict[str, int] = {}
    rest = dict(tensors)
    for key, value in tensors.items():
        for ours, theirs in names:
            for i, there in enumerate(theirs):
                match = _pattern(there, anywhere).fullmatch(key)
                if match is None:
                    continue
                groups = match.groupdict()
                name = ours.replace("#", groups.get("block") or "")
                name = name.replace("*", groups.get("kind") or "")
                parts.setdefault(name, {}).setdefault(i, (key, value))
                counts[name] = len(theirs)
                break
            else:
                continue
            break
    renamed = {}
    for name, found in parts.items():
        if len(found) < counts[name]:
            continue
        values = [found[i][1] for i in sorted(found)]
        if len(values) > 1 and len({value.shape[1:] for value in values}) > 1:
            continue
        renamed[name] = values[0] if len(values) == 1 else torch.cat(values)
        for key, _ in found.values():
            del rest[key]
    return renamed, rest


def _is_whole(decoder: Mapping[str, Tensor]) -> bool:
    """Whether nothing of a decoder is missing, to one block."""
    blocks = {key.split(".")[1] for key in decoder if key.startswith("blocks.")}
    ends = {"mask_token", "pos_embed", "embed.weight", "norm.weight", "pred.weight"}
    return ends <= decoder.keys() and bool(blocks)


def _flat_grid(pos_embed: Tensor, where: str) -> Tensor:
    """Positions [1, h, w, D] as rows [1, L, D]."""
    if pos_embed.ndim != 4 or pos_embed.shape[1] != pos_embed.shape[2]:
        raise ConvertError(
            f"{where}: pos_embed.embed is {list(pos_embed.shape)}, expected a square grid"
        )
    return pos_embed.flatten(1, 2)


def _format(
    tree: list[str], layout: str, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Format:
    if metadata.get("format") == OWN_FORMAT:
        return Format(name=f"{OWN_FORMAT} weights", layout=layout)
    text = "\n".join(tree)
    pos_embed = weights.get("pos_embed")
    rows = pos_embed.shape[-2] if pos_embed is not None and pos_embed.ndim > 1 else 0
    has_row = rows != isqrt(rows) ** 2 if rows else None

    def fits(entry: Format) -> bool:
        return (
            entry.layout == layout
            and all(re.search(pattern, text, re.MULTILINE) for pattern in entry.has)
            and not any(re.search(pattern, text, re.MULTILINE) for pattern in entry.lacks)
            and (entry.class_row is None or entry.class_row == has_row)
        )

    return next(entry for entry in FORMATS if fits(entry))


def _stated(
    content: Mapping[str, Any],
    metadata: Mapping[str, str],
    beside: Mapping[str, Any],
    heads: int | None,
    layout: str,
) -> Stated:
    """What the file, or the config.json beside it, says of the encoder."""
    stated = Stated(num_heads=heads)
    if metadata.get("format") == OWN_FORMAT:
        own = _parsed(metadata.get("settings", ""))
        names = [field.name for field in dataclasses.fields(Stated)]
        stated = Stated(**{name: own[name] for name in names if name in own})
    elif isinstance(content.get("config"), Mapping) and "stage" in content:
        _state_own(stated, content["config"])
    elif isinstance(content.get("ctor_kwargs"), Mapping):
        # ml-jku/MAE-CT@6c82cb6: models/vit/vit_mae.py.
        stated.num_heads = content["ctor_kwargs"].get("attention_heads", heads)
    elif layout == "timm" and "architecture" in beside:
        _state_timm(stated, beside)
    elif layout.startswith("huggingface") and "hidden_size" in beside:
        stated.num_heads = beside.get("num_attention_heads", heads)
        stated.decoder_heads = beside.get("decoder_num_attention_heads")
        stated.activation, stated.eps = beside.get("hidden_act"), beside.get("layer_norm_eps")
    return _checked(stated)


def _state_own(stated: Stated, config: Mapping[str, Any]) -> None:
    """As a checkpoint of ours has it."""
    encoder, decoder = config.get("encoder"), config.get("decoder")
    augment, head = config.get("augment"), config.get("head")
    if isinstance(encoder, Mapping):
        stated.num_heads = encoder.get("num_heads") or _timm_heads(str(encoder.get("name")))
        stated.eps = encoder.get("norm_eps")
    if isinstance(decoder, Mapping):
        stated.decoder_heads = decoder.get("num_heads")
    if isinstance(augment, Mapping):
        stated.mean, stated.std = augment.get("mean"), augment.get("std")
    if isinstance(head, Mapping):
        stated.pooling = head.get("pooling")


def _state_timm(stated: Stated, config: Mapping[str, Any]) -> None:
    """As timm's config.json has it."""
    given, trained = config.get("model_args"), config.get("pretrained_cfg")
    if isinstance(given, Mapping):
        stated.num_heads = given.get("num_heads")
        if config.get("global_pool") == "avg" or given.get("global_pool") == "avg":
            stated.pooling = "mean_patch"
    stated.num_heads = stated.num_heads or _timm_heads(str(config["architecture"]))
    if isinstance(trained, Mapping):
        stated.mean, stated.std = trained.get("mean"), trained.get("std")


def _timm_heads(name: str) -> int | None:
    """How many heads timm's model of this name has."""
    import timm

    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False, num_classes=0)
    blocks = getattr(model, "blocks", None)
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None
    return heads if isinstance(heads, int) else None


def _checked(stated: Stated) -> Stated:
    """Without what is of no use, whoever wrote it."""
    for key in ("num_heads", "decoder_heads"):
        value = getattr(stated, key)
        if type(value) is not int or value < 1:
            setattr(stated, key, None)
    numbers = (stated.mean, stated.std)
    if not all(
        isinstance(x, list) and x and all(type(v) in (int, float) for v in x) for x in numbers
    ):
        stated.mean = stated.std = None
    if stated.pooling not in ("class_token", "mean_patch"):
        stated.pooling = None
    if type(stated.activation) is not str:
        stated.activation = None
    if type(stated.eps) is int and abs(stated.eps) < 2**53:
        stated.eps = float(stated.eps)
    if type(stated.eps) is not float:
        stated.eps = None
    return stated


def _config_beside(path: Path) -> Mapping[str, Any]:
    """The config.json of a Hugging Face or timm folder."""
    try:
        with open_regular(path.with_name("config.json")) as file:
            return _parsed(file.read(MAX_CONFIG).decode())
    except (OSError, UnicodeDecodeError):
        return {}


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}


def why_left_out(name: str) -> str:
    """What a tensor is that an encoder has no use for."""
    return next((why for pattern, why in LEFT_OUT if pattern.search(name)), "not of this encoder")
