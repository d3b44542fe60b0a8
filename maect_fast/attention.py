"""Attention modules on the `masked_attention` op.

B samples, N tokens, C features, H heads, D features of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maect_fast.kernels import attention, masked_attention
from maect_fast.kernels._common.checks import check_int, check_tensors

__all__ = ["FusedAttention", "FusedMultiheadAttention", "is_bare", "key_mask_of"]


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is one of its class's forward, and nothing more."""
    own = vars(module)
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
    )


class FusedAttention(nn.Module):
    """Multi-head self-attention on `masked_attention`, with the layers of timm's `Attention`.

    ``proj(norm(softmax(scale * Q K^T) V) * sigmoid(gate(x)))`` with q, k, V = qkv(x),
    Q = q_norm(q), K = k_norm(k) and scale = D ** -0.5; layers that are None are left out. They are
    shared, not copied: parameters stay the same objects, state-dict keys are `qkv.*`, `proj.*` and
    so on. Gradients go to x and to the parameters.

    Args:
        qkv: maps C features to 3 * H * D, ordered (3, H, D).
        proj: maps H * D features to the output.
        num_heads: H.
        q_norm: works on the D features of every query and head; None is nothing, as for the rest.
        k_norm: the same for keys.
        norm: works on the H * D features of every token before `proj`.
        gate: maps C features to H * D.
        proj_drop: what follows `proj`.

    Source: timm: layers/attention.py; ml-jku/MAE-CT: models/modules/flash_attention_wrapper.py.
    """

    num_heads: int
    qkv: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(
        self,
        qkv: nn.Module,
        proj: nn.Module,
        *,
        num_heads: int,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        norm: nn.Module | None = None,
        gate: nn.Module | None = None,
        proj_drop: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = qkv
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.norm = norm
        self.gate = gate
        self.proj = proj
        self.proj_drop = nn.Identity() if proj_drop is None else proj_drop

    def forward(
        self,
        x: Tensor,
        attn_mask: Any = None,
        is_causal: bool = False,
        *,
        keep: Tensor | None = None,
        seqlens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, N, C], with `cu_seqlens` [T, C], to the same rows of `proj`'s width.

        Rows outside a sample come out as what `norm`, `gate` and `proj` make of zeros: without the
        first two, `proj`'s bias.

        Args:
            x: tokens.
            attn_mask: what a timm block passes on: None; bool [B, 1, 1, N], True = the token takes
                part as a key; or, for x [1, T, C], a BlockDiagonalMask of xformers.
            is_causal: False; timm's blocks pass it on.
            keep: see `masked_attention`, as for the rest.
            seqlens: see there.
            cu_seqlens: see there.
            max_seqlen: see there.
            key_mask: see there.

        Raises:
            ValueError: a causal or an [.., N, N] mask, or what `masked_attention` refuses.
            TypeError: as `masked_attention`.
        """
        self._check_tokens(x, is_causal, ndim=3 if cu_seqlens is None else 2)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        block_diagonal = _is_block_diagonal(attn_mask)
        if attn_mask is not None:
            given = (keep, seqlens, cu_seqlens, max_seqlen, key_mask)
            if any(argument is not None for argument in given):
                raise ValueError("attn_mask: expected None with another mode, got a mask")
            if block_diagonal:
                cu_seqlens, max_seqlen = _segments(attn_mask, x)
                qkv = qkv.squeeze(0)
            else:
                key_mask = key_mask_of(attn_mask, x.shape[0])
        modes: dict[str, Any] = {
            "keep": keep,
            "seqlens": seqlens,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
            "key_mask": key_mask,
        }
        if self._layer("q_norm") is None and self._layer("k_norm") is None:
            o = masked_attention(qkv, **modes)
        else:
            q, k, v = qkv.unbind(-3)
            q, k = self._normalised("q_norm", q), self._normalised("k_norm", k)
            if seqlens is None:
                o = attention(q, k, v, **modes)
            else:
                # There lengths bound the keys alone, here the queries too.
                o = masked_attention(torch.stack((q, k, v), dim=-3), **modes)
        return self._project(o.unsqueeze(0) if block_diagonal else o, x)

    @property
    def has_first_token(self) -> bool:
        """Whether `qkv` computes what its weight says, and nobody watches or changes it."""
        return type(self.qkv) is nn.Linear and is_bare(self.qkv)

    def first_token(self, x: Tensor) -> Tensor:
        """Row 0 of `forward(x)`: tokens [B, N, C] to [B, 1, proj's width].

        Keys and values are those of all tokens; the query, and what follows attention, are computed
        for one token of N.

        Args:
            x: tokens; gets a gradient at every row.

        Raises:
            TypeError: `qkv` is not just an `nn.Linear`, whose rows could be taken apart.
        """
        if not self.has_first_token:
            kind = type(self.qkv).__qualname__
            raise TypeError(f"qkv: expected an nn.Linear without hooks, got {kind}")
        assert isinstance(self.qkv, nn.Linear)
        weight, bias = self.qkv.weight, self.qkv.bias  # [3 * H * D, C], [3 * H * D]
        width = len(weight) // 3
        q_weight, kv_weight = weight.split_with_sizes([width, 2 * width])
        q_bias = kv_bias = None
        if bias is not None:
            q_bias, kv_bias = bias.split_with_sizes([width, 2 * width])
        first = x[:, :1]
        q = torch.unflatten(F.linear(first, q_weight, q_bias), -1, (self.num_heads, -1))
        kv = torch.unflatten(F.linear(x, kv_weight, kv_bias), -1, (2, self.num_heads, -1))
        k, v = kv.unbind(-3)
        o = attention(self._normalised("q_norm", q), self._normalised("k_norm", k), v)
        return self._project(o, first)

    @staticmethod
    def _check_tokens(x: Tensor, is_causal: bool, *, ndim: int = 3) -> None:
        """Refuse what would be told in the words of an op's arguments."""
        check_tensors(x=x)
        if x.ndim != ndim:
            expected = "[B, N, C]" if ndim == 3 else "[T, C] with cu_seqlens"
            raise ValueError(f"x: expected {expected}, got {list(x.shape)}")
        if is_causal:
            raise ValueError("is_causal: expected False, got True: attention here is bidirectional")

    def _layer(self, name: str) -> nn.Module | None:
        """A layer that computes something; MAE-CT's module lacks what timm's fills by Identity."""
        layer: nn.Module | None = getattr(self, name, None)
        return None if isinstance(layer, nn.Identity) else layer

    def _normalised(self, name: str, x: Tensor) -> Tensor:
        """Queries or keys after their norm, in their own dtype: autocast may run norms in fp32."""
        layer = self._layer(name)
        if layer is None:
            return x
        normalised: Tensor = layer(x)
        return normalised.to(x.dtype)

    def _project(self, o: Tensor, x: Tensor) -> Tensor:
        """What follows attention: [.., H, D] of the tokens x to `proj`'s width."""
        o = o.flatten(-2)
        norm, gate = self._layer("norm"), self._layer("gate")
        if norm is not None:
            o = norm(o)
        if gate is not None:
            o = o * gate(x).sigmoid()
        return self.proj_drop(self.proj(o))  # type: ignore[no-any-return]


class FusedMultiheadAttention(nn.MultiheadAttention):
    """Self-attention of `nn.MultiheadAttention(batch_first=True)` on `masked_attention`.

    What torchvision's ViT needs of it: no dropout, no masks, no weights. Parameters and state-dict
    keys are those of the base class.

    Args:
        embed_dim: C.
        num_heads: H.
        bias: of both projections.

    Source: torch: nn/modules/activation.py; torchvision: models/vision_transformer.py.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, bias: bool = True) -> None:
        check_int("num_heads", num_heads, 1)
        check_int("embed_dim", embed_dim, 1)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of {num_heads}, got {embed_dim}")
        super().__init__(embed_dim, num_heads, bias=bias, batch_first=True)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Tokens [B, N, C] to ([B, N, C], None).

        Args:
            query: tokens.
            key: the same tensor.
            value: the same tensor.
            key_padding_mask: None.
            need_weights: False, though the base class's default is True.
            attn_mask: None.
            average_attn_weights: of no meaning without weights.
            is_causal: False.

        Raises:
            ValueError: anything else, or what `masked_attention` refuses.
        """
        check_tensors(query=query)
        if query.ndim != 3:
            raise ValueError(f"query: expected [B, N, C], got {list(query.shape)}")
        if key is not query or value is not query:
            raise ValueError("query, key, value: expected one tensor, got several")
        if need_weights:
            raise ValueError("need_weights: expected False, got True: weights are never held")
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise ValueError("key_padding_mask, attn_mask, is_causal: expected none, got one")
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        o = masked_attention(torch.unflatten(qkv, -1, (3, self.num_heads, -1)))
        return self.out_proj(o.flatten(-2)), None


def _is_block_diagonal(mask: object) -> bool:
    """Whether it is xformers' BlockDiagonalMask itself; subclasses mean more (causal, padded)."""
    kind = type(mask)
    return kind.__name__ == "BlockDiagonalMask" and kind.__module__.startswith("xformers.")


def _segments(mask: Any, x: Tensor) -> tuple[Tensor, int]:
    """Arguments `cu_seqlens` and `max_seqlen` of a BlockDiagonalMask for x [1, T, C]."""
    bounds, shape = mask.q_seqinfo.seqstart_py, list(x.shape)
    if mask.k_seqinfo.seqstart_py != bounds:
        raise ValueError("attn_mask: expected equal blocks of queries and keys, got different ones")
    if x.ndim != 3 or x.shape[0] != 1 or x.shape[1] != bounds[-1]:
        raise ValueError(f"x: expected [1, {bounds[-1]}, C] with this attn_mask, got {shape}")
    return mask.q_seqinfo.seqstart.to(x.device), mask.q_seqinfo.max_seqlen


def key_mask_of(mask: object, num_samples: int) -> Tensor:
    """The [B, N] mask in `attn_mask`, a [B, 1, 1, N] or [1, 1, 1, N] one; or an error.

    Args:
        mask: bool, True = takes part as a key.
        num_samples: B.
    """
    if not isinstance(mask, Tensor):
        kind = type(mask).__qualname__
        raise ValueError(f"attn_mask: expected a tensor or a BlockDiagonalMask, got {kind}")
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        got = f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"attn_mask: expected bool [B, 1, 1, N], no N x N bias, got {got}")
    rows = mask[:, 0, 0]
    return rows.expand(num_samples, -1) if rows.shape[0] == 1 else rows
