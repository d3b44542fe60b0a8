import pytest
import torch
from torch import nn

from maect_fast.config import DecoderConfig, EncoderConfig, OptimConfig
from maect_fast.models.decoder import Decoder
from maect_fast.models.encoder import Encoder
from maect_fast.training.optim import (
    ParamGroup,
    Rates,
    build_optimizer,
    layer_scale,
    param_groups,
)

CPU = torch.device("cpu")
OPTIM = OptimConfig(
    encoder_lr=1e-3,
    other_lr=2e-3,
    encoder_weight_decay=0.05,
    other_weight_decay=1e-5,
    layer_decay=0.65,
)


class Model(nn.Module):
    """What stage 1 trains, with four blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(
            EncoderConfig(
                name="vit_tiny_patch16_224",
                img_size=8,
                patch_size=4,
                embed_dim=16,
                depth=4,
                num_heads=2,
            )
        )
        self.decoder = Decoder(DecoderConfig(embed_dim=8, depth=1, num_heads=2), self.encoder)


def settings(model: nn.Module, groups: list[ParamGroup]) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter in a group, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in groups:
        assert group["lr"] == group["base_lr"]
        for p in group["params"]:
            assert names[id(p)] not in found
            found[names[id(p)]] = (group["lr"], group["weight_decay"])
    return found


@pytest.mark.parametrize(
    ("depth", "scales"),
    [
        # B/16: blocks 6 to 11; L/16: 12 and 23; H: 16 and 31
        (12, dict(zip(range(6, 12), (0.0754, 0.116, 0.1785, 0.2746, 0.4225, 0.65), strict=True))),
        (24, {12: 0.00569, 23: 0.65}),
        (32, {16: 0.00102, 31: 0.65}),
    ],
)
def test_layer_scales_of_the_recipes(depth: int, scales: dict[int, float]) -> None:
    for i, scale in scales.items():
        assert layer_scale(f"blocks.{i}", depth, 0.65) == pytest.approx(scale, rel=5e-3)
    assert layer_scale("stem", depth, 0.65) == pytest.approx(0.65 ** (depth + 1))
    assert layer_scale("norm", depth, 0.65) == 1


def test_groups() -> None:
    model = Model()
    found = settings(model, param_groups(model, OPTIM, lr_scale=8))
    assert set(found) == {name for name, _ in model.named_parameters()}
    lr, other = 8e-3, 1.6e-2
    expected = {
        # the tokens have three dimensions, and so weight decay
        "encoder.cls_token": (lr * 0.65**5, 0.05),
        "decoder.mask_token": (other, 1e-5),
        "encoder.patch_embed.proj.weight": (lr * 0.65**5, 0.05),
        "encoder.patch_embed.proj.bias": (lr * 0.65**5, 0),
        "encoder.blocks.0.attn.qkv.weight": (lr * 0.65**4, 0.05),
        "encoder.blocks.0.norm1.weight": (lr * 0.65**4, 0),
        "encoder.blocks.3.mlp.fc2.weight": (lr * 0.65, 0.05),
        "encoder.blocks.3.mlp.fc2.bias": (lr * 0.65, 0),
        "encoder.norm.weight": (lr, 0),
        "decoder.blocks.0.attn.qkv.weight": (other, 1e-5),
        "decoder.pred.bias": (other, 0),
        "decoder.norm.weight": (other, 0),
    }
    for name, (rate, weight_decay) in expected.items():
        assert found[name] == pytest.approx((rate, weight_decay)), name


def test_without_layer_decay_the_encoder_is_two_groups() -> None:
    model = Model()
    optim = OptimConfig(encoder_lr=1e-3, other_lr=1e-3, layer_decay=1.0)
    groups = param_groups(model, optim, lr_scale=1)
    assert [group["name"] for group in groups] == [
        "encoder",
        "encoder without decay",
        "decoder",
        "decoder without decay",
    ]
    assert {rate for rate, _ in settings(model, groups).values()} == {1e-3}


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.encoder.freeze(3)
    found = settings(model, param_groups(model, OPTIM, lr_scale=1))
    encoder = {name.split(".")[1] for name in found if name.startswith("encoder.")}
    assert encoder == {"blocks", "norm"}
    assert {n.split(".")[2] for n in found if n.startswith("encoder.blocks")} == {"3"}
    model.encoder.freeze(None)
    groups = param_groups(model, OPTIM, lr_scale=1)
    assert [group["name"] for group in groups] == ["decoder", "decoder without decay"]


def test_zero_weight_decay_is_one_group() -> None:
    model = Model()
    optim = OptimConfig(encoder_weight_decay=0.0, other_weight_decay=0.0)
    found = settings(model, param_groups(model, optim, lr_scale=1))
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert {weight_decay for _, weight_decay in found.values()} == {0}


def test_unknown_parameters_are_listed() -> None:
    model = Model()
    model.add_module("classifier", nn.Linear(2, 2, bias=False))
    model.encoder.add_module("rope", nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match=r"encoder\.rope\.weight, classifier\.weight"):
        param_groups(model, OPTIM, lr_scale=1)


def test_optimizer_steps_as_adamw_by_formula() -> None:
    model = Model()
    groups = param_groups(model, OPTIM, lr_scale=1)
    optimizer = build_optimizer(groups, OPTIM)
    Rates(optimizer, CPU).set(torch.tensor(0.5, dtype=torch.float64))
    weight, bias = model.decoder.pred.weight, model.decoder.pred.bias
    before = {"weight": weight.detach().clone(), "bias": bias.detach().clone()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.3)
    optimizer.step()
    # the first step of Adam is the sign of the gradient
    rate = 0.5 * 2e-3
    torch.testing.assert_close(weight.detach(), before["weight"] * (1 - rate * 1e-5) - rate)
    torch.testing.assert_close(bias.detach(), before["bias"] - rate)
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_learning_rate_follows_the_factor_and_survives_a_state_dict() -> None:
    model = Model()
    optimizer = build_optimizer(param_groups(model, OPTIM, lr_scale=1), OPTIM)
    peak = [group["lr"] for group in optimizer.param_groups]
    Rates(optimizer, CPU).set(torch.tensor(0.1, dtype=torch.float64))
    # To the last bit, as fp64 tensors: so does an update on a CPU what it did with numbers.
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.1 * lr for lr in peak]
    resumed = build_optimizer(param_groups(model, OPTIM, lr_scale=1), OPTIM)
    resumed.load_state_dict(optimizer.state_dict())
    Rates(resumed, CPU).set(torch.tensor(1.0, dtype=torch.float64))
    assert [group["lr"].item() for group in resumed.param_groups] == peak
