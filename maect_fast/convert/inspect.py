"""What a file is, in lines for people and in a dict for programs."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maect_fast.convert.find import FoundEncoder, find_encoder, why_left_out
from maect_fast.convert.formats import OURS
from maect_fast.names import listed, printable, shortened

__all__ = ["describe", "lines"]

SHOWN = 12
REGISTERS = re.compile(r"(reg_token|register_tokens|storage_tokens)$")
VITS = {
    (192, 12): "ViT-Ti",
    (384, 12): "ViT-S",
    (768, 12): "ViT-B",
    (1024, 24): "ViT-L",
    (1280, 32): "ViT-H",
}


def describe(path: Path, *, encoder: str | None = None) -> dict[str, Any]:
    """What is in a file, by names and shapes; tensors are not read where the file allows that.

    Args:
        path: of `torch.save` or safetensors.
        encoder: which of several to describe; None takes the default one.

    Returns:
        `format`, `encoder` and `others` (names), `architecture`, `taken` and `left_out` (groups of
        names with their numbers, those left out with the reason), `missing` (names), `obstacles`
        (why ours cannot have it; empty where it can), `instead`, `decoder`.

    Raises:
        ConvertError: no encoder, or none of that name.
    """
    found = find_encoder(path, encoder=encoder, with_tensors=False)
    left_out = [(name, _why(name, found.others)) for name in found.beside + found.elsewhere]
    left_out += [(name, "ours has none") for name in found.extra]
    obstacles = found.obstacles()
    missing = _missing(found)
    lacking = [name for name in missing if name != "pos_embed"]
    return {
        "file": printable(path),
        "format": found.format.name,
        "encoder": found.name,
        "others": found.others,
        "architecture": _architecture(found),
        "taken": _groups(found.weights),
        "left_out": [
            {"names": names, "number": number, "why": why}
            for why in dict.fromkeys(why for _, why in left_out)
            for names, number in _groups(name for name, reason in left_out if reason == why).items()
        ],
        "missing": missing,
        "decoder": bool(found.decoder),
        "obstacles": obstacles or ([f"lacks {listed(lacking)}"] if lacking else []),
        "instead": found.instead() if obstacles else None,
    }


def lines(told: dict[str, Any]) -> list[str]:
    """What `describe` found, readable."""
    sizes = told["architecture"]
    name = VITS.get((sizes["width"], sizes["depth"]))
    model = f"{name}/{sizes['patch_size']}: " if name else ""
    heads = f"{sizes['heads']} heads" if sizes["heads"] else "heads not stated"
    image = f"images of {sizes['img_size']}" if sizes["img_size"] else "no positions"
    token = "a class token" if sizes["class_token"] else "no class token"
    registers = f", {sizes['registers']} registers" if sizes["registers"] else ""
    encoder = f", encoder {shortened(told['encoder'], 80)}" if told["encoder"] else ""
    others = ", ".join(shortened(other, 80) for other in told["others"])
    norms = ""
    if sizes["norm_eps"] is not None:
        norms = f", norms with eps {sizes['norm_eps']:g}{sizes['norm_eps_from']}"
    found = [
        f"{told['file']}: {told['format']}{encoder}"
        + (f" (the default of several; --encoder takes {others})" if others else ""),
        f"  {model}width {sizes['width']}, "
        f"{sizes['depth']} blocks, {heads}{sizes['heads_from']}, patches of {sizes['patch_size']}, "
        f"{image}, {token}{registers}{norms}, "
        f"{sizes['parameters'] / 1e6:.1f} M parameters ({sizes['dtype']})",
        f"  taken: {_shown(told['taken'].items())}",
    ]
    if told["left_out"]:
        groups: dict[str, list[tuple[str, int]]] = {}
        for group in told["left_out"]:
            groups.setdefault(group["why"], []).append((group["names"], group["number"]))
        parts = [f"{_shown(names)} ({why})" for why, names in groups.items()]
        found.append(f"  left out: {'; '.join(parts)}")
    found.append(f"  missing: {listed(told['missing']) or 'nothing'}")
    if told["decoder"]:
        found.append("  MAE's decoder is there and whole: convert import and export take it along")
    if told["obstacles"]:
        instead = f"; {told['instead']}" if told["instead"] else ""
        found.append(
            f"  not for --init, evaluate and extract: {', '.join(told['obstacles'])}{instead}"
        )
    else:
        found.append("  for --init, evaluate, extract, convert import and export: as it is")
    return found


def _architecture(found: FoundEncoder) -> dict[str, Any]:
    width, in_chans, _, patch_size = found.anchor.shape
    within = {**found.weights, **found.extra}
    registers = [value.shape[-2] for key, value in within.items() if REGISTERS.search(key)]
    pos_embed, cls_token = found.weights.get("pos_embed"), found.weights.get("cls_token")
    rows = 0 if pos_embed is None or pos_embed.ndim < 2 else pos_embed.shape[-2]
    fc1 = within.get("blocks.0.mlp.fc1.weight")
    stated = found.stated.eps is not None
    # Of those that ours cannot be, a layout's default says nothing: DINOv2's is another.
    norm_eps = found.norm_eps if stated or not found.obstacles() else None
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in within.values())
    return {
        "width": width,
        "depth": found.depth,
        "heads": found.num_heads,
        "heads_from": "" if found.stated.num_heads or not found.num_heads else " (by its width)",
        "patch_size": patch_size,
        "in_chans": in_chans,
        "img_size": int(rows**0.5) * patch_size or None,
        "class_token": cls_token is not None,
        "registers": sum(registers),
        "norm_eps": norm_eps,
        "norm_eps_from": "" if stated or norm_eps is None else " (the default there)",
        "mlp_ratio": None if fc1 is None else fc1.shape[0] / width,
        "parameters": sum(value.numel() for value in within.values()),
        "dtype": " and ".join(dtypes),
    }


def _missing(found: FoundEncoder) -> list[str]:
    """Names that an encoder of as many blocks has, and this has not."""
    wanted = []
    for name in OURS:
        blocks = range(found.depth) if "#" in name else (0,)
        kinds = ("weight", "bias") if "*" in name else ("",)
        wanted += [name.replace("#", str(i)).replace("*", k) for i in blocks for k in kinds]
    return [name for name in wanted if name not in found.weights]


def _why(name: str, others: list[str]) -> str:
    """What a tensor is that is no part of the encoder."""
    dotted = _dotted(name)
    for other in others:
        parts = other.split(".")
        if any(dotted.startswith(".".join(parts[i:]) + ".") for i in range(len(parts))):
            return "another encoder"
    return why_left_out(name)


def _dotted(name: str) -> str:
    return name.replace("/", ".").replace("module.", "")


def _groups(names: Iterable[str]) -> dict[str, int]:
    """Names with a wildcard for what is below their first part, and their number."""
    counts: Counter[str] = Counter()
    for name in names:
        path, _, last = name.rpartition("/")
        parts = last.removeprefix("module.").split(".")
        # Of dicts within dicts, such as an optimiser's, the outermost says enough.
        if path:
            counts[f"{path.split('/')[0]}/*"] += 1
        elif len(parts) > 1:
            counts[f"{parts[0]}.*"] += 1
        else:
            counts[name] += 1
    return dict(counts)


def _shown(groups: Iterable[tuple[str, int]]) -> str:
    pairs = list(groups)
    more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
    texts = (shortened(n, 80) + (f" ({count})" if count > 1 else "") for n, count in pairs[:SHOWN])
    return ", ".join(texts) + more
