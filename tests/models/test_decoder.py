import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from maect_fast.config import DecoderConfig, EncoderConfig
from maect_fast.kernels import masked_patch_mse
from maect_fast.models.decoder import Decoder
from maect_fast.models.encoder import Encoder, Masking, random_masking, sincos_pos_embed
from maect_fast.nn import FusedAttention

DIM, PATCH, HEADS = 16, 2, 4


def build(in_chans: int = 3) -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    encoder = Encoder(
        EncoderConfig(
            name="vit_tiny_patch16_224",
            img_size=8,
            in_chans=in_chans,
            patch_size=PATCH,
            embed_dim=24,
            depth=1,
            num_heads=2,
        )
    )
    decoder = Decoder(DecoderConfig(embed_dim=DIM, depth=2, num_heads=HEADS), encoder)
    return encoder.double(), decoder.double()


def patchify(images: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, L, p * p * C] for all patches, written with loops."""
    rows = []
    for top in range(0, images.shape[2], PATCH):
        for left in range(0, images.shape[3], PATCH):
            patch = images[:, :, top : top + PATCH, left : left + PATCH]
            rows.append(patch.permute(0, 2, 3, 1).flatten(1))
    return torch.stack(rows, dim=1)


def full_prediction(decoder: Decoder, tokens: Tensor, masking: Masking) -> Tensor:
    """The decoder as published: every patch through norm and predictor, [B, L, p * p * C]."""
    x = decoder.embed(tokens)
    num_masked = masking.ids_restore.shape[1] + 1 - x.shape[1]
    mask_tokens = decoder.mask_token.repeat(len(x), num_masked, 1)
    patches = torch.cat([x[:, 1:], mask_tokens], dim=1)
    index = masking.ids_restore[:, :, None].repeat(1, 1, x.shape[2])
    patches = torch.gather(patches, dim=1, index=index) + decoder.pos_embed
    x = torch.cat([x[:, :1], patches], dim=1)
    for block in decoder.blocks:
        x = block(x)
    prediction: Tensor = decoder.pred(decoder.norm(x))[:, 1:]
    return prediction


def full_loss(prediction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    target = patchify(images)
    mean = target.mean(dim=-1, keepdim=True)
    var = target.var(dim=-1, keepdim=True)  # unbiased
    target = (target - mean) / (var + 1.0e-6) ** 0.5
    loss = ((prediction - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def test_names_shapes_and_initialisation() -> None:
    encoder, decoder = build()
    state = decoder.state_dict()
    assert {name.split(".")[0] for name in state} == {
        *("embed", "mask_token", "pos_embed", "blocks", "norm", "pred")
    }
    assert state["pred.weight"].shape == (3 * PATCH**2, DIM)
    assert state["mask_token"].shape == (1, 1, DIM)
    assert state["mask_token"].std() < 0.04
    assert state["mask_token"].any()
    torch.testing.assert_close(decoder.pos_embed, sincos_pos_embed(DIM, 4).double())
    assert not any(state[f"{name}.bias"].any() for name in ("embed", "pred", "blocks.1.mlp.fc1"))
    block: Any = decoder.blocks[0]
    assert decoder.norm.eps == block.norm1.eps == encoder.config.norm_eps == 1e-6
    config = dataclasses.replace(encoder.config, norm_eps=1e-12)
    other: Any = Decoder(DecoderConfig(embed_dim=16, depth=1, num_heads=2), Encoder(config))
    assert other.norm.eps == other.blocks[0].norm2.eps == 1e-12
    assert block.attn.num_heads == HEADS
    assert all(type(each.attn) is FusedAttention for each in decoder.blocks)


def test_heads_must_divide_the_width() -> None:
    encoder, _ = build()
    with pytest.raises(ValueError, match="num_heads 3"):
        Decoder(DecoderConfig(embed_dim=16, depth=1, num_heads=3), encoder)


def loss_of(predicted: Tensor, images: Tensor, masking: Masking) -> Tensor:
    return masked_patch_mse(predicted, images, masking.ids_removed, PATCH, normalize=True)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_loss_and_gradients_equal_the_full_computation(in_chans: int) -> None:
    encoder, decoder = build(in_chans)
    images = torch.randn(3, in_chans, 8, 8, dtype=torch.float64)
    masking = random_masking(torch.rand(3, 16), 0.75)
    parameters = [*encoder.parameters(), *decoder.parameters()]

    tokens = encoder(images, masking.ids_keep)
    predicted = decoder(tokens, masking)
    assert predicted.shape == (3, 12, in_chans * PATCH**2)
    loss = loss_of(predicted, images, masking)
    grads = torch.autograd.grad(loss, parameters)

    full = full_prediction(decoder, encoder(images, masking.ids_keep), masking)
    expected = full_loss(full, images, masking.mask)
    torch.testing.assert_close(
        predicted, full[torch.arange(3)[:, None], masking.ids_removed], rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for grad, full_grad in zip(grads, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(grad, full_grad, rtol=1e-8, atol=1e-12)


def test_every_parameter_gets_a_gradient() -> None:
    encoder, decoder = build()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    masking = random_masking(torch.rand(2, 16), 0.5)
    predicted = decoder(encoder(images, masking.ids_keep), masking)
    torch.autograd.backward(loss_of(predicted, images, masking))
    for module in (encoder, decoder):
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_targets_are_fp32_under_autocast() -> None:
    encoder, decoder = build()
    encoder, decoder = encoder.float(), decoder.float()
    images = torch.randn(2, 3, 8, 8)
    masking = random_masking(torch.rand(2, 16), 0.75)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = decoder(encoder(images, masking.ids_keep), masking)
        loss = loss_of(predicted, images, masking)
    assert predicted.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    expected = loss_of(decoder(encoder(images, masking.ids_keep), masking), images, masking)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
