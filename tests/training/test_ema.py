import math

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3

from maect_fast.config import EncoderConfig, Stage, load_config, load_recipe
from maect_fast.models.encoder import Encoder
from maect_fast.training.ema import EncoderEma, ema_decay, half_lives

TINY = EncoderConfig(
    name="vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2
)

# Of updates: no warm-up.
LONG_RUN = 1_000_000


def move(encoder: Encoder) -> None:
    with torch.no_grad():
        for p in encoder.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))


def test_starts_as_a_true_copy() -> None:
    encoder = Encoder(TINY)
    ema = EncoderEma(encoder, 0.9, total=LONG_RUN)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    move(encoder)
    assert list(ema.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in ema.state_dict().items())
    assert not any(p.requires_grad for p in ema.encoder.parameters())
    assert not ema.encoder.training


def test_equals_the_formula() -> None:
    encoder = Encoder(TINY)
    encoder.freeze(1)
    ema = EncoderEma(encoder, 0.9, total=LONG_RUN)
    expected = {name: value.double() for name, value in encoder.state_dict().items()}
    for _ in range(3):
        move(encoder)
        ema.update()
        for name, value in encoder.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.double()
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)
        assert value.dtype == torch.float32


def test_frozen_parameters_stay_bitwise_and_buffers_are_copied() -> None:
    encoder = Encoder(TINY)
    encoder.freeze(2)
    ema = EncoderEma(encoder, 0.9999, total=LONG_RUN)
    encoder.pos_embed.add_(1)
    move(encoder)
    ema.update()
    state, own = ema.state_dict(), encoder.state_dict()
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert {name for name in own if torch.equal(own[name], state[name])} == frozen | {"pos_embed"}


def test_fully_frozen_encoder_has_nothing_to_follow() -> None:
    encoder = Encoder(TINY)
    encoder.freeze(None)
    ema = EncoderEma(encoder, 0.5, total=LONG_RUN)
    ema.update()
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in ema.state_dict().items())


def test_continues_from_its_state_dict_bitwise() -> None:
    encoder = Encoder(TINY)
    ema = EncoderEma(encoder, 0.9, total=LONG_RUN)
    move(encoder)
    ema.update()
    resumed = EncoderEma(encoder, 0.9, total=LONG_RUN)
    resumed.load_state_dict({name: value.clone() for name, value in ema.state_dict().items()})
    move(encoder)
    for average in (ema, resumed):
        average.update()
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in ema.state_dict().items())


def test_follows_an_encoder_that_is_converted_later() -> None:
    """`Module.to` keeps parameters and replaces buffers; layers may freeze and thaw."""
    encoder = Encoder(TINY)
    ema = EncoderEma(encoder, 0.9, total=LONG_RUN)
    encoder.double()
    ema.encoder.double()
    encoder.freeze(2)
    encoder.pos_embed.add_(1)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    move(encoder)
    ema.update()
    own, moves = encoder.state_dict(), {n for n, p in encoder.named_parameters() if p.requires_grad}
    for name, value in ema.state_dict().items():
        expected = before[name].lerp(own[name], 0.1) if name in moves else own[name]
        torch.testing.assert_close(value, expected)


def test_a_short_run_warms_up_as_timm_does() -> None:
    """Weights and decays, from the first update on."""
    encoder = Encoder(TINY)
    ema = EncoderEma(encoder, 0.9999, total=200)
    peer = ModelEmaV3(encoder, decay=0.9999, use_warmup=True)
    for update in range(1, 201):
        decay = ema_decay(0.9999, update=update, total=200)
        assert decay == pytest.approx(peer.get_decay(update), abs=1e-15)
        if update <= 5:
            move(encoder)
            ema.weigh(update)
            ema.update()
            peer.update(encoder, step=update)
    for name, value in peer.module.state_dict().items():
        torch.testing.assert_close(ema.state_dict()[name], value)


@pytest.mark.parametrize("recipe", ["b16", "l16", "h16", "h14", "b16-aug", "l16-aug", "h14-aug"])
def test_the_runs_of_the_paper_have_no_warm_up(recipe: str) -> None:
    stage: Stage = "tune"
    config = load_config(load_recipe(recipe, stage))
    assert config.encoder_ema == 0.9999
    total = config.epochs * (1_281_167 // config.batch_size)
    assert {ema_decay(0.9999, update=u, total=total) for u in (1, 2, 500, total)} == {0.9999}
    assert ema_decay(0.9999, update=1, total=24_999) == 0


def test_half_lives() -> None:
    assert half_lives(0.5, 3) == 3
    assert half_lives(0.9999, 25_020) == pytest.approx(3.61, abs=0.01)
    assert half_lives(0.0, 1) == math.inf
