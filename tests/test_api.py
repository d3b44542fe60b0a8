"""The program from Python."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

import maect_fast
from maect_fast.checkpoint import CheckpointError, load_checkpoint
from maect_fast.cli import main
from maect_fast.config import ConfigError
from maect_fast.data import Batch, DataError
from maect_fast.evaluation.runs import load_run, run_encoder, split_features
from maect_fast.training.stages import last_checkpoint
from maect_fast.training.update import Update

ENCODER = {"embed_dim": 16, "depth": 2, "num_heads": 2}
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 16, "threads": 1}
HEAD = {"queue_size": 40, "projector_hidden": 16, "predictor_hidden": 16, "output_dim": 8}


def dataset(num: int = 48) -> TensorDataset:
    pixels = np.random.default_rng(0).integers(0, 256, (num, 1, 8, 8), dtype=np.uint8)
    return TensorDataset(torch.from_numpy(pixels), torch.arange(num) % 3)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> maect_fast.Run:
    """Stages 1 and 2 on a Dataset."""
    folder = tmp_path_factory.mktemp("runs")
    mae = maect_fast.pretrain(
        {"root": dataset(), "workers": 0},
        out=folder / "mae",
        recipe="digits",
        encoder=ENCODER,
        decoder={"depth": 1},
        **SHORT,
    )
    return maect_fast.prepare_head(dataset(), init=mae, out=folder / "head", head=HEAD, **SHORT)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of grey images of several sizes."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(1)
    for i in range(6):
        pixels = rng.integers(0, 256, (8 + i, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def weights(run: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_checkpoint(last_checkpoint(run))["model"]
    return state


def test_an_interrupt_saves_and_the_same_call_goes_on_to_the_same_bits(
    head: maect_fast.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tune(out: str) -> maect_fast.Run:
        return maect_fast.tune(
            dataset(),
            init=head,
            out=tmp_path / out,
            optim={"encoder_lr": 1e-3},
            frozen_blocks=1,
            log_every=1,
            **{**SHORT, "epochs": 2},
        )

    torch.manual_seed(7)
    state = torch.get_rng_state()
    whole = tune("whole")
    # The caller's own.
    assert torch.equal(torch.get_rng_state(), state)
    assert [line["update"] for line in whole.metrics] == [1, 2, 3, 4, 5, 6]
    assert "nn_accuracy" in whole.metrics[0]
    with monkeypatch.context() as patch:
        call = Update.__call__

        def interrupt(update: Update, batch: Batch) -> dict[str, Tensor]:
            os.kill(os.getpid(), signal.SIGINT)
            return call(update, batch)

        patch.setattr(Update, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune("parts")
    assert "stopped by SIGINT and saved; the same call continues" in capsys.readouterr().out
    assert load_checkpoint(last_checkpoint(tmp_path / "parts"))["update"] == 1
    parts = tune("parts")
    for name, value in weights(whole.directory).items():
        assert torch.equal(value, weights(parts.directory)[name]), name
    # With other images it is another run.
    with pytest.raises(ConfigError, match=r"data\.root: these 63 images are not the 48"):
        maect_fast.tune(dataset(63), out=whole.directory)


def test_settings_have_the_names_and_errors_of_the_command_line(
    head: maect_fast.Run, tmp_path: Path
) -> None:
    config = load_run(head.directory)[0]
    assert (config.encoder.depth, config.head.queue_size, config.data.source) == (2, 40, "dataset")
    assert config.data.workers == 0
    out = tmp_path / "run"
    for settings, message in (
        ({"optim": {"lr": 1}}, r"optim\.lr: Key 'lr' not in"),
        ({"epochs": "many"}, "epochs: "),
        ({"epochs": torch.zeros(1)}, "epochs: expected a number, .* got a Tensor"),
        ({"accumulate": 4}, "accumulate: unknown key: use chunk_size"),
        ({"batch_size": 1000}, "batch_size: expected at most the 48 images"),
    ):
        with pytest.raises(ConfigError, match=message):
            maect_fast.tune(dataset(), init=head, out=out, **settings)
    with pytest.raises(ConfigError, match="--init: tune starts from the stage before"):
        maect_fast.tune(dataset(), out=out, recipe="digits")
    with pytest.raises(
        ConfigError, match=r"data\.source: the images of a Dataset come from Python"
    ):
        maect_fast.tune(init=head, out=out, **SHORT)
    with pytest.raises(CheckpointError, match="no run directory with a checkpoint"):
        maect_fast.load(tmp_path / "nothing")


def test_several_processes_are_the_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"torchrun \.\.\. -m maect_fast\.cli tune"):
        maect_fast.tune(out="run")


def test_files_have_the_features_of_extract(
    head: maect_fast.Run, files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features.npy"
    command = ["extract", str(head.directory), "--out", str(out)]
    assert main([*command, "data.source=folder", f"data.root={files}"]) == 0
    expected = torch.from_numpy(np.load(out))
    paths = sorted(files.iterdir())
    model = head.load()
    assert torch.equal(model.encode(paths), expected)
    assert torch.equal(model.encode([str(path) for path in paths]), expected)
    images = [Image.open(path) for path in paths]
    assert torch.equal(model.encode(images), expected)
    arrays: list[NDArray[np.uint8]] = [np.asarray(image) for image in images]
    assert torch.equal(model.encode(arrays), expected)
    assert torch.equal(model.encode([arrays[0], images[1], *paths[2:]]), expected)
    # A single one is a batch of one, whose products may be rounded otherwise.
    assert torch.allclose(model.encode(paths[0]), expected[:1], atol=1e-5)
    assert torch.equal(model.encode(arrays[0][None, :, :, None]), model.encode(images[0]))


def test_tensors_are_taken_as_they_are(head: maect_fast.Run) -> None:
    config, state = load_run(head.directory, ["data.source=digits"])
    images = split_features(config, "test", run_encoder(config, state))
    pixels = images.source.images  # type: ignore[attr-defined]
    model = maect_fast.load(str(head.directory), device="cpu")
    found = model.encode(pixels)
    assert torch.equal(found, images.features.x)
    assert found.shape == (360, 16)
    assert torch.equal(model.encode(list(pixels.float() / 255)), found)
    patches = model(pixels[:3].float())[:, 1:].mean(1)
    assert patches.requires_grad
    cls = model.encode(pixels[:3], pool="class_token")
    assert not torch.allclose(cls, model.encode(pixels[:3], pool="mean_patch"))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "at least one, got none"),
        (torch.zeros(3, 8, 8), ValueError, r"expected tensors of \[1, 8, 8\]"),
        (torch.full((1, 8, 8), 2.0), ValueError, r"floats in \[0, 1\], not normalised, .* 2 to 2"),
        (torch.zeros(1, 8, 8, dtype=torch.int64), ValueError, "uint8 or floats, got torch.int64"),
        (np.zeros((8, 8)), ValueError, r"arrays of uint8 in \[0, 255\], got float64"),
        ([np.zeros((8, 8), np.uint8), torch.zeros(1, 8, 8)], TypeError, "expected tensors, which"),
        (3, TypeError, "expected paths, Pillow images, arrays or tensors, got a int"),
        ("no.png", DataError, r"no\.png"),
    ],
)
def test_what_is_no_image_is_told(
    head: maect_fast.Run, images: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        head.load().encode(images)
    with pytest.raises(
        ValueError, match="pool: expected class_token, mean_patch or None, got 'max'"
    ):
        head.load().encode(images, pool="max")  # type: ignore[arg-type]


SCRIPT = """
import sys
from pathlib import Path

import maect_fast
import torch
from torch.utils.data import TensorDataset

with open("started", "a") as file:
    file.write("x")

class Named(TensorDataset):
    def __init__(self):
        self.last = lambda item: item
        super().__init__(torch.arange(64 * 64).view(64, 1, 8, 8).to(torch.uint8))

    def __getitem__(self, index):
        return self.last(super().__getitem__(index)[0])

run = maect_fast.pretrain(
    {"root": Named(), "workers": 2}, out="mae", recipe="digits", epochs=1, batch_size=16, threads=1
)
print(run.load().encode(Named()[0]).shape)
"""


@pytest.mark.slow
def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    """Its workers neither run it again nor miss the Dataset that it defines."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([1, 64])\n"
    assert (tmp_path / "started").read_text() == "x"


CELL = """
import torch
from torch.utils.data import TensorDataset

import maect_fast

class Cells(TensorDataset):
    def __getitem__(self, index):
        return transform(super().__getitem__(index)[0])

transform = lambda item: item
pixels = torch.arange(64 * 64).view(64, 1, 8, 8).to(torch.uint8)
run = maect_fast.pretrain(
    {"root": Cells(pixels), "workers": 1}, out="mae", recipe="digits", epochs=10_000, batch_size=32,
    threads=1, save_minutes=60, encoder={"embed_dim": 16, "depth": 1, "num_heads": 2},
)
"""


@pytest.mark.slow
def test_a_notebook_is_interrupted_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a Dataset that a cell defines, in worker processes."""
    manager = pytest.importorskip("jupyter_client.manager")
    # Kernels of a virtual environment that is not activated, too.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    kernel, client = manager.start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    try:

        def reply(request: str) -> dict[str, Any]:
            while True:
                message = client.get_shell_msg(timeout=300)
                if message["parent_header"]["msg_id"] == request:
                    return dict(message["content"])

        cell = client.execute(CELL)
        metrics = tmp_path / "mae" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        kernel.interrupt_kernel()
        stopped = reply(cell)
        assert stopped["ename"] == "KeyboardInterrupt", stopped
        done = load_checkpoint(last_checkpoint(tmp_path / "mae"))["update"]
        assert done >= 1
        shorter = (
            f"run = maect_fast.pretrain(Cells(pixels), out='mae', change={{'epochs': {done}}})"
        )
        finished = reply(
            client.execute(f"{shorter}\nassert run.load().encode(pixels).shape == (64, 16)")
        )
        assert finished["status"] == "ok", finished
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert load_checkpoint(last_checkpoint(tmp_path / "mae"))["update"] == 2 * done


@pytest.mark.slow
def test_the_notebook_of_the_documentation(tmp_path: Path) -> None:
    client = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    path = Path(__file__).parents[1] / "docs" / "notebooks" / "from_folder_to_clusters.ipynb"
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    purity = float(text.rpartition("purity: ")[2].split()[0])
    # Of five digits; it is 0.59 where the notebook was made.
    assert purity > 0.4
