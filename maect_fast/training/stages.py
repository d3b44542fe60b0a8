"""The three stages of MAE-CT: what each trains and where its weights come from.

1. `pretrain`: encoder and decoder learn by reconstruction.
2. `prepare-head`: on the frozen encoder, an NNCLR head learns and fills its queue.
3. `tune`: the upper blocks and the head learn by contrast with neighbours from the queue.

Source: arXiv 2304.10520 section 3; ml-jku/MAE-CT: yamls/stage1_mae, stage2_*, stage3_*.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from maect_fast.checkpoint import CheckpointError, load_checkpoint
from maect_fast.config import Config, ConfigError, Stage, load_config
from maect_fast.convert import load_encoder
from maect_fast.models.maect import (
    ContrastiveModel,
    PretrainModel,
    build_contrastive,
    build_pretrain,
)
from maect_fast.names import one_line, printable, shortened
from maect_fast.training.distributed import World
from maect_fast.training.ema import EncoderEma, ema_decay
from maect_fast.training.optim import build_optimizer, param_groups
from maect_fast.training.schedule import warmup_cosine

__all__ = [
    "StageModel",
    "StageState",
    "autocast",
    "build_stage",
    "last_checkpoint",
    "load_module",
    "load_state",
    "matrix_dtype",
    "part",
    "reading",
    "start_weights",
]

StageModel = PretrainModel | ContrastiveModel


def matrix_dtype(config: Config, device: torch.device) -> torch.dtype:
    """What the operands of matrix products are: the autocast dtype, or fp32 without autocast."""
    use_bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if use_bf16 else torch.float32


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The autocast of a forward pass."""
    use_bf16 = matrix_dtype(config, device) == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16)


def last_checkpoint(run: Path) -> Path:
    """The checkpoint from which a run continues, and which the next stage starts from."""
    return run / "checkpoints" / "last.pt"


def load_state(run: Path) -> dict[str, Any]:
    """The last checkpoint of a run, with every part of it there and of its kind.

    Raises:
        CheckpointError: there is none, or a part is missing or impossible; one line.
    """
    path = last_checkpoint(run)
    state = load_checkpoint(path)
    kinds = {
        "stage": (str,),
        "config": (dict,),
        "update": (int,),
        "total": (int,),
        "model": (dict,),
        "optimizer": (dict,),
        "encoder_ema": (dict, type(None)),
        "random_states": (list,),
    }
    for key, kind in kinds.items():
        if key not in state:
            raise CheckpointError(f"{printable(path)}: a checkpoint without {key}")
        if type(state[key]) not in kind:
            kinds_named = f"{type(state[key]).__name__}, expected {kind[0].__name__}"
            raise CheckpointError(f"{printable(path)}: {key} is a {kinds_named}")
    if state["stage"] not in get_args(Stage):
        raise CheckpointError(f"{printable(path)}: there is no stage {shortened(state['stage'])}")
    if not 0 <= state["update"] <= state["total"]:
        raise CheckpointError(
            f"{printable(path)}: update {state['update']} of {state['total']} cannot be"
        )
    decay = state.get("encoder_ema_decay")
    if decay is not None and not (type(decay) is float and 0 <= decay < 1):
        raise CheckpointError(f"{printable(path)}: encoder_ema_decay {shortened(decay)} cannot be")
    for key in ("model", "encoder_ema"):
        for name, value in (state[key] or {}).items():
            if type(name) is not str or not isinstance(value, Tensor):
                raise CheckpointError(f"{printable(path)}: {key}.{shortened(name)} is no tensor")
    return state


@contextmanager
def reading(part: str, run: Path) -> Iterator[None]:
    """Around the use of a part of a checkpoint: what does not fit there is told in one line.

    Raises:
        CheckpointError: names the part and `run`.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{printable(run)}: {part} does not fit ({reason})") from error


@dataclass(slots=True)
class StageState:
    """Everything that changes during a run, and so everything that a checkpoint holds."""

    config: Config
    model: StageModel
    optimizer: torch.optim.Optimizer
    encoder_ema: EncoderEma | None
    total: int
    """Updates of the whole run."""
    update: int = 0
    """Updates done."""

    def lr_factor(self, update: int) -> float:
        """Schedule factor of an update, in (0, 1]."""
        warmup = int(self.config.optim.warmup * self.total)
        return warmup_cosine(update, total=self.total, warmup=warmup)

    @property
    def _ema_decay(self) -> float | None:
        """The encoder's EMA's, in the last update."""
        if self.config.encoder_ema is None:
            return None
        return ema_decay(self.config.encoder_ema, update=max(1, self.update), total=self.total)

    def update_averages(self) -> None:
        """Both EMAs, after an optimiser step."""
        if isinstance(self.model, ContrastiveModel):
            self.model.head.update_target()
        if self.encoder_ema is not None:
            self.encoder_ema.update()

    def state_dict(self) -> dict[str, Any]:
        """The part of a checkpoint that is alike on all ranks."""
        return {
            "stage": self.config.stage,
            "update": self.update,
            "total": self.total,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "encoder_ema": None if self.encoder_ema is None else self.encoder_ema.state_dict(),
            "encoder_ema_decay": self._ema_decay,
        }

    def load_state_dict(self, state: dict[str, Any], run: Path) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: the state is not one of this model; the message names `run`.
        """
        load_module(self.model, state["model"], "model", run)
        # Rates, decays and averaging are the configuration's, which may have changed.
        own = [{**group} for group in self.optimizer.param_groups]
        with reading("optimizer", run):
            self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if name != "step" and value.shape != parameter.shape:
                    raise CheckpointError(
                        f"{printable(run)}: optimizer.{shortened(name)} has shape "
                        f"{list(value.shape)}, its parameter {list(parameter.shape)}"
                    )
        if (self.encoder_ema is None) != (state["encoder_ema"] is None):
            raise CheckpointError(f"{printable(run)}: encoder_ema does not fit the configuration")
        if self.encoder_ema is not None:
            load_module(self.encoder_ema.encoder, state["encoder_ema"], "encoder_ema", run)
        self.update = state["update"]

    def forget_images(self) -> None:
        """Leave the queue's rows without ids and labels: those were of other images."""
        if isinstance(self.model, ContrastiveModel):
            queue = self.model.head.loss.queue
            queue.queue_id.fill_(-1)
            queue.queue_y.fill_(-1)


def build_stage(config: Config, world: World, *, total: int) -> StageState:
    """Model, optimiser and EMA of `config.stage`, with initial weights drawn from `config.seed`.

    Raises:
        ConfigError: sizes that do not fit together, or a model that is no plain ViT.
    """
    model: StageModel
    try:
        if config.stage == "pretrain":
            model = build_pretrain(config, world)
        else:
            model = build_contrastive(config, world)
            frozen = None if config.stage == "prepare-head" else config.frozen_blocks
            model.encoder.freeze(frozen, int8=config.frozen_precision == "int8")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    model.to(world.device).train()
    scale = config.batch_size * config.num_views / 256
    groups = param_groups(model, config.optim, lr_scale=scale)
    optimizer = build_optimizer(groups, config.optim)
    ema = None
    if config.encoder_ema is not None:
        ema = EncoderEma(model.encoder, config.encoder_ema, total=total)
    return StageState(config, model, optimizer, ema, total)


def start_weights(
    state: StageState, *, init: Path | None, decoder: Path | None = None
) -> list[str]:
    """Fill a new run's model from the previous stage. Returns lines that say what was taken.

    Args:
        state: a freshly built stage.
        init: a run directory of the previous stage; for `pretrain` and `prepare-head` also a file
            with an encoder's weights (facebook MAE, MAE-CT, timm). None keeps the random weights.
        decoder: for `tune` with a reconstruction loss: the pretrain run whose decoder to use.

    Raises:
        CheckpointError: a path that is missing, of another stage, unfinished, or of other sizes.
    """
    config, model = state.config, state.model
    lines = []
    if init is not None and not init.exists():
        raise CheckpointError(f"{init}: no such run directory or file")
    if init is not None and init.is_dir():
        previous = _previous(init, config)
        _check_norm_eps(previous, init, config)
        lines.append(f"encoder from {init} ({previous['stage']})")
        load_module(model.encoder, part(previous["model"], "encoder."), "encoder", init)
        if config.stage == "tune" and isinstance(model, ContrastiveModel):
            # Projector, predictor, batch statistics and the filled queue go on as they are; the
            # target projector, which stage 2 does not have, starts as a copy of the projector.
            head = part(previous["model"], "head.")
            own = model.head.state_dict()
            head |= {k: v for k, v in own.items() if k.startswith("target_projector.")}
            load_module(model.head, head, "head", init)
            model.head.start_target()
            lines.append(f"head and queue from {init}")
    elif init is not None:
        if config.stage == "tune":
            raise CheckpointError(
                f"{init}: tune starts from a prepare-head run, whose head and queue it needs; "
                "give an encoder's file to prepare-head"
            )
        try:
            lines += load_encoder(model.encoder, init)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    if config.stage == "tune" and config.reconstruction_weight > 0:
        if decoder is None:
            raise CheckpointError(
                "reconstruction_weight is above 0: give the pretrain run with --decoder RUN"
            )
        states = load_state(decoder)
        _check_norm_eps(states, decoder, config)
        assert isinstance(model, ContrastiveModel)
        assert model.decoder is not None
        load_module(model.decoder, part(states["model"], "decoder."), "decoder", decoder)
        lines.append(f"decoder from {decoder}")
    if state.encoder_ema is not None:
        state.encoder_ema.load_state_dict(model.encoder.state_dict())
    return lines


def _previous(run: Path, config: Config) -> dict[str, Any]:
    """Load a finished run of the stage that `config.stage` follows."""
    wanted = {"pretrain": "pretrain", "prepare-head": "pretrain", "tune": "prepare-head"}
    state = load_state(run)
    if state["stage"] != wanted[config.stage]:
        raise CheckpointError(
            f"{run}: {config.stage} starts from a {wanted[config.stage]} run, "
            f"this is a {state['stage']} run"
        )
    if state["update"] < state["total"]:
        raise CheckpointError(
            f"{run}: unfinished ({state['update']} of {state['total']} updates); "
            f"continue it first: maect-fast {state['stage']} --out {run}"
        )
    return state


def _check_norm_eps(state: dict[str, Any], run: Path, config: Config) -> None:
    """Refuse weights made with other norms, which no shape tells."""
    with reading("config", run):
        there = load_config(state["config"]).encoder.norm_eps
    if there != config.encoder.norm_eps:
        raise CheckpointError(
            f"{printable(run)}: encoder.norm_eps is {there:g} there, this configuration has "
            f"{config.encoder.norm_eps:g}; use the same encoder.* settings"
        )


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries below `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def load_module(module: nn.Module, state: dict[str, Tensor], name: str, run: Path) -> None:
    """Load strictly; a mismatch is the user's to mend, so it is told in one line.

    Of a module on the meta device the sizes alone are compared.

    Raises:
        CheckpointError: other names, shapes or kinds of numbers.
    """
    own = module.state_dict()
    where = printable(run)
    for key in dict.fromkeys([*own, *state]):
        shown = f"{name}.{shortened(key, 100)}"
        if key not in own or key not in state:
            side = "this configuration" if key not in own else where
            raise CheckpointError(f"{where}: {shown} is not in {side}; use the same {name}.*")
        if own[key].shape != state[key].shape:
            raise CheckpointError(
                f"{where}: {shown} has shape {list(state[key].shape)}, this configuration "
                f"expects {list(own[key].shape)}; use the same {name}.* settings"
            )
        if own[key].is_floating_point() != state[key].is_floating_point():
            raise CheckpointError(
                f"{where}: {shown} is {state[key].dtype}, expected {own[key].dtype}"
            )
    if not any(value.is_meta for value in own.values()):
        module.load_state_dict(state)
