"""Hugging Face's vision transformers, fused, beside themselves; random weights, no hub."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maect_fast.nn import attention_maps, fuse, unfuse, why_not

# transformers takes seconds to import.
pytestmark = pytest.mark.slow

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 16,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
MODELS = {
    "ViTModel": "ViTConfig",
    "ViTForImageClassification": "ViTConfig",
    "ViTMAEModel": "ViTMAEConfig",
    "ViTMAEForPreTraining": "ViTMAEConfig",
    "DeiTModel": "DeiTConfig",
    "Dinov2Model": "Dinov2Config",
    "Dinov2WithRegistersModel": "Dinov2WithRegistersConfig",
    "DINOv3ViTModel": "DINOv3ViTConfig",
    "IJepaModel": "IJepaConfig",
    "ViTMSNModel": "ViTMSNConfig",
}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(name: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = SIZE | (DECODER if "MAE" in name else {}) | options
    return getattr(transformers, name)(getattr(transformers, MODELS[name])(**sizes))


def caller(name: str) -> Callable[..., Any]:
    """Calls a model; a ViTMAE drops the same patches every time."""
    noise = {"noise": torch.rand(2, 4)} if "MAE" in name else {}
    return lambda model, **options: model(X, **noise, **options)


def results_of(model: nn.Module, call: Callable[..., Any]) -> list[Tensor]:
    """What the model returns, and all gradients of it."""
    out = next(x for x in call(model).values() if isinstance(x, Tensor))
    parameters = [p for p in model.parameters() if p.requires_grad]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, parameters, weight, allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_computes_the_same(name: str) -> None:
    """Bit for bit; nothing changes but the name of the function, which `unfuse` puts back."""
    # DINOv3 changes its positions at random in training.
    model, call = build(name).eval(), caller(name)
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    before = model.config._attn_implementation
    expected = results_of(model, call)
    assert fuse(model) is model
    assert fuse(model).config._attn_implementation == "maect_fast"
    assert all(map(torch.equal, results_of(model, call), expected))
    assert len(call(model, output_hidden_states=True).hidden_states) >= 3
    twin = copy.deepcopy(model)
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == (keys, types)
    for one in (unfuse(twin), unfuse(model)):
        assert one.config._attn_implementation == before
        assert all(map(torch.equal, results_of(one, call), expected))
        assert "_unfused" not in vars(one)


def test_compiled_and_exported() -> None:
    """Whole, and with any number of images."""
    model = fuse(build("ViTModel")).eval()
    images = torch.randn(5, 3, 32, 32)
    expected = model(images).last_hidden_state
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch},)).module()
    assert torch.equal(program(images).last_hidden_state, expected)
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(images).last_hidden_state, expected)


def test_a_model_inside_of_another() -> None:
    backbone = build("ViTModel")
    model = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(32, 5)})
    fuse(model)
    assert backbone.config._attn_implementation == "maect_fast"
    unfuse(model)
    assert backbone.config._attn_implementation == "sdpa"


def test_weights_are_had_by_maps_or_unfused() -> None:
    model = build("ViTModel").eval()
    model.set_attn_implementation("eager")
    expected = model(X, output_attentions=True).attentions
    fuse(model)
    with pytest.raises(ValueError, match=r"output_attentions: .*unfuse\(model\).*attention_maps"):
        model(X, output_attentions=True)
    for found, theirs in zip(attention_maps(model, X), expected, strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-7)
    assert unfuse(model).config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("ViTModel", {"attention_probs_dropout_prob": 0.1}, r"drops attention weights .*0\.1"),
        ("DINOv3ViTModel", {"attention_dropout": 0.2}, r"drops attention weights .*0\.2"),
    ],
)
def test_what_attends_otherwise_is_refused(
    name: str, options: dict[str, float], reason: str
) -> None:
    model = build(name, **options)
    with pytest.raises(ValueError, match=f"cannot replace the model itself: .*{reason}"):
        fuse(model)
    (line,) = why_not(model)
    assert line.startswith("the model itself: cannot be fused: it drops")
    assert model.config._attn_implementation == "sdpa"


def test_other_families_are_left_alone() -> None:
    transformers = pytest.importorskip("transformers")
    other, vit = transformers.BeitModel(transformers.BeitConfig(**SIZE)), build("ViTModel")
    with pytest.raises(ValueError, match=r"Hugging Face's deit, .*vit_mae.*, got BeitModel"):
        fuse(other)
    fuse(nn.ModuleDict({"image": vit, "other": other}))
    names = [model.config._attn_implementation for model in (vit, other)]
    assert names == ["maect_fast", "sdpa"]


def test_a_model_of_two_families_is_refused() -> None:
    """What its configuration says holds for both."""
    transformers = pytest.importorskip("transformers")
    decoder = transformers.BertGenerationDecoder(
        transformers.BertGenerationConfig(
            **{name: SIZE[name] for name in SIZE if not name.startswith(("image", "patch"))},
            is_decoder=True,
            add_cross_attention=True,
            vocab_size=20,
        )
    )
    model = transformers.VisionEncoderDecoderModel(encoder=build("ViTModel"), decoder=decoder)
    with pytest.raises(ValueError, match=r"expected attention of .* alone, got .*BertGeneration"):
        fuse(model)
    assert fuse(model.encoder).config._attn_implementation == "maect_fast"
    assert decoder.config._attn_implementation != "maect_fast"
