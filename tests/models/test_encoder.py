import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maect_fast.config import EncoderConfig
from maect_fast.kernels import gather_patches
from maect_fast.models.encoder import (
    Encoder,
    masking_noise,
    paste_patches,
    pool,
    pooled_features,
    random_masking,
    sincos_pos_embed,
)
from maect_fast.nn import FusedAttention, unfuse
from maect_fast.testing import assert_within_budget

# 4 x 4 patches of 2 x 2 pixels
TINY = EncoderConfig(
    name="vit_tiny_patch16_224",
    img_size=8,
    in_chans=3,
    patch_size=2,
    embed_dim=32,
    depth=3,
    num_heads=2,
)


def tiny() -> Encoder:
    return Encoder(TINY)


def test_names_and_shapes_of_the_state_dict() -> None:
    state = tiny().state_dict()
    linear = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"]
    layers = [f"blocks.{i}.{name}" for i in range(3) for name in linear]
    layers += ["patch_embed.proj", "norm"]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(state) == expected | {"cls_token", "pos_embed"}
    assert state["cls_token"].shape == (1, 1, 32)
    assert state["pos_embed"].shape == (1, 16, 32)
    assert state["patch_embed.proj.weight"].shape == (32, 3, 2, 2)


@pytest.mark.parametrize(
    ("name", "patch_size", "shape"),
    [
        ("vit_base_patch16_224", None, (16, 768, 12, 196)),
        ("vit_huge_patch14_224", 16, (16, 1280, 12, 196)),
        ("deit_small_patch16_224", None, (16, 384, 6, 196)),
    ],
)
def test_any_plain_timm_vit(
    name: str, patch_size: int | None, shape: tuple[int, int, int, int]
) -> None:
    num_heads = shape[2] if "huge" not in name else None
    encoder = Encoder(EncoderConfig(name=name, patch_size=patch_size, depth=1, num_heads=num_heads))
    found = (encoder.patch_size, encoder.embed_dim, shape[2], encoder.num_patches)
    assert found == shape
    assert encoder.depth == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_2240", "timm has no model"),
        ("resnet50", "not one of timm's plain ViTs"),
        ("vit_relpos_small_patch16_224", "not one of timm's plain ViTs"),
        ("vit_small_patch16_dinov3", "not one of timm's plain ViTs"),
        ("vit_medium_patch16_gap_256", "no class token"),
        ("vit_small_patch14_reg4_dinov2", "register tokens"),
        ("vit_small_patch14_dinov2", "LayerScale"),
        ("vit_base_patch32_clip_224", "before the first block"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),
        ("vit_base_patch16_rpn_224", "no class token"),
        ("vit_intern300m_patch14_448", "its final norm"),
        ("vit_small_patch16_18x2_224", "its blocks are ParallelThingsBlock"),
    ],
)
def test_other_models_are_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        Encoder(EncoderConfig(name=name, img_size=224, depth=1))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block.attn, "q_norm", nn.LayerNorm(16)), "qk-norm"),
        (lambda block: setattr(block.mlp, "act", nn.GELU(approximate="tanh")), "exact GELU"),
        (lambda block: setattr(block.norm2, "eps", 1e-5), "LayerNorms with eps 1e-06"),
        (lambda block: setattr(block.attn.qkv, "bias", None), "qkv bias"),
    ],
    ids=["qk-norm", "gelu", "eps", "bias"],
)
def test_blocks_that_differ_are_refused(
    change: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(change)
    vit: Any = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    change(vit.blocks[1])
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: vit)
    with pytest.raises(ValueError, match=reason):
        Encoder(EncoderConfig(name="vit_tiny_patch16_224"))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (EncoderConfig(name="vit_tiny_patch16_224", img_size=30), "encoder.img_size"),
        (EncoderConfig(embed_dim=32, num_heads=3), "num_heads 3"),
        (EncoderConfig(embed_dim=30, num_heads=3, depth=1), "multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: EncoderConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Encoder(config)


def test_wrong_image_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images: expected \[1, 3, 8, 8\]"):
        tiny()(torch.zeros(1, 3, 8, 6))


def test_initialisation() -> None:
    torch.manual_seed(0)
    encoder: Any = Encoder(
        EncoderConfig(
            name="vit_tiny_patch16_224", embed_dim=256, depth=2, num_heads=4, norm_eps=1e-5
        )
    )
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.15)

    def assert_uniform(weight: Tensor, bound: float) -> None:
        weight = weight.detach()
        assert weight.abs().max() == pytest.approx(bound, rel=0.02)
        assert weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)

    # xavier-uniform on the [D, 3 p^2] view; the bias keeps Conv2d's default
    assert_uniform(encoder.patch_embed.proj.weight, math.sqrt(6 / (256 + 768)))
    assert_uniform(encoder.patch_embed.proj.bias, 1 / math.sqrt(768))
    for block in encoder.blocks:
        # one [3D, D] matrix, not three
        assert_uniform(block.attn.qkv.weight, math.sqrt(6 / (4 * 256)))
        assert_uniform(block.mlp.fc1.weight, math.sqrt(6 / (5 * 256)))
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert not layer.bias.any()
    for norm in (encoder.norm, encoder.blocks[0].norm1, encoder.blocks[1].norm2):
        assert norm.eps == 1e-5
        assert norm.weight.eq(1).all()
        assert not norm.bias.any()


def test_positions_by_hand() -> None:
    # D = 8: omega = 1, 10000 ** -0.5 = 0.01; patch 5 of a 3 x 3 grid is row 1, column 2
    pos_embed = sincos_pos_embed(8, 3)
    assert pos_embed.shape == (1, 9, 8)
    assert pos_embed.dtype == torch.float32
    column = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    row = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    torch.testing.assert_close(pos_embed[0, 5], torch.tensor(column + row))
    torch.testing.assert_close(pos_embed[0, 0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))


def test_equals_timm() -> None:
    encoder = tiny().double()
    vit: Any = timm.create_model(
        TINY.name,
        img_size=8,
        patch_size=2,
        embed_dim=32,
        depth=3,
        num_heads=2,
        num_classes=0,
        no_embed_class=True,
    ).double()
    vit.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(encoder(images), vit.forward_features(images))


def test_kept_patches_equal_convolution_then_gather() -> None:
    encoder = tiny().double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    ids_keep = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
    whole = encoder.embed(images)
    expected = torch.cat([whole[:, :1], whole[:, 1:][torch.arange(3)[:, None], ids_keep]], dim=1)
    torch.testing.assert_close(encoder.embed(images, ids_keep), expected)
    channels_last = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(encoder.embed(channels_last, ids_keep), expected)
    assert encoder(images, ids_keep).shape == (3, 6, 32)


@pytest.mark.parametrize("enabled", [False, True])
def test_kept_patches_are_cast_as_autocast_casts_them(enabled: bool) -> None:
    """Gathered in the product's dtype, they are the same bits."""
    encoder, images = tiny(), torch.randn(2, 3, 8, 8)
    ids_keep = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    proj = encoder.patch_embed.proj
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
        pixels = gather_patches(images, ids_keep, 2)
        embedded = F.linear(pixels, proj.weight.flatten(1), proj.bias)
        assert embedded.dtype == (torch.bfloat16 if enabled else torch.float32)
        expected = embedded + encoder.pos_embed[0, ids_keep]
        assert torch.equal(encoder.embed(images, ids_keep)[:, 1:], expected)
        double = encoder.double().embed(images.double(), ids_keep)
    torch.testing.assert_close(double[:, 1:], expected.double(), rtol=2e-2, atol=2e-2)


@pytest.fixture
def _as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole images are embedded as on CUDA."""
    monkeypatch.setattr("maect_fast.models.encoder.is_gpu", lambda _: True)


def embed(
    encoder: Encoder, images: Tensor, ids_keep: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens, and gradients of what trains of the patch embedding."""
    tokens = encoder.embed(images, ids_keep)
    names = {n: p for n, p in encoder.patch_embed.named_parameters() if p.requires_grad}
    if not names:
        return tokens, {}
    weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)).to(tokens)
    grads = torch.autograd.grad(tokens, list(names.values()), weight)
    return tokens.detach(), dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_one_product_embeds_whole_images_within_the_convolutions_error(
    frozen: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, images = tiny(), torch.randn(5, 3, 8, 8)
    encoder.patch_embed.requires_grad_(not frozen)
    exact, exact_grads = embed(copy.deepcopy(encoder).double(), images.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        by_module, by_module_grads = embed(encoder, images)
        monkeypatch.setattr("maect_fast.models.encoder.is_gpu", lambda _: True)
        with FlopCounterMode(display=False) as counter:
            result, grads = embed(encoder, images)
    operators = {str(op) for op in counter.get_flop_counts()["Global"]}
    assert not any("convolution" in op for op in operators)
    assert result.dtype == by_module.dtype
    assert_within_budget(result, by_module, exact)
    assert set(grads) == (set() if frozen else {"proj.weight", "proj.bias"})
    for name, grad in grads.items():
        assert_within_budget(grad, by_module_grads[name], exact_grads[name], name=name)


def hooked(embedding: Any) -> None:
    embedding.proj.register_forward_hook(lambda _, __, output: 2 * output)


def embedding_hooked(embedding: Any) -> None:
    embedding.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))


def replaced(embedding: Any) -> None:
    embedding.proj = nn.Sequential(embedding.proj, nn.Tanh())


def overwritten(embedding: Any) -> None:
    embedding.proj.forward = lambda images: 2 * nn.Conv2d.forward(embedding.proj, images)


def normalised(embedding: Any) -> None:
    embedding.norm = nn.LayerNorm(32)


@pytest.mark.usefixtures("_as_on_gpu")
@pytest.mark.parametrize("change", [hooked, embedding_hooked, replaced, overwritten, normalised])
def test_a_changed_patch_embedding_is_called(change: Callable[[Any], None]) -> None:
    """Of whole images and of kept patches."""
    encoder, images = tiny(), torch.randn(2, 3, 8, 8)
    ids_keep = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    plain = encoder.patch_embed(images)
    change(encoder.patch_embed)
    expected = encoder.patch_embed(images)
    assert not torch.allclose(expected, plain)
    row = torch.arange(2)[:, None]
    tokens = encoder.embed(images)[:, 1:] - encoder.pos_embed
    torch.testing.assert_close(tokens, expected)
    kept = encoder.embed(images, ids_keep)[:, 1:] - encoder.pos_embed[0, ids_keep]
    torch.testing.assert_close(kept, expected[row, ids_keep])


@pytest.mark.usefixtures("_as_on_gpu")
def test_one_product_compiles_whole() -> None:
    encoder, images = tiny(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(encoder.embed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), encoder.embed(images))


def test_order_of_kept_patches_does_not_matter_to_the_class_token() -> None:
    encoder = tiny().double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    shuffled = torch.stack([torch.randperm(16) for _ in range(2)])
    torch.testing.assert_close(encoder(images, shuffled)[:, 0], encoder(images)[:, 0])


def test_patches_are_found_and_pasted_row_by_row() -> None:
    images = torch.arange(2 * 1 * 4 * 6).view(2, 1, 4, 6).float()
    ids = torch.tensor([[5, 0], [1, 4]])
    patches = gather_patches(images, ids, 2).view(2, 2, 1, 2, 2)
    assert patches[0, 0, 0].tolist() == [[16, 17], [22, 23]]
    assert patches[1, 0, 0].tolist() == [[26, 27], [32, 33]]
    pasted = paste_patches(images, ids, torch.zeros(2, 2, 4), 2)
    assert pasted[0, 0].tolist() == [
        [0, 0, 2, 3, 4, 5],
        [0, 0, 8, 9, 10, 11],
        [12, 13, 14, 15, 0, 0],
        [18, 19, 20, 21, 0, 0],
    ]
    channel_last = patches.permute(0, 1, 3, 4, 2).flatten(2)
    assert paste_patches(pasted, ids, channel_last, 2).equal(images)


def test_pool() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 5.0], [5.0, 9.0]]])
    assert pool(tokens, "class_token").tolist() == [[1, 2]]
    assert pool(tokens, "mean_patch").tolist() == [[4, 7]]


def test_attention_is_fused() -> None:
    encoder = tiny()
    images = torch.randn(2, 3, 8, 8)
    tokens = encoder(images)
    assert all(type(block.attn) is FusedAttention for block in encoder.blocks)
    unfuse(encoder)
    assert all(type(block.attn) is Attention for block in encoder.blocks)
    # On the CPU it is the same kernel.
    assert torch.equal(encoder(images), tokens)
    torch.testing.assert_close(encoder(images, class_token_only=True), tokens[:, :1])


class Doubled(nn.Linear):
    """What a plug-in may put in a layer's place."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice the product."""
        return 2 * super().forward(x)


def changed(encoder: Encoder, where: str) -> list[str]:
    """Let somebody watch or replace a module of the last block; returns what they saw."""
    seen: list[str] = []
    block: Any = encoder.blocks[-1]
    if where == "class":
        block.attn.qkv.__class__ = Doubled
    elif where == "parametrised":
        nn.utils.parametrizations.weight_norm(block.attn.qkv)
    elif where == "wrapped":
        block.attn.qkv = nn.Sequential(block.attn.qkv)
    elif where == "forward":
        plain = block.attn.forward
        block.attn.forward = lambda x, **rest: 3 * plain(x, **rest)
    else:
        module = encoder.get_submodule(f"blocks.{len(encoder.blocks) - 1}{where}")
        module.register_forward_hook(lambda *_: seen.append(where))
        module.register_forward_pre_hook(lambda *_: seen.append(where))
    return seen


@pytest.mark.parametrize(
    "where",
    [
        *("", ".attn", ".attn.qkv", ".attn.proj", ".mlp", ".norm1", ".norm2"),
        *("class", "parametrised", "wrapped", "forward"),
    ],
)
def test_the_class_token_alone_passes_no_module_by(where: str) -> None:
    """Hooks run, and what replaces or wraps a layer computes."""
    encoder = tiny().eval()
    images = torch.randn(2, 3, 8, 8)
    seen = changed(encoder, where)
    expected = encoder(images)[:, :1]
    called = len(seen)
    torch.testing.assert_close(encoder(images, class_token_only=True), expected)
    assert len(seen) == 2 * called
    assert called == (2 if where == "" or where.startswith(".") else 0)


def class_token(encoder: Encoder, images: Tensor, *, alone: bool, **options: Any) -> list[Tensor]:
    """The class token after the final norm, [B, 1, D], and all gradients of a function of it."""
    tokens = encoder(images, class_token_only=alone, **options)
    assert (tokens.shape[1] == 1) == alone
    row = tokens[:, :1]
    weight = torch.randn(row.shape, generator=torch.Generator().manual_seed(1)).to(row)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    if not row.requires_grad:
        assert not parameters
        return [row]
    return [row.detach(), *torch.autograd.grad(row, parameters, weight)]


def uneven() -> Encoder:
    """In fp64, and no bias is zero, no scale is one."""
    encoder = tiny().double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return encoder


@pytest.mark.parametrize("frozen", [0, 2, 3, None])
@pytest.mark.parametrize("masked", [False, True])
def test_the_class_token_alone_is_the_class_token(frozen: int | None, masked: bool) -> None:
    encoder = uneven()
    encoder.freeze(frozen)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    options = {"ids_keep": torch.rand(3, 16).argsort(dim=1)[:, :5]} if masked else {}
    expected = class_token(encoder, images, alone=False, **options)
    result = class_token(encoder, images, alone=True, **options)
    assert len(expected) == 1 + sum(p.requires_grad for p in encoder.parameters())
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-13)


def test_the_class_token_alone_with_layer_scale_and_stochastic_depth() -> None:
    """A block is followed layer by layer, also where a plain ViT has none."""
    encoder = uneven()
    last: Any = encoder.blocks[-1]
    last.ls1, last.ls2 = nn.Linear(32, 32).double(), nn.Linear(32, 32).double()
    last.drop_path1, last.drop_path2 = nn.Tanh(), nn.Sigmoid()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = class_token(encoder, images, alone=False)
    result = class_token(encoder, images, alone=True)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("frozen", [0, 2, None])
def test_the_class_token_alone_saves_all_but_keys_and_values(frozen: int | None) -> None:
    encoder = tiny()
    encoder.freeze(frozen)
    B, N, D = 3, 17, 32
    images = torch.randn(B, 3, 8, 8)

    def count(alone: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            class_token(encoder, images, alone=alone)
        total: int = counter.get_total_flops()
        return total

    # Queries and `proj` are D x D, the MLP's layers 4 D x D; backward is twice that.
    linear = 2 * (1 + 1 + 4 + 4) * D**2
    # Two products forward, five backward.
    attention = (2 * 2 * N * D, 2 * 5 * N * D)
    trains = frozen is not None
    saved = (linear + attention[0]) + trains * (2 * linear + attention[1])
    assert count(alone=False) - count(alone=True) == B * (N - 1) * saved


def test_the_class_token_alone_compiles_whole() -> None:
    encoder = tiny()
    encoder.freeze(1)
    images = torch.randn(2, 3, 8, 8)
    expected = class_token(encoder, images, alone=True)
    encoder.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(class_token(encoder, images, alone=True), expected)


def test_the_class_token_alone_under_autocast() -> None:
    encoder = tiny()
    images = torch.randn(2, 3, 8, 8)
    exact = class_token(encoder, images, alone=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full = class_token(encoder, images, alone=False)
        result = class_token(encoder, images, alone=True)
    assert {tensor.dtype for tensor in result} == {torch.float32}
    for ours, eager, true in zip(result, full, exact, strict=True):
        assert (ours - true).norm() <= 2 * (eager - true).norm() + 1e-6 * true.norm()


@pytest.mark.parametrize(("pooling", "rows"), [("class_token", 1), ("mean_patch", 17)])
def test_pooling_computes_what_it_needs(pooling: Any, rows: int) -> None:
    encoder = tiny()
    seen: list[int] = []
    last: Any = encoder.blocks[-1]
    for layer in (last.norm2, last.mlp.fc1, last.mlp.fc2, last.attn.proj, encoder.norm):
        layer.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    images = torch.randn(2, 3, 8, 8)
    pooled = pooled_features(encoder, images, pooling)
    assert seen == [rows] * 5
    torch.testing.assert_close(pooled, pool(encoder(images), pooling))
    # Whatever else maps images to tokens is asked for all of them.
    tokens = nn.Flatten(2)
    assert torch.equal(pooled_features(tokens, images, pooling), pool(tokens(images), pooling))


def trained_names(encoder: Encoder) -> set[str]:
    return {name for name, p in encoder.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_freeze_trains_only_what_is_above(num_blocks: int) -> None:
    encoder = tiny()
    encoder.freeze(num_blocks)
    names = trained_names(encoder)
    assert names == {
        name
        for name, _ in encoder.named_parameters()
        if name.startswith("norm.")
        or (name.startswith("blocks.") and int(name.split(".")[1]) >= num_blocks)
    }
    tokens = encoder(torch.randn(2, 3, 8, 8))
    torch.autograd.backward(tokens.square().sum())
    assert {name for name, p in encoder.named_parameters() if p.grad is not None} == names


def test_autograd_starts_at_the_first_tuned_block() -> None:
    encoder = tiny()
    encoder.freeze(2)
    seen: list[bool] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append(out.requires_grad))
    encoder(torch.randn(2, 3, 8, 8, requires_grad=True))
    assert seen == [False, False, True]


def test_frozen_layers_stay_in_eval_mode() -> None:
    encoder = tiny().train()
    encoder.freeze(1)
    encoder.train()
    assert [block.training for block in encoder.blocks] == [False, True, True]
    assert not encoder.patch_embed.training
    assert encoder.norm.training
    encoder.freeze(None)
    encoder.train()
    assert not any(m.training for m in encoder.modules())
    assert trained_names(encoder) == set()
    assert not encoder(torch.randn(2, 3, 8, 8)).requires_grad


def test_freeze_can_be_undone_and_is_checked() -> None:
    encoder = tiny()
    encoder.freeze(None)
    encoder.freeze(0)
    encoder.train()
    assert trained_names(encoder) == {name for name, _ in encoder.named_parameters()}
    assert all(m.training for m in encoder.modules())
    with pytest.raises(ValueError, match="frozen_blocks: expected 0 to 3"):
        encoder.freeze(4)


def test_frozen_or_not_the_numbers_are_the_same() -> None:
    encoder = tiny()
    images = torch.randn(2, 3, 8, 8)
    free = encoder(images)
    for num_blocks in (2, None):
        encoder.freeze(num_blocks)
        assert torch.equal(encoder(images), free)


def test_masking_by_hand() -> None:
    noise = torch.tensor([[0.3, 0.1, 0.9, 0.2, 0.5]])
    masking = random_masking(noise, 0.6)
    assert masking.ids_keep.tolist() == [[1, 3]]
    assert masking.ids_removed.tolist() == [[0, 4, 2]]
    assert masking.ids_restore.tolist() == [[2, 0, 4, 1, 3]]
    assert masking.mask.tolist() == [[1, 0, 1, 0, 1]]


@pytest.mark.parametrize(("num_patches", "num_keep"), [(196, 49), (256, 64), (16, 4), (10, 2)])
def test_number_of_kept_patches(num_patches: int, num_keep: int) -> None:
    masking = random_masking(torch.rand(3, num_patches), 0.75)
    assert masking.ids_keep.shape == (3, num_keep)
    everything = torch.cat([masking.ids_keep, masking.ids_removed], dim=1)
    assert everything.sort(dim=1).values.equal(torch.arange(num_patches).expand(3, -1))
    assert everything.gather(1, masking.ids_restore).equal(torch.arange(num_patches).expand(3, -1))
    assert masking.mask.sum(dim=1).tolist() == [num_patches - num_keep] * 3


def test_ties_keep_their_order() -> None:
    assert random_masking(torch.zeros(1, 64), 0.5).ids_keep.tolist() == [list(range(32))]


def test_noise_depends_on_seed_step_view_and_row_alone() -> None:
    noise = masking_noise(2, 6, 10, seed=7, step=3)
    assert noise.shape == (12, 10)
    assert len(set(noise.flatten().tolist())) == 120
    # two ranks of three rows draw what one rank of six rows draws
    ranks = [masking_noise(2, 3, 10, seed=7, step=3, first_row=first) for first in (0, 3)]
    assert torch.cat([r.view(2, 3, 10) for r in ranks], dim=1).flatten(0, 1).equal(noise)
    assert masking_noise(2, 6, 10, seed=7, step=torch.tensor(3)).equal(noise)
    assert masking_noise(2, 6, 12, seed=7, step=3)[:, :10].equal(noise)
    for seed, step in ((8, 3), (7, 4)):
        assert not masking_noise(2, 6, 10, seed=seed, step=step).eq(noise).any()


def test_masks_are_uniform() -> None:
    noise = masking_noise(2, 500, 16, seed=0, step=0)
    kept = 1 - random_masking(noise, 0.75).mask.mean(dim=0)
    # 1000 draws at 0.25: the standard error is 0.014
    assert (kept - 0.25).abs().max() < 0.06


def test_bf16_autocast_keeps_the_norm_in_fp32() -> None:
    encoder = tiny()
    images = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = encoder(images)
    assert tokens.dtype == torch.float32
    similarity = F.cosine_similarity(tokens.flatten(1), encoder(images).flatten(1))
    assert similarity.min() > 0.999
