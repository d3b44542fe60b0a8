import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pyarrow import csv, parquet
from safetensors.torch import load_file

from maect_fast.cli import main
from maect_fast.evaluation import load_features

SMALL = [
    "encoder.name=vit_tiny_patch16_224",
    "encoder.img_size=32",
    "encoder.embed_dim=24",
    "encoder.depth=2",
    "encoder.num_heads=2",
    "encoder.patch_size=8",
    "decoder={embed_dim: 16, depth: 1, num_heads: 2}",
    "head.projector_hidden=16",
    "head.predictor_hidden=16",
    "head.output_dim=8",
    "batch_size=8",
    "epochs=2",
    "data.workers=0",
    "device=cpu",
    "threads=1",
]
HEAD = ["head.queue_size=20", "head.topk=2"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twenty-four unlabelled JPEG files of different sizes."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 256, (40 + i, 60 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake gives."""
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_run_may_be_told_not_to_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []

    def noted(*_: object, capture: bool, **__: object) -> int:
        found.append(capture)
        return 0

    monkeypatch.setattr("maect_fast.training.start.run_stage", noted)
    command = ["pretrain", "--recipe", "digits", "--out", str(tmp_path)]
    assert main(command) == main([*command, "--no-capture"]) == 0
    assert found == [True, False]


def test_unlabelled_folder_through_all_stages(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file of a run directory is there, and metrics that need labels are not."""
    root = f"data.root={images}"
    mae, head, tuned = tmp_path / "mae", tmp_path / "head", tmp_path / "tuned"
    assert main(["pretrain", "--recipe", "b16", "--out", str(mae), root, *SMALL]) == 0
    command = ["prepare-head", "--recipe", "b16-aug", "--out", str(head), "--init", str(mae)]
    assert main([*command, root, *SMALL, "head.queue_size=20"]) == 0
    command = ["tune", "--recipe", "b16-aug", "--out", str(tuned), "--init", str(head)]
    assert main([*command, root, *SMALL, *HEAD, "frozen_blocks=1"]) == 0
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/last.pt"):
        assert (tuned / name).is_file()
    assert list(tuned.glob("events.out.tfevents.*"))
    line = json.loads((tuned / "metrics.jsonl").read_text().splitlines()[-1])
    timed = {"images_per_second", "data_wait"}
    assert line.keys() == {"update", "epoch", "loss", "searched_again", "lr"} | timed
    assert line["update"] == 6
    capsys.readouterr()

    command = ["evaluate", str(mae), str(tuned), f"data.test_root={images}"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert "no labels: the images lie in no class folders" in printed
    report = json.loads((tuned / "report" / "report.json").read_text())
    needs_none = ["view_agreement", "silhouette", "cluster_smallest", "cluster_largest"]
    for row in report["tables"]["Metrics"].values():
        assert set(row) == {*needs_none, "alignment", "uniformity"}
    assert list(report["figures"]) == [
        "Training",
        "t-SNE of the test images",
        "Reconstructions",
        "Attention",
    ]
    assert report["about"]["command"] == " ".join(["maect-fast", *command])
    told = report["about"]["tuned (tune)"]
    assert f"{tuned}: stage tune, recipe b16-aug, seed 5, 2 epochs of batches of 8" in told
    # Of a run that short the average would be what it started from, but for the warm-up.
    assert "the encoder's EMA of decay 0.6971 after 6 of 6 updates: 3.1 half-lives" in told
    assert "the encoder as trained, after 6 of 6 updates" in report["about"]["mae (pretrain)"]

    word = ["--methods", "knn"]
    assert "knn need class folders; no labels: " in error_of(capsys, *command, *word)
    features = tmp_path / "x.safetensors"
    assert main(["extract", str(tuned), "--out", str(features)]) == 0
    ema = load_features(features).x
    assert ema.shape == (24, 24)
    assert main(["extract", str(tuned), "--out", str(features), "--weights", "model"]) == 0
    assert "the encoder as trained, not its EMA, after 6 of 6" in capsys.readouterr().out
    assert not torch.equal(load_features(features).x, ema)


def test_a_run_finds_its_images_from_another_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images.parent)
    root = ("data.root=images", "data.test_root=images")
    command = ["pretrain", "--recipe", "b16", "--out", "mae", *root, *SMALL, "epochs=1"]
    assert main(command) == 0
    monkeypatch.chdir("/")
    assert main(["evaluate", str(tmp_path / "mae")]) == 0


def rows_of(path: Path) -> list[dict[str, object]]:
    table = parquet.read_table(path) if path.suffix == ".parquet" else csv.read_csv(path)
    found: list[dict[str, object]] = table.to_pylist()
    return found


def test_features_have_a_row_per_file_that_was_asked_for(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In each format; labels and why a file is missing are there."""
    folder = tmp_path / "classes"
    for i, name in enumerate(["a,b", "cat", 'q"t']):
        (folder / name).mkdir(parents=True)
        for k in range(3):
            (folder / name / f"{k}.jpg").write_bytes((images / f"{3 * i + k}.jpg").read_bytes())
    (folder / "cat" / "1.jpg").write_text("nothing")
    out = str(tmp_path / "mae")
    command = ["pretrain", "--recipe", "b16", "--out", out, f"data.root={images}", *SMALL]
    assert main([*command, "epochs=1"]) == 0

    def extract(name: str) -> Path:
        path = tmp_path / name
        capsys.readouterr()
        assert main(["extract", out, "--out", str(path), f"data.root={folder}"]) == 0
        assert "8 x 24 (mean_patch), 1 images missing" in capsys.readouterr().out
        return path

    x = np.load(extract("x.npy"))
    assert x.shape == (8, 24)
    tensors = load_file(extract("x.safetensors"))
    assert np.array_equal(tensors["x"].numpy(), x)
    assert tensors["id"].tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert tensors["label"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    beside = [rows_of(tmp_path / f"x.{suffix}.files.csv") for suffix in ("npy", "safetensors")]
    assert beside[0] == beside[1]
    tables = [rows_of(extract(name)) for name in ("x.csv", "x.parquet")]
    for rows in (*tables, beside[0]):
        assert [row["path"] for row in rows] == sorted(str(p) for p in folder.glob("*/*"))
        assert [row["id"] for row in rows] == list(range(9))
        assert [row["label"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert [row["class"] for row in rows][::3] == ["a,b", "cat", 'q"t']
        missing = {i: row["missing"] for i, row in enumerate(rows) if row["missing"]}
        assert missing == {4: "it begins like none"}
    assert [row["row"] for row in beside[0]] == [0, 1, 2, 3, None, 4, 5, 6, 7]
    written = [[row[f"feature_{i}"] for i in range(24)] for row in tables[0]]
    lists = [row["feature"] for row in tables[1]]
    assert written[4] == [None] * 24
    assert lists[4] is None
    for found in (written, lists):
        kept = np.array([row for i, row in enumerate(found) if i != 4], dtype=np.float32)
        assert np.array_equal(kept, x)
    assert "--out: expected a file that ends in .safetensors, .npy, .csv, .parquet" in error_of(
        capsys, "extract", out, "--out", str(tmp_path / "x.h5")
    )


def test_the_same_warning_is_given_once(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However many passes over the images an evaluation makes."""
    out = str(tmp_path / "mae")
    command = ["pretrain", "--recipe", "b16", "--out", out, f"data.root={images}", *SMALL]
    assert main([*command, "epochs=1"]) == 0
    (images / "0.jpg").write_text("nothing")
    (images / "1.jpg").write_text("nothing")
    assert main(["evaluate", out, f"data.test_root={images}"]) == 0
    (line,) = caplog.messages
    assert line.startswith("skipped 2 (no image): ")


def test_runs_of_one_name_are_all_evaluated(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also runs of different sizes, which cannot share every picture."""
    first, second = tmp_path / "a" / "mae", tmp_path / "b" / "mae"
    root = f"data.root={images}"
    command = ["pretrain", "--recipe", "b16", root, *SMALL, "epochs=1"]
    assert main([*command, "--out", str(first)]) == 0
    assert main([*command, "--out", str(second), "encoder.img_size=16"]) == 0
    out = tmp_path / "report"
    test = f"data.test_root={images}"
    assert main(["evaluate", str(first), str(second), "--out", str(out), test]) == 0
    report = json.loads((out / "report.json").read_text())
    assert list(report["tables"]["Metrics"]) == [f"{first} (pretrain)", f"{second} (pretrain)"]
    assert "Reconstructions" not in report["figures"]
    capsys.readouterr()
    told = error_of(capsys, "evaluate", str(first), str(first), test)
    assert "expected different runs, files or models" in told


def test_baselines_beside_a_run(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file of the run's own encoder gives the run's figures; nothing is fetched of timm's."""
    run, file, weights = tmp_path / "vit", tmp_path / "a" / "vit", tmp_path / "timm.pth"
    roots = [f"data.root={images}", f"data.test_root={images}", "data.workers=0", "device=cpu"]
    command = ["pretrain", "--recipe", "b16", "--out", str(run), *roots, *SMALL, "epochs=1"]
    assert main(command) == 0
    file.parent.mkdir()
    file.write_bytes((run / "checkpoints" / "last.pt").read_bytes())
    torch.save(timm.create_model("test_vit", pretrained=False, num_classes=0).state_dict(), weights)
    local = functools.partial(timm.create_model, pretrained_cfg_overlay={"file": str(weights)})
    monkeypatch.setattr(timm, "create_model", local)

    encoders = (str(run), str(file), "timm:test_vit")
    # A run's own number of heads is 2 as well.
    assert main(["evaluate", *encoders, *roots, "encoder.num_heads=2"]) == 2
    assert "encoder.num_heads: timm:test_vit has its own" in capsys.readouterr().err
    same = ["encoder.num_heads=2", "head.pooling=class_token"]
    assert main(["evaluate", *encoders[:2], *roots, *same]) == 0
    report = json.loads((run / "report" / "report.json").read_text())
    rows = report["tables"]["Metrics"]
    assert list(rows) == [f"{run} (pretrain)", f"{file} (file)"]
    assert len({json.dumps(row) for row in rows.values()}) == 1

    assert main(["evaluate", encoders[0], encoders[2], *roots]) == 0
    assert "test_vit (timm): pretrained weights r160_in1k" in capsys.readouterr().out
    report = json.loads((run / "report" / "report.json").read_text())
    rows = report["tables"]["Metrics"]
    assert list(rows) == ["vit (pretrain)", "test_vit (timm)"]
    assert set(rows["test_vit (timm)"]) == set(rows["vit (pretrain)"])
    # The decoder is the run's, and the images timm's.
    assert list(report["figures"]) == ["Training", "t-SNE of the test images", "Attention"]
    told = report["about"]["test_vit (timm)"]
    assert told.startswith(f"timm:test_vit, of timm {timm.__version__}; pretrained weights r160")
    assert (
        "160 x 160 pixels, mean 0.5 0.5 0.5, deviation 0.5 0.5 0.5; class_token pooling; "
        f"24 training and 24 test images of {images}"
    ) in told

    told = error_of(capsys, "evaluate", "timm:test_vit", *roots)
    assert "--out: expected a folder, as there is no run" in told
    out = tmp_path / "report"
    assert main(["evaluate", "timm:test_vit", "--out", str(out), *roots]) == 0
    assert "Training" not in json.loads((out / "report.json").read_text())["figures"]

    features = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for word, path in zip(encoders, features, strict=True):
        more = [] if word == "timm:test_vit" else same
        assert main(["extract", word, "--out", str(path), *roots, *more]) == 0
    x = [load_features(path).x for path in features]
    assert torch.equal(x[0], x[1])
    assert x[2].shape == (24, 64)


def test_evaluating_too_few_labelled_images_is_one_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few"
    for i in range(4):
        folder = few / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes((images / f"{i}.jpg").read_bytes())
    out = str(tmp_path / "mae")
    command = ["pretrain", "--recipe", "b16", "--out", out, f"data.root={images}", *SMALL]
    assert main([*command, "epochs=1"]) == 0
    capsys.readouterr()
    both = (f"data.root={few}", f"data.test_root={few}")
    assert "k: expected 1 to 4" in error_of(capsys, "evaluate", out, *both)


def test_added_reconstruction_loss(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"data.root={images}", *SMALL]
    mae, head, tuned = tmp_path / "mae", tmp_path / "head", tmp_path / "tuned"
    assert main(["pretrain", "--recipe", "b16", "--out", str(mae), *settings]) == 0
    command = ["prepare-head", "--recipe", "b16", "--out", str(head), "--init", str(mae)]
    assert main([*command, *settings, "head.queue_size=20"]) == 0
    command = ["tune", "--recipe", "b16", "--out", str(tuned), "--init", str(head)]
    command += [*settings, *HEAD, "frozen_blocks=1", "reconstruction_weight=0.5"]
    capsys.readouterr()
    assert "give the pretrain run with --decoder RUN" in error_of(capsys, *command)
    assert main([*command, "--decoder", str(mae)]) == 0
    line = json.loads((tuned / "metrics.jsonl").read_text().splitlines()[-1])
    total = line["contrastive"] + 0.5 * line["reconstruction"]
    assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_mistakes_are_one_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    root = f"data.root={images}"
    pretrain = ("pretrain", "--recipe", "b16", "--out", out)
    tune = ("tune", "--recipe", "b16", "--out", out)
    assert "no run to continue there" in error_of(capsys, "tune", "--out", out)
    assert "no recipe 'x'" in error_of(capsys, "tune", "--recipe", "x", "--out", out)
    assert "--init: tune starts from" in error_of(capsys, *tune, root)
    assert "data.root" in error_of(capsys, *pretrain)
    assert "data.root" in error_of(capsys, *pretrain, f"data.root={tmp_path / 'nowhere'}")
    assert "batch_size: expected at most the 24 images" in error_of(capsys, *pretrain, root)
    assert "frozen_blocks" in error_of(
        capsys, *tune, root, *SMALL, *HEAD, "frozen_blocks=3", "--from-scratch"
    )
    assert "encoder.name: timm has no model" in error_of(
        capsys, *pretrain, root, *SMALL, "encoder.name=vit_enormous"
    )
    assert not (tmp_path / "run").exists()
    assert "no run directory with a checkpoint" in error_of(capsys, "evaluate", out)
    assert "no such checkpoint" in error_of(
        capsys, *tune, root, *SMALL, *HEAD, "frozen_blocks=1", "--init", str(images)
    )
    small = (root, *SMALL, *HEAD, "frozen_blocks=1")
    assert "no such run directory or file" in error_of(capsys, *tune, *small, "--init", "nowhere")
    weights = tmp_path / "weights.pth"
    weights.write_text("nothing")
    head = ("prepare-head", "--recipe", "b16", "--out", str(tmp_path / "head"))
    assert "weights.pth" in error_of(capsys, *head, root, *SMALL, *HEAD, "--init", str(weights))
    assert "tune starts from a prepare-head run" in error_of(
        capsys, *tune, *small, "--init", str(weights)
    )


def test_a_wrong_size_between_stages_is_named(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"data.root={images}", *SMALL, "epochs=1"]
    mae = tmp_path / "mae"
    assert main(["pretrain", "--recipe", "b16", "--out", str(mae), *settings]) == 0
    capsys.readouterr()
    command = ("prepare-head", "--recipe", "b16", "--init", str(mae), *settings, *HEAD)
    told = error_of(capsys, *command, "--out", str(tmp_path / "head"), "encoder.embed_dim=32")
    assert "encoder.cls_token has shape [1, 1, 24], this configuration expects [1, 1, 32]" in told


@pytest.mark.parametrize("arguments", [["doctor", "x=1"], ["demo", "epochs=2"], ["tune", "--wat"]])
def test_unknown_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_doctor_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tokens = ("gather_patches", "restore_tokens", "masked_patch_mse")
    for op in ("masked_attention", "queue_topk", "info_nce", *tokens):
        states = {line.split()[1]: line for line in lines if line.split()[:1] == [op]}
        assert states.keys() == {"triton", "cpp", "reference"}
        assert states["reference"].endswith("works")
    assert any(line.startswith("  torchvision") and "loads" in line for line in lines)


def test_help_needs_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "maect_fast.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "prepare-head" in done.stdout
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert modules.isdisjoint({"torch", "timm", "torchvision", "sklearn", "matplotlib"})


def test_outputs_and_images_are_looked_at_first(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, file = str(tmp_path / "mae"), tmp_path / "file"
    command = ["pretrain", "--recipe", "b16", "--out", out, f"data.root={images}", *SMALL]
    assert main([*command, "epochs=1"]) == 0
    file.write_text("")
    monkeypatch.setattr("maect_fast.evaluation.encoders.load_run", None)
    capsys.readouterr()
    test = f"data.test_root={images}"
    assert "data.test_root: expected a folder" in error_of(capsys, "evaluate", out)
    assert "data.test_root: there is no folder" in error_of(
        capsys, "evaluate", out, "data.test_root=nowhere"
    )
    assert f"--out: {file} is not a folder" in error_of(
        capsys, "evaluate", out, test, "--out", str(file / "report")
    )
    assert f"--out: {file} is a file" in error_of(capsys, "evaluate", out, test, "--out", str(file))
    extract = ("extract", out, "--out")
    assert f"--out: {tmp_path} is a folder" in error_of(capsys, *extract, str(tmp_path))
    assert f"--out: {file} is not a folder" in error_of(capsys, *extract, str(file / "x"))
    assert "data.test_root: expected" in error_of(capsys, *extract, "x", "--split", "test")
    assert not Path("x").exists()
    both = (*command[:-1], "--init", out, "--from-scratch")
    assert "--init, --from-scratch: expected one of them" in error_of(
        capsys, "tune", *both[1:], *HEAD
    )
