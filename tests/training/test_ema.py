import torch

from maect_fast.config import EncoderConfig
from maect_fast.models.encoder import Encoder
from maect_fast.training.ema import EncoderEma

TINY = EncoderConfig(
    name="vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2
)


def move(encoder: Encoder) -> None:
    with torch.no_grad():
        for p in encoder.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))


def test_starts_as_a_true_copy() -> None:
    encoder = Encoder(TINY)
    ema = EncoderEma(encoder, 0.9)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    move(encoder)
    assert list(ema.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in ema.state_dict().items())
    assert not any(p.requires_grad for p in ema.encoder.parameters())
    assert not ema.encoder.training


def test_equals_the_formula() -> None:
    encoder = Encoder(TINY)
    encoder.freeze(1)
    ema = EncoderEma(encoder, 0.9)
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
    ema = EncoderEma(encoder, 0.9999)
    encoder.pos_embed.add_(1)
    move(encoder)
    ema.update()
    state, own = ema.state_dict(), encoder.state_dict()
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert {name for name in own if torch.equal(own[name], state[name])} == frozen | {"pos_embed"}


def test_fully_frozen_encoder_has_nothing_to_follow() -> None:
    encoder = Encoder(TINY)
    encoder.freeze(None)
    ema = EncoderEma(encoder, 0.5)
    ema.update()
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in ema.state_dict().items())


def test_continues_from_its_state_dict_bitwise() -> None:
    encoder = Encoder(TINY)
    ema = EncoderEma(encoder, 0.9)
    move(encoder)
    ema.update()
    resumed = EncoderEma(encoder, 0.9)
    resumed.load_state_dict({name: value.clone() for name, value in ema.state_dict().items()})
    move(encoder)
    for average in (ema, resumed):
        average.update()
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in ema.state_dict().items())


def test_follows_an_encoder_that_is_converted_later() -> None:
    """`Module.to` keeps parameters and replaces buffers; layers may freeze and thaw."""
    encoder = Encoder(TINY)
    ema = EncoderEma(encoder, 0.9)
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
