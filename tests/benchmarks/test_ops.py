"""The registry: inputs, formulas and gates of every op, and that each provider computes the op."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from maect_fast.benchmarks import registry
from maect_fast.benchmarks.ops import OPS
from maect_fast.benchmarks.ops import gelu as gelu_entry
from maect_fast.benchmarks.ops import info_nce as loss_entry
from maect_fast.benchmarks.ops import int8_linear as int8_entry
from maect_fast.benchmarks.ops import mae_tokens as tokens_entry
from maect_fast.benchmarks.ops import masked_attention as attention_entry
from maect_fast.benchmarks.ops import queue_topk as search_entry
from maect_fast.benchmarks.ops import residual_norm as norm_entry
from maect_fast.benchmarks.registry import EAGER, OURS, Call, Op, Outputs, judged_samples
from maect_fast.benchmarks.run import gate

CPU = torch.device("cpu")
COMPILED = ("torch.compile", "FlexAttention", "cut-cross-entropy")
NEEDS_CUDA = {
    "masked_attention": {"SDPA efficient", "SDPA cuDNN", "xformers", "flash-attn"},
    "queue_topk": {"faiss-gpu"},
    "info_nce": {"Liger"},
    "mae_tokens": set(),
    "residual_norm": set(),
    "gelu": set(),
    "int8_linear": set(),
}
CASES = [(name, mode) for name, op in OPS.items() for mode in op.modes]


def copy_of(op: Op[Any]) -> Op[Any]:
    """An op to which a test can add providers."""
    return replace(op, providers=dict(op.providers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_providers_pass_the_gate(name: str, mode: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    providers = [p for p in op.providers if p not in COMPILED]
    for sizes in op.sizes["check"]:
        x = op.inputs(sizes, dtype, CPU)
        calls, reasons = gate(op, x, mode, dtype, providers)
        assert {OURS, EAGER} <= calls.keys(), reasons
        assert {p for p in reasons if reasons[p] == "needs CUDA"} == NEEDS_CUDA[name]
        absent = ("needs CUDA", "runs on CUDA", "is not installed", "has no F.linear_cross_entropy")
        assert all(any(word in reason for word in absent) for reason in reasons.values()), reasons


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_providers_pass_the_gate(name: str, mode: str) -> None:
    op = OPS[name]
    providers = [p for p in op.providers if p in COMPILED]
    x = op.inputs(op.sizes["quick"][0], torch.float32, CPU)
    if not providers:
        pytest.skip("no compiled peer")
    _, reasons = gate(op, x, mode, torch.float32, providers)
    assert "torch.compile" not in reasons, reasons
    assert not any(reason.startswith("wrong") for reason in reasons.values()), reasons


def wrong_attention(x: attention_entry.Inputs, mode: str) -> Call:
    """The last sample's last token is not written."""

    def forward(qkv: torch.Tensor) -> torch.Tensor:
        o = attention_entry._sdpa(qkv)
        keep = torch.ones(o.shape[:2], dtype=torch.bool)
        keep[-1, -1] = False
        return o * keep[..., None, None]

    return attention_entry._differentiate(x, mode, forward)


def wrong_search(x: search_entry.Inputs, mode: str) -> Call:
    """The query's own slot is not excluded."""

    def search() -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = (x.query @ x.state.queue.T).topk(x.k)
        return values, indices

    return search_entry._finish(x, mode, search)


def wrong_loss(x: loss_entry.Inputs, mode: str) -> Call:
    """The views are not crossed."""
    straight = replace(x, neighbour=x.neighbour.flip(0))
    return loss_entry._by_rows(straight, mode, loss_entry._rows_loss)


def wrong_tokens(x: tokens_entry.Inputs, mode: str) -> Call:
    """The patches are not in their own order."""
    turned = replace(x, ids_restore=x.ids_restore.flip(1))
    return tokens_entry._differentiate(turned, mode, tokens_entry._plain)


def wrong_norm(x: norm_entry.Inputs, mode: str) -> Call:
    """The branch's bias is forgotten."""
    without = replace(x, branch_bias=torch.zeros_like(x.branch_bias))
    return norm_entry._differentiate(without, mode, norm_entry._plain)


def wrong_gelu(x: gelu_entry.Inputs, mode: str) -> Call:
    """By tanh, which differs from the exact function by 5e-4."""

    def tanh(h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu((h + bias).to(h.dtype), approximate="tanh")

    return gelu_entry._differentiate(x, mode, tanh)


def wrong_int8(x: int8_entry.Inputs, mode: str) -> Call:
    """A row's scale is its neighbour's."""
    return int8_entry.ours(replace(x, x_scale=x.x_scale.roll(1)), mode)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_wrong_provider_gets_no_time(name: str, mode: str) -> None:
    op = copy_of(OPS[name])
    wrong: dict[str, Any] = {
        "masked_attention": wrong_attention,
        "queue_topk": wrong_search,
        "info_nce": wrong_loss,
        "mae_tokens": wrong_tokens,
        "residual_norm": wrong_norm,
        "gelu": wrong_gelu,
        "int8_linear": wrong_int8,
    }
    op.provider("wrong")(wrong[name])
    x = op.inputs(op.sizes["quick"][0], torch.float32, CPU)
    if name == "queue_topk":
        # The queue's own rows as queries, so that the own slot would be the best, and k = 1, so
        # that it would be picked.
        x = replace(x, query=x.state.queue[x.query_id], k=1)
    calls, reasons = gate(op, x, mode, torch.float32, [EAGER, "wrong"])
    assert list(calls) == [EAGER]
    assert reasons["wrong"].startswith("wrong: ")


@pytest.mark.parametrize("mode", ["fwd", "bwd", "full"])
def test_a_fault_in_any_single_sample_is_found(mode: str) -> None:
    """At every size of the check."""
    op = copy_of(OPS["masked_attention"])
    make = op.providers[EAGER].make
    for sizes in op.sizes["check"]:
        x = op.inputs(sizes, torch.float32, CPU)
        for b in range(sizes["B"]):
            # One number of one sample.
            @op.provider(f"wrong {b}")
            def wrong(x: attention_entry.Inputs, mode: str, b: int = b) -> Call:
                call = make(x, mode)

                def run() -> Outputs:
                    outputs = call()
                    for value in outputs.values():
                        value[b][(-1,) * (value.ndim - 1)] += 1
                    return outputs

                return run

        names = [f"wrong {b}" for b in range(sizes["B"])]
        calls, reasons = gate(op, x, mode, torch.float32, names)
        assert not calls
        assert all(reasons[name].startswith("wrong: ") for name in names)


@pytest.mark.parametrize("mode", ["topk", "find_nn"])
def test_a_fault_in_any_single_query_is_found(mode: str) -> None:
    op = copy_of(OPS["queue_topk"])
    sizes = {"B": 129, "Q": 8191, "D": 32, "K": 1}
    x = op.inputs(sizes, torch.float32, CPU)
    right = op.providers[EAGER].make(x, mode)()

    for b in range(sizes["B"]):
        outputs = {name: value.clone() for name, value in right.items()}
        if mode == "topk":
            outputs["values"][b] += 0.1
        else:
            # The own slot is the farthest of all.
            index = outputs["picked_index"]
            index[b] = x.query_id[b]
            outputs["picked_neighbour"] = x.state.queue[index]
            outputs["num_hits"] = (x.state.queue_y[index] == x.query_label).sum()

        @op.provider("wrong")
        def wrong(x: search_entry.Inputs, mode: str, outputs: Outputs = outputs) -> Call:
            return lambda: outputs

        assert gate(op, x, mode, torch.float32, ["wrong"])[1]["wrong"].startswith("wrong: ")


def test_judged_are_all_samples_or_a_fixed_part_with_both_ends() -> None:
    assert judged_samples(512, 1 << 17, CPU).tolist() == [*range(512)]
    # Attention at 257 tokens: as many as 512 MiB of fp64 hold.
    part = judged_samples(512, 16 * 257**2, CPU).tolist()
    assert len(part) == (1 << 26) // (16 * 257**2) == 63
    assert part == sorted(set(part))
    assert (part[:2], part[-2:]) == ([0, 1], [510, 511])
    assert part == judged_samples(512, 16 * 257**2, CPU).tolist()
    assert judged_samples(512, 1 << 30, CPU).tolist() == [0, 1, 510, 511]


def test_the_gate_compares_the_judged_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "JUDGED_NUMBERS", 1)
    for name, B in (("masked_attention", 7), ("queue_topk", 9)):
        op = OPS[name]
        x = op.inputs({**op.sizes["check"][1], "B": B, "Q": 65, "K": 3}, torch.float32, CPU)
        for mode in op.modes:
            assert all(len(value) == 4 for value in op.definition(x, mode, torch.float64).values())
            calls, reasons = gate(op, x, mode, torch.float32, [OURS, EAGER])
            assert not reasons
            assert list(calls) == [OURS, EAGER]


def test_nothing_large_is_drawn_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw of inputs names the device and has a generator of it."""
    draws = []
    for name in ("randn", "rand", "randint"):
        real = getattr(torch, name)

        def draw(*args: Any, real: Any = real, **options: Any) -> torch.Tensor:
            draws.append((options.get("device"), options["generator"].device))
            drawn: torch.Tensor = real(*args, **options)
            return drawn

        monkeypatch.setattr(torch, name, draw)
    for op in OPS.values():
        op.inputs(op.sizes["check"][0], torch.float32, CPU)
    assert len(draws) > len(OPS)
    assert set(draws) == {(CPU, CPU)}


def test_claimed_scores_must_belong_to_the_slots() -> None:
    op = copy_of(OPS["queue_topk"])

    @op.provider("shifted")
    def shifted(x: search_entry.Inputs, mode: str) -> Call:
        values, indices = search_entry._scores_topk(
            x.query, x.state.queue, x.query_id, x.state.queue_id, x.k
        )
        return lambda: {"values": values, "indices": (indices + 1) % len(x.state.queue)}

    x = op.inputs(op.sizes["quick"][0], torch.float32, CPU)
    _, reasons = gate(op, x, "topk", torch.float32, ["shifted"])
    assert reasons["shifted"].startswith("wrong: scores of indices")


def test_a_provider_that_raises_gets_its_reason() -> None:
    op = copy_of(OPS["info_nce"])

    @op.provider("broken")
    def broken(x: loss_entry.Inputs, mode: str) -> Call:
        def call() -> Outputs:
            raise MemoryError("no memory\nwith details")

        return call

    x = op.inputs(op.sizes["quick"][0], torch.float32, CPU)
    assert gate(op, x, "fwd", torch.float32, ["broken"])[1] == {"broken": "MemoryError: no memory"}


def test_formulas() -> None:
    """ViT-H/14 tuning at 512 views, the usual search and loss, worked out by hand."""
    attention = {"B": 512, "H": 16, "N": 257, "D": 80}
    op = OPS["masked_attention"]
    assert op.num_flops(attention, "fwd") == 4 * 512 * 16 * 257**2 * 80  # 173.1 GFLOP
    assert op.num_flops(attention, "bwd") == 10 * 512 * 16 * 257**2 * 80  # 432.9 GFLOP
    assert op.num_flops(attention, "full") == 14 * 512 * 16 * 257**2 * 80
    assert op.num_bytes(attention, "fwd", 2) == 4 * 2 * 512 * 257 * 16 * 80  # 1.35 GB
    search = {"B": 512, "Q": 65_536, "D": 256, "K": 20}
    assert OPS["queue_topk"].num_flops(search, "topk") == 17_179_869_184
    queue = 65_536 * 256 * 2
    assert queue < OPS["queue_topk"].num_bytes(search, "topk", 2) < 1.02 * queue
    loss = {"B": 512, "N": 4096, "D": 256}
    assert OPS["info_nce"].num_flops(loss, "full") == 12 * 512 * 4096 * 256  # 6.4 GFLOP
    tokens = {"B": 512, "H": 224, "N": 49, "D": 512, "K": 16}
    restored, patches = 4 * 197 * 512 + 2 * 50 * 512, 2 * 768
    fwd = 512 * (restored + 3 * patches * (49 + 147))
    assert OPS["mae_tokens"].num_bytes(tokens, "fwd", 2) == fwd  # 0.70 GB
    bwd = 512 * (restored + 4 * patches * 147)
    assert OPS["mae_tokens"].num_bytes(tokens, "bwd", 2) == bwd  # 0.70 GB
    # One bf16 tensor of the stream of ViT-L/16 at 512 views is 207 MB.
    unit = 2 * 512 * 197 * 1024
    norm, hidden = {"M": 512 * 197, "D": 1024}, {"M": 512 * 197, "D": 4096}
    for mode, num_norm, num_gelu in (("fwd", 4, 8), ("bwd", 4, 12), ("full", 8, 20)):
        assert OPS["residual_norm"].num_bytes(norm, mode, 2) == num_norm * unit
        assert OPS["gelu"].num_bytes(hidden, mode, 2) == num_gelu * unit
    layer = {"M": 512 * 197, "N": 4096, "K": 1024}
    assert OPS["int8_linear"].num_flops(layer, "fwd") == 8 * 512 * 197 * 1024**2
    # Half a unit in, four out, and the weight.
    assert OPS["int8_linear"].num_bytes(layer, "fwd", 2) == 4.5 * unit + 4 * 1024**2


def test_both_divisions_of_the_loss_agree_on_one_rank() -> None:
    x = OPS["info_nce"].inputs({"B": 9, "N": 9, "D": 16}, torch.float32, CPU)
    x = loss_entry.Inputs(x.predicted.double(), x.neighbour.double(), x.B)
    by_rows = loss_entry._by_rows(x, "full", loss_entry._rows_loss)()
    by_columns = loss_entry._by_columns(x, "full", loss_entry._columns_loss)()
    assert by_rows.keys() == by_columns.keys() == {"loss", "gradient"}
    for name, value in by_rows.items():
        torch.testing.assert_close(by_columns[name], value)
