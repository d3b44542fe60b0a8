import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from maect_fast.config import EncoderConfig
from maect_fast.evaluation import (
    Features,
    extract_features,
    load_features,
    raw_pixels,
    save_features,
)
from maect_fast.evaluation.features import concatenate, pooled_attention
from maect_fast.models.encoder import Encoder
from maect_fast.nn import FusedAttention, unfuse

NO_LABEL = torch.tensor([-1])


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(
        EncoderConfig(
            name="vit_tiny_patch16_224",
            img_size=8,
            in_chans=1,
            patch_size=2,
            embed_dim=16,
            depth=2,
            num_heads=2,
        )
    )


def some_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) + 10 * n) for n in (3, 3, 2)
    ]


def test_rows_that_are_not_finite_are_counted() -> None:
    x = torch.ones(5, 2)
    x[1, 0] = torch.nan
    x[4] = torch.inf
    with pytest.raises(ValueError, match=r"^features: 2 of 5 rows hold NaN or infinity$"):
        Features(x=x, label=torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("x", "label", "error"),
    [
        (torch.ones(2), torch.zeros(2, dtype=torch.int64), ValueError),
        (torch.ones(2, 3), torch.zeros(3, dtype=torch.int64), ValueError),
        (torch.ones(2, 3).double(), torch.zeros(2, dtype=torch.int64), TypeError),
        (torch.ones(2, 3), torch.zeros(2), TypeError),
    ],
)
def test_features_that_do_not_fit(x: Tensor, label: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^features: expected"):
        Features(x=x, label=label)


def test_labelled_rows_and_concatenation() -> None:
    some = Features(x=torch.arange(6.0).view(3, 2), label=torch.tensor([4, -1, 0]))
    known = some.labelled()
    assert known.x.tolist() == [[0, 1], [4, 5]]
    assert known.label.tolist() == [4, 0]
    both = concatenate(some, known)
    assert both.x.tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [4, 5]]
    assert both.label.tolist() == [4, -1, 0, 4, 0]


def test_extraction_pools_the_final_tokens_in_order(encoder: Encoder) -> None:
    batches = some_batches()
    images = torch.cat([images for images, _ in batches])
    with torch.no_grad():
        tokens = encoder(images)
    first = extract_features(encoder, iter(batches), pooling="class_token")
    mean = extract_features(encoder, iter(batches), pooling="mean_patch")
    torch.testing.assert_close(first.x, tokens[:, 0])
    torch.testing.assert_close(mean.x, tokens[:, 1:].mean(dim=1))
    assert first.label.tolist() == [30, 31, 32, 30, 31, 32, 20, 21]
    assert not first.x.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_extraction_runs_in_eval_mode_and_leaves_the_mode_alone(training: bool) -> None:
    class Probe(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(self.training)
            return images.flatten(2).transpose(1, 2)

    seen: list[bool] = []
    encoder = Probe().train(training)
    extract_features(encoder, some_batches(), pooling="class_token")
    assert seen == [False] * 3
    assert encoder.training is training


def test_bf16_extraction_is_near_fp32_and_not_equal(encoder: Encoder) -> None:
    full = extract_features(encoder, some_batches(), pooling="mean_patch", precision="fp32")
    half = extract_features(encoder, some_batches(), pooling="mean_patch", precision="bf16")
    auto = extract_features(encoder, some_batches(), pooling="mean_patch", precision="auto")
    assert torch.equal(auto.x, full.x)
    assert half.x.dtype == torch.float32
    error = (half.x - full.x).abs().max() / full.x.abs().max()
    assert 0 < error < 0.05


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        raw_pixels([], mean=[0.5], std=[0.5])


def test_raw_pixels_undo_the_normalisation() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    pixels = torch.rand(4, 3, 2, 2)
    normalised = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    batches = [(normalised[:3], torch.arange(3)), (normalised[3:], NO_LABEL)]
    found = raw_pixels(batches, mean=mean, std=std)
    torch.testing.assert_close(found.x, pixels.flatten(1))
    assert found.label.tolist() == [0, 1, 2, -1]


def test_saved_features_come_back(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "test.safetensors"
    # A view with strides, as slicing leaves behind.
    some = Features(x=torch.randn(6, 8)[::2, 1:], label=torch.tensor([3, -1, 0]))
    save_features(some, path)
    found = load_features(path)
    assert torch.equal(found.x, some.x)
    assert torch.equal(found.label, some.label)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test.safetensors"
    old = Features(x=torch.randn(3, 4), label=torch.arange(3))
    save_features(old, path)

    def fail(file: Path, content: bytes) -> None:
        with file.open("wb") as stream:
            stream.write(content[: len(content) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save_features(Features(x=torch.zeros(1, 4), label=NO_LABEL), path)
    assert torch.equal(load_features(path).x, old.x)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_with_other_tensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(2, 2), "weight": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match=r"expected the tensors x and label, got \['weight', 'x'\]"
    ):
        load_features(path)


def last_attention(encoder: Encoder) -> Any:
    return encoder.blocks[-1].attn


def attention_of_timm(encoder: Encoder, images: Tensor) -> Tensor:
    """The last block's weights [n, heads, 1 + L, 1 + L] as timm itself computes them."""
    encoder = unfuse(copy.deepcopy(encoder))
    attn = last_attention(encoder)
    attn.fused_attn = False
    weights: list[Tensor] = []
    hook = attn.attn_drop.register_forward_hook(lambda _, __, output: weights.append(output))
    with torch.no_grad():
        encoder.eval()(images)
    hook.remove()
    return weights[0]


@pytest.mark.parametrize("pooling", ["class_token", "mean_patch"])
def test_attention_of_what_is_pooled_is_what_timm_computes(
    encoder: Encoder, pooling: Literal["class_token", "mean_patch"]
) -> None:
    images = 5 * some_batches()[0][0]
    weights = attention_of_timm(encoder, images)
    queries = weights[:, :, :1] if pooling == "class_token" else weights[:, :, 1:]
    expected = queries[..., 1:].mean(dim=2)
    encoder.train()
    found = pooled_attention(encoder, images, pooling)
    assert found.shape == (3, 2, 4, 4)
    torch.testing.assert_close(found.flatten(2), expected)
    assert encoder.training
    assert not last_attention(encoder)._forward_pre_hooks


def test_attention_of_an_encoder_that_is_not_fused(encoder: Encoder) -> None:
    """A fused one's attention module never holds the weights; it makes no difference."""
    images = 5 * some_batches()[0][0]
    expected = pooled_attention(encoder, images, "class_token")
    assert isinstance(last_attention(encoder), FusedAttention)
    found = pooled_attention(unfuse(encoder), images, "class_token")
    torch.testing.assert_close(found, expected)


def test_extraction_computes_of_the_last_block_what_it_uses(encoder: Encoder) -> None:
    rows: list[int] = []
    last: Any = encoder.blocks[-1]
    last.mlp.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[1]))
    extract_features(encoder, some_batches()[:1], pooling="class_token")
    extract_features(encoder, some_batches()[:1], pooling="mean_patch")
    assert rows == [1, 17]
