import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from maect_fast.config import EncoderConfig
from maect_fast.convert import export_timm, load_encoder
from maect_fast.models.encoder import Encoder, sincos_pos_embed

NAME = "vit_tiny_patch16_224"
SIZES: dict[str, Any] = {"patch_size": 2, "embed_dim": 32, "num_heads": 2, "depth": 2}

State = dict[str, Tensor]


def tiny(img_size: int = 8) -> Encoder:
    return Encoder(EncoderConfig(name=NAME, img_size=img_size, **SIZES))


@pytest.fixture
def weights() -> State:
    """Another encoder's state, without a row for the class token."""
    return tiny().state_dict()


def with_row(state: State, value: float = 0.0) -> State:
    row = torch.full((1, 1, 32), value)
    return state | {"pos_embed": torch.cat([row, state["pos_embed"]], dim=1)}


def assert_loaded(encoder: Encoder, state: State) -> None:
    own = encoder.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in own.items())


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def test_official_file(weights: State, tmp_path: Path) -> None:
    path = tmp_path / "mae_contheads_vit.encoder cp=last model.th"
    kwargs = {"patch_size": [2, 2], "kind": "vit.masked_encoder"}
    torch.save({"state_dict": weights, "ctor_kwargs": kwargs}, path)
    encoder = tiny()
    assert load_encoder(encoder, path) == [f"encoder from {path}, state_dict"]
    assert_loaded(encoder, weights)


@pytest.mark.parametrize("key", [None, "model", "optim"])
def test_official_ema_file_and_published_wrappers(
    weights: State, key: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "maect_large16.th"
    torch.save(weights if key is None else {key: weights}, path)
    encoder = tiny()
    load_encoder(encoder, str(path))
    assert_loaded(encoder, weights)


def test_facebook_file(weights: State, tmp_path: Path) -> None:
    path = tmp_path / "mae_pretrain.pth"
    decoder = {
        "mask_token": torch.zeros(1, 1, 4),
        "decoder_blocks.0.norm1.weight": torch.ones(4),
        "decoder_blocks.0.norm1.bias": torch.ones(4),
        "decoder_pred.bias": torch.ones(12),
    }
    args = argparse.Namespace(lr=1e-3)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}, 1: torch.zeros(2)}, "param_groups": []}
    content = {"model": with_row(weights) | decoder, "args": args, "optimizer": optimizer}
    torch.save(content, path)
    encoder = tiny()
    lines = load_encoder(encoder, path)
    assert lines == [
        f"encoder from {path}, model",
        "there, but not used: mask_token, decoder_blocks.* (2), decoder_pred.*",
    ]
    assert_loaded(encoder, weights)


def test_timm_and_safetensors_with_a_learned_class_row(weights: State, tmp_path: Path) -> None:
    vit: Any = timm.create_model(NAME, img_size=8, num_classes=5, **SIZES)
    nn.init.normal_(vit.cls_token)
    path = tmp_path / "model.safetensors"
    save_file(vit.state_dict(), path)
    encoder = tiny()
    lines = load_encoder(encoder, path)
    assert lines[1:] == [
        "pos_embed: the class token's row was added into cls_token",
        "there, but not used: head.* (2)",
    ]
    torch.testing.assert_close(encoder.cls_token, vit.cls_token + vit.pos_embed[:, :1])
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(encoder(images), vit.forward_features(images))


def test_half_precision_files_become_fp32(weights: State) -> None:
    half = {name: value.half() for name, value in with_row(weights, 0.5).items()}
    encoder = tiny()
    load_encoder(encoder, half)
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(
        encoder.cls_token.detach(), weights["cls_token"] + 0.5, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (lambda w: {"target_encoder": prefixed(w, "module."), "prototypes": torch.ones(2)}, "msn"),
        (lambda w: {"state_dict": prefixed(w, "module.base_encoder.")}, "mocov3"),
        (lambda w: {"model": prefixed(w, "encoder."), "update": 3}, "whole model"),
        (lambda w: {"model": prefixed(w, "encoder."), "encoder_ema": None}, "own run"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_encoders_inside_other_checkpoints(weights: State, wrap: Any, where: str) -> None:
    encoder = tiny()
    load_encoder(encoder, wrap(weights))
    assert_loaded(encoder, weights)


def test_the_published_encoder_is_preferred_among_several(weights: State) -> None:
    other = tiny().state_dict()
    contents: list[dict[str, Any]] = [
        {"encoder": prefixed(other, "module."), "target_encoder": prefixed(weights, "module.")},
        {
            "state_dict": prefixed(weights, "module.base_encoder.")
            | prefixed(other, "module.momentum_encoder.")
        },
        {"model": prefixed(other, "encoder."), "encoder_ema": weights},
        {"student": other, "teacher": weights},
    ]
    for content in contents:
        encoder = tiny()
        load_encoder(encoder, content)
        assert_loaded(encoder, weights)
    with pytest.raises(ValueError, match=r"expected one ViT encoder, found 2: left; right; "):
        load_encoder(tiny(), {"left": weights, "right": other})


def test_names_beside_the_encoder_are_reported(weights: State) -> None:
    content = prefixed(weights, "encoder.") | {"head.weight": torch.ones(1), "scale": torch.ones(1)}
    lines = load_encoder(tiny(), content)
    assert lines == [
        "encoder from a state dict, encoder.*",
        "there, but not used: head.*, scale",
    ]


def test_without_positions_the_fixed_ones_stay(weights: State) -> None:
    del weights["pos_embed"]
    encoder = tiny()
    lines = load_encoder(encoder, weights)
    assert lines[1:] == ["missing there, kept as it was: pos_embed"]
    torch.testing.assert_close(encoder.pos_embed, sincos_pos_embed(32, 4))


@pytest.mark.parametrize("row", [False, True])
def test_positions_are_resampled_bicubically_without_antialiasing(
    weights: State, row: bool
) -> None:
    # from 4 x 4 down to 2 x 2, where antialiasing would change the numbers
    weights["pos_embed"] = torch.randn(1, 16, 32)
    encoder = tiny(img_size=4)
    lines = load_encoder(encoder, with_row(weights) if row else weights)
    assert lines[1:] == ["pos_embed: resampled from 4x4 to 2x2"]
    # Keys's kernel with a = -0.75 half way between samples, as torch has it
    kernel = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375])
    # a clamped 4 x 4 neighbourhood around the points 0.5 and 2.5 of the old grid
    index = torch.tensor([[0, 0, 1, 2], [1, 2, 3, 3]])
    grid = weights["pos_embed"].view(4, 4, 32)
    expected = torch.stack(
        [
            torch.einsum("a,b,abd->d", kernel, kernel, grid[index[y]][:, index[x]])
            for y in range(2)
            for x in range(2)
        ]
    )
    torch.testing.assert_close(encoder.pos_embed[0], expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.pop("blocks.1.mlp.fc2.bias"), r"lacks blocks\.1\.mlp\.fc2\.bias"),
        (lambda w: w.pop("norm.weight"), r"lacks norm\.weight"),
        (
            lambda w: w.update({"blocks.0.ls1.gamma": torch.ones(32)}),
            r"cannot have LayerScale \(blocks\.0\.ls1\.gamma\)",
        ),
        (
            lambda w: w.update({f"blocks.2.{i}": torch.ones(1) for i in range(9)}),
            r"blocks\.2\.0, blocks\.2\.1, blocks\.2\.2, blocks\.2\.3 and 5 more",
        ),
        (
            lambda w: w.update({"cls_token": torch.ones(1, 1, 16)}),
            r"cls_token is \[1, 1, 16\], this encoder needs \[1, 1, 32\] \(vit_tiny_patch16_224\)",
        ),
        (lambda w: w.update({"pos_embed": torch.ones(1, 15, 32)}), "square grid, got 15"),
        (lambda w: w.update({"pos_embed": torch.ones(1, 16, 16)}), r"pos_embed is \[1, 16, 16\]"),
        (lambda w: w.update({"pos_embed": torch.ones(16)}), r"pos_embed is \[16\]"),
        (lambda w: w.update({"cls_token": w["cls_token"].long()}), "cls_token is torch.int64"),
        (lambda w: w["norm.bias"].fill_(float("nan")), "norm.bias holds NaN or infinity"),
        (lambda w: w.pop("patch_embed.proj.weight"), "found nothing named patch_embed"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_change_nothing(
    weights: State, change: Any, reason: str
) -> None:
    encoder = tiny()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    change(weights)
    with pytest.raises(ValueError, match=reason) as error:
        load_encoder(encoder, weights)
    assert "\n" not in str(error.value)
    assert_loaded(encoder, before)


def test_files_that_could_run_code_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": Path("x")}, path)
    with pytest.raises(ValueError, match="reading it could run code"):
        load_encoder(tiny(), path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="expected a state dict, got a list"):
        load_encoder(tiny(), path)


@pytest.mark.parametrize("class_row", [True, False])
def test_export_is_what_timm_loads(class_row: bool) -> None:
    encoder = tiny()
    state = export_timm(encoder, class_row=class_row)
    vit: Any = timm.create_model(
        NAME, img_size=8, num_classes=0, no_embed_class=not class_row, **SIZES
    )
    vit.load_state_dict(state)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(vit.forward_features(images), encoder(images))
    other = tiny()
    load_encoder(other, state)
    assert_loaded(other, encoder.state_dict())


def test_export_is_a_copy() -> None:
    encoder = tiny()
    state = export_timm(encoder)
    encoder.cls_token.data.add_(1)
    assert not state["cls_token"].equal(encoder.cls_token)
    assert not any(value.requires_grad for value in state.values())
