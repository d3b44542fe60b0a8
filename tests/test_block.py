"""timm's block against its fused form, which the CPU reaches where a test says that it pays."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maect_fast import block as block_module
from maect_fast.block import FusedBlock, Stream, normed, run_blocks
from maect_fast.config import EncoderConfig
from maect_fast.kernels._common import gpu
from maect_fast.models.encoder import Encoder
from maect_fast.nn import fuse, unfuse, why_not
from maect_fast.testing import assert_within_budget

FP16, FP32, BF16 = torch.float16, torch.float32, torch.bfloat16
B, N, C, H = 2, 5, 32, 2


@pytest.fixture(params=["definitions", "interpreted"])
def reached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks take the fused path on a CPU, by the ops' definitions or by their kernels."""
    monkeypatch.setattr(block_module, "_place_obstacle", lambda x, dtype: None)
    if request.param == "interpreted":
        pytest.importorskip("triton")
        monkeypatch.setattr(gpu, "is_gpu", lambda x: True)
    return str(request.param)


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_module, "_place_obstacle", lambda x, dtype: None)


def make(**options: Any) -> Any:
    """A block of timm's in which no parameter is what it starts as."""
    block = Block(C, H, **{"qkv_bias": True, **options})
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return block


def advances(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes the fused path's calls: whether the last bias was kept."""
    seen: list[bool] = []
    advance = FusedBlock.advance

    def noted(self: FusedBlock, stream: Stream, copies: Any, *, keeps_bias: bool) -> Stream:
        seen.append(keeps_bias)
        return advance(self, stream, copies, keeps_bias=keeps_bias)

    monkeypatch.setattr(FusedBlock, "advance", noted)
    return seen


def run(model: Callable[[Tensor], Tensor], x: Tensor, parameters: Any) -> dict[str, Tensor]:
    """The result, and the gradients of x and of all parameters that have one."""
    x = x.detach().requires_grad_(x.is_floating_point())
    wanted = {"dx": x} | {f"d {name}": p for name, p in parameters if p.requires_grad}
    out = model(x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, list(wanted.values()), upstream)
    return {"out": out.detach()} | dict(zip(wanted, grads, strict=True))


def double(module: nn.Module) -> Any:
    return copy.deepcopy(module).double()


# Dtypes of modules, tokens and autocast.
MODES: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype | None]] = {
    "fp32": (FP32, FP32, None),
    "half modules": (FP16, FP16, None),
    "autocast, fp32 stream": (FP32, FP32, FP16),
    "autocast, half stream": (FP32, FP16, FP16),
}


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"proj_bias": False}], ids=str)
def test_equals_timms_block(
    mode: str, options: dict[str, Any], reached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules, tokens, mixed = MODES[mode]
    block = make(**options).to(modules)
    x = torch.randn(B, N, C).to(tokens)
    twin = double(block)
    exact = run(twin, x.double(), twin.named_parameters())
    with autocast(mixed):
        eager = run(block, x, block.named_parameters())
        fuse(nn.Sequential(block))
        seen = advances(monkeypatch)
        found = run(block, x, block.named_parameters())
    assert seen == [False]
    assert len(found) == 2 + len(list(block.parameters()))
    for name, value in found.items():
        assert_within_budget(value, eager[name].to(value.dtype), exact[name], name=name)


def is_frozen_as(which: str, name: str) -> bool:
    kinds = {"weights": "weight", "biases": "bias", "all": "", "none": "no such name"}
    return kinds[which] in name


@pytest.mark.parametrize("which", ["weights", "biases", "all"])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_frozen_parameters_get_no_gradient(
    which: str, needs_dx: bool, reached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = make()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not is_frozen_as(which, name))
    x = torch.randn(B, N, C)
    wanted = {n: p for n, p in block.named_parameters() if p.requires_grad}

    def grads() -> list[Tensor]:
        leaf = x.clone().requires_grad_(needs_dx)
        leaves = [*wanted.values(), *([leaf] if needs_dx else [])]
        out = block(leaf)
        assert out.requires_grad == bool(leaves)
        if not leaves:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    expected = grads()
    fuse(nn.Sequential(block))
    seen = advances(monkeypatch)
    torch.testing.assert_close(grads(), expected, rtol=1e-4, atol=1e-5)
    assert seen == [False]


@pytest.mark.parametrize("mode", MODES)
def test_a_chain_equals_its_blocks(
    mode: str, reached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules, tokens, mixed = MODES[mode]
    chain: Any = nn.Sequential(make(), make(), nn.LayerNorm(C, eps=1e-6)).to(modules)
    x = torch.randn(B, N, C).to(tokens)
    twin = double(chain)
    exact = run(twin, x.double(), twin.named_parameters())

    def chained(x: Tensor) -> Tensor:
        return normed(chain[2], run_blocks(chain[:2], Stream(x)))

    with autocast(mixed):
        # On a GPU autocast has the norm give fp32.
        eager = run(lambda x: normed(chain[2], Stream(chain[:2](x))), x, chain.named_parameters())
        fuse(chain)
        seen = advances(monkeypatch)
        found = run(chained, x, chain.named_parameters())
    assert seen == [True, True]
    for name, value in found.items():
        assert value.dtype == eager[name].dtype
        assert_within_budget(value, eager[name], exact[name], name=name)


@pytest.mark.usefixtures("definitions")
def test_frozen_blocks_hand_their_branch_to_tuned_ones() -> None:
    chain: Any = fuse(nn.Sequential(make(), make()))
    chain[0].requires_grad_(False)
    x = torch.randn(B, N, C)

    def chained(x: Tensor) -> Tensor:
        with torch.no_grad():
            stream = run_blocks(chain[:1], Stream(x))
        assert stream.branch is not None
        return run_blocks(chain[1:], stream).added()

    out = chained(x)
    torch.autograd.backward(out.square().sum())
    found = [p.grad for p in chain[1].parameters()]
    assert all(p.grad is None for p in chain[0].parameters())
    chain.zero_grad()
    unfuse(chain)
    expected = chain(x)
    torch.testing.assert_close(out, expected)
    torch.autograd.backward(expected.square().sum())
    for grad, parameter in zip(found, chain[1].parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5)


def vit(**options: Any) -> Any:
    options = {"img_size": 8, "patch_size": 4, "embed_dim": C, "depth": 2, "num_heads": H} | options
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **options)


@pytest.mark.usefixtures("definitions")
def test_fusing_and_unfusing_leave_all_but_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit().eval()
    images = torch.randn(B, 3, 8, 8)
    contents = [dict(vars(module)) for module in model.modules()]
    expected, names = model(images), list(model.state_dict())
    fuse(model)
    assert [type(block) for block in model.blocks] == [FusedBlock] * 2
    assert list(model.state_dict()) == names
    seen = advances(monkeypatch)
    torch.testing.assert_close(model(images), expected)
    assert len(seen) == 2
    fresh = vit()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(images), expected)
    unfuse(model)
    assert [type(block) for block in model.blocks] == [Block] * 2
    assert [vars(module) for module in model.modules()] == contents
    assert torch.equal(model(images), expected)


@pytest.mark.usefixtures("definitions")
def test_hooks_of_a_block_see_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    chain: Any = nn.Sequential(make(), make(), make())
    x = torch.randn(B, N, C)
    expected = chain[:2](x)
    fuse(chain)
    tokens: list[Tensor] = []
    handle = chain[1].register_forward_hook(lambda _, __, out: tokens.append(out))
    seen = advances(monkeypatch)
    run_blocks(chain, Stream(x))
    assert seen == [True, False, True]
    torch.testing.assert_close(tokens[0], expected)
    handle.remove()
    run_blocks(chain, Stream(x))
    assert seen[3:] == [True] * 3


def with_hook(block: Any) -> None:
    block.mlp.fc1.register_forward_hook(lambda *_: None)


def with_wrapped_layer(block: Any) -> None:
    block.attn.proj = nn.Sequential(block.attn.proj)


def with_parametrized_layer(block: Any) -> None:
    nn.utils.parametrizations.weight_norm(block.mlp.fc2)


def with_own_forward(block: Any) -> None:
    block.norm2.forward = block.norm2.forward


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({"init_values": 0.1}, None, "LayerScale"),
        ({"drop_path": 0.1}, None, "drop_path"),
        ({"proj_drop": 0.1}, None, "proj_drop"),
        ({"qk_norm": True}, None, "qk-norm"),
        ({"act_layer": nn.ReLU}, None, "exact GELU"),
        ({"norm_layer": nn.RMSNorm}, None, "norms are not LayerNorms"),
        ({}, with_hook, "hooks"),
        ({}, with_wrapped_layer, "a linear layer is Sequential"),
        ({}, with_parametrized_layer, "a linear layer is ParametrizedLinear"),
        ({}, with_own_forward, "forward of its own"),
    ],
)
def test_what_is_not_plain_keeps_timms_forward_and_is_named(
    options: dict[str, Any],
    change: Callable[[Any], None] | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block: Any = Block(C, H, **options)
    model = fuse(nn.Sequential(block))
    if change is not None:
        assert why_not(model) == []
        change(block)
    (line,) = why_not(model)
    assert line.startswith("0: timm's forward: ")
    assert reason in line
    seen = advances(monkeypatch)
    x = torch.randn(B, N, C)
    torch.manual_seed(3)
    found = model(x)
    torch.manual_seed(3)
    assert torch.equal(found, unfuse(model)(x))
    assert run_blocks(model, Stream(x)).branch is None
    assert not seen


@pytest.mark.usefixtures("definitions")
def test_what_drops_nothing_now_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse(nn.Sequential(Block(C, H, drop_path=0.5, proj_drop=0.5))).eval()
    assert why_not(model) == []
    assert len(why_not(model.train())) == 1


def test_where_it_would_not_pay_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse(nn.Sequential(Block(C, H)))
    assert "on cpu" in why_not(model)[0]
    monkeypatch.setattr(block_module, "is_gpu", lambda x: True)
    assert "torch.float32" in why_not(model)[0]
    with torch.autocast("cpu", BF16):
        assert why_not(model) == []
        assert "torch.float64" in why_not(model, torch.zeros(1, 1, C, dtype=torch.float64))[0]
        assert "contiguous" in why_not(model, torch.zeros(1, C, 4).mT)[0]
    assert "there is no autocast" in why_not(model, torch.zeros(1, 1, C, dtype=BF16))[0]
    assert why_not(model.bfloat16()) == []
    assert "not fused" in why_not(unfuse(model))[0]


@pytest.mark.usefixtures("definitions")
def test_masks_take_timms_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    block = fuse(nn.Sequential(make()))[0]
    seen = advances(monkeypatch)
    x, mask = torch.randn(B, N, C), torch.ones(B, 1, 1, N, dtype=torch.bool)
    mask[:, :, :, 3:] = False
    found = block(x, attn_mask=mask)
    assert not seen
    torch.testing.assert_close(found[:, :3], block(x[:, :3].contiguous()))
    assert len(seen) == 1


@pytest.mark.usefixtures("definitions")
def test_compiled_it_is_timms_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse(nn.Sequential(make(), make()))
    x = torch.randn(B, N, C)
    expected = run(model, x, model.named_parameters())
    seen = advances(monkeypatch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = run(compiled, x, model.named_parameters())
    assert not seen
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("definitions")
def test_recomputed_in_the_backward_it_is_the_same() -> None:
    block = fuse(nn.Sequential(make()))[0]
    x = torch.randn(B, N, C)
    expected = run(block, x, block.named_parameters())

    def again(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(block, x, use_reentrant=False)
        return out

    found = run(again, x, block.named_parameters())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("definitions")
def test_no_second_derivative() -> None:
    block = fuse(nn.Sequential(make()))[0]
    x = torch.randn(B, N, C).requires_grad_()
    (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.backward(dx.sum())


def test_weights_are_cast_for_one_pass() -> None:
    """torch's fused optimisers move no version counter, by which a value would be known."""
    block: Any = fuse(nn.Sequential(make()))[0]
    weights = [block.attn.qkv.weight, block.attn.qkv.bias, block.attn.proj.weight]
    weights += [block.mlp.fc1.weight, block.mlp.fc2.weight, block.mlp.fc2.bias]
    optimizer = torch.optim.AdamW(weights, lr=0.1, fused=True)
    for _ in range(2):
        with torch.autocast("cpu", BF16):
            copies = block_module._cast([block], torch.zeros(1, 1, C))
        assert len(copies) == 6
        for weight in weights:
            assert not copies[id(weight)].requires_grad
            assert torch.equal(copies[id(weight)], weight.bfloat16())
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    same = block_module._cast([block], torch.zeros(1, 1, C))
    assert all(same[id(weight)].data_ptr() == weight.data_ptr() for weight in weights)


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize("fused", [True, False])
def test_training_under_autocast_sees_its_own_steps(fused: bool) -> None:
    x = torch.randn(B, N, C)

    def losses(block: Any) -> list[float]:
        optimizer = torch.optim.AdamW(block.parameters(), lr=0.01, fused=fused)
        found = []
        for _ in range(4):
            with torch.autocast("cpu", FP16):
                loss = block(x).square().mean()
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    block = make()
    twin = fuse(nn.Sequential(copy.deepcopy(block)))[0]
    expected = losses(block)
    assert expected[3] < 0.9 * expected[0]
    assert losses(twin) == pytest.approx(expected, rel=2e-3)


def test_frozen_weights_are_quantized_once_for_each_value() -> None:
    weight = nn.Parameter(torch.randn(3, 4), requires_grad=False)
    first = block_module._quantized(weight)
    assert first[0].dtype == torch.int8
    assert block_module._quantized(weight) is first
    with torch.no_grad():
        weight.mul_(2)
    second = block_module._quantized(weight)
    assert torch.equal(second[0], first[0])
    torch.testing.assert_close(second[1], 2 * first[1])
    # Another tensor under the same parameter, as Module.to leaves it.
    weight.data = torch.randn(3, 4)
    assert not torch.equal(block_module._quantized(weight)[0], first[0])
    with torch.inference_mode():
        block_module._quantized(torch.ones(2, 2))
    number = len(block_module._QUANTIZED)
    del weight
    assert len(block_module._QUANTIZED) == number - 1


@pytest.mark.usefixtures("definitions")
def test_inference_mode_leaves_weights_that_train() -> None:
    block = fuse(nn.Sequential(make()))[0]
    x = torch.randn(B, N, C)
    with torch.autocast("cpu", FP16):
        with torch.inference_mode():
            block(x)
        torch.autograd.backward(block(x).sum())
    assert all(p.grad is not None for p in block.parameters())


def make_encoder(**options: Any) -> Any:
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": C}
    sizes |= {"depth": 3, "num_heads": H}
    encoder = Encoder(EncoderConfig(name="vit_tiny_patch16_224", **sizes, **options))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return encoder


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("frozen", [0, 1, 3, None])
def test_an_encoder_of_fused_blocks(
    alone: bool, frozen: int | None, reached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not the one that the ops have by default.
    encoder = make_encoder(norm_eps=9e-3)
    encoder.freeze(frozen)
    images = torch.randn(B, 3, 8, 8)
    wanted = [p for p in encoder.parameters() if p.requires_grad]

    def outcome() -> list[Tensor]:
        tokens = encoder(images, class_token_only=alone)[:, :1]
        return [
            tokens.detach(),
            *(torch.autograd.grad(tokens.sin().sum(), wanted) if wanted else []),
        ]

    seen = advances(monkeypatch)
    found = outcome()
    assert seen == [True] * (2 if alone else 3)
    monkeypatch.undo()
    assert why_not(encoder)
    torch.testing.assert_close(found, outcome(), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize("alone", [False, True])
def test_the_stream_may_be_bf16_under_autocast(alone: bool) -> None:
    encoder = make_encoder(stream="bf16")
    images = torch.randn(B, 3, 8, 8)
    streams: list[torch.dtype] = []
    encoder.blocks[1].register_forward_hook(lambda _, __, out: streams.append(out.dtype))
    exact = encoder(images, class_token_only=alone)
    assert streams == [FP32]
    with torch.autocast("cpu", BF16):
        found = encoder(images, class_token_only=alone)
    assert streams == [FP32, BF16]
    assert found.dtype == FP32
    assert 0 < (found - exact).norm() < 0.02 * exact.norm()


GPU_MODES: dict[str, tuple[torch.dtype, torch.dtype, bool]] = {
    "half modules": (BF16, BF16, False),
    "autocast, fp32 stream": (FP32, FP32, True),
    "autocast, half stream": (FP32, BF16, True),
}


@pytest.mark.parametrize("mode", GPU_MODES)
def test_equals_timms_block_in_bf16(
    mode: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing has to be said to pay, and weights' gradients are fp32 sums unrounded."""
    modules, tokens, is_mixed = GPU_MODES[mode]
    chain: Any = nn.Sequential(make(), make()).to(cuda, modules)
    x = torch.randn(B, 197, C, device=cuda).to(tokens)
    twin = double(chain)
    exact = run(twin, x.double(), twin.named_parameters())
    with torch.autocast("cuda", BF16, enabled=is_mixed):
        eager = run(chain, x, chain.named_parameters())
        fuse(chain)
        assert why_not(chain, x) == []
        seen = advances(monkeypatch)
        for model in (chain, lambda x: run_blocks(chain, Stream(x)).added()):
            found = run(model, x, chain.named_parameters())
            for name, value in found.items():
                assert_within_budget(value, eager[name].to(value.dtype), exact[name], name=name)
    assert seen == [False] * 2 + [True] * 2


# In int8.


def frozen(**options: Any) -> Any:
    """A chain of two, told to multiply in int8."""
    chain: Any = fuse(nn.Sequential(make(**options), make(**options))).requires_grad_(False)
    for block in chain:
        block.is_int8 = True
    return chain


@pytest.mark.parametrize("is_interpreted", [False, True], ids=["definitions", "interpreted"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param({name: False}, marks=pytest.mark.slow)
            for name in ("qkv_bias", "proj_bias")
        ),
    ],
    ids=str,
)
def test_int8_is_close_to_the_block(
    mode: str, options: dict[str, Any], is_interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU as well. A number half-way between two steps makes others differ behind it."""
    if is_interpreted:
        pytest.importorskip("triton")
        monkeypatch.setattr(gpu, "is_gpu", lambda x: True)
    modules, tokens, mixed = MODES[mode]
    chain = frozen(norm_layer=partial(nn.LayerNorm, eps=0.3), **options).to(modules)
    x = torch.randn(B, N, C).to(tokens)
    exact = unfuse(double(chain))(x.double())
    change = (exact - x.double()).square().mean().sqrt()
    seen = advances(monkeypatch)
    with autocast(mixed):
        results = run_blocks(chain, Stream(x)).added(), chain(x)
    assert seen == [True, True, False, False]
    for found in results:
        assert found.dtype == tokens
        error = (found.double() - exact).square().mean().sqrt() / change
        # Of rows with 32 features; without int8 it is below 0.003.
        assert 0.003 < error < 0.03


def test_int8_has_no_gradient_and_says_so() -> None:
    chain, x = frozen(), torch.randn(B, N, C)
    assert why_not(chain) == []
    assert not run_blocks(chain, Stream(x)).added().requires_grad
    chain[1].requires_grad_(True)
    assert why_not(chain) == [
        "1: timm's forward: something in it trains: products in int8 have no gradient"
    ]
    out = chain(x)
    torch.autograd.backward(out.sum())
    assert all(p.grad is not None for p in chain[1].parameters())
    with torch.no_grad():
        assert why_not(chain) == []


def test_int8_weights_are_quantised_once_for_each_value() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    first, scale = block_module._quantized(weight)
    assert first.dtype == torch.int8
    assert block_module._quantized(weight)[0] is first
    with torch.no_grad():
        weight.mul_(2)
    second, twice = block_module._quantized(weight)
    assert torch.equal(second, first)
    torch.testing.assert_close(twice, 2 * scale)


def test_unfuse_takes_int8_back() -> None:
    chain = frozen()
    assert all("is_int8" not in vars(block) for block in unfuse(chain))


@pytest.mark.parametrize("frozen_blocks", [0, 1, None])
def test_an_encoder_has_its_frozen_blocks_in_int8(frozen_blocks: int | None) -> None:
    size = {"img_size": 8, "patch_size": 4, "embed_dim": C, "depth": 2, "num_heads": H}
    encoder = Encoder(EncoderConfig(name="vit_tiny_patch16_224", **size))  # type: ignore[arg-type]
    images = torch.randn(B, 3, 8, 8)
    expected = encoder(images)
    encoder.freeze(frozen_blocks, int8=True)
    wanted = {0: [False, False], 1: [True, False], None: [True, True]}[frozen_blocks]
    assert [block.is_int8 for block in encoder.blocks] == wanted
    found = encoder(images)
    assert found.requires_grad == (frozen_blocks is not None)
    assert torch.equal(found, expected) == (frozen_blocks == 0)
    assert nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.999
    encoder.freeze(frozen_blocks)
    assert torch.equal(encoder(images), expected)
