"""A stage inherits from the one before, and a run goes on for longer than it was to."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maect_fast.checkpoint import load_checkpoint
from maect_fast.cli import main
from maect_fast.config import load_config, load_recipe
from maect_fast.data import Batch
from maect_fast.training.log import read_metrics
from maect_fast.training.run_directory import RunRecord
from maect_fast.training.schedule import warmup_cosine
from maect_fast.training.stages import last_checkpoint
from maect_fast.training.update import Update

SHORT = ["epochs=1", "batch_size=16", "threads=1", "log_every=1"]
# Typed once, for stage 1.
ENCODER = [
    *("encoder.embed_dim=16", "encoder.depth=3", "encoder.num_heads=2"),
    "encoder.norm_eps=1e-12",
]
IMAGES = ["data.source=synthetic", "data.num_images=64"]
# And for stage 2.
HEAD = [
    *("head.queue_size=50", "head.output_dim=8"),
    *("head.projector_hidden=16", "head.predictor_hidden=16"),
]
PER_EPOCH = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished runs of stages 1 and 2: `mae` and `head`."""
    folder = tmp_path_factory.mktemp("runs")
    mae = ["--out", str(folder / "mae"), "--recipe", "digits", "augment.rotation=0.1"]
    assert main(["pretrain", *mae, *ENCODER, *IMAGES, *SHORT, "decoder.depth=1"]) == 0
    head = ["--out", str(folder / "head"), "--init", str(folder / "mae")]
    assert main(["prepare-head", *head, *HEAD, *SHORT]) == 0
    return folder


@pytest.fixture
def tune(runs: Path) -> Callable[..., int]:
    def run(out: Path, *words: str) -> int:
        head = str(runs / "head")
        return main(["tune", "--out", str(out), "--init", head, "frozen_blocks=1", *SHORT, *words])

    return run


def test_a_stage_inherits_what_was_typed_for_those_before(
    tune: Callable[..., int], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert tune(out, "data.num_images=48") == 0
    line = (
        f"inherited from {runs / 'head'}: data.source=synthetic, augment.rotation=0.1, "
        "encoder.depth=3, encoder.embed_dim=16, encoder.num_heads=2, encoder.norm_eps=1e-12, "
        "head.output_dim=8, "
        "head.predictor_hidden=16, head.projector_hidden=16, head.queue_size=50"
    )
    told = [each for each in capsys.readouterr().err.splitlines() if each.startswith("inherited")]
    assert [sorted(each.replace(": ", ", ").split(", ")) for each in told] == [
        sorted(line.replace(": ", ", ").split(", "))
    ]
    state = load_checkpoint(last_checkpoint(out))
    config = load_config(state["config"])
    assert (config.encoder.depth, config.data.source, config.head.queue_size) == (
        3,
        "synthetic",
        50,
    )
    assert config.augment.rotation == 0.1
    assert config.data.num_images == 48
    # Nobody typed those.
    assert config.head.topk == load_config(load_recipe("digits", "tune")).head.topk
    record = RunRecord.read(state["record"])
    assert record.recipe == "digits"
    assert "data.num_images" not in record.inherited
    assert (out / "config.yaml").read_text().splitlines()[0] == f"# {told[0]}"
    # The same command goes on, with and without the recipe's name.
    assert tune(out, "data.num_images=48") == 0
    assert tune(out, "--recipe", "digits") == 0


def test_a_recipe_of_the_stage_before_is_not_handed_on() -> None:
    """As stage 1 of the paper has other crops than stages 2 and 3."""
    typed = ["data.root=/images", "augment.flip=0", "head.topk=3"]
    config = load_config(load_recipe("l16", "pretrain"), overrides=typed)
    record = RunRecord.of(None, None, {}, "l16", config, {})
    assert record.given == {"augment.flip": 0.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["encoder.norm_eps=1e-6"],
            "encoder.norm_eps is 1e-12 there, this configuration has 1e-06",
        ),
        (["encoder.depth=4"], "encoder.blocks.3.norm1.weight is not in"),
        (["--recipe", "b16"], "encoder.cls_token|encoder.pos_embed has shape"),
        (["head.queue_size=60"], "head.loss.queue.queue has shape"),
    ],
)
def test_a_contradiction_is_one_line(
    tune: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    assert tune(tmp_path / "run", *words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert any(part in line for part in message.split("|")), line
    assert not last_checkpoint(tmp_path / "run").exists()


def test_a_recipe_is_needed_where_none_is_known(
    runs: Path, tmp_path: Path, recipes: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*words: str) -> str:
        assert main(["prepare-head", "--out", str(tmp_path / "run"), *words]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    file = tmp_path / "encoder.pth"
    torch.save({}, file)
    assert "no run to continue there; start one with --recipe NAME" in error()
    assert f"{file}: a file says no recipe; give --recipe NAME" in error("--init", str(file))
    assert "no such checkpoint" in error("--init", str(tmp_path))
    mae = tmp_path / "mae"
    command = ["pretrain", "--recipe", str(recipes["pretrain"]), "--out", str(mae), "epochs=1"]
    assert main(command) == 0
    line = error("--init", str(mae))
    assert "pretrain.yaml, the recipe of another stage than prepare-head; give --recipe" in line


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = (load_checkpoint(last_checkpoint(run)) for run in (a, b))
    assert first["update"] == second["update"]
    for part in ("model", "encoder_ema"):
        assert first[part].keys() == second[part].keys()
        for key, value in first[part].items():
            assert torch.equal(value, second[part][key]), key
    moments = (state["optimizer"]["state"] for state in (first, second))
    for one, other in zip(*(list(each.values()) for each in moments), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_goes_on_for_more_epochs(
    tune: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out in (whole, parts):
        assert tune(out, "epochs=2") == 0
    assert tune(whole, "epochs=4") == 2
    assert "with --change epochs=4" in capsys.readouterr().err

    longer = ["tune", "--change", "epochs=4", "--out"]
    assert main([*longer, str(whole)]) == 0
    assert (
        "epochs 2 -> 4, updates 8 -> 16: rates are now those of 4 epochs from the start (warm-up, "
        "then cosine), at 0.677 of their peak, and stood at 0.050" in capsys.readouterr().err
    )
    kept = load_checkpoint(last_checkpoint(whole).with_name("update-0000008.pt"))
    assert kept["update"] == 8
    lines = read_metrics(whole)
    assert [line["update"] for line in lines] == list(range(1, 17))
    for line in lines:
        update = int(line["update"])
        total = 8 if update <= 8 else 16
        factor = warmup_cosine(update - 1, total=total, warmup=int(0.2 * total))
        peak = lines[0]["lr"] / warmup_cosine(0, total=8, warmup=1)
        assert line["lr"] == pytest.approx(peak * factor)
    assert "# from update 8 on: epochs was 2, is 4" in (whole / "config.yaml").read_text()

    # Stopped on the way, it goes on to the same bits.
    with monkeypatch.context() as patch:
        call = Update.__call__

        def stop_at_11(update: Update, batch: Batch) -> dict[str, Tensor]:
            if update.state.update == 10:
                os.kill(os.getpid(), signal.SIGTERM)
            return call(update, batch)

        patch.setattr(Update, "__call__", stop_at_11)
        assert main([*longer, str(parts)]) == 128 + signal.SIGTERM
    assert main(["tune", "--out", str(parts)]) == 0
    assert_same_weights(whole, parts)

    assert main(["tune", "--change", "epochs=3", "--out", str(parts)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"maect-fast tune: epochs: the run in {parts} has done 4 (16 updates), now 3 were asked "
        "for; expected at least 4"
    )
