"""One update of a stage: forward, backward, optimiser, EMAs; on a GPU one CUDA graph.

What differs from one update to the next lies on the device: the batch, the update's number, which
keys masks and neighbour picks, the learning rates and the EMA's weight. All else of an update is
the same launches with the same arguments: they are captured once and launched again together, to
the same bits.
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maect_fast.attention import is_bare
from maect_fast.block import has_global_hooks
from maect_fast.data import Batch
from maect_fast.errors import UserError
from maect_fast.profiling import profile_range
from maect_fast.training.distributed import World
from maect_fast.training.optim import Rates
from maect_fast.training.stages import StageState, autocast

__all__ = ["WARMUP", "TrainingError", "Update", "capture_obstacle"]

# Updates before the capture, as PyTorch's documentation has it: they make the optimiser's state,
# cuBLAS's workspaces and the kernels' plans.
WARMUP = 3

Outputs = dict[str, Tensor]


class TrainingError(UserError, RuntimeError):
    """The run cannot go on; the message says why and from where it can be continued."""


def capture_obstacle(state: StageState, world: World) -> str | None:
    """Why the updates of a run on a GPU are launched kernel by kernel; None: they are captured."""
    if world.size > 1:
        return "with several processes a capture has not been tested"
    if state.config.profile is not None:
        return "a profile counts what each range launches"
    is_plain = all(is_bare(module) for module in state.model.modules())
    hooks = [p._backward_hooks or p._post_accumulate_grad_hooks for p in state.model.parameters()]
    if not is_plain or any(hooks) or has_global_hooks():
        return "the model has hooks, which would run once, in the capture"
    return None


class Update:
    """The updates of one run, to be called with one batch after the other.

    Args:
        state: what they change.
        model: `state.model`, or what wraps it.
        world: this process's place.
        capture: on a GPU, make one CUDA graph of an update after `WARMUP` of them, where nothing
            forbids it; what does is told on stderr. The next batches of the same shapes replay it,
            others are launched kernel by kernel.
    """

    def __init__(
        self, state: StageState, model: nn.Module, world: World, *, capture: bool = False
    ) -> None:
        self.state = state
        self.model = model
        self.device = world.device
        self._step = torch.zeros((), dtype=torch.int64, device=self.device)
        self._factor = torch.zeros((), dtype=torch.float64, device=self.device)
        self._rates = Rates(state.optimizer, self.device)
        self._stream: torch.cuda.Stream | None = None
        self._captured: _Captured | None = None
        self._num_done = 0
        if capture and self.device.type == "cuda":
            reason = capture_obstacle(state, world)
            if reason is None:
                self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            elif world.rank == 0:
                print(f"updates run without a CUDA graph: {reason}", file=sys.stderr)  # noqa: T201

    @property
    def is_captured(self) -> bool:
        """Whether there is a graph by now."""
        return self._captured is not None

    def __call__(self, batch: Batch) -> Outputs:
        """Make an update of a batch on the device; no host sync, but for the capture's own.

        Returns:
            What the model gave, detached; the next call may overwrite it.
        """
        # As numbers in the launches of fills: a copy would wait for the host's memory.
        self._step.fill_(self.state.update)
        self._factor.fill_(self.state.lr_factor(self.state.update))
        if self.state.encoder_ema is not None:
            self.state.encoder_ema.weigh(self.state.update + 1)
        if self._stream is None:
            outputs = self._launch(batch)
        elif self._captured is not None:
            fits = self._captured.fits(batch)
            outputs = self._captured.replay(batch) if fits else self._launch(batch)
        elif self._num_done < WARMUP:
            outputs = self._warm_up(batch, self._stream)
        else:
            self._captured = self._capture(batch, self._stream)
            outputs = self._captured.replay(batch)
        self._num_done += 1
        self.state.update += 1
        return outputs

    def _launch(self, batch: Batch) -> Outputs:
        """One update, kernel by kernel, of the numbers that are on the device."""
        state = self.state
        with autocast(state.config, self.device):
            outputs: Outputs = self.model(
                batch.views, sample_id=batch.sample_id, label=batch.label, step=self._step
            )
        with profile_range("backward"):
            outputs["loss"].backward()  # type: ignore[no-untyped-call]
        with profile_range("optimiser"):
            self._rates.set(self._factor)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
        with profile_range("EMA"):
            state.update_averages()
        return {name: value.detach() for name, value in outputs.items()}

    def _warm_up(self, batch: Batch, stream: torch.cuda.Stream) -> Outputs:
        """On the capture's stream, to which workspaces belong."""
        current = torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs = self._launch(batch)
        current.wait_stream(stream)
        return outputs

    def _capture(self, batch: Batch, stream: torch.cuda.Stream) -> "_Captured":
        """Record an update, which makes none."""
        state, graph = self.state, torch.cuda.CUDAGraph()
        inputs = Batch(*(x.clone() for x in _tensors(batch)))
        try:
            # Other threads, the loader's, may go on allocating.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                outputs = self._launch(inputs)
        except RuntimeError as error:
            # The one that stopped the capture comes before the one at its end.
            reason = str(error.__context__ or error).splitlines()[0]
            raise TrainingError(
                f"update {state.update} could not be captured in a CUDA graph ({reason}); the same "
                "command with --no-capture trains without one, from the last saved checkpoint"
            ) from error
        return _Captured(graph, inputs, outputs)


class _Captured(NamedTuple):
    """A graph, and the memory through which it is given batches and gives results."""

    graph: torch.cuda.CUDAGraph
    inputs: Batch
    outputs: Outputs

    def fits(self, batch: Batch) -> bool:
        pairs = zip(_tensors(self.inputs), _tensors(batch), strict=True)
        return all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)

    def replay(self, batch: Batch) -> Outputs:
        for own, given in zip(_tensors(self.inputs), _tensors(batch), strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.outputs


def _tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.views, batch.sample_id, batch.label
