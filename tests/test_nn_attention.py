import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers.attention import Attention, AttentionRope
from timm.layers.config import set_fused_attn
from timm.models import VisionTransformer
from timm.utils.attention_extract import AttentionExtract
from torch import Tensor, nn

from maect_fast.config import EncoderConfig
from maect_fast.kernels import masked_attention
from maect_fast.models.encoder import Encoder
from maect_fast.nn import (
    FusedAttention,
    FusedMultiheadAttention,
    attention_maps,
    fuse,
    unfuse,
    why_not,
)
from maect_fast.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("poison")

B, N, C, H = 3, 6, 32, 4


def vit(**options: Any) -> VisionTransformer:
    size = {"img_size": 16, "patch_size": 4, "embed_dim": C, "depth": 2, "num_heads": H}
    return VisionTransformer(**{"num_classes": 5, **size, **options})


def torchvision_vit(**options: Any) -> nn.Module:
    size = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": H, "hidden_dim": C}
    model = torchvision.models.VisionTransformer(**size, mlp_dim=2 * C, num_classes=5, **options)
    # Its head and its biases are zero at the start.
    return scatter(model)


class FlashAttention(nn.Module):
    """Stands in for the kernel, with its attributes.

    Source: Dao-AILab/flash-attention@13403e8: flash_attn/flash_attention.py.
    """

    def __init__(self, softmax_scale: float, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.dropout_p = attention_dropout

    def forward(self, qkv: Tensor) -> tuple[Tensor, None]:
        assert qkv.dtype in (torch.float16, torch.bfloat16)
        q, k, v = qkv.transpose(1, 3).unbind(2)
        o = F.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale)
        return o.transpose(1, 2), None


class FlashAttentionWrapper(nn.Module):
    """What the official ViT holds, in layers, attributes and both ways of computing.

    Source: ml-jku/MAE-CT@6c82cb6: models/modules/flash_attention_wrapper.py.
    """

    def __init__(self, dim: int, num_heads: int = 8, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn = FlashAttention(softmax_scale=self.scale, attention_dropout=attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.attn_drop = nn.Dropout(attn_drop)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        if qkv.dtype in (torch.float16, torch.bfloat16):
            x = self.attn(qkv)[0].reshape(B, N, C)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            weights = (q @ k.transpose(-2, -1) * self.attn.softmax_scale).softmax(dim=-1)
            x = (self.attn_drop(weights) @ v).transpose(1, 2).reshape(B, N, C)
        out: Tensor = self.proj_drop(self.proj(x))
        return out


class VitBlock(nn.Module):
    """Source: ml-jku/MAE-CT@6c82cb6: models/modules/vit_block.py."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(C)
        self.attn = FlashAttentionWrapper(C, num_heads=H)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x))  # type: ignore[no-any-return]


def official_blocks() -> nn.Module:
    return nn.Sequential(VitBlock(), VitBlock())


def scatter(model: nn.Module) -> nn.Module:
    """No parameter is zero or one, where a mistake might not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "timm": (lambda: vit(qkv_bias=True), (2, 3, 16, 16)),
    "MAE-CT": (official_blocks, (B, N, C)),
    "torchvision": (torchvision_vit, (2, 3, 16, 16)),
}
# Of timm's Attention; the norms' weights are moved away from one by `scatter`.
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk_norm": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "scale_norm": {"scale_norm": True, "norm_layer": nn.LayerNorm},
    "gate": {"gated": True},
    "all": {"qk_norm": True, "scale_norm": True, "gated": True, "norm_layer": nn.LayerNorm},
}


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of the parameters."""
    x = x.detach().requires_grad_()
    out = model(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, [x, *parameters], weight)]


@pytest.fixture(params=["plain", "qk_norm"])
def fused(request: pytest.FixtureRequest) -> FusedAttention:
    norms = {}
    if request.param == "qk_norm":
        norms = {name: scatter(nn.LayerNorm(C // H)) for name in ("q_norm", "k_norm")}
    return FusedAttention(nn.Linear(C, 3 * C), nn.Linear(C, C), num_heads=H, **norms)


def packed(fused: FusedAttention, x: Tensor, **modes: Any) -> Tensor:
    qkv = fused.qkv(x).unflatten(-1, (3, H, C // H))
    if fused.q_norm is not None and fused.k_norm is not None:
        q, k, v = qkv.unbind(-3)
        qkv = torch.stack((fused.q_norm(q), fused.k_norm(k), v), dim=-3)
    out: Tensor = fused.proj(masked_attention(qkv, **modes).flatten(-2))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_a_fused_model_computes_the_same(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    build, shape = MODELS[kind]
    model = build().to(device, dtype)
    x = torch.randn(shape).to(device, dtype)
    exact = run(copy.deepcopy(model).double(), x.double())
    eager = run(model, x)
    names = ["output", "input", *(name for name, _ in model.named_parameters())]
    assert fuse(model) is model
    for name, *tensors in zip(names, run(model, x), eager, exact, strict=True):
        assert_within_budget(*tensors, name=name)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("head_dim", [8, 80])
def test_every_layer_of_timm(layers: str, head_dim: int) -> None:
    options = LAYERS[layers]
    block = Attention(C, num_heads=3, attn_head_dim=head_dim, dim_out=10, **options).double()
    x = torch.randn(B, N, C, dtype=torch.float64)
    expected = run(scatter(block), x)
    torch.testing.assert_close(run(fuse(block), x), expected, rtol=1e-9, atol=1e-11)


class Float32Norm(nn.LayerNorm):
    """As CUDA's autocast runs norms."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)


def test_norms_may_run_in_fp32_under_autocast() -> None:
    layers = {**LAYERS["all"], "norm_layer": Float32Norm}
    attention = scatter(Attention(C, num_heads=H, **layers))
    x = torch.randn(B, N, C)
    exact = attention(x).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = attention(x)
        result = fuse(attention)(x)
    assert result.dtype == torch.bfloat16
    assert_within_budget(result, eager, exact)


@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_mode_computes_the_same(kind: str) -> None:
    """torch has a path of its own for nn.MultiheadAttention there."""
    build, shape = MODELS[kind]
    model, x = build().double().eval(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fuse(model)(x), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_unfusing_puts_back_exactly_what_was_there(kind: str) -> None:
    build, shape = MODELS[kind]
    model, x = build(), torch.randn(shape)
    modules, keys = list(model.modules()), list(model.state_dict())
    types = [type(module) for module in modules]
    contents = [dict(vars(module)) for module in modules]
    parameters = list(model.parameters())
    expected = run(model, x)
    assert list(fuse(model).modules()) == modules
    assert list(model.state_dict()) == keys
    assert [type(module) for module in modules] != types
    assert unfuse(model) is model
    assert list(model.modules()) == modules
    assert [type(module) for module in modules] == types
    assert [vars(module) for module in modules] == contents
    assert list(model.state_dict()) == keys
    for parameter, before in zip(model.parameters(), parameters, strict=True):
        assert parameter is before
    assert all(map(torch.equal, run(model, x), expected))
    assert [type(module) for module in unfuse(model).modules()] == types


@pytest.mark.parametrize("kind", MODELS)
def test_what_happens_to_a_fused_model_stays_when_it_is_unfused(kind: str) -> None:
    """Copies, files, moves, modes and weights; hooks work before, between and after."""
    build, shape = MODELS[kind]
    x = torch.randn(shape, dtype=torch.float64)
    model = build()
    calls: list[str] = []
    last = [m for m in model.modules() if type(m).__name__ in ATTENTIONS][-1]
    last.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    fuse(model).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    torch.testing.assert_close(unfuse(twin)(x), expected)
    assert type(last).__name__.startswith("Fused")
    torch.testing.assert_close(unfuse(model)(x), expected)
    assert not any(module.training for module in model.modules())
    names = (type(last).__name__, vars(last).get("_unfused"))
    assert names == (calls[-1], None)
    assert len(set(calls)) == 2


ATTENTIONS = ("Attention", "FlashAttentionWrapper", "MultiheadAttention")


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_a_saved_module_comes_back_fused(kind: str) -> None:
    build, shape = MODELS[kind]
    model, x = fuse(build()).eval(), torch.randn(shape)
    file = io.BytesIO()
    torch.save(model, file)
    size = sum(p.nbytes for p in model.parameters())
    # Nothing is in it twice: the rest is names and the little that a file needs per tensor.
    assert size < file.tell() < 2 * size
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), model(x))
    torch.testing.assert_close(unfuse(loaded)(x), model(x))


def test_a_module_built_as_fused_has_nothing_to_go_back_to(fused: FusedAttention) -> None:
    assert type(unfuse(nn.Sequential(fused))[0]) is FusedAttention


def test_a_class_that_others_changed_is_not_overwritten() -> None:
    model = fuse(torchvision_vit())
    attention = model.get_submodule("encoder.layers.encoder_layer_1.self_attention")
    nn.utils.parametrizations.orthogonal(attention, "in_proj_weight")
    others = type(attention)
    with pytest.raises(ValueError, match=r"cannot restore .*layer_1\.self_attention: .*Param"):
        unfuse(model)
    assert type(attention) is others
    # All or nothing; and what is fused stays so.
    assert [type(m) for m in model.modules()].count(FusedMultiheadAttention) == 1
    assert fuse(model) is model
    plain = torchvision_vit()
    attention = plain.get_submodule("encoder.layers.encoder_layer_0.self_attention")
    nn.utils.parametrizations.orthogonal(attention, "in_proj_weight")
    with pytest.raises(ValueError, match=r"cannot replace .*layer_0\.self_attention: expected"):
        fuse(plain)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_first_token_alone(layers: str, bias: bool) -> None:
    options = {**LAYERS[layers], "attn_head_dim": 16, "dim_out": 10, "qkv_bias": bias}
    attention: Any = fuse(scatter(Attention(C, num_heads=3, **options).double()))
    x = torch.randn(B, N, C, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(B, 1, 10, dtype=torch.float64)
    wanted = [x, *attention.parameters()]

    def first(out: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad(out, wanted, weight)]

    expected = first(attention(x)[:, :1])
    assert expected[0].shape == (B, 1, 10)
    # Keys and values of the other tokens take part.
    assert expected[1][:, 1:].abs().amax(dim=-1).min() > 1e-4
    result = first(attention.first_token(x))
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


def test_the_first_token_needs_the_rows_of_qkv() -> None:
    fused = FusedAttention(nn.Sequential(nn.Linear(C, 3 * C)), nn.Linear(C, C), num_heads=H)
    assert fused(torch.randn(B, N, C)).shape == (B, N, C)
    with pytest.raises(
        TypeError, match=r"qkv: expected an nn\.Linear without hooks, got Sequential"
    ):
        fused.first_token(torch.randn(B, N, C))


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


def test_an_attention_that_does_more_is_refused() -> None:
    plain, other = Attention(C, num_heads=H), Attention(C, num_heads=H, attn_drop=0.1)
    model = nn.ModuleDict({"first": plain, "second": other})
    with pytest.raises(ValueError, match=r"cannot replace second: .*attn_drop 0\.1"):
        fuse(model)
    # All or nothing.
    assert type(model["first"]) is Attention


def test_an_official_attention_that_does_more_is_refused() -> None:
    other = FlashAttentionWrapper(C, H, attn_drop=0.1)
    with pytest.raises(ValueError, match=r"cannot replace 0: .*attn_drop 0\.1"):
        fuse(nn.Sequential(other))
    other = FlashAttentionWrapper(C, H)
    other.attn.softmax_scale = 0.25
    with pytest.raises(ValueError, match=r"cannot replace 0: its scale 0\.25"):
        fuse(nn.Sequential(other))
    other.attn = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"cannot replace 0: expected .*FlashAttentionWrapper"):
        fuse(nn.Sequential(other))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout": 0.1}, r"dropout 0\.1"),
        ({"add_bias_kv": True}, "keys of its own"),
        ({"add_zero_attn": True}, "keys of its own"),
        ({"kdim": 8}, "width of their own"),
        ({"vdim": 8}, "width of their own"),
        ({"batch_first": False}, "batch_first=False"),
    ],
)
def test_a_multihead_attention_that_does_more_is_refused(
    options: dict[str, Any], reason: str
) -> None:
    model = torchvision_vit()
    block: Any = model.get_submodule("encoder.layers.encoder_layer_1")
    block.self_attention = nn.MultiheadAttention(C, H, **{"batch_first": True, **options})
    where = r"encoder\.layers\.encoder_layer_1\.self_attention"
    with pytest.raises(ValueError, match=f"cannot replace {where}: .*{reason}") as error:
        fuse(model)
    assert "\n" not in str(error.value)
    assert not any(isinstance(m, FusedMultiheadAttention) for m in model.modules())


def test_other_users_of_multihead_attention_are_left_alone() -> None:
    """They may want its weights, or other keys than queries."""
    head = nn.MultiheadAttention(C, H)
    model = fuse(nn.ModuleDict({"vit": torchvision_vit(), "head": head}))
    assert type(head) is nn.MultiheadAttention
    assert [type(m) for m in model.modules()].count(FusedMultiheadAttention) == 2


def test_what_a_fused_multihead_attention_cannot_do_is_an_error() -> None:
    attention = FusedMultiheadAttention(C, H).double()
    twin = nn.MultiheadAttention(C, H, batch_first=True).double()
    twin.load_state_dict(attention.state_dict())
    x = torch.randn(B, N, C, dtype=torch.float64)
    result, weights = attention(x, x, x, need_weights=False)
    torch.testing.assert_close(result, twin(x, x, x)[0])
    assert weights is None
    with pytest.raises(ValueError, match="need_weights: expected False, got True"):
        attention(x, x, x)
    for tensors in ((x, x, x + 1), (x, x + 1, x), (x + 1, x, x)):
        with pytest.raises(ValueError, match="expected one tensor, got several"):
            attention(*tensors, need_weights=False)
    mask = torch.zeros(B, N, dtype=torch.bool)
    more: tuple[dict[str, Any], ...] = (
        {"key_padding_mask": mask},
        {"attn_mask": mask.new_zeros(N, N)},
        {"is_causal": True},
    )
    for options in more:
        with pytest.raises(ValueError, match=r"key_padding_mask, attn_mask, is_causal: expected"):
            attention(x, x, x, need_weights=False, **options)


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
    with pytest.raises(ValueError, match=rf"expected timm\.layers\.Attention, .*, got .*{kind}"):
        fuse(model)


def test_nothing_to_replace_is_an_error() -> None:
    for model in (nn.Linear(2, 2), nn.MultiheadAttention(C, H)):
        with pytest.raises(ValueError, match=r"expected .* attention of timm, .*, got "):
            fuse(model)
        assert unfuse(model) is model


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
    torch.testing.assert_close(result, packed(fused, x, **modes))
    if "seqlens" in modes:
        padding = torch.arange(N) >= modes["seqlens"][:, None]
        assert torch.equal(fused(x.masked_fill(padding[..., None], torch.nan), **modes), result)
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


@pytest.mark.parametrize("layers", LAYERS)
def test_block_diagonal_mask_of_xformers(layers: str) -> None:
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    model = vit()
    blocks = model.get_submodule("blocks")
    for block in blocks.children():
        block.attn = scatter(Attention(C, num_heads=H, **LAYERS[layers]))
    fuse(model).double()
    lengths = [5, 1, 3]
    samples = [torch.randn(1, length, C, dtype=torch.float64) for length in lengths]
    mask, tokens = attn_bias.BlockDiagonalMask.from_tensor_list(samples)
    for block in blocks.children():
        assert block.get_submodule("attn")(tokens, attn_mask=mask).shape == tokens.shape
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


@pytest.mark.parametrize("kind", [*MODELS, "qk_norm"])
def test_a_fused_model_compiles_whole(kind: str) -> None:
    build, shape = MODELS.get(kind, (lambda: vit(qk_norm=True), (2, 3, 16, 16)))
    model, x = fuse(build()), torch.randn(shape)
    expected = run(model, x)
    model.compile(fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(model, x), expected, strict=True):
        torch.testing.assert_close(ours, eager)


# Rotary attention, which only timm has.
ROTARY: dict[str, dict[str, Any]] = {
    "eva02_tiny_patch14_224": {"img_size": 28},
    "eva_giant_patch14_224": {"img_size": 28},
    "vit_small_patch16_dinov3": {"img_size": 32},
    "vit_small_patch16_dinov3_qkvb": {"img_size": 32},
    "vit_small_patch16_rope_mixed_224": {"img_size": 32},
    "vit_pe_core_tiny_patch16_384": {"img_size": 32},
}


@pytest.mark.parametrize("name", ROTARY)
def test_rotated_queries_and_keys(name: str) -> None:
    """Bit for bit, forward and backward; `unfuse` puts back what was there."""
    size: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
    model = scatter(timm.create_model(name, **size, **ROTARY[name]))
    x = torch.randn(2, 3, ROTARY[name]["img_size"], ROTARY[name]["img_size"])
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    expected = run(model, x)
    fuse(model)
    assert [type(b.attn).__name__ for b in model.get_submodule("blocks").children()] == [
        "FusedRotaryAttention"
    ] * 2
    assert all(map(torch.equal, run(model, x), expected))
    assert list(model.state_dict()) == keys
    assert not [line for line in why_not(model) if "attn" in line]
    assert [type(m) for m in unfuse(model).modules()] == types
    assert all(map(torch.equal, run(model, x), expected))


@pytest.mark.slow
def test_a_rotary_model_compiles_whole_and_is_exported() -> None:
    size: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 32}
    model = fuse(timm.create_model("vit_small_patch16_dinov3", **size)).eval()
    x = torch.randn(5, 3, 32, 32)
    expected = run(model, x)
    assert torch.equal(exported(model, (2, 3, 32, 32))(x), expected[0])
    model.compile(fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(model, x), expected, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_projections_apart_and_grouped_keys(kv_heads: int | None) -> None:
    options: dict[str, Any] = {"qkv_fused": False, "gated": True, "rotate_half": True}
    if kv_heads is not None:
        if "num_kv_heads" not in inspect.signature(AttentionRope).parameters:
            pytest.skip("this release of timm has no grouped keys")
        options["num_kv_heads"] = kv_heads
    options |= {"norm_layer": nn.LayerNorm, "qk_norm": True, "scale_norm": True}
    attention = scatter(AttentionRope(C, num_heads=H, **options))
    x, rope = torch.randn(B, N, C), torch.randn(N - 1, 2 * C // H)
    mask = torch.rand(B, 1, 1, N) < 0.7
    mask[..., 0] = True
    expected = attention(x, rope=rope, attn_mask=mask)
    fuse(attention)
    torch.testing.assert_close(attention(x, rope=rope, attn_mask=mask), expected)
    assert not torch.allclose(attention(x, rope=rope), expected)
    with pytest.raises(ValueError, match=r"no N x N bias, got torch.bool \[3, 1, 6, 6\]"):
        attention(x, rope=rope, attn_mask=mask.expand(-1, -1, N, -1))
    with pytest.raises(ValueError, match=r"x: expected \[B, N, C\], got \[6, 32\]"):
        attention(x[0])


def test_norms_of_a_rotary_attention_may_run_in_fp32_under_autocast() -> None:
    layers: dict[str, Any] = {"norm_layer": Float32Norm, "qk_norm": True}
    attention = scatter(AttentionRope(C, num_heads=H, **layers))
    x, rope = torch.randn(B, N, C), torch.randn(N - 1, 2 * C // H)
    exact = attention(x, rope=rope).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = attention(x, rope=rope)
        result = fuse(attention)(x, rope=rope)
    assert_within_budget(result, eager, exact)


def test_naflex_masks_its_keys() -> None:
    """Of two samples one is padded: the outputs, which leave padding out, stay the same."""
    size: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
    model: Any = scatter(timm.create_model("naflexvit_base_patch16_gap", **size)).eval()
    coordinates = torch.cartesian_prod(torch.arange(3), torch.arange(3)).expand(2, -1, -1).clone()
    valid = torch.arange(9) < torch.tensor([[9], [6]])
    coordinates[~valid] = 0
    batch = {
        "patches": torch.randn(2, 9, 768),
        "patch_coord": coordinates,
        "patch_valid": valid,
    }
    expected = model(batch)
    fuse(model)
    assert type(model).__name__ == "FusedNaFlexVit"
    torch.testing.assert_close(model(batch), expected)
    # What is padded takes no part; without the mask it would.
    batch["patches"][~valid] = 9.0
    torch.testing.assert_close(model(batch), expected)
    everything = torch.ones(2, 1, 1, 9 + model.num_prefix_tokens, dtype=torch.bool)
    assert not torch.allclose(model({**batch, "attn_mask": everything}), expected)
    assert type(unfuse(model)).__name__ == "NaFlexVit"
    torch.testing.assert_close(model(batch), expected)


def test_why_not_names_what_fuse_refuses() -> None:
    model = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=48)
    (line,) = why_not(model)
    assert line.startswith("blocks.0.attn: cannot be fused: expected timm.layers.Attention")


def exported(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.randn(shape),), dynamic_shapes=({0: batch},))
    return program.module()


@pytest.mark.parametrize("kind", ["timm", "torchvision", "encoder"])
def test_an_exported_model_takes_any_batch(kind: str) -> None:
    shape = (2, 3, 16, 16)
    if kind == "encoder":
        size: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": C}
        size |= {"depth": 2, "num_heads": H}
        model: nn.Module = Encoder(EncoderConfig(name="vit_tiny_patch16_224", **size))
    else:
        model = fuse(MODELS[kind][0]())
    model.eval()
    program = exported(model, shape)
    assert any("maect_fast" in str(node.target) for node in program.graph.nodes)  # type: ignore[union-attr]
    for num_images in (1, 5):
        images = torch.randn(num_images, *shape[1:])
        assert torch.equal(program(images), model(images))


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_gradients_per_sample(kind: str) -> None:
    build, shape = MODELS[kind]
    # In fp64 the order of sums does not show.
    model = fuse(build()).double().eval()
    parameters, images = dict(model.named_parameters()), torch.randn(shape).double()

    def loss(parameters: dict[str, Any], image: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, parameters, (image[None],))
        return out.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    for i, image in enumerate(images):
        expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        for (name, grads), one in zip(found.items(), expected, strict=True):
            torch.testing.assert_close(grads[i], one, rtol=1e-5, atol=1e-6, msg=name)


def test_maps_are_timms_and_of_all_modes() -> None:
    """As timm's AttentionExtract finds them in a model that holds its weights."""
    set_fused_attn(False)
    try:
        model = vit(qk_norm=True).train()
    finally:
        set_fused_attn(True)
    images = torch.randn(2, 3, 16, 16)
    expected = AttentionExtract(model, method="hook")(images)
    model.train()
    fuse(model)
    maps = attention_maps(model, images)
    assert model.training
    assert [m.shape for m in maps] == [(2, H, 17, 17)] * 2
    for found, theirs in zip(maps, expected.values(), strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, H, 17))
    with pytest.raises(ValueError, match="expected one with fused attention, got VisionTransf"):
        attention_maps(unfuse(model), images)


def test_maps_of_masked_keys(fused: FusedAttention) -> None:
    x, mask = torch.randn(B, N, C), torch.rand(B, N) < 0.6
    (weights,) = attention_maps(Masked(fused, key_mask=mask), x)
    assert not weights.transpose(1, 3)[~mask].any()
    qkv = fused.qkv(x).unflatten(-1, (3, H, C // H))
    v = qkv[:, :, 2]
    o = fused.proj(torch.einsum("bhmn,bnhd->bmhd", weights, v).flatten(-2))
    torch.testing.assert_close(o, fused(x, key_mask=mask))


class Masked(nn.Module):
    def __init__(self, attention: nn.Module, **modes: Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.modes = modes

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, **self.modes)
        return out


def test_hooks_that_wait_for_weights_are_told() -> None:
    model = fuse(vit())
    assert not any("attn_drop" in line for line in why_not(model))
    AttentionExtract(model, method="hook")
    lines = [line for line in why_not(model) if line.startswith("blocks.1.attn.attn_drop: ")]
    assert len(lines) == 1
    assert "attention_maps(model, images)" in lines[0]
