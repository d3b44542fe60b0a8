"""Files with weights and models of timm's, beside runs. Nothing is fetched here."""

import functools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from maect_fast.checkpoint import CheckpointError
from maect_fast.config import ConfigError, EncoderConfig
from maect_fast.convert import export_timm
from maect_fast.evaluation.encoders import TimmEncoder, check_encoder, open_encoder
from maect_fast.evaluation.features import extract_features, pooled_attention
from maect_fast.models.encoder import Encoder, pool

# timm's smallest with a class token: width 64, 160 pixels.
TIMM = "timm:test_vit"
CPU = ["device=cpu"]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Timm's pretrained weights of `TIMM` are those of this file."""
    path = tmp_path / "test_vit.pth"
    torch.save(timm.create_model("test_vit", pretrained=False, num_classes=0).state_dict(), path)
    local = functools.partial(timm.create_model, pretrained_cfg_overlay={"file": str(path)})
    monkeypatch.setattr(timm, "create_model", local)
    return path


def own_file(path: Path, **sizes: Any) -> Encoder:
    """A file in facebook's form, of an encoder for 32 pixels in patches of 8."""
    encoder = Encoder(EncoderConfig(img_size=32, patch_size=8, depth=2, **sizes)).eval()
    beside = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 8)}
    torch.save({"model": export_timm(encoder) | beside}, path)
    return encoder


@torch.no_grad()
def tokens(encoder: nn.Module, img_size: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    return images, encoder(images)


@pytest.mark.parametrize("img_size", [160, 96])
@pytest.mark.parametrize("pooling", ["class_token", "mean_patch"])
def test_features_are_timms_own(published: Path, img_size: int, pooling: Any) -> None:
    settings = [*CPU, f"encoder.img_size={img_size}", f"head.pooling={pooling}"]
    opened = open_encoder(TIMM, settings)
    images, _ = tokens(opened.encoder, img_size)
    vit: Any = timm.create_model(
        "test_vit", pretrained=True, num_classes=0, img_size=img_size
    ).eval()
    with torch.no_grad():
        own = vit.forward_features(images)
    labels = torch.zeros(2, dtype=torch.int64)
    config = opened.config
    assert config.head.pooling == pooling
    found = extract_features(opened.encoder, [(images, labels)], pooling=pooling).x
    expected = own[:, 0] if pooling == "class_token" else own[:, 1:].mean(dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert pooled_attention(opened.encoder, images, pooling).shape == (2, 2, *[img_size // 16] * 2)


def test_the_model_decides_size_and_normalisation(published: Path) -> None:
    config, _ = check_encoder(TIMM, CPU)
    assert config.encoder.img_size == 160
    assert config.augment.mean == config.augment.std == [0.5, 0.5, 0.5]
    assert config.head.pooling == "class_token"
    opened = open_encoder(TIMM, [*CPU, "augment.mean=[0.1,0.2,0.3]"])
    assert opened.config.augment.mean == [0.1, 0.2, 0.3]
    assert opened.weights == "pretrained weights r160_in1k"
    assert opened.origin == f"timm:test_vit, of timm {timm.__version__}"
    assert not opened.encoder.training


def test_registers_are_no_patches() -> None:
    vit: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0, reg_tokens=3
    ).eval()
    images, found = tokens(TimmEncoder(vit), 32)
    with torch.no_grad():
        own = vit.forward_features(images)
    assert own.shape[1] == 1 + 3 + 4
    assert torch.equal(found[:, 0], own[:, 0])
    assert torch.equal(pool(found, "mean_patch"), own[:, 4:].mean(dim=1))


def test_a_file_says_its_own_sizes(tmp_path: Path) -> None:
    path = tmp_path / "mae.pth"
    encoder = own_file(path, embed_dim=192, num_heads=3)
    opened = open_encoder(str(path), CPU)
    sizes = opened.config.encoder
    assert (sizes.img_size, sizes.patch_size, sizes.in_chans) == (32, 8, 3)
    assert (sizes.embed_dim, sizes.depth, sizes.num_heads) == (192, 2, 3)
    assert opened.config.augment.mean == [0.485, 0.456, 0.406]
    assert opened.origin == str(path)
    assert opened.weights == (
        f"encoder from {path}, model; there, but not used: mask_token, decoder_embed.*; "
        "width 192, 2 blocks of 3 heads, patches of 8 pixels"
    )
    for module in (encoder, opened.encoder):
        assert not module.training
    assert torch.equal(tokens(opened.encoder, 32)[1], tokens(encoder, 32)[1])


def test_a_file_at_another_size(tmp_path: Path) -> None:
    path = tmp_path / "mae.pth"
    own_file(path, embed_dim=192, num_heads=3)
    opened = open_encoder(str(path), [*CPU, "encoder.img_size=48"])
    assert "pos_embed: resampled from 4x4 to 6x6" in opened.weights
    assert tokens(opened.encoder, 48)[1].shape == (2, 1 + 36, 192)


def test_the_heads_of_an_odd_width_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "narrow.pth"
    encoder = own_file(path, embed_dim=24, num_heads=2)
    with pytest.raises(ConfigError, match=r"encoder.num_heads: .* does not say how many"):
        check_encoder(str(path), CPU)
    opened = open_encoder(str(path), [*CPU, "encoder.num_heads=2"])
    assert torch.equal(tokens(opened.encoder, 32)[1], tokens(encoder, 32)[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["encoder.depth=1"], r"has, beyond this encoder, blocks\.1\."),
        (["encoder.embed_dim=96"], r"is \[.*\], this encoder needs \["),
        (["encoder.num_heads=7"], "192 is no multiple of num_heads 7"),
        # 412 GB of weights, if they were made.
        (["encoder.embed_dim=65536", "encoder.num_heads=1"], "this encoder needs"),
        (["encoder.img_size=33"], "multiple of the patch size 8"),
    ],
)
def test_settings_that_a_file_does_not_fit(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    own_file(tmp_path / "mae.pth", embed_dim=192, num_heads=3)
    with pytest.raises(CheckpointError, match=message):
        check_encoder(str(tmp_path / "mae.pth"), settings)


@pytest.mark.parametrize(
    "change",
    [
        {"pos_embed": torch.zeros(1, 15, 192)},
        {"pos_embed": torch.zeros(1, 0, 192)},
        {"pos_embed": torch.zeros(192)},
        {"patch_embed.proj.weight": torch.zeros(192)},
        {"norm.weight": torch.full((192,), torch.nan)},
        {"blocks.7.norm1.weight": torch.zeros(192)},
    ],
)
def test_a_file_that_holds_no_such_encoder(tmp_path: Path, change: dict[str, Tensor]) -> None:
    path = tmp_path / "mae.pth"
    own_file(path, embed_dim=192, num_heads=3)
    torch.save(torch.load(path)["model"] | change, path)
    with pytest.raises((CheckpointError, ConfigError)):
        check_encoder(str(path), CPU)


@pytest.mark.parametrize(
    ("word", "settings", "message"),
    [
        ("timm:vit_nope", [], "timm:vit_nope: timm has no such model"),
        ("timm:", [], "timm has no such model"),
        ("timm:resnet50", [], "expected one of timm's ViTs"),
        ("timm:vit_base_patch16_siglip_224", [], "has no class token"),
        ("timm:vit_large_patch14_clip_224.nowhere", [], "no pretrained weights of this name"),
        ("timm:test_vit", ["encoder.depth=3"], "encoder.depth: timm:test_vit has its own"),
        ("timm:test_vit", ["encoder.name=vit_tiny_patch16_224"], "encoder.name: .* has its own"),
        ("timm:test_vit", ["encoder.img_size=100"], "multiple of the patch size 16"),
        ("timm:test_vit", ["encoder.in_chans=1"], "augment.mean, augment.std: expected"),
    ],
)
def test_models_that_timm_cannot_give(word: str, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_encoder(word, settings)


def test_weights_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before anything is computed, after the images, which are nearer."""
    build = timm.create_model

    def offline(name: str, *, pretrained: bool, **own: Any) -> nn.Module:
        if pretrained:
            raise ConnectionError("Name or service not known\nRetrying")
        return build(name, **own)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"data\.root"):
        check_encoder(TIMM, CPU, "train")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    told = r"^timm:test_vit: .* had \(Name or service not known\); fetch them once"
    with pytest.raises(CheckpointError, match=told):
        check_encoder(TIMM, [*CPU, f"data.root={tmp_path}"], "train")
