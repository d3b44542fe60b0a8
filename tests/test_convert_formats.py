"""Files as other programs write them: what they are, and features beside the library's own.

Where a library is installed, its model writes the file and computes the features. Where none is,
the layout is the published one (the source is named), and the forward is that of timm's ViT, of
which those programs' models are copies, or of the transcription.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import transcription
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maect_fast.checkpoint import CheckpointError
from maect_fast.cli import main
from maect_fast.convert import ConvertError, find_encoder
from maect_fast.convert.formats import FORMATS, LAYOUTS
from maect_fast.convert.inspect import describe
from maect_fast.evaluation.encoders import check_encoder, open_encoder
from maect_fast.models.encoder import Encoder

State = dict[str, Tensor]
WIDTH, HEADS, DEPTH, PATCH = 32, 2, 2, 16
HUGGINGFACE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "patch_size": PATCH,
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of the order of trained ones, norms and positions included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            is_norm = value.ndim == 1 and name.endswith("weight")
            value.copy_(1 + 0.1 * noise if is_norm else noise * (0.5 if value.ndim == 3 else 0.1))
    return model.eval()


def timm_vit(img_size: int = 224, **changes: Any) -> VisionTransformer:
    sizes = {"patch_size": PATCH, "embed_dim": WIDTH, "num_heads": HEADS, "depth": DEPTH}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=img_size, **sizes | changes)
    assert isinstance(vit, VisionTransformer)
    randomised(vit)
    return vit


def images(img_size: int) -> Tensor:
    return torch.randn(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(path: Path, img_size: int, expected: Tensor, *settings: str) -> float:
    """The largest between our tokens and the library's."""
    opened = open_encoder(str(path), ["device=cpu", f"encoder.img_size={img_size}", *settings])
    return float((opened.encoder(images(img_size)) - expected).abs().max())


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


# ---- Beside the libraries ----


@pytest.mark.parametrize("img_size", [224, 96])
def test_timm(tmp_path: Path, img_size: int) -> None:
    vit = timm_vit(img_size, num_classes=5)
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = vit.forward_features(images(img_size))
    found = difference(tmp_path / "model.safetensors", img_size, expected, "encoder.num_heads=2")
    assert found <= 1e-5


@pytest.mark.parametrize("img_size", [224, 96])
def test_torchvision(tmp_path: Path, img_size: int) -> None:
    from torchvision.models import VisionTransformer as TorchvisionViT

    vit = TorchvisionViT(img_size, PATCH, DEPTH, HEADS, WIDTH, 4 * WIDTH, num_classes=5)
    randomised(vit)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    with torch.no_grad():
        # Its forward takes the class token of this.
        patches = vit._process_input(images(img_size))
        expected = vit.encoder(torch.cat([vit.class_token.expand(2, -1, -1), patches], dim=1))
    assert difference(tmp_path / "vit.pth", img_size, expected, "encoder.num_heads=2") <= 1e-5
    assert find_encoder(tmp_path / "vit.pth").format.name == "torchvision"


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Models with transformers' own defaults beyond their sizes, and where they were saved."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    decoder = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 64,
    }
    kinds = {
        "vit": ("ViTModel", "ViTConfig", {}),
        "mae": ("ViTMAEForPreTraining", "ViTMAEConfig", decoder),
        "dinov2": ("Dinov2Model", "Dinov2Config", {}),
        "dinov2 with registers": (
            "Dinov2WithRegistersModel",
            "Dinov2WithRegistersConfig",
            {"num_register_tokens": 4},
        ),
        "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 4}),
        "ijepa": ("IJepaModel", "IJepaConfig", {}),
        "deit": ("DeiTModel", "DeiTConfig", {}),
    }
    made = {}
    for name, (model_name, config_name, more) in kinds.items():
        config = getattr(transformers, config_name)(**HUGGINGFACE, **more)
        model = getattr(transformers, model_name)(config)
        # MAE's fixed positions stay.
        fixed = {k: v.clone() for k, v in model.state_dict().items() if "pos" in k}
        randomised(model)
        if name == "mae":
            model.load_state_dict(fixed, strict=False)
        folder = tmp_path_factory.mktemp("huggingface")
        model.save_pretrained(folder)
        made[name] = (model, folder / "model.safetensors")
    return made


@pytest.mark.parametrize("img_size", [224, 96])
def test_huggingface_vit(huggingface: Any, img_size: int) -> None:
    model, path = huggingface["vit"]
    with torch.no_grad():
        expected = model(images(img_size), interpolate_pos_encoding=True).last_hidden_state
    # Heads come from config.json.
    assert difference(path, img_size, expected) <= 1e-5


@pytest.mark.parametrize("img_size", [224, 96])
def test_huggingface_mae(huggingface: Any, img_size: int) -> None:
    model, path = huggingface["mae"]
    ratio, model.config.mask_ratio = model.config.mask_ratio, 0.0
    length = (img_size // PATCH) ** 2
    with torch.no_grad():
        expected = model.vit(
            images(img_size),
            noise=torch.arange(length, dtype=torch.float32).expand(2, -1),
            interpolate_pos_encoding=True,
        ).last_hidden_state
    model.config.mask_ratio = ratio
    assert difference(path, img_size, expected) <= 1e-5


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """As transformers initialises them: with class tokens near zero, where eps counts."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    made = {}
    for name, kind in (("vit", "ViT"), ("mae", "ViTMAE")):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**HUGGINGFACE)
        model = getattr(transformers, f"{kind}Model")(config).eval()
        folder = tmp_path_factory.mktemp("untrained")
        model.save_pretrained(folder)
        made[name] = (model, folder / "model.safetensors")
    return made


@pytest.mark.parametrize("img_size", [224, 96])
@pytest.mark.parametrize("name", ["vit", "mae"])
def test_norms_have_the_eps_of_the_file(untrained: Any, name: str, img_size: int) -> None:
    model, path = untrained[name]
    options: dict[str, Any] = {"interpolate_pos_encoding": True}
    if name == "mae":
        model.config.mask_ratio = 0.0
        length = (img_size // PATCH) ** 2
        options["noise"] = torch.arange(length, dtype=torch.float32).expand(2, -1)
    with torch.no_grad():
        expected = model(images(img_size), **options).last_hidden_state
    assert difference(path, img_size, expected) <= 1e-5
    # And that can be seen here: 1e-6 gives other features.
    opened = open_encoder(str(path), ["device=cpu", f"encoder.img_size={img_size}"])
    assert opened.config.encoder.norm_eps == 1e-12
    other = Encoder(dataclasses.replace(opened.config.encoder, norm_eps=1e-6))
    other.load_state_dict(opened.encoder.state_dict())
    with torch.no_grad():
        assert float((other(images(img_size)) - expected).abs().max()) > 5e-4


def test_without_a_config_the_librarys_default_is_taken_and_said(
    untrained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = untrained["vit"][1]
    path = tmp_path / "model.safetensors"
    path.write_bytes(beside.read_bytes())
    for file, source in ((path, " (the default there)"), (beside, "")):
        assert main(["convert", "inspect", str(file)]) == 0
        assert f"a class token, norms with eps 1e-12{source}, " in capsys.readouterr().out
    heads = f"encoder.num_heads={HEADS}"
    for words, eps in (([], 1e-12), (["encoder.norm_eps=1e-6"], 1e-6)):
        opened = open_encoder(str(path), ["device=cpu", heads, *words])
        assert opened.config.encoder.norm_eps == eps
        assert f"norms have eps {eps:g} here; nothing says theirs, of which 1e-12" in opened.weights
        out = tmp_path / f"{eps}.safetensors"
        assert main(["convert", "import", str(path), "--out", str(out), heads, *words]) == 0
        assert find_encoder(out).stated.eps == eps
        assert f"norms have eps {eps:g} here" in capsys.readouterr().out


def test_eps_that_contradicts_the_file_or_cannot_be(untrained: Any, tmp_path: Path) -> None:
    path = untrained["vit"][1]
    with pytest.raises(
        CheckpointError, match=r"eps 1e-12, this encoder's 1e-06; set encoder\.norm"
    ):
        check_encoder(str(path), ["encoder.norm_eps=1e-6"])
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(path.read_bytes())
    config = json.loads(path.with_name("config.json").read_text())
    for eps in (0, 0.5, -1e-6, math.nan):
        settings = json.dumps(config | {"layer_norm_eps": eps})
        (tmp_path / "config.json").write_text(settings)
        with pytest.raises(
            CheckpointError, match=rf"norms with eps {eps:g} \(ours is in \(0, 0.01"
        ):
            check_encoder(str(copy), [])


def test_a_state_dict_of_transformers_5(huggingface: Any, tmp_path: Path) -> None:
    """Which has other names than what it saves."""
    model, path = huggingface["mae"]
    torch.save(model.state_dict(), tmp_path / "mae.pth")
    saved, found = find_encoder(path), find_encoder(tmp_path / "mae.pth")
    for one, other in ((saved.weights, found.weights), (saved.decoder, found.decoder)):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("name", "told", "reason", "instead"),
    [
        ("dinov2", "DINOv2 (Hugging Face)", "LayerScale", "its own library"),
        ("dinov2 with registers", "DINOv2 (Hugging Face)", "register tokens", "its own library"),
        ("dinov3", "DINOv3 (Hugging Face)", "rotary positions", "its own library"),
        ("ijepa", "I-JEPA (Hugging Face)", "no class token", "its own library"),
        ("deit", "DeiT with distillation (Hugging Face)", "distillation", "timm:deit_base_dis"),
    ],
)
def test_huggingface_models_that_ours_cannot_be(
    huggingface: Any, name: str, told: str, reason: str, instead: str
) -> None:
    path = huggingface[name][1]
    with pytest.raises(CheckpointError, match=rf"cannot have .*{reason}.*; .*{instead}"):
        check_encoder(str(path), ["device=cpu"])
    found = describe(path)
    assert found["format"] == told
    sizes = found["architecture"]
    registers = 4 if name in ("dinov2 with registers", "dinov3") else 0
    assert (sizes["width"], sizes["depth"], sizes["heads"]) == (WIDTH, DEPTH, HEADS)
    assert (sizes["patch_size"], sizes["registers"]) == (PATCH, registers)
    assert sizes["class_token"] == (name != "ijepa")
    assert sizes["img_size"] in ((None,) if name == "dinov3" else (224,))


def test_open_clip(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip.transformer")
    vit = open_clip.VisionTransformer(32, PATCH, WIDTH, DEPTH, HEADS, 4.0, output_dim=8)
    text = {"positional_embedding": torch.zeros(7, WIDTH), "logit_scale": torch.ones(())}
    torch.save(under("visual.", vit.state_dict()) | text, tmp_path / "clip.pt")
    found = describe(tmp_path / "clip.pt")
    sizes = found["architecture"]
    assert found["format"] == "open_clip"
    assert found["encoder"] == "visual"
    assert (sizes["width"], sizes["depth"], sizes["img_size"]) == (WIDTH, DEPTH, 32)
    with pytest.raises(
        CheckpointError,
        match=r"projection behind.*a norm before the blocks.*timm:vit_base_patch16_c",
    ):
        check_encoder(str(tmp_path / "clip.pt"), [])


# ---- By published keys ----


class Published(NamedTuple):
    """A file in a program's own form."""

    told: str
    """Its format, as `inspect` says it."""
    encoder: str
    write: Callable[[State, State], dict[str, Any]]
    """From the encoder that is meant and another one to what the file holds."""
    others: tuple[str, ...] = ()


def without_row(state: State) -> State:
    return state | {"pos_embed": state["pos_embed"][:, 1:]}


def kappamodules(state: State) -> State:
    named = dict(without_row(state))
    rows = named.pop("pos_embed")
    side = isqrt(rows.shape[1])
    grid = rows.view(1, side, side, -1)
    return named | {"pos_embed.embed": grid, "cls_tokens.tokens": named.pop("cls_token")}


HEAD = {"head.weight": torch.ones(5, WIDTH), "head.bias": torch.ones(5)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3), "step": 1}}, "param_groups": [{"lr": 0.1}]}

PUBLISHED = {
    # facebookresearch/mae@efb2a80: util/misc.py save_model, models_mae.py.
    "facebook": Published("facebook MAE", "model", lambda w, _: {"model": w}),
    # ml-jku/MAE-CT@6c82cb6: loggers/base/checkpoint_writer.py, models/vit/vit_mae.py.
    "mae-ct": Published(
        "MAE-CT",
        "state_dict",
        lambda w, _: {"state_dict": without_row(w), "ctor_kwargs": {"attention_heads": HEADS}},
    ),
    # ml-jku/MIM-Refiner@cc57423: hubconf.py, hub/prenorm_vit.py.
    "mim-refiner": Published(
        "MIM-Refiner", "state_dict", lambda w, _: {"state_dict": kappamodules(w)}
    ),
    # facebookresearch/dino@04c0ad9: main_dino.py.
    "dino": Published(
        "DINO v1",
        "teacher.backbone",
        lambda w, o: {
            "student": under("module.backbone.", o) | {"module.head.mlp.0.weight": torch.ones(1)},
            "teacher": under("backbone.", w) | {"head.mlp.0.weight": torch.ones(1)},
            "optimizer": OPTIMIZER,
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_small"),
            "dino_loss": {"center": torch.ones(1, 8)},
        },
        ("student.backbone",),
    ),
    # bytedance/ibot@c24f870: main_ibot.py, models/vision_transformer.py.
    "ibot": Published(
        "iBOT",
        "teacher.backbone",
        lambda w, o: {
            "student": under("module.backbone.", o | {"masked_embed": torch.ones(1, WIDTH)}),
            "teacher": under("backbone.", w) | {"head.mlp.0.weight": torch.ones(1)},
            "ibot_loss": {"center": torch.ones(1, 8), "center2": torch.ones(1, 1, 8)},
        },
        ("student.backbone",),
    ),
    # facebookresearch/moco-v3@1c6b717: main_moco.py, vits.py.
    "moco v3": Published(
        "MoCo v3",
        "state_dict.base_encoder",
        lambda w, o: {
            "epoch": 300,
            "arch": "vit_small",
            "state_dict": under("module.base_encoder.", w | {"head.0.weight": torch.ones(1)})
            | under("module.momentum_encoder.", o | {"head.0.weight": torch.ones(1)})
            | {"module.predictor.0.weight": torch.ones(1)},
            "optimizer": OPTIMIZER,
        },
        ("state_dict.momentum_encoder",),
    ),
    # facebookresearch/msn@db0d572: src/msn_train.py, src/deit.py.
    "msn": Published(
        "MSN",
        "target_encoder",
        lambda w, o: {
            "encoder": under("module.", o | {"fc.fc1.weight": torch.ones(1)}),
            "opt": OPTIMIZER,
            "prototypes": torch.ones(4, 4),
            "target_encoder": under("module.", w | {"fc.fc1.weight": torch.ones(1)}),
            "epoch": 300,
        },
        ("encoder",),
    ),
    # facebookresearch/deit@1d38fa4: main.py, models.py.
    "deit": Published("DeiT", "model", lambda w, _: {"model": w | HEAD}),
    # Lightning-AI/pytorch-lightning: trainer/connectors/checkpoint_connector.py dump_checkpoint;
    # the module's names are those of lightly's examples/pytorch_lightning/dino.py.
    "lightning": Published(
        "PyTorch Lightning",
        "state_dict.teacher_backbone.vit",
        lambda w, o: {
            "epoch": 3,
            "global_step": 30,
            "pytorch-lightning_version": "2.6.6",
            "state_dict": under("student_backbone.vit.", o) | under("teacher_backbone.vit.", w),
            "loops": {"fit_loop": {"state_dict": {}}},
            "optimizer_states": [OPTIMIZER],
        },
        ("state_dict.student_backbone.vit",),
    ),
    # huggingface/pytorch-image-models@aa4b585: timm/utils/checkpoint_saver.py.
    "timm's training": Published(
        "timm's training program",
        "state_dict_ema",
        lambda w, o: {"epoch": 1, "arch": "vit", "state_dict": o | HEAD, "state_dict_ema": w},
        ("state_dict",),
    ),
}


@pytest.fixture(scope="module")
def plain() -> dict[int, VisionTransformer]:
    return {img_size: timm_vit(img_size, num_classes=0) for img_size in (224, 96)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys(name: str, plain: dict[int, VisionTransformer], tmp_path: Path) -> None:
    told, encoder, write, others = PUBLISHED[name]
    path = tmp_path / "file.pth"
    for img_size, vit in plain.items():
        other = {key: torch.zeros_like(value) for key, value in vit.state_dict().items()}
        weights = vit.state_dict()
        if name in ("mae-ct", "mim-refiner"):
            # These have no position for the class token.
            vit = timm_vit(img_size, num_classes=0)
            weights = vit.state_dict()
            weights["pos_embed"][:, 0] = 0
        torch.save(write(weights, other), path)
        with torch.no_grad():
            expected = vit.forward_features(images(img_size))
        assert difference(path, img_size, expected, "encoder.num_heads=2") <= 1e-5
        found = describe(path)
        assert (found["format"], found["encoder"]) == (told, encoder)
        assert tuple(found["others"]) == others
        assert found["obstacles"] == []
        assert found["missing"] == []
        for other_name in others:
            own_parts = set(other_name.split(".")) - set(encoder.split("."))
            # A part of the name does, where it is one encoder's alone.
            for word in (other_name, *own_parts):
                assert not find_encoder(path, encoder=word).weights["norm.weight"].any()


def test_moco_v3_small_has_its_own_number_of_heads(tmp_path: Path) -> None:
    vit = timm_vit(32, num_classes=0, embed_dim=384, num_heads=12, depth=1)
    state = vit.state_dict()
    both = under("module.base_encoder.", state) | under("module.momentum_encoder.", state)
    torch.save({"state_dict": both}, tmp_path / "moco.pth.tar")
    with torch.no_grad():
        expected = vit.forward_features(images(32))
    assert difference(tmp_path / "moco.pth.tar", 32, expected) <= 1e-5
    with pytest.raises(CheckpointError, match=r"have 12 heads, this encoder's 6"):
        check_encoder(str(tmp_path / "moco.pth.tar"), ["encoder.num_heads=6"])


def test_facebooks_own_resampling(plain: dict[int, VisionTransformer], tmp_path: Path) -> None:
    """facebookresearch/mae@efb2a80: util/pos_embed.py, bicubic, without antialiasing."""
    torch.save({"model": plain[224].state_dict()}, tmp_path / "mae.pth")
    vit = timm_vit(96, num_classes=0)
    rows = plain[224].state_dict()["pos_embed"]
    grid = rows[:, 1:].reshape(1, 14, 14, WIDTH).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    vit.load_state_dict(
        plain[224].state_dict()
        | {"pos_embed": torch.cat([rows[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)}
    )
    with torch.no_grad():
        expected = vit.forward_features(images(96))
    assert difference(tmp_path / "mae.pth", 96, expected, "encoder.num_heads=2") <= 1e-5


def test_mae_ct_beside_the_transcription(tmp_path: Path) -> None:
    state = without_row(timm_vit(96, num_classes=0).state_dict())
    torch.save(state, tmp_path / "maect.th")
    expected = transcription.encode(state, images(96), HEADS)
    assert difference(tmp_path / "maect.th", 96, expected, "encoder.num_heads=2") <= 1e-5


# ---- What ours cannot be ----


@pytest.mark.parametrize(
    ("told", "more", "drop", "reason", "instead"),
    [
        # facebookresearch/dinov2@027a9ac: dinov2/models/vision_transformer.py.
        (
            "DINOv2",
            {"mask_token": (1, 384), "blocks.0.ls1.gamma": (384,), "register_tokens": (1, 4, 384)},
            (),
            r"register tokens \(register_tokens\), LayerScale \(blocks\.0\.ls1\.gamma\)",
            "timm:vit_small_patch14_reg4_dinov2.lvd142m",
        ),
        (
            "DINOv2",
            {"mask_token": (1, 384), "blocks.0.ls1.gamma": (384,), "blocks.0.mlp.w12.weight": (9,)},
            (),
            "LayerScale .*, an MLP with gates",
            "timm:vit_small_patch14_dinov2.lvd142m",
        ),
        # facebookresearch/dinov3@583c867: dinov3/models/vision_transformer.py.
        (
            "DINOv3",
            {
                "storage_tokens": (1, 4, 384),
                "mask_token": (1, 384),
                "rope_embed.periods": (16,),
                "blocks.0.attn.qkv.bias_mask": (9,),
            },
            ("pos_embed",),
            "register tokens .*, rotary positions .*, masked biases",
            "its own library",
        ),
        # facebookresearch/deit@1d38fa4: models.py.
        (
            "DeiT with distillation",
            {"dist_token": (1, 1, 384), "head_dist.weight": (5, 384)},
            (),
            r"a distillation token \(dist_token\)",
            "timm:deit_small_distilled_patch16_224",
        ),
        # ml-jku/MIM-Refiner@cc57423: hub/postnorm_vit.py.
        (
            "MIM-Refiner",
            {
                "cls_tokens.tokens": (1, 1, 384),
                "embed_norm.weight": (384,),
                "pos_embed.embed": (1, 2, 2, 384),
            },
            ("norm.weight", "norm.bias", "pos_embed", "cls_token"),
            r"norms behind the blocks' sums",
            "its own library",
        ),
        # facebookresearch/mae@efb2a80: models_vit.py, global_pool.
        (
            "ViT with timm's names",
            {"fc_norm.weight": (384,)},
            ("norm.weight", "norm.bias"),
            "fc_norm",
            "its own library",
        ),
    ],
)
def test_refusals_name_reason_and_remedy(
    told: str,
    more: dict[str, tuple[int, ...]],
    drop: tuple[str, ...],
    reason: str,
    instead: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vit = timm_vit(32, num_classes=0, embed_dim=384, num_heads=6, depth=1)
    state = vit.state_dict() | {name: torch.zeros(shape) for name, shape in more.items()}
    path = tmp_path / "file.pth"
    torch.save({name: value for name, value in state.items() if name not in drop}, path)
    with pytest.raises(CheckpointError, match=rf"cannot have .*{reason}.*; .*{instead}") as error:
        check_encoder(str(path), [])
    assert "\n" not in str(error.value)
    assert main(["convert", "inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert told in shown
    assert "not for --init, evaluate and extract: " in shown
    assert main(["convert", "import", str(path), "--out", str(tmp_path / "x.safetensors")]) == 2
    assert not (tmp_path / "x.safetensors").exists()


def test_ijepa_has_no_class_token(tmp_path: Path) -> None:
    """facebookresearch/ijepa@52c1ae9: src/train.py, src/models/vision_transformer.py."""
    state = without_row(timm_vit(32, num_classes=0).state_dict())
    del state["cls_token"]
    predictor = {"module.predictor_pos_embed": torch.ones(1, 4, 8)}
    content = {"encoder": under("module.", state), "predictor": predictor}
    path = tmp_path / "jepa.pth.tar"
    torch.save(content | {"target_encoder": under("module.", state), "epoch": 300}, path)
    found = describe(path)
    assert (found["format"], found["encoder"]) == ("I-JEPA", "target_encoder")
    assert found["obstacles"] == ["no class token"]


def test_a_stem_of_convolutions(tmp_path: Path) -> None:
    torch.save({"module.base_encoder.patch_embed.proj.0.weight": torch.ones(2)}, tmp_path / "c.pth")
    with pytest.raises(ConvertError, match=r"patch_embed\.proj\.0\.weight is of a stem of conv"):
        find_encoder(tmp_path / "c.pth")


def test_every_name_that_is_offered_instead_is_one_of_timms() -> None:
    for entry in FORMATS:
        for name in entry.instead.values():
            word = name.split()[0].removeprefix("timm:")
            assert timm.is_model(word), word
            assert timm.models.is_model_pretrained(word), word
    assert {entry.layout for entry in FORMATS} == LAYOUTS.keys()


# ---- inspect ----


def test_inspect_says_what_is_taken_and_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = timm_vit(32, num_classes=0, embed_dim=192, num_heads=3, depth=12).state_dict()
    del state["blocks.3.mlp.fc2.bias"]
    content = PUBLISHED["dino"].write(state, state)
    torch.save(content, tmp_path / "dino.pth")
    assert main(["convert", "inspect", str(tmp_path / "dino.pth")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/dino.pth: DINO v1, encoder teacher.backbone (the default of several; "
        "--encoder takes student.backbone)",
        "  ViT-Ti/16: width 192, 12 blocks, 3 heads (by its width), patches of 16, images of 32, "
        "a class token, norms with eps 1e-06 (the default there), 5.5 M parameters (float32)",
        "  taken: cls_token, pos_embed, patch_embed.* (2), blocks.* (143), norm.* (2)",
        "  left out: head.*, student/* (head); student/* (149) (another encoder); optimizer/* "
        "(optimiser); dino_loss/* (loss)",
        "  missing: blocks.3.mlp.fc2.bias",
        "  not for --init, evaluate and extract: lacks blocks.3.mlp.fc2.bias",
    ]
    words = ["convert", "inspect", str(tmp_path / "dino.pth"), "--json", "--encoder", "student"]
    assert main(words) == 0
    [told] = json.loads(capsys.readouterr().out)
    assert told["encoder"] == "student.backbone"
    assert told["architecture"]["depth"] == 12
    assert main([*words[:3], "--encoder", "nobody"]) == 2
    assert "expected one encoder nobody, there are: " in capsys.readouterr().err


def test_inspect_reads_no_tensors_of_large_files(tmp_path: Path) -> None:
    state = timm_vit(32, num_classes=0).state_dict()
    torch.save(state, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors"):
        found = find_encoder(path, with_tensors=False)
        assert all(value.is_meta for value in found.weights.values())
        assert {k: v.shape for k, v in found.weights.items()} == {
            k: v.shape for k, v in state.items()
        }
