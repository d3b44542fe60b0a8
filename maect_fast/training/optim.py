"""AdamW with the recipes' parameter groups.

Source: ml-jku/MAE-CT: optimizers/optimizer_wrapper.py, optimizers/param_group_modifiers.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from maect_fast.config import OptimConfig
from maect_fast.models.encoder import Encoder

__all__ = ["ParamGroup", "Rates", "build_optimizer", "layer_scale", "param_groups"]

ParamGroup: TypeAlias = dict[str, Any]

PARTS = ("encoder", "decoder", "head")


def param_groups(model: nn.Module, optim: OptimConfig, *, lr_scale: float) -> list[ParamGroup]:
    """Group the parameters that train by learning rate and weight decay.

    Biases and parameters of at most one dimension have no weight decay; `cls_token` and
    `mask_token` have. timm's `param_groups_layer_decay` differs: it exempts `cls_token`, and it
    merges the final norm into the last block.

    Args:
        model: a stage's model, with the child `encoder` and `decoder` or `head`.
        optim: base rates, weight decays, layer decay.
        lr_scale: effective rate / base rate, that is batch_size * num_views / 256.

    Returns:
        Groups with `params`, `lr` and `base_lr` (both the effective peak rate), `weight_decay` and
        `name`.

    Raises:
        ValueError: parameters for which there is no rule; the message lists them.
    """
    encoder = model.get_submodule("encoder")
    assert isinstance(encoder, Encoder)
    groups: dict[str, ParamGroup] = {}
    unknown = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, _, rest = name.partition(".")
        layer = _layer(rest) if part == "encoder" else ""
        if part not in PARTS or layer is None:
            unknown.append(name)
            continue
        lr, weight_decay = optim.other_lr * lr_scale, optim.other_weight_decay
        if part == "encoder":
            scale = layer_scale(layer, encoder.depth, optim.layer_decay)
            lr, weight_decay = optim.encoder_lr * lr_scale * scale, optim.encoder_weight_decay
        if name.endswith(".bias") or parameter.ndim <= 1:
            weight_decay = 0.0
        # Without layer decay one group holds the whole encoder: fewer groups, fewer launches.
        key = f"{part}.{layer}" if layer and optim.layer_decay < 1 else part
        key += " without decay" if weight_decay == 0.0 else ""
        group = {"params": [], "lr": lr, "base_lr": lr, "weight_decay": weight_decay, "name": key}
        groups.setdefault(key, group)["params"].append(parameter)
    if unknown:
        raise ValueError(f"no learning rate is defined for the parameters {', '.join(unknown)}")
    return list(groups.values())


def layer_scale(layer: str, depth: int, decay: float) -> float:
    """Factor of a layer's learning rate.

    `decay ** (depth + 1)` for "stem", `decay ** (depth - i)` for "blocks.i", 1 for "norm".
    """
    if layer == "norm":
        return 1.0
    exponent = depth + 1 if layer == "stem" else depth - int(layer.removeprefix("blocks."))
    return float(decay**exponent)


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, which counts the steps of all groups in one launch instead of each."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have gradients."""
        lists: list[tuple[list[Tensor], ...]] = []
        for group in self.param_groups:
            lists.append(([], [], [], [], [], []))
            self._init_group(group, *lists[-1])  # type: ignore[no-untyped-call]
        if steps := [step for *_, steps in lists for step in steps]:
            torch._foreach_add_(steps, 1)
        for group, tensors in zip(self.param_groups, lists, strict=True):
            if tensors[0]:
                torch._fused_adamw_(
                    *tensors,
                    amsgrad=group["amsgrad"],
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=group["maximize"],
                )


def build_optimizer(groups: list[ParamGroup], optim: OptimConfig) -> AdamW:
    """One AdamW over all groups."""
    return AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)


class Rates:
    """Learning rates that lie on the device, where a CUDA graph reads them anew in each replay.

    Args:
        optimizer: whose groups have their peak rates as `base_lr`.
        device: of the parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        peak = [group["base_lr"] for group in optimizer.param_groups]
        self._peak = torch.tensor(peak, dtype=torch.float64, device=device)
        # What torch's fused AdamW reads on the device; on a CPU it takes the number out.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self._rates = torch.empty_like(self._peak, dtype=dtype)

    def set(self, factor: Tensor) -> None:
        """Give every group its peak rate times the schedule's factor, 0-d fp64 on the device."""
        torch.mul(self._peak, factor, out=self._rates)
        for group, rate in zip(self.optimizer.param_groups, self._rates.unbind(), strict=True):
            group["lr"] = rate


def _layer(name: str) -> str | None:
    """Layer of an encoder's parameter, None where no rule knows it."""
    if name == "cls_token" or name.startswith("patch_embed."):
        return "stem"
    if name.startswith("blocks."):
        return ".".join(name.split(".")[:2])
    return "norm" if name.startswith("norm.") else None
