"""Encoders of ours written as other programs have them, and other programs' as ours.

Whatever is written is whole or not there, and nothing that is there is replaced.
"""

import dataclasses
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import timm
import torch
import torch.nn.functional as F
from jinja2 import Environment, PackageLoader, StrictUndefined
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maect_fast import __version__
from maect_fast.checkpoint import fingerprint
from maect_fast.config import Config
from maect_fast.convert.find import (
    OWN_FORMAT,
    ConvertError,
    find_encoder,
    weights_file,
)
from maect_fast.convert.formats import HUGGINGFACE, TIMM, Names
from maect_fast.convert.load import export_timm, load_encoder
from maect_fast.evaluation.encoders import TIMM as TIMM_WORD
from maect_fast.evaluation.encoders import check_file, is_run, open_encoder
from maect_fast.evaluation.runs import Weights
from maect_fast.models.encoder import TIMM_EPS, Encoder, pooled_features
from maect_fast.names import printable
from maect_fast.training.stages import part

__all__ = ["TARGETS", "PixelFeatures", "Target", "export", "import_file"]

Target = Literal["timm", "huggingface", "facebook", "mae-ct", "onnx", "torch-export"]
TARGETS = get_args(Target)
# timm's plain ViTs by width; every size is given beside the name, so another would do.
ARCHITECTURES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
# Heads of the published decoder, which is 512 wide.
DECODER_HEADS = {512: 16}
# Largest difference between features, of the order of 1 after the final norm, as in the tests.
TOLERANCE = 1e-5
# Protobuf messages end at 2 GiB.
LARGEST_ONNX = 1_800_000_000


class _Source(NamedTuple):
    """What is exported."""

    config: Config
    encoder: Encoder
    decoder: dict[str, Tensor]
    decoder_heads: int | None
    origin: str
    weights: str
    card: str
    """What the model card says of the weights, without a path."""


def import_file(
    file: Path, out: Path, *, encoder: str | None = None, overrides: Sequence[str] = ()
) -> list[str]:
    """Write a file's encoder as ours: one safetensors file that says its own sizes.

    Args:
        file: any that `find_encoder` reads.
        out: ends in `.safetensors`.
        encoder: which of several.
        overrides: `encoder.num_heads=` where nothing says it, `encoder.img_size=` for others.

    Returns:
        Lines that say what was taken.

    Raises:
        ConvertError: no such encoder, one that ours cannot be, or `out` is there.
        ConfigError: an override that does not fit.
    """
    if out.suffix != ".safetensors":
        raise ConvertError(
            f"--out: expected a name that ends in .safetensors, got {printable(out)}"
        )
    _check_new(out)
    config, found = check_file(str(file), overrides, encoder=encoder)
    model = Encoder(config.encoder).float()
    taken = load_encoder(model, found)
    decoder = {f"decoder.{name}": value.float() for name, value in found.decoder.items()}
    own = config.encoder
    said = dataclasses.asdict(found.stated) | {"num_heads": own.num_heads, "eps": own.norm_eps}
    sizes = found.sizes() | {"img_size": own.img_size, "norm_eps": own.norm_eps}
    metadata = {
        "format": OWN_FORMAT,
        "version": __version__,
        "architecture": json.dumps(sizes),
        "settings": json.dumps(said),
        "source": f"{found.format.name}{f', encoder {found.name}' if found.name else ''}",
        "source_digest": fingerprint(weights_file(file)),
    }
    with _whole(out) as place:
        _save_safetensors(model.state_dict() | decoder, place, metadata)
    return taken


def export(
    word: str,
    target: Target,
    out: Path,
    *,
    weights: Weights = "ema",
    overrides: Sequence[str] = (),
    opset: int | None = None,
) -> list[str]:
    """Write an encoder of ours, or a file's, as another program's.

    Args:
        word: a run directory, or a file with an encoder's weights.
        target: `timm`, `huggingface`: a folder; `facebook`, `mae-ct`: a file of `torch.save`;
            `onnx`, `torch-export`: a program from pixels to features, compared with ours after
            writing.
        out: what to write, not there yet.
        weights: of a run.
        overrides: `encoder.img_size=` for another size, `head.pooling=`.
        opset: of ONNX; None leaves it to PyTorch.

    Returns:
        Lines that say what was written.

    Raises:
        ConvertError: `out` is there, no decoder's heads, or what was written computes something
            else, of which nothing is left.
        CheckpointError: a run or a file that is not one.
    """
    if word.startswith(TIMM_WORD):
        raise ConvertError(f"{printable(word)}: timm has it; a run or a file is exported")
    _check_new(out)
    if opset is not None and target != "onnx":
        raise ConvertError(f"--opset: expected with --to onnx, got --to {target}")
    source = _source(word, weights, overrides)
    write: dict[Target, Callable[[_Source, Path], list[str]]] = {
        "timm": _write_timm,
        "huggingface": _write_huggingface,
        "facebook": _write_facebook,
        "mae-ct": _write_maect,
        "onnx": lambda source, place: _write_onnx(source, place, opset),
        "torch-export": _write_program,
    }
    with _whole(out) as place:
        told = write[target](source, place)
    return [f"{printable(word)}: {source.weights}", f"{printable(out)}: {'; '.join(told)}"]


class PixelFeatures(nn.Module):
    """Pixels [B, C, H, W] in [0, 1] to features [B, D], normalisation inside.

    Args:
        vit: timm's, without a classifier.
        mean: of the training images' channels.
        std: their deviations.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vit: VisionTransformer, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.vit = vit
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """The pooled tokens after the final norm."""
        features: Tensor = self.vit((pixels - self.mean) / self.std)
        return features


def _source(word: str, weights: Weights, overrides: Sequence[str]) -> _Source:
    """The encoder on the CPU in fp32, with MAE's decoder where it has one."""
    opened = open_encoder(word, ["device=cpu", *overrides], weights=weights)
    config, encoder = opened.config, opened.encoder
    assert isinstance(encoder, Encoder)
    decoder: dict[str, Tensor] = {}
    heads: int | None = None
    if opened.state is not None:
        decoder = part(opened.state["model"], "decoder.")
        heads = config.decoder.num_heads
    elif not is_run(word):
        found = find_encoder(word)
        decoder, heads = found.decoder, found.stated.decoder_heads
    if decoder and decoder["pos_embed"].shape[1] not in (
        encoder.num_patches,
        encoder.num_patches + 1,
    ):
        # The encoder was resampled to another size, which a decoder cannot be used at.
        decoder = {}
    if decoder and decoder["pos_embed"].shape[1] == encoder.num_patches + 1:
        decoder = decoder | {"pos_embed": decoder["pos_embed"][:, 1:]}
    decoder = {name: value.float() for name, value in decoder.items()}
    if decoder:
        heads = heads or DECODER_HEADS.get(decoder["mask_token"].shape[-1])
    card = opened.weights.split("; ")[-1 if opened.kind == "file" else 0]
    return _Source(config, encoder, decoder, heads, opened.origin, opened.weights, card)


def _write_timm(source: _Source, place: Path) -> list[str]:
    """As `timm.create_model("local-dir:PATH", pretrained=True)` reads it."""
    config = source.config
    if config.encoder.norm_eps != TIMM_EPS:
        # timm's config.json names a kind of norm, which has its default eps there.
        raise ConvertError(
            f"--to timm: its folders cannot say eps {config.encoder.norm_eps:g} of the norms, timm "
            f"would take {TIMM_EPS:g}; --to huggingface, onnx and torch-export keep it"
        )
    vit, arguments = _timm_model(source)
    place.mkdir()
    images = {
        "mean": list(config.augment.mean),
        "std": list(config.augment.std),
        "input_size": (source.encoder.in_chans, *[source.encoder.img_size] * 2),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
    }
    save_for_hf(vit, str(place), model_args=arguments, data_config=images, safe_serialization=True)
    (place / "README.md").write_text(_card(source, images))
    return [f"timm's folder of {vit.pretrained_cfg['architecture']}"]


def _timm_model(source: _Source) -> tuple[Any, dict[str, Any]]:
    """Timm's own model with the encoder's weights, which pools as ours is pooled."""
    encoder, pooling = source.encoder, source.config.head.pooling
    arguments: dict[str, Any] = {
        "img_size": encoder.img_size,
        "in_chans": encoder.in_chans,
        "patch_size": encoder.patch_size,
        "embed_dim": encoder.embed_dim,
        "depth": encoder.depth,
        "num_heads": _num_heads(encoder),
        # Ours takes the mean of normed patches; timm's default norms the mean.
        **({"global_pool": "avg", "fc_norm": False} if pooling == "mean_patch" else {}),
    }
    name = ARCHITECTURES.get(encoder.embed_dim, ARCHITECTURES[768])
    vit: Any = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    vit.load_state_dict(export_timm(encoder))
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = encoder.config.norm_eps
    # Of the weights that timm has under this name.
    for key in ("tag", "license"):
        vit.pretrained_cfg.pop(key, None)
    return vit.float().eval(), arguments


def _card(source: _Source, images: dict[str, Any]) -> str:
    """The folder's README.md."""
    environment = Environment(
        loader=PackageLoader("maect_fast", "convert"),
        undefined=StrictUndefined,
        trim_blocks=True,
        # Markdown, of our own words and numbers.
        autoescape=False,
    )
    return environment.get_template("card.md.jinja").render(
        encoder=source.encoder,
        num_heads=_num_heads(source.encoder),
        pooling=source.config.head.pooling,
        images=images,
        # Not where it lay, which is nobody's business.
        origin=printable(Path(source.origin.split(": stage")[0]).name),
        weights=source.card,
        version=__version__,
    )


def _write_huggingface(source: _Source, place: Path) -> list[str]:
    """As `ViTModel.from_pretrained(PATH)`, or `ViTMAEForPreTraining`, reads it."""
    encoder, decoder, config = source.encoder, source.decoder, source.config
    with_decoder = bool(decoder)
    if with_decoder and source.decoder_heads is None:
        raise ConvertError("nothing says how many heads MAE's decoder has; convert a run instead")
    settings: dict[str, Any] = {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": _num_heads(encoder),
        "intermediate_size": _hidden(encoder.state_dict()),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": encoder.config.norm_eps,
        "image_size": encoder.img_size,
        "patch_size": encoder.patch_size,
        "num_channels": encoder.in_chans,
        "qkv_bias": True,
        "architectures": ["ViTMAEForPreTraining" if with_decoder else "ViTModel"],
        "model_type": "vit_mae" if with_decoder else "vit",
    }
    if with_decoder:
        settings |= {
            "decoder_hidden_size": decoder["mask_token"].shape[-1],
            "decoder_num_hidden_layers": _depth(decoder),
            "decoder_num_attention_heads": source.decoder_heads,
            "decoder_intermediate_size": _hidden(decoder),
            "mask_ratio": 0.75,
            "norm_pix_loss": config.decoder.normalize_pixels,
        }
    side = {"height": encoder.img_size, "width": encoder.img_size}
    images = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": side,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.augment.mean),
        "image_std": list(config.augment.std),
    }
    tensors = _theirs(export_timm(encoder), HUGGINGFACE.names, "vit." if with_decoder else "")
    if with_decoder:
        row = {"pos_embed": F.pad(decoder["pos_embed"], (0, 0, 1, 0))}
        tensors |= _theirs(decoder | row, HUGGINGFACE.decoder, "")
    place.mkdir()
    (place / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (place / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    _save_safetensors(tensors, place / "model.safetensors", {"format": "pt"})
    return [f"Hugging Face's folder of a {settings['architectures'][0]}"]


def _write_facebook(source: _Source, place: Path) -> list[str]:
    """As facebookresearch/mae's programs read it."""
    state = export_timm(source.encoder)
    if source.decoder:
        row = {"pos_embed": F.pad(source.decoder["pos_embed"], (0, 0, 1, 0))}
        state |= _theirs(source.decoder | row, TIMM.decoder, "")
    torch.save({"model": state}, place)
    return [f"facebook's MAE{' with its decoder' if source.decoder else ''}", *_untold(source)]


def _write_maect(source: _Source, place: Path) -> list[str]:
    """As ml-jku/MAE-CT's programs read it."""
    encoder = source.encoder
    settings = {
        "kind": "vit.masked_encoder",
        "patch_size": encoder.patch_size,
        "embedding_dim": encoder.embed_dim,
        "depth": encoder.depth,
        "attention_heads": _num_heads(encoder),
        "input_shape": (encoder.in_chans, encoder.img_size, encoder.img_size),
    }
    torch.save(
        {"state_dict": export_timm(encoder, class_row=False), "ctor_kwargs": settings}, place
    )
    return ["MAE-CT's encoder", *_untold(source)]


def _untold(source: _Source) -> list[str]:
    """What files of tensors alone cannot say."""
    eps = source.config.encoder.norm_eps
    if eps == TIMM_EPS:
        return []
    return [f"its norms have eps {eps:g}, which the file cannot say: others take {TIMM_EPS:g}"]


def _write_onnx(source: _Source, place: Path, opset: int | None) -> list[str]:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConvertError(
            f"--to onnx needs {error.name}: pip install 'maect-fast[export]'"
        ) from error
    model, example = _program(source)
    large = sum(p.numel() for p in model.parameters()) * 4 > LARGEST_ONNX
    with _quiet():
        written = torch.onnx.export(
            model,
            (example,),
            input_names=["pixels"],
            output_names=["features"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}},
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
        assert written is not None
        written.model.metadata_props.update(_said(source))
        written.save(place, external_data=large)
    onnx.checker.check_model(str(place))
    try:
        import onnxruntime
    except ImportError:
        checked = "its numbers not compared, as there is no onnxruntime"
    else:
        session = onnxruntime.InferenceSession(str(place), providers=["CPUExecutionProvider"])
        checked = _compared(
            source,
            lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0]),
        )
    files = f", weights in {place.name}.data" if large else ""
    return [f"ONNX, opset {written.model.opset_imports['']}{files}", checked]


def _write_program(source: _Source, place: Path) -> list[str]:
    model, example = _program(source)
    batch = torch.export.Dim("batch", min=1)
    # The name says the kind to torch, and only that.
    named = place.with_name(f"{place.name}.pt2")
    said = {"maect_fast.json": json.dumps(_said(source))}
    with _quiet():
        program = torch.export.export(model, (example,), dynamic_shapes={"pixels": {0: batch}})
        torch.export.save(program, named, extra_files=said)
        loaded = torch.export.load(named).module()
    checked = _compared(source, loaded)
    named.rename(place)
    return ["a program of torch.export", checked]


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporters warn of what other parts of PyTorch do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _program(source: _Source) -> tuple[PixelFeatures, Tensor]:
    """What is exported, and pixels to trace it with."""
    augment = source.config.augment
    model = PixelFeatures(_timm_model(source)[0], augment.mean, augment.std).eval()
    return model, _pixels(source, 2)


def _pixels(source: _Source, number: int) -> Tensor:
    encoder = source.encoder
    shape = (number, encoder.in_chans, encoder.img_size, encoder.img_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _said(source: _Source) -> dict[str, str]:
    """What goes with a program."""
    return {
        "producer": f"maect-fast {__version__}",
        "input": "pixels in [0, 1], channels first; normalisation is inside",
        "mean": json.dumps(list(source.config.augment.mean)),
        "std": json.dumps(list(source.config.augment.std)),
        "img_size": str(source.encoder.img_size),
        "pooling": source.config.head.pooling,
    }


@torch.no_grad()
def _compared(source: _Source, program: Callable[[Tensor], Tensor]) -> str:
    """The program's features of a batch of another size than it was traced with, beside ours."""
    config, pixels = source.config, _pixels(source, 3)
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (config.augment.mean, config.augment.std))
    ours = pooled_features(source.encoder, (pixels - mean) / std, config.head.pooling)
    difference = float((program(pixels) - ours).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise ConvertError(
            f"its features differ from ours by {difference:.1e}, so nothing was written; "
            "please report it"
        )
    return f"features within {difference:.1e} of ours"


def _theirs(state: dict[str, Tensor], names: Names, prefix: str) -> dict[str, Tensor]:
    """The tensors under a layout's names, the first where there are several."""
    first: dict[str, tuple[str, ...]] = {}
    for ours, theirs in names:
        first.setdefault(ours, theirs)
    found = {}
    for name, value in state.items():
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        kind = name.rpartition(".")[2]
        ours = name.replace(f"blocks.{block}.", "blocks.#.", 1) if block else name
        if kind in ("weight", "bias"):
            ours = f"{ours.removesuffix(kind)}*"
        theirs = first[ours]
        for there, rows in zip(theirs, value.chunk(len(theirs)), strict=True):
            found[prefix + there.replace("#", block).replace("*", kind)] = rows.contiguous()
    return found


def _num_heads(encoder: Encoder) -> int:
    blocks: Any = encoder.blocks
    return int(blocks[0].attn.num_heads)


def _hidden(state: dict[str, Tensor]) -> int:
    return state["blocks.0.mlp.fc1.weight"].shape[0]


def _depth(state: dict[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def _save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)


def _check_new(out: Path) -> None:
    if os.path.lexists(out):
        raise ConvertError(f"--out: {printable(out)} is there already; give another name")
    if not out.absolute().parent.is_dir():
        raise ConvertError(f"--out: there is no folder {printable(out.absolute().parent)}")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A place of the same name to write to, which becomes `out` if all went well.

    What is written beside it, such as an ONNX file's weights, comes along, before it.
    """
    room = out.absolute().with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    room.mkdir()
    try:
        yield room / out.name
        for file in room.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        # `out` itself last: where it is, everything is.
        for written in sorted(room.iterdir(), key=lambda path: path.name == out.name):
            target = out.with_name(written.name)
            if os.path.lexists(target):
                raise ConvertError(f"--out: {printable(target)} is there already")
            written.rename(target)
    finally:
        shutil.rmtree(room, ignore_errors=True)
