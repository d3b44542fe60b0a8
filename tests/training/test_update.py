"""The captured update, without a GPU: a graph that records operators and runs them again.

Like CUDA's, `Graph` makes the same launches on the same memory with the numbers of the capture: no
Python runs in a replay, and autograd's versions stay. Like CUDA, a capture makes no update.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from allocation import NoSync
from omegaconf import OmegaConf
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maect_fast import block as block_module
from maect_fast.checkpoint import load_checkpoint
from maect_fast.cli import main
from maect_fast.config import Config, Stage, load_config
from maect_fast.data import Batch
from maect_fast.models.head import NNCLRHead
from maect_fast.training.distributed import init_world
from maect_fast.training.optim import Rates
from maect_fast.training.stages import StageState, build_stage, last_checkpoint
from maect_fast.training.update import WARMUP, TrainingError, Update, capture_obstacle

CPU = init_world("cpu")
UPDATES, N, TOTAL = 9, 6, 12
SETTINGS = """
encoder:
  {name: vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 32, depth: 3, num_heads: 2}
decoder: {embed_dim: 16, depth: 2, num_heads: 4}
head: {projector_hidden: 24, predictor_hidden: 40, output_dim: 16, queue_size: 50, topk: 5}
optim: {encoder_lr: 0.01, other_lr: 0.01, warmup: 0.3, layer_decay: 0.65}
mask_ratio: 0.7
batch_size: 6
precision: fp32
device: cpu
"""
STAGE3 = {
    "stage": "tune",
    "frozen_blocks": 1,
    "encoder_ema": 0.9,
    "head": {"target_ema": 0.9, "pooling": "class_token"},
}
CASES: dict[str, dict[str, Any]] = {
    "pretrain": {"stage": "pretrain"},
    "prepare-head": {"stage": "prepare-head", "head": {"topk": 1, "pooling": "mean_patch"}},
    "tune": STAGE3,
    "tune with reconstruction": STAGE3 | {"reconstruction_weight": 0.5},
    "tune in chunks": STAGE3 | {"chunk_size": 4},
    "tune in bf16": STAGE3 | {"precision": "bf16"},
}


def config_of(case: str, **changes: Any) -> Config:
    layers = [OmegaConf.create(layer) for layer in (SETTINGS, CASES[case], changes)]
    return load_config(*layers)  # type: ignore[arg-type]


def build(config: Config, device: str = "cpu") -> StageState:
    return build_stage(config, init_world(device), total=TOTAL)


def batches(device: torch.device | str = "cpu", size: int = N) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(2)
    while True:
        views = torch.randn(2, size, 3, 8, 8, generator=generator)
        sample_id = torch.randint(24, (size,), generator=generator)
        label = torch.randint(-1, 3, (size,), generator=generator)
        yield Batch(*(x.to(device) for x in (views, sample_id, label)))


def contents(state: StageState) -> dict[str, Tensor]:
    """Copies of all that an update changes."""
    found = dict(state.model.state_dict())
    if state.encoder_ema is not None:
        found |= {f"EMA {name}": x for name, x in state.encoder_ema.state_dict().items()}
    for i, moments in state.optimizer.state_dict()["state"].items():
        found |= {f"AdamW {i} {name}": x for name, x in moments.items()}
    return {name: x.detach().clone() for name, x in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def train(
    state: StageState,
    make: Callable[[Batch], dict[str, Tensor]],
    device: torch.device | str = "cpu",
    sizes: tuple[int, ...] = (N,) * UPDATES,
) -> dict[str, Tensor]:
    """Some updates; what they gave, and what is there in the end."""
    streams = {size: batches(device, size) for size in set(sizes)}
    found: dict[str, Tensor] = {}
    for i, size in enumerate(sizes):
        outputs = make(next(streams[size]))
        found |= {f"update {i}: {name}": x.clone() for name, x in outputs.items()}
    return found | contents(state)


def with_numbers(state: StageState) -> Callable[[Batch], dict[str, Tensor]]:
    """An update as it is written without a graph in mind: its rates and its step are numbers."""

    def make(batch: Batch) -> dict[str, Tensor]:
        use_bf16 = state.config.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
            outputs = state.model(
                batch.views, sample_id=batch.sample_id, label=batch.label, step=state.update
            )
        outputs["loss"].backward()
        for group in state.optimizer.param_groups:
            group["lr"] = group["base_lr"] * state.lr_factor(state.update)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        if state.encoder_ema is not None:
            state.encoder_ema.weigh(state.update + 1)
        state.update_averages()
        state.update += 1
        return {name: x.detach() for name, x in outputs.items()}

    return make


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_as_good_as_numbers(case: str) -> None:
    """Bit for bit."""
    plain, state = build(config_of(case)), build(config_of(case))
    expected = train(plain, with_numbers(plain))
    assert_same(train(state, Update(state, state.model, CPU)), expected)
    assert state.update == UPDATES


class CaptureFailedError(RuntimeError):
    """What CUDA would say."""


# They wait for the device, or make results whose shape only it knows.
FORBIDDEN = {
    *("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2"),
    *("equal", "bincount", "unique_consecutive"),
}


class Graph(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        masks = [
            x for x in tree_leaves(args[1:2]) if isinstance(x, Tensor) and x.dtype == torch.bool
        ]
        if name in FORBIDDEN or (name in ("index", "index_put_") and masks):
            raise CaptureFailedError(f"operation not permitted when stream is capturing: {name}")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        given = [x for call in self.calls for x in tree_leaves(call[1:3]) if isinstance(x, Tensor)]
        with _unsafe_preserve_version_counter(tuple(given)):
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                storages = {x.untyped_storage().data_ptr() for x in inputs}
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    # What shares memory with an argument, views and writes in place, is done.
                    if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in storages:
                        old.copy_(new)


class Stream:
    """Stands in for one of CUDA's, and for the current one."""

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[StageState], Update]:
    """Updates whose capture and replays a CPU can do."""
    taken: list[Update] = []

    @contextmanager
    def record(graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        update = taken[-1]
        tensors = persistent(update)
        before = [x.detach().clone() for x in tensors]
        with graph:
            yield
        assert all(p.grad is None for p in update.state.model.parameters())
        with torch.no_grad():
            for x, old in zip(tensors, before, strict=True):
                x.copy_(old)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())

    def make(state: StageState) -> Update:
        update = Update(state, state.model, CPU)
        update._stream = Stream()  # type: ignore[assignment]
        taken.append(update)
        return update

    return make


def persistent(update: Update) -> list[Tensor]:
    """Memory that outlives an update."""
    state = update.state
    found = [*state.model.parameters(), *state.model.buffers()]
    if state.encoder_ema is not None:
        found += [*state.encoder_ema.encoder.parameters(), *state.encoder_ema.encoder.buffers()]
    for moments in state.optimizer.state.values():
        found += moments.values()
    return [x for x in found if x.numel() > 0]


def graph_of(update: Update) -> Graph:
    assert update._captured is not None
    graph: Any = update._captured.graph
    assert isinstance(graph, Graph)
    return graph


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks take their fused path, by the ops' definitions."""
    monkeypatch.setattr(block_module, "_place_obstacle", lambda x, dtype: None)


@pytest.fixture(params=["timm's blocks", "fused blocks"])
def blocks(request: pytest.FixtureRequest) -> None:
    if request.param == "fused blocks":
        request.getfixturevalue("definitions")


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("case", CASES)
def test_replays_equal_updates(case: str, capturing: Callable[[StageState], Update]) -> None:
    """Bit for bit: weights, queue, averages, AdamW's state, and what each update told."""
    plain, state = build(config_of(case)), build(config_of(case))
    expected = train(plain, Update(plain, plain.model, CPU))
    update = capturing(state)
    assert_same(train(state, update), expected)
    assert graph_of(update).replays == UPDATES - WARMUP
    assert state.update == UPDATES


def test_a_batch_of_another_size_is_launched_by_itself(
    capturing: Callable[[StageState], Update],
) -> None:
    sizes = (N, N, N, N, 4, N, 4, N)
    plain, state = build(config_of("tune")), build(config_of("tune"))
    expected = train(plain, Update(plain, plain.model, CPU), sizes=sizes)
    update = capturing(state)
    assert_same(train(state, update, sizes=sizes), expected)
    assert graph_of(update).replays == sizes.count(N) - WARMUP


@pytest.mark.parametrize("stopped_after", [1, WARMUP, WARMUP + 2])
def test_a_run_continues_from_a_checkpoint(
    stopped_after: int, capturing: Callable[[StageState], Update]
) -> None:
    """Saved between replays, loaded into another process's state, with a graph or without."""
    whole = build(config_of("tune"))
    expected = train(whole, Update(whole, whole.model, CPU))
    for capture_again in (False, True):
        source = batches()
        first, second = build(config_of("tune")), build(config_of("tune"))
        update = capturing(first)
        for _ in range(stopped_after):
            update(next(source))
        second.load_state_dict(copy.deepcopy(first.state_dict()), Path("run"))
        update = capturing(second) if capture_again else Update(second, second.model, CPU)
        for _ in range(UPDATES - stopped_after):
            update(next(source))
        assert_same(contents(second), {name: expected[name] for name in contents(second)})


@pytest.mark.usefixtures("definitions")
def test_evaluation_between_replays_sees_their_weights(
    capturing: Callable[[StageState], Update],
) -> None:
    """A replay moves no version counter."""
    state = build(config_of("tune in bf16"))
    assert state.encoder_ema is not None
    average, source, images = state.encoder_ema.encoder, batches(), torch.randn(2, 3, 8, 8)
    update = capturing(state)
    for i in range(WARMUP + 3):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found, expected = average(images), copy.deepcopy(average)(images)
        assert torch.equal(found, expected), f"before update {i}"
        update(next(source))


def test_two_updates_make_the_same_calls() -> None:
    """With the same numbers: what changes lies in tensors."""
    for case in CASES:
        state, source = build(config_of(case)), batches()
        update = Update(state, state.model, CPU)
        update(next(source))
        found = []
        for _ in range(2):
            calls, batch = Graph(), next(source)
            update._step.fill_(state.update)
            update._factor.fill_(state.lr_factor(state.update))
            with calls:
                update._launch(batch)
            state.update += 1
            found.append([described(func, args, kwargs) for func, args, kwargs, _ in calls.calls])
        assert len(found[0]) > 100
        assert found[0] == found[1]


def described(func: Any, args: Any, kwargs: Any) -> list[Any]:
    leaves = tree_leaves((args, kwargs))
    return [str(func), *((x.shape, x.dtype) if isinstance(x, Tensor) else str(x) for x in leaves)]


def test_a_rate_that_is_a_number_would_be_seen(
    capturing: Callable[[StageState], Update], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a replay with the capture's rate the result is another one."""
    plain, state = build(config_of("tune")), build(config_of("tune"))
    expected = train(plain, Update(plain, plain.model, CPU))

    def as_numbers(rates: Rates, factor: Tensor) -> None:
        for group in rates.optimizer.param_groups:
            group["lr"] = group["base_lr"] * state.lr_factor(state.update)

    monkeypatch.setattr(Rates, "set", as_numbers)
    found = train(state, capturing(state))
    name = "head.predictor.0.weight"
    assert torch.equal(found["update 3: loss"], expected["update 3: loss"])
    assert not torch.equal(found[name], expected[name])


def test_a_step_that_is_a_number_would_be_seen(
    capturing: Callable[[StageState], Update], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, state = build(config_of("pretrain")), build(config_of("pretrain"))
    expected = train(plain, Update(plain, plain.model, CPU))
    forward = state.model.forward

    def with_number(views: Tensor, *, step: Tensor, **others: Any) -> dict[str, Tensor]:
        return forward(views, step=state.update, **others)

    monkeypatch.setattr(state.model, "forward", with_number)
    found = train(state, capturing(state))
    assert torch.equal(found["update 3: loss"], expected["update 3: loss"])
    assert not torch.equal(found["update 4: loss"], expected["update 4: loss"])


def test_what_waits_for_the_device_is_an_error_that_says_what_to_do(
    capturing: Callable[[StageState], Update], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, source = build(config_of("tune")), batches()
    update_target = NNCLRHead.update_target

    def waiting(head: NNCLRHead) -> None:
        update_target(head)
        assert bool(head.loss.queue.queue.isfinite().all())

    monkeypatch.setattr(NNCLRHead, "update_target", waiting)
    update = capturing(state)
    for _ in range(WARMUP):
        update(next(source))
    with pytest.raises(TrainingError) as error:
        update(next(source))
    assert str(error.value) == (
        "update 3 could not be captured in a CUDA graph (operation not permitted when stream is "
        "capturing: _local_scalar_dense); the same command with --no-capture trains without one, "
        "from the last saved checkpoint"
    )
    assert state.update == WARMUP


def test_what_forbids_a_capture() -> None:
    state: Any = build(config_of("tune"))
    assert capture_obstacle(state, CPU) is None
    assert "several processes" in str(capture_obstacle(state, dataclasses.replace(CPU, size=2)))
    profiled = build(config_of("tune", profile="1:2"))
    assert "a profile counts" in str(capture_obstacle(profiled, CPU))
    weight = state.model.encoder.norm.weight
    for register in (
        state.model.encoder.norm.register_forward_hook,
        weight.register_hook,
        weight.register_post_accumulate_grad_hook,
    ):
        handle = register(lambda *_: None)
        assert "hooks" in str(capture_obstacle(state, CPU))
        handle.remove()
    assert capture_obstacle(state, CPU) is None


def on_gpu(case: str) -> Config:
    return config_of(case, device="cuda", precision="auto")


@pytest.mark.parametrize("case", CASES)
def test_a_cuda_graph_equals_launches(case: str, cuda: torch.device) -> None:
    """Bit for bit, a batch of another size among them."""
    sizes = (N, N, N, N, 4, N, N)
    world = init_world("cuda")
    plain, state = build(on_gpu(case), "cuda"), build(on_gpu(case), "cuda")
    expected = train(plain, Update(plain, plain.model, world), cuda, sizes)
    update = Update(state, state.model, world, capture=True)
    assert_same(train(state, update, cuda, sizes), expected)
    assert update._captured is not None


def test_a_replay_waits_for_nothing(cuda: torch.device, no_sync: NoSync) -> None:
    state, source = build(on_gpu("tune"), "cuda"), batches(cuda)
    given = [next(source) for _ in range(WARMUP + 3)]
    update = Update(state, state.model, init_world("cuda"), capture=True)
    for batch in given[: WARMUP + 1]:
        update(batch)
    with no_sync():
        for batch in given[WARMUP + 1 :]:
            update(batch)
    assert state.update == len(given)


def test_runs_with_and_without_a_graph(
    cuda: torch.device, tmp_path: Path, recipes: dict[Stage, Path], capfd: Any
) -> None:
    """By the command line: captured, not, profiled, and continued the other way."""
    found = {}
    runs = {"captured": [], "launched": ["--no-capture"], "profiled": ["profile=5:8"]}
    for name, words in runs.items():
        command = ["tune", "--recipe", str(recipes["tune"]), "--out", str(tmp_path / name)]
        assert main([*command, "--from-scratch", *words, "device=cuda"]) == 0
        found[name] = load_checkpoint(last_checkpoint(tmp_path / name))["model"]
        told = capfd.readouterr().err
        line = "updates run without a CUDA graph: a profile counts what each range launches"
        assert (line in told) == (name == "profiled")
    for name in ("launched", "profiled"):
        assert_same(found[name], found["captured"])
    assert (tmp_path / "profiled" / "profile" / "ranges.csv").exists()
