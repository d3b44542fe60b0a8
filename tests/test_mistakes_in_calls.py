"""Every mistake in a call of the public functions is one line that names the argument."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from maect_fast.kernels import (
    Pick,
    attention,
    enqueue,
    gather_patches,
    gelu,
    info_nce,
    info_nce_stats,
    masked_attention,
    masked_patch_mse,
    queue_topk,
    residual_norm,
    restore_tokens,
    symmetric_info_nce,
    with_shadow,
)
from maect_fast.nn import (
    ClipLoss,
    FeatureQueue,
    FusedAttention,
    FusedMultiheadAttention,
    NNCLRLoss,
    attention_maps,
    fuse,
    unfuse,
    why_not,
)

X = torch.ones(3, 8)
LONG = torch.zeros(3, dtype=torch.int64)
QUEUE = torch.ones(9, 8)
QKV = torch.ones(2, 5, 3, 2, 8)
VIEWS = torch.ones(2, 3, 8)
IMAGES = torch.ones(2, 3, 8, 8)
IDS = torch.zeros(2, 3, dtype=torch.int64)
W = torch.ones(8)


def search(**changes: object) -> object:
    return queue_topk(**({"query": X, "queue": QUEUE, "k": 2} | changes))  # type: ignore[arg-type]


def loss(**changes: object) -> object:
    given = {"predicted": X, "neighbour": X, "temperature": 0.1}
    return info_nce(**(given | changes))  # type: ignore[arg-type]


def norm(**changes: object) -> object:
    return residual_norm(**({"r": X, "weight": W, "bias": W} | changes))  # type: ignore[arg-type]


def module(**changes: object) -> object:
    given = {"queue_size": 9, "dim": 8, "topk": 2, "temperature": 0.1}
    return NNCLRLoss(**(given | changes))  # type: ignore[arg-type]


def update(**changes: object) -> object:
    given = {"projected": VIEWS, "predicted": VIEWS, "step": 0, "sample_id": None, "label": None}
    return NNCLRLoss(queue_size=9, dim=8, topk=2, temperature=0.1)(**(given | changes))


def in_queue(**changes: object) -> object:
    return FeatureQueue(9, 8).search(**({"query": X, "k": 2} | changes))  # type: ignore[arg-type]


def attend(**changes: object) -> object:
    fused = FusedAttention(nn.Linear(8, 24), nn.Linear(8, 8), num_heads=2)
    return fused(**({"x": torch.ones(2, 5, 8)} | changes))


def attend_to_all(query: object) -> object:
    return FusedMultiheadAttention(8, 2)(query, query, query, need_weights=False)


def clip(**changes: object) -> object:
    given = {"image_features": X, "text_features": X, "logit_scale": 10.0}
    return ClipLoss()(**(given | changes))


def mse(**changes: object) -> object:
    given: dict[str, object] = {
        "predicted": torch.ones(2, 3, 48),
        "images": IMAGES,
        "ids_removed": IDS,
    }
    given |= {"patch_size": 4, "normalize": True}
    return masked_patch_mse(**(given | changes))  # type: ignore[arg-type]


def tokens(**changes: object) -> object:
    given: dict[str, object] = {"tokens": torch.ones(2, 3, 8), "mask_token": torch.ones(1, 1, 8)}
    given |= {"pos_embed": torch.ones(1, 4, 8), "ids_restore": torch.arange(4).expand(2, 4)}
    return restore_tokens(**(given | changes))  # type: ignore[arg-type]


CALLS: list[tuple[str, Callable[..., object], dict[str, object]]] = [
    ("scale", masked_attention, {"qkv": QKV, "scale": math.nan}),
    ("scale", masked_attention, {"qkv": QKV, "scale": math.inf}),
    ("scale", masked_attention, {"qkv": QKV, "scale": "half"}),
    ("scale", masked_attention, {"qkv": QKV, "scale": torch.tensor(1.0)}),
    ("qkv", masked_attention, {"qkv": [1.0]}),
    ("qkv", masked_attention, {"qkv": None}),
    ("qkv", masked_attention, {"qkv": QKV.long()}),
    ("qkv", masked_attention, {"qkv": QKV[:, :, :2]}),
    ("qkv", masked_attention, {"qkv": QKV.transpose(-1, -2)}),
    ("keep", masked_attention, {"qkv": QKV, "keep": [[0, 1]]}),
    ("keep", masked_attention, {"qkv": QKV, "keep": torch.ones(2, 2)}),
    ("seqlens", masked_attention, {"qkv": QKV, "seqlens": LONG}),
    ("max_seqlen", masked_attention, {"qkv": QKV, "max_seqlen": 3}),
    ("key_mask", masked_attention, {"qkv": QKV, "key_mask": torch.ones(2, 5)}),
    ("backend", masked_attention, {"qkv": QKV, "backend": "cudnn"}),
    ("q", attention, {"q": None, "k": QKV[:, :, 1], "v": QKV[:, :, 2]}),
    ("k", attention, {"q": QKV[:, :, 0], "k": QKV[:, :3, 1], "v": QKV[:, :, 2]}),
    ("v", attention, {"q": QKV[:, :, 0], "k": QKV[:, :, 1], "v": 3}),
    ("k", search, {"k": 2.5}),
    ("k", search, {"k": math.nan}),
    ("k", search, {"k": "2"}),
    ("k", search, {"k": 0}),
    ("k", search, {"k": 10}),
    ("k", search, {"k": None}),
    ("query", search, {"query": [[1.0]]}),
    ("query", search, {"query": X[:, :7]}),
    ("query", search, {"query": X.long()}),
    ("queue", search, {"queue": None}),
    ("queue", search, {"queue": QUEUE[0]}),
    ("query_id", search, {"query_id": LONG}),
    ("query_id", search, {"query_id": [1, 2, 3], "queue_id": torch.arange(9)}),
    ("queue_id", search, {"query_id": LONG, "queue_id": torch.ones(9)}),
    ("query_label", search, {"query_label": LONG, "queue_label": torch.arange(9)}),
    ("pick", search, {"pick": 1}),
    ("pick", search, {"pick": LONG + 2}),
    ("pick", search, {"pick": LONG - 1}),
    ("pick", search, {"pick": LONG[:2]}),
    ("pick.step", search, {"pick": Pick(0, 1.5, 0)}),  # type: ignore[arg-type]
    ("pick.seed", search, {"pick": Pick("a", 1, 0)}),  # type: ignore[arg-type]
    ("backend", search, {"backend": "faiss"}),
    ("temperature", loss, {"temperature": math.nan}),
    ("temperature", loss, {"temperature": math.inf}),
    ("temperature", loss, {"temperature": 0}),
    ("temperature", loss, {"temperature": -0.1}),
    ("temperature", loss, {"temperature": "0.1"}),
    ("temperature", loss, {"temperature": None}),
    ("temperature", loss, {"temperature": torch.ones(2)}),
    ("temperature", loss, {"temperature": torch.tensor(1.0, requires_grad=True)}),
    ("predicted", loss, {"predicted": [1.0]}),
    ("predicted", loss, {"predicted": X[:2]}),
    ("predicted", loss, {"predicted": X[:0], "neighbour": X[:0]}),
    ("predicted", loss, {"predicted": X.long()}),
    ("neighbour", loss, {"neighbour": None}),
    ("group", loss, {"group": 3}),
    ("transposed", loss, {"transposed": "yes"}),
    ("backend", loss, {"backend": "liger"}),
    ("temperature", info_nce_stats, {"predicted": X, "neighbour": X, "temperature": 0.0}),
    ("temperature", symmetric_info_nce, {"first": X, "second": X, "temperature": -1}),
    ("second", symmetric_info_nce, {"first": X, "second": None, "temperature": 1}),
    ("second", symmetric_info_nce, {"first": X, "second": X[:2], "temperature": 1}),
    (
        "same_view",
        symmetric_info_nce,
        {"first": X, "second": X, "temperature": 1, "same_view": 2.5},
    ),
    ("group", symmetric_info_nce, {"first": X, "second": X, "temperature": 1, "group": "all"}),
    ("h", gelu, {"h": [1.0]}),
    ("h", gelu, {"h": X.long()}),
    ("bias", gelu, {"h": X, "bias": 3.0}),
    ("bias", gelu, {"h": X, "bias": W[:7]}),
    ("eps", norm, {"eps": math.nan}),
    ("eps", norm, {"eps": -1e-6}),
    ("eps", norm, {"eps": "small"}),
    ("weight", norm, {"weight": None}),
    ("weight", norm, {"weight": W[:7]}),
    ("bias", norm, {"bias": 0}),
    ("branch", norm, {"branch": X[:2]}),
    ("branch", norm, {"branch_bias": W}),
    ("dtype", norm, {"dtype": torch.int8}),
    ("dtype", norm, {"dtype": "float32"}),
    ("patch_size", gather_patches, {"images": IMAGES, "ids": IDS, "patch_size": 0}),
    ("patch_size", gather_patches, {"images": IMAGES, "ids": IDS, "patch_size": 2.5}),
    ("images", gather_patches, {"images": IMAGES, "ids": IDS, "patch_size": 3}),
    ("images", gather_patches, {"images": [1], "ids": IDS, "patch_size": 4}),
    ("ids", gather_patches, {"images": IMAGES, "ids": [[0]], "patch_size": 4}),
    ("dtype", gather_patches, {"images": IMAGES, "ids": IDS, "patch_size": 4, "dtype": torch.int8}),
    ("predicted", mse, {"predicted": X}),
    ("ids_removed", mse, {"ids_removed": IDS[:, :0], "predicted": torch.ones(2, 0, 48)}),
    ("patch_size", mse, {"patch_size": "4"}),
    ("tokens", tokens, {"tokens": None}),
    ("tokens", tokens, {"tokens": torch.ones(2, 6, 8)}),
    ("mask_token", tokens, {"mask_token": W}),
    ("pos_embed", tokens, {"pos_embed": 1}),
    ("ids_restore", tokens, {"ids_restore": torch.ones(2, 4)}),
    ("rows", enqueue, {"state": FeatureQueue(9, 8).state, "rows": None}),
    ("rows", enqueue, {"state": FeatureQueue(9, 8).state, "rows": X[:, :7]}),
    ("sample_id", enqueue, {"state": FeatureQueue(9, 8).state, "rows": X, "sample_id": 3}),
    ("dtype", with_shadow, {"state": FeatureQueue(9, 8).state, "dtype": torch.float64}),
    ("size", FeatureQueue, {"size": 0, "dim": 8}),
    ("size", FeatureQueue, {"size": 2.5, "dim": 8}),
    ("dim", FeatureQueue, {"size": 9, "dim": -1}),
    ("shadow", FeatureQueue, {"size": 9, "dim": 8, "shadow": torch.float64}),
    ("topk", module, {"topk": 2.5}),
    ("topk", module, {"topk": 10}),
    ("temperature", module, {"temperature": math.nan}),
    ("temperature", module, {"temperature": 0}),
    ("dim", module, {"dim": 0}),
    ("queue_size", module, {"queue_size": "9"}),
    ("projected", update, {"projected": None}),
    ("projected", update, {"projected": VIEWS[0]}),
    ("projected", update, {"projected": VIEWS[..., :7]}),
    ("projected", update, {"projected": VIEWS.long()}),
    ("projected", update, {"projected": VIEWS[:, :0], "predicted": VIEWS[:, :0]}),
    ("predicted", update, {"predicted": [1.0]}),
    ("predicted", update, {"predicted": VIEWS[..., :7]}),
    ("predicted", update, {"predicted": VIEWS[:, :2]}),
    ("sample_id", update, {"sample_id": LONG[:2]}),
    ("sample_id", update, {"sample_id": [0, 1, 2]}),
    ("label", update, {"label": LONG.float()}),
    ("step", update, {"step": 1.5}),
    ("step", update, {"step": torch.ones(2)}),
    ("query", in_queue, {"query": X[:, :7]}),
    ("query", in_queue, {"query": None}),
    ("k", in_queue, {"k": 10}),
    ("sample_id", in_queue, {"sample_id": LONG[:2]}),
    ("label", in_queue, {"label": LONG.int()}),
    ("label", in_queue, {"label": LONG}),
    ("x", attend, {"x": None}),
    ("x", attend, {"x": torch.ones(5, 8)}),
    ("x", attend, {"cu_seqlens": LONG.int(), "max_seqlen": 3}),
    ("seqlens", attend, {"seqlens": LONG}),
    ("query", attend_to_all, {"query": [1.0]}),
    ("query", attend_to_all, {"query": X}),
    ("image_features", clip, {"image_features": X.long()}),
    ("image_features", clip, {"image_features": None}),
    ("text_features", clip, {"text_features": X[:2]}),
    ("logit_scale", clip, {"logit_scale": torch.ones(2)}),
    ("logit_scale", clip, {"logit_scale": 0}),
    ("model", attention_maps, {"model": nn.Linear(2, 2), "images": X[:, :2]}),
    ("images", attention_maps, {"model": nn.Linear(2, 2), "images": None}),
    ("embed_dim", FusedMultiheadAttention, {"embed_dim": 8, "num_heads": 3}),
    ("num_heads", FusedMultiheadAttention, {"embed_dim": 8, "num_heads": 0}),
    ("model", fuse, {"model": None}),
    ("model", fuse, {"model": nn.Linear(2, 2)}),
    ("model", unfuse, {"model": 3}),
    ("model", why_not, {"model": "vit"}),
]


@pytest.mark.parametrize(
    ("argument", "call", "given"),
    CALLS,
    ids=[f"{call.__name__}-{argument}-{i}" for i, (argument, call, _) in enumerate(CALLS)],
)
def test_the_argument_is_named(
    argument: str, call: Callable[..., object], given: dict[str, object]
) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        call(**given)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 300
    # The argument comes first, perhaps among those that it does not fit.
    assert argument in line.partition(": ")[0].replace(",", " ").split() or (
        argument == "backend" and "expected backend" in line
    )


def test_numbers_of_other_libraries_are_numbers() -> None:
    np = pytest.importorskip("numpy")
    result = search(k=np.int64(2))
    assert result.indices.shape == (3, 2)  # type: ignore[attr-defined]
    assert torch.equal(loss(temperature=np.float32(0.5)), loss(temperature=0.5))  # type: ignore[arg-type]
