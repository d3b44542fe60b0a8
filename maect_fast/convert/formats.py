"""What files with ViTs look like: a table. Nothing is read or computed here.

A `Layout` is how a library names the tensors of an encoder, a `Format` what surrounds them. Both
are recognised by names and shapes, never by a file's name; each says where its names are published.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "FORMATS",
    "FOR_TRAINING",
    "LAYOUTS",
    "LEFT_OUT",
    "NUM_HEADS",
    "OBSTACLES",
    "OURS",
    "OUR_DECODER",
    "PREFERRED",
    "STEMS",
    "Format",
    "Layout",
    "Names",
]

# Ours, and one or three names there: `#` is a block's number, `*` weight or bias. Of three, the
# rows follow each other in ours (query, key, value).
Names = tuple[tuple[str, tuple[str, ...]], ...]

OURS = (
    "cls_token",
    "pos_embed",
    "patch_embed.proj.*",
    "blocks.#.norm1.*",
    "blocks.#.attn.qkv.*",
    "blocks.#.attn.proj.*",
    "blocks.#.norm2.*",
    "blocks.#.mlp.fc1.*",
    "blocks.#.mlp.fc2.*",
    "norm.*",
)
OUR_DECODER = (
    "mask_token",
    "embed.*",
    *(name for name in OURS if name.startswith(("pos_embed", "blocks."))),
    "norm.*",
    "pred.*",
)


def _named(ours: tuple[str, ...], theirs: Mapping[str, str | tuple[str, ...]]) -> Names:
    """Pairs of names; what `theirs` does not have is called alike."""
    return _pairs({name: theirs.get(name, name) for name in ours})


def _pairs(theirs: Mapping[str, str | tuple[str, ...]]) -> Names:
    return tuple(
        (ours, (there,) if isinstance(there, str) else there) for ours, there in theirs.items()
    )


def _huggingface(block: str) -> dict[str, str | tuple[str, ...]]:
    """A ViTLayer's, as files of transformers 4 and 5 have them."""
    attention = f"{block}.attention.attention"
    return {
        "blocks.#.norm1.*": f"{block}.layernorm_before.*",
        "blocks.#.attn.qkv.*": tuple(f"{attention}.{part}.*" for part in ("query", "key", "value")),
        "blocks.#.attn.proj.*": f"{block}.attention.output.dense.*",
        "blocks.#.norm2.*": f"{block}.layernorm_after.*",
        "blocks.#.mlp.fc1.*": f"{block}.intermediate.dense.*",
        "blocks.#.mlp.fc2.*": f"{block}.output.dense.*",
    }


def _huggingface_5(block: str) -> dict[str, str | tuple[str, ...]]:
    """The same in a model's state dict since transformers 5, which files do not have."""
    return {
        "blocks.#.norm1.*": f"{block}.layernorm_before.*",
        "blocks.#.attn.qkv.*": tuple(f"{block}.attention.{part}_proj.*" for part in "qkv"),
        "blocks.#.attn.proj.*": f"{block}.attention.o_proj.*",
        "blocks.#.norm2.*": f"{block}.layernorm_after.*",
        "blocks.#.mlp.fc1.*": f"{block}.mlp.fc1.*",
        "blocks.#.mlp.fc2.*": f"{block}.mlp.fc2.*",
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a library names the tensors of a ViT."""

    anchor: str
    """Name of the patch embedding's weight [D, C, p, p], by which an encoder is found."""
    beside: str = ""
    """A name that is there too, where the anchor is not rare enough."""
    names: Names
    """Of what an encoder of ours has."""
    decoder: Names = ()
    """Of MAE's decoder; these may follow any prefix."""
    inner: tuple[str, ...]
    """What all names that belong to the encoder start with, also those that ours has no use for."""
    block: str
    """Pattern of a block's number."""
    norm_eps: float = 1e-6
    """Of its LayerNorms, where nothing beside the tensors says it."""
    obstacle: str = ""
    """What ours cannot have in any encoder of this layout."""


PLAIN_INNER = (
    *("blocks.", "patch_embed.", "pos_embed", "cls_token", "cls_norm.", "norm.", "norm_pre."),
    *("fc_norm.", "embed_norm.", "reg_token", "register_tokens", "storage_tokens", "dist_token"),
    *("rope", "rel_pos_bias"),
)
PLAIN_BLOCK = r"^blocks\.(?:\d+\.)?(\d+)\."

# huggingface/pytorch-image-models@aa4b585: timm/models/vision_transformer.py, whose names
# facebookresearch's mae, dino, deit, msn, moco-v3, ijepa, dinov2, dinov3, bytedance/ibot and
# ml-jku/MAE-CT share; decoders of facebookresearch/mae@efb2a80: models_mae.py, and ours.
TIMM = Layout(
    anchor="patch_embed.proj.weight",
    names=_named(OURS, {}),
    decoder=(
        *_named(
            OUR_DECODER,
            {name: f"decoder_{name}" for name in OUR_DECODER if name != "mask_token"},
        ),
        *_named(OUR_DECODER, {name: f"decoder.{name}" for name in OUR_DECODER}),
    ),
    inner=PLAIN_INNER,
    block=PLAIN_BLOCK,
)
# ml-jku/MIM-Refiner@cc57423: hub/prenorm_vit.py, hub/postnorm_vit.py, on the modules of
# BenediktAlkin/KappaModules: kappamodules/vit/{vit_class_tokens,vit_pos_embed}.py.
KAPPAMODULES = Layout(
    anchor="patch_embed.proj.weight",
    beside="cls_tokens.tokens",
    names=_named(OURS, {"cls_token": "cls_tokens.tokens", "pos_embed": "pos_embed.embed"}),
    inner=(*PLAIN_INNER, "cls_tokens."),
    block=PLAIN_BLOCK,
)
# huggingface/transformers@v5.24.0: models/vit, models/vit_mae, conversion_mapping.py.
HUGGINGFACE = Layout(
    anchor="embeddings.patch_embeddings.projection.weight",
    names=_named(
        OURS,
        {
            "cls_token": "embeddings.cls_token",
            "pos_embed": "embeddings.position_embeddings",
            "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
            "norm.*": "layernorm.*",
            **_huggingface("encoder.layer.#"),
        },
    )
    + _pairs(_huggingface_5("layers.#")),
    decoder=_named(
        OUR_DECODER,
        {
            "mask_token": "decoder.mask_token",
            **{
                name: f"decoder.decoder_{name}"
                for name in ("embed.*", "pos_embed", "norm.*", "pred.*")
            },
            **_huggingface("decoder.decoder_layers.#"),
        },
    )
    # What transformers 5 makes of those when it saves; it reads both.
    + _pairs(_huggingface("decoder.decoder_encoder.layer.#"))
    + _pairs(_huggingface_5("decoder.decoder_layers.#")),
    inner=("embeddings.", "encoder.", "layers.", "layernorm."),
    block=r"^(?:encoder\.layer|layers)\.(\d+)\.",
    # The default of ViTConfig and ViTMAEConfig.
    norm_eps=1e-12,
)
HUGGINGFACE_DINOV3 = Layout(
    anchor="embeddings.patch_embeddings.weight",
    names=(("cls_token", ("embeddings.cls_token",)),),
    inner=("embeddings.", "layer.", "model.", "norm.", "rope_embeddings."),
    block=r"^(?:model\.)?layer\.(\d+)\.",
    obstacle="rotary positions",
)
# pytorch/vision@v0.26.0: torchvision/models/vision_transformer.py.
TORCHVISION = Layout(
    anchor="conv_proj.weight",
    beside="class_token",
    names=_named(
        OURS,
        {
            "cls_token": "class_token",
            "pos_embed": "encoder.pos_embedding",
            "patch_embed.proj.*": "conv_proj.*",
            "blocks.#.norm1.*": "encoder.layers.encoder_layer_#.ln_1.*",
            "blocks.#.attn.qkv.*": "encoder.layers.encoder_layer_#.self_attention.in_proj_*",
            "blocks.#.attn.proj.*": "encoder.layers.encoder_layer_#.self_attention.out_proj.*",
            "blocks.#.norm2.*": "encoder.layers.encoder_layer_#.ln_2.*",
            "blocks.#.mlp.fc1.*": "encoder.layers.encoder_layer_#.mlp.0.*",
            "blocks.#.mlp.fc2.*": "encoder.layers.encoder_layer_#.mlp.3.*",
            "norm.*": "encoder.ln.*",
        },
    ),
    inner=("class_token", "conv_proj.", "encoder."),
    block=r"^encoder\.layers\.encoder_layer_(\d+)\.",
)
# mlfoundations/open_clip@v3.3.0: src/open_clip/transformer.py.
OPEN_CLIP = Layout(
    anchor="conv1.weight",
    beside="class_embedding",
    names=(("cls_token", ("class_embedding",)), ("pos_embed", ("positional_embedding",))),
    inner=("class_embedding", "positional_embedding", "conv1.", "ln_", "transformer.", "attn_pool"),
    block=r"^transformer\.resblocks\.(\d+)\.",
    obstacle="CLIP's projection behind the pooling",
)
LAYOUTS = {
    "kappamodules": KAPPAMODULES,
    "timm": TIMM,
    "huggingface": HUGGINGFACE,
    "huggingface-dinov3": HUGGINGFACE_DINOV3,
    "torchvision": TORCHVISION,
    "open_clip": OPEN_CLIP,
}

# Where a file holds several encoders, the first of these that its name has: the averaged one, by
# which each program's own evaluation goes, and MoCo v3's base_encoder, by which its own does.
PREFERRED = (
    *("target_encoder", "teacher", "encoder_ema", "state_dict_ema", "model_ema", "base_encoder"),
)

# Attention heads of the published ViTs (T, S, B, L, H, MIM-Refiner's 2B) by their width, for files
# that do not say how many: no weight tells them.
NUM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 2560: 32}

# What an encoder of ours cannot have, by the names of tensors within one.
OBSTACLES = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"(reg_token|register_tokens|storage_tokens)$", "register tokens"),
        (r"dist(illation)?_token$", "a distillation token"),
        (r"^rope|\.rope", "rotary positions"),
        (r"(ls[12]\.gamma|layer_scale[12]\.lambda1|gamma_[12])$", "LayerScale"),
        (r"mlp\.(w\d+|weights_(in|out)|fc1_[gx]|gate_proj)\.", "an MLP with gates"),
        (r"^(norm_pre|ln_pre)\.", "a norm before the blocks"),
        (r"^embed_norm\.", "norms behind the blocks' sums (post-norm)"),
        (r"\.(q_norm|k_norm)\.", "normalised queries and keys"),
        (r"^fc_norm\.", "its norm behind the pooling (fc_norm)"),
        (r"rel_pos|relative_pos", "relative positions"),
        (r"\.bias_mask$", "masked biases"),
    )
)
# Tensors within an encoder that its features do not depend on.
FOR_TRAINING = re.compile(r"(^|\.)(mask_token|masked_embed)$")
# What other tensors are, for those who wonder why they are left out.
LEFT_OUT = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"(^|\.)(mask_token|masked_embed)$", "for masked training"),
        (r"(^|[./])decoder", "decoder"),
        (r"(^|[./])(optim|opt[./]|scaler|lr_sched)", "optimiser"),
        (r"(^|[./_])(head|heads|head_dist|fc|classifier|pooler|proj|last_layer)[./]", "head"),
        (r"(^|[./])(predictor|projector|prototypes|target_projector|queue)", "head"),
        (r"(^|[./])proj$", "head"),
        (r"_loss[./]|loss_fn", "loss"),
    )
)
# Stems of several convolutions, instead of a layout's anchor.
STEMS = re.compile(r"patch_embed\.(proj\.\d+|stem\.\d+|backbone\.[^ ]+)\.weight$")

DINOV2 = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
WITH_TIMM = "evaluate, extract and export take timm's own weights by name, timm:NAME"


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A kind of file."""

    name: str
    """As people call it."""
    layout: str
    """Key of `LAYOUTS`."""
    has: tuple[str, ...] = ()
    """Patterns, each of some name in the file; names within dicts are joined by `/`."""
    lacks: tuple[str, ...] = ()
    """Patterns of none."""
    class_row: bool | None = None
    """Whether `pos_embed` has a row for the class token; None where that does not matter."""
    num_heads: Mapping[int, int] = field(default_factory=dict)
    """Heads by width, where they differ from `NUM_HEADS`."""
    instead: Mapping[int | None, str] = field(default_factory=dict)
    """Timm's names of the same weights by width (None: any), for those that ours cannot have."""


# The first that fits is it.
FORMATS = (
    Format(
        name="maect-fast checkpoint",
        layout="timm",
        has=(r"^stage$", r"^total$", r"^model/encoder\."),
    ),
    *(
        Format(name="PyTorch Lightning", layout=layout, has=(r"^pytorch-lightning_version$",))
        for layout in LAYOUTS
    ),
    # facebookresearch/msn@db0d572: src/msn_train.py.
    Format(name="MSN", layout="timm", has=(r"^prototypes$", r"^target_encoder/")),
    # facebookresearch/ijepa@52c1ae9: src/train.py, src/models/vision_transformer.py.
    Format(
        name="I-JEPA",
        layout="timm",
        has=(r"^target_encoder/", r"predictor_pos_embed$"),
        lacks=(r"cls_token$",),
    ),
    Format(name="I-JEPA (Hugging Face)", layout="huggingface", lacks=(r"cls_token$",)),
    # facebookresearch/dinov3@583c867: dinov3/models/vision_transformer.py.
    Format(name="DINOv3", layout="timm", has=(r"rope_embed\.periods$",)),
    Format(name="DINOv3 (Hugging Face)", layout="huggingface-dinov3"),
    # facebookresearch/dinov2@027a9ac: dinov2/models/vision_transformer.py.
    *(
        Format(
            name=f"DINOv2{where}",
            layout=layout,
            has=(scale, r"mask_token$", *has),
            instead={
                width: f"timm:vit_{size}_patch14_{reg}dinov2.lvd142m"
                for width, size in DINOV2.items()
            },
        )
        for where, layout, scale in (
            ("", "timm", r"ls1\.gamma$"),
            (" (Hugging Face)", "huggingface", r"layer_scale1\.lambda1$"),
        )
        for has, reg in (((r"reg(ister)?_tokens?$",), "reg4_"), ((), ""))
    ),
    # bytedance/ibot@c24f870: main_ibot.py, models/vision_transformer.py.
    Format(name="iBOT", layout="timm", has=(r"^ibot_loss/|[./]masked_embed$",)),
    # facebookresearch/dino@04c0ad9: main_dino.py, vision_transformer.py.
    Format(name="DINO v1", layout="timm", has=(r"^(teacher|student)/",)),
    # facebookresearch/moco-v3@1c6b717: main_moco.py, vits.py, whose small ViT has 12 heads.
    Format(
        name="MoCo v3",
        layout="timm",
        has=(r"base_encoder\.", r"momentum_encoder\."),
        num_heads={384: 12},
    ),
    Format(name="MIM-Refiner", layout="kappamodules"),
    Format(
        name="MAE (Hugging Face ViTMAE)", layout="huggingface", has=(r"decoder\.decoder_embed\.",)
    ),
    Format(
        name="DeiT with distillation (Hugging Face)",
        layout="huggingface",
        has=(r"distillation_token$",),
        instead={None: "timm:deit_base_distilled_patch16_224 (or its small and tiny)"},
    ),
    Format(name="Hugging Face ViT", layout="huggingface"),
    Format(name="torchvision", layout="torchvision"),
    Format(
        name="open_clip",
        layout="open_clip",
        instead={None: "timm:vit_base_patch16_clip_224.openai and its like"},
    ),
    # facebookresearch/deit@1d38fa4: main.py, models.py.
    Format(
        name="DeiT with distillation",
        layout="timm",
        has=(r"dist_token$",),
        instead={
            192: "timm:deit_tiny_distilled_patch16_224",
            384: "timm:deit_small_distilled_patch16_224",
            768: "timm:deit_base_distilled_patch16_224",
        },
    ),
    Format(
        name="facebook MAE with decoder", layout="timm", has=(r"decoder_embed\.", r"decoder_pos")
    ),
    Format(name="MAE-CT", layout="timm", class_row=False, lacks=(r"(^|[./])head\.",)),
    Format(name="DeiT", layout="timm", has=(r"^model/cls_token$", r"^model/head\.weight$")),
    Format(name="facebook MAE", layout="timm", has=(r"^model/cls_token$",)),
    Format(name="timm's training program", layout="timm", has=(r"^state_dict_ema/|^arch$",)),
    Format(name="ViT with timm's names (timm, DINO, iBOT, DeiT, ...)", layout="timm"),
)
