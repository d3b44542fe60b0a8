import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn

from maect_fast.kernels import masked_attention
from maect_fast.nn import FusedAttention, fuse
from maect_fast.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("poison")

B, N, C, H = 3, 6, 32, 4


def vit(**options: Any) -> VisionTransformer:
    size = {"img_size": 16, "patch_size": 4, "embed_dim": C, "depth": 2, "num_heads": H}
    return VisionTransformer(**{"num_classes": 5, **size, **options})


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of the parameters."""
    x = x.detach().requires_grad_()
    out = model(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, [x, *parameters], weight)]


@pytest.fixture
def fused() -> FusedAttention:
    return FusedAttention(nn.Linear(C, 3 * C), nn.Linear(C, C), num_heads=H)


def packed(fused: FusedAttention, x: Tensor, **modes: Any) -> Tensor:
    qkv = fused.qkv(x).unflatten(-1, (3, H, C // H))
    out: Tensor = fused.proj(masked_attention(qkv, **modes).flatten(-2))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_model_computes_the_same(dtype: torch.dtype, device: torch.device) -> None:
    model = vit(qkv_bias=True).to(device, dtype)
    images = torch.randn(2, 3, 16, 16).to(device, dtype)
    exact = run(copy.deepcopy(model).double(), images.double())
    eager = run(model, images)
    names = ["output", "image", *(name for name, _ in model.named_parameters())]
    assert fuse(model) is model
    for name, *tensors in zip(names, run(model, images), eager, exact, strict=True):
        assert_within_budget(*tensors, name=name)


def test_fusing_shares_parameters_and_keeps_keys() -> None:
    model = vit().eval()
    keys = list(model.state_dict())
    parameters = dict(model.named_parameters())
    qkv = model.get_submodule("blocks.1.attn.qkv")
    qkv.requires_grad_(False)
    fuse(model)
    assert list(model.state_dict()) == keys
    assert {"blocks.1.attn.qkv.weight", "blocks.1.attn.proj.bias"} <= set(keys)
    assert model.get_submodule("blocks.1.attn.qkv") is qkv
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert not any(isinstance(m, Attention) for m in model.modules())
    assert [type(m) for m in model.modules()].count(FusedAttention) == 2
    assert not any(m.training for m in model.modules())
    model.load_state_dict(vit().state_dict())


def test_fusing_twice_changes_nothing() -> None:
    model = fuse(vit())
    modules = list(model.modules())
    assert list(fuse(model).modules()) == modules


def test_dropout_behind_the_projection_stays() -> None:
    model = fuse(vit(proj_drop_rate=1.0))
    attn = model.get_submodule("blocks.0.attn")
    x = torch.randn(B, N, C)
    assert not attn(x).any()
    assert attn.eval()(x).any()


def test_a_head_dim_of_its_own() -> None:
    block = nn.Sequential(Attention(C, num_heads=3, attn_head_dim=8, dim_out=10).double())
    x = torch.randn(B, N, C, dtype=torch.float64)
    expected = run(block, x)
    torch.testing.assert_close(run(fuse(block), x), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"qk_norm": True, "norm_layer": nn.LayerNorm}, "normalises q and k"),
        ({"scale_norm": True, "norm_layer": nn.LayerNorm}, "normalises its output"),
        ({"gated": True}, "gate"),
        ({"attn_drop": 0.1}, r"attn_drop 0\.1"),
    ],
)
def test_an_attention_that_does_more_is_refused(options: dict[str, Any], reason: str) -> None:
    plain, other = Attention(C, num_heads=H), Attention(C, num_heads=H, **options)
    model = nn.ModuleDict({"first": plain, "second": other})
    with pytest.raises(ValueError, match=f"cannot replace second: .*{reason}"):
        fuse(model)
    # All or nothing.
    assert model["first"] is plain


def test_another_scale_is_refused() -> None:
    attention = Attention(C, num_heads=H)
    attention.scale = 1.0
    with pytest.raises(ValueError, match=r"cannot replace 0: its scale 1\.0"):
        fuse(nn.Sequential(attention))


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("beit_base_patch16_224", {"depth": 1, "embed_dim": 48}, r"timm\.models\.beit\.Attention"),
        ("vit_relpos_small_patch16_224", {"depth": 1, "embed_dim": 48}, "RelPosAttention"),
        ("swin_tiny_patch4_window7_224", {"depths": (1,), "num_heads": (2,)}, "WindowAttention"),
    ],
)
def test_a_position_bias_is_refused(name: str, options: dict[str, Any], kind: str) -> None:
    model = timm.create_model(name, **options)
    with pytest.raises(ValueError, match=rf"expected timm\.layers\.Attention, got .*{kind}"):
        fuse(model)


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), Attention(C, num_heads=H)], ids=["none", "bare"]
)
def test_nothing_to_replace_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"expected a model that contains timm\.layers\.Attention"):
        fuse(model)


@pytest.mark.parametrize(
    ("rows", "modes"),
    [
        ((B, N), {}),
        ((B, N), {"keep": torch.tensor([[0, 2], [5, 1], [3, 4]])}),
        ((B, N), {"seqlens": torch.tensor([6, 2, 4])}),
        ((B, N), {"key_mask": torch.rand(B, N, generator=torch.Generator().manual_seed(0)) < 0.5}),
        ((N,), {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32), "max_seqlen": 4}),
    ],
    ids=["dense", "keep", "seqlens", "key_mask", "cu_seqlens"],
)
def test_modes_reach_the_op(
    rows: tuple[int, ...], modes: dict[str, Any], fused: FusedAttention
) -> None:
    x = torch.randn(*rows, C)
    result = fused(x, **modes)
    assert torch.equal(result, packed(fused, x, **modes))
    if modes:
        dense = fused(x) if len(rows) == 2 else fused(x[None])[0]
        assert not torch.allclose(result, dense)


@pytest.mark.parametrize("first", [1, B])
def test_a_broadcast_key_mask_goes_through_timm(first: int) -> None:
    model = vit().double().eval()
    mask = torch.rand(first, 1, 1, 17) < 0.5
    images = torch.randn(B, 3, 16, 16, dtype=torch.float64)
    expected = model.forward_features(images, attn_mask=mask)
    result = fuse(model).forward_features(images, attn_mask=mask)
    torch.testing.assert_close(result, expected)
    assert not torch.allclose(result, model.forward_features(images))


def test_block_diagonal_mask_of_xformers() -> None:
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    model = vit().double()
    blocks = fuse(model).get_submodule("blocks")
    lengths = [5, 1, 3]
    samples = [torch.randn(1, length, C, dtype=torch.float64) for length in lengths]
    mask, tokens = attn_bias.BlockDiagonalMask.from_tensor_list(samples)
    for block in blocks.children():
        tokens = block(tokens, attn_mask=mask)
    for sample, result in zip(samples, mask.split(tokens), strict=True):
        torch.testing.assert_close(result, nn.Sequential(*blocks.children())(sample))


def test_other_masks_of_xformers_are_refused(fused: FusedAttention) -> None:
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    mask = attn_bias.BlockDiagonalMask.from_seqlens([2, 4], device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"x: expected \[1, 6, C\].*, got \[1, 5, 32\]"):
        fused(torch.randn(1, 5, C), attn_mask=mask)
    with pytest.raises(ValueError, match=r"expected a tensor or a Block.*, got .*Causal"):
        fused(torch.randn(1, 6, C), attn_mask=mask.make_causal())
    mask = attn_bias.BlockDiagonalMask.from_seqlens([2, 4], [4, 2], device=torch.device("cpu"))
    with pytest.raises(ValueError, match="equal blocks of queries and keys"):
        fused(torch.randn(1, 6, C), attn_mask=mask)


def test_what_a_block_passes_on_is_never_dropped(fused: FusedAttention) -> None:
    x = torch.randn(B, N, C)
    mask = torch.ones(B, 1, 1, N, dtype=torch.bool)
    with pytest.raises(ValueError, match="is_causal: expected False"):
        fused(x, is_causal=True)
    with pytest.raises(ValueError, match=r"no N x N bias, got torch.bool \[3, 1, 6, 6\]"):
        fused(x, attn_mask=mask.expand(-1, -1, N, -1))
    with pytest.raises(ValueError, match=r"no N x N bias, got torch.float32"):
        fused(x, attn_mask=mask.float())
    with pytest.raises(ValueError, match="attn_mask: expected None with another mode"):
        fused(x, attn_mask=mask, seqlens=torch.tensor([1, 2, 3]))


def test_a_fused_model_compiles_whole() -> None:
    model = fuse(vit())
    images = torch.randn(2, 3, 16, 16)
    expected = run(model, images)
    model.compile(fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(model, images), expected, strict=True):
        torch.testing.assert_close(ours, eager)
