"""Every mistake on the command line is one line that names what to mend, and leaves nothing."""

from pathlib import Path

import pytest
import torch

from maect_fast.cli import main
from maect_fast.evaluation import runs
from maect_fast.training import engine

# Settings of a pretrain run on digits: what is given, and what the line has to say.
SETTINGS = """
encoder.name=resnet50 | encoder.name
encoder.name=vit_nope | encoder.name
encoder.name= | encoder.name
encoder.img_size=0 | encoder.img_size
encoder.img_size=-8 | encoder.img_size
encoder.img_size=9 | encoder.img_size
encoder.img_size=99999 | encoder.img_size
encoder.img_size=8.5 | encoder.img_size
encoder.img_size=eight | encoder.img_size
encoder.img_size= | encoder.img_size
encoder.in_chans=0 | encoder.in_chans
encoder.in_chans=2 | encoder.in_chans
encoder.in_chans=4 | encoder.in_chans
encoder.patch_size=0 | encoder.patch_size
encoder.patch_size=-1 | encoder.patch_size
encoder.patch_size=3 | encoder.img_size: expected a multiple of the patch size 3
encoder.patch_size=16 | encoder.img_size
encoder.embed_dim=-64 | encoder.embed_dim
encoder.embed_dim=0 | encoder.embed_dim
encoder.embed_dim=63 | encoder.embed_dim
encoder.embed_dim=66 | embed_dim
encoder.embed_dim=1e9 | encoder.embed_dim
encoder.embed_dim=1000000000 | encoder.embed_dim
encoder.depth=-1 | encoder.depth
encoder.depth=0 | encoder.depth
encoder.depth=3000 | encoder.depth
encoder.depth=true | encoder.depth
encoder.num_heads=0 | encoder.num_heads
encoder.num_heads=-2 | encoder.num_heads
encoder.num_heads=5 | num_heads
encoder.stream=fp16 | encoder.stream
encoder.width=3 | encoder
encoder=3 | encoder
encoder={depth: -1} | encoder.depth
encoder={depht: 1} | encoder
encoder={depth | encoder
decoder.embed_dim=0 | decoder.embed_dim
decoder.embed_dim=-4 | decoder.embed_dim
decoder.embed_dim=6 | embed_dim
decoder.depth=0 | decoder.depth
decoder.depth=-3 | decoder.depth
decoder.num_heads=0 | decoder.num_heads
decoder.num_heads=7 | num_heads 7
decoder.normalize_pixels=maybe | decoder.normalize_pixels
data.source=web | data.source
data.num_images=0 | data.num_images
data.num_images=-1 | data.num_images
data.workers=-1 | data.workers
data.workers=many | data.workers
data.workers=100000 | data.workers
data.max_broken=-1 | data.max_broken
data.max_broken=nan | data.max_broken
data.source=folder | data.root
augment.scale=[0,1] | augment.scale
augment.scale=[0.5] | augment.scale
augment.scale=[0.9,0.1] | augment.scale
augment.scale=[0.1,2] | augment.scale
augment.scale=[nan,1] | augment.scale
augment.scale=0.5 | augment.scale
augment.ratio=[0,1] | augment.ratio
augment.ratio=[2,1] | augment.ratio
augment.ratio=[-1,1] | augment.ratio
augment.ratio=[1,inf] | augment.ratio
augment.flip=2 | augment.flip
augment.flip=-0.1 | augment.flip
augment.flip=nan | augment.flip
augment.rotation=-1 | augment.rotation
augment.rotation=90 | augment.rotation
augment.contrast=-0.5 | augment.contrast
augment.contrast=2 | augment.contrast
augment.noise=-1 | augment.noise
augment.noise=inf | augment.noise
augment.views=[{blur: 1}] | augment.views
augment.views=[{blur: 2}, {}] | blur
augment.views=[{sharpen: 1}] | sharpen
augment.views=3 | augment.views
augment.views[0].blur=1 | augment.views
augment.mean=[0.5,0.5] | augment.mean
augment.mean=[nan] | augment.mean
augment.mean=[] | augment.mean
augment.std=[0] | augment.std
augment.std=[-1] | augment.std
augment.std=[inf] | augment.std
augment.std=[1,1,1] | augment.std
optim.encoder_lr=-1 | optim.encoder_lr
optim.encoder_lr=nan | optim.encoder_lr
optim.encoder_lr=fast | optim.encoder_lr
optim.other_lr=-1e-3 | optim.other_lr
optim.other_lr=inf | optim.other_lr
optim.encoder_weight_decay=-0.1 | optim.encoder_weight_decay
optim.other_weight_decay=nan | optim.other_weight_decay
optim.layer_decay=0 | optim.layer_decay
optim.layer_decay=1.5 | optim.layer_decay
optim.betas=[1.5,0.9] | optim.betas
optim.betas=[0.9,1] | optim.betas
optim.betas=[0.9] | optim.betas
optim.betas=[0.9,nan] | optim.betas
optim.betas=0.9 | optim.betas
optim.eps=-1 | optim.eps
optim.eps=nan | optim.eps
optim.warmup=1 | optim.warmup
optim.warmup=-0.5 | optim.warmup
optim.momentum=0.9 | optim
optimiser.lr=1 | optimiser
head.pooling=max | head.pooling
head.projector_hidden=0 | head.projector_hidden
head.predictor_hidden=-3 | head.predictor_hidden
head.output_dim=0 | head.output_dim
head.queue_size=0 | head.queue_size
head.queue_size=3 | head.queue_size
head.queue_size=1e6 | head.queue_size
head.topk=0 | head.topk
head.topk=2.5 | head.topk
head.topk=-1 | head.topk
head.temperature=0 | head.temperature
head.temperature=-1 | head.temperature
head.temperature=inf | head.temperature
head.temperature=nan | head.temperature
head.temperature=1e-30 | head.temperature
head.transposed=maybe | head.transposed
head.target_ema=1 | head.target_ema
head.target_ema=-0.1 | head.target_ema
stage=finetune | stage
stage=tune | stage
seed=-1 | seed
seed=1.5 | seed
seed=99999999999999999999999 | seed
epochs=0 | epochs
epochs=-1 | epochs
epochs=1.5 | epochs
epochs=many | epochs
epochs=[1 | epochs
epochs=??? | epochs
epochs= | epochs
epochs | epochs
=3 | override
.epochs=3 | override
epochs.x=3 | epochs
batch_size=0 | batch_size
batch_size=1 | batch_size
batch_size=-4 | batch_size
batch_size=1e3 | batch_size
batch_size=5000 | batch_size
chunk_size=-1 | chunk_size
chunk_size=x | chunk_size
num_views=0 | num_views
num_views=1000 | num_views
mask_ratio=1 | mask_ratio
mask_ratio=-0.1 | mask_ratio
mask_ratio=nan | mask_ratio
mask_ratio=0.999 | mask_ratio
frozen_blocks=-1 | frozen_blocks
reconstruction_weight=nan | reconstruction_weight
reconstruction_weight=-1 | reconstruction_weight
encoder_ema=1 | encoder_ema
encoder_ema=2 | encoder_ema
encoder_ema=nan | encoder_ema
precision=fp8 | precision
device=tpu | device
device=cuda | device
threads=0 | threads
threads=1000000 | threads
log_every=0 | log_every
checkpoint_every=0 | checkpoint_every
save_minutes=-1 | save_minutes
save_minutes=nan | save_minutes
profile=5 | profile
profile=9:3 | profile
profile=null | profile
profiler=perf | profiler
"""


def rows(table: str) -> list[tuple[str, str]]:
    """What is given, and what the line has to say."""
    given = [line.rpartition(" | ") for line in table.strip().splitlines()]
    return [(words, told) for words, _, told in given]


def told(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The line that a command answers a mistake with."""
    capsys.readouterr()
    code: object
    try:
        code = main(words)
    except SystemExit as exit_:  # argparse's own way
        code = exit_.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def never(*_: object, **__: object) -> bool:
    """In place of what takes minutes."""
    raise AssertionError("the work began")


@pytest.mark.parametrize(("setting", "key"), rows(SETTINGS))
def test_a_setting(
    setting: str,
    key: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A mistake that is not found would take minutes.
    monkeypatch.setattr(engine, "_loop", never)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "run"
    line = told(
        capsys, ["pretrain", "--recipe", "digits", "--out", str(out), "device=cpu", setting]
    )
    assert key in line.partition(": ")[2], line
    assert len(line) < 400
    assert not out.exists()


# Whole command lines; {out} does not exist yet, {run} is a finished pretrain run, {file} a text.
COMMANDS = """
train --out {out} | train
pretrain | --out
pretrain --out {out} | --recipe
pretrain --out {out} --recipe l17 | l17
pretrain --out {out} --recipe {out}/no.yaml | no.yaml
pretrain --out {out} --recipe {bad}/list.yaml | list.yaml
pretrain --out {out} --recipe {bad}/broken.yaml | broken.yaml
pretrain --out {out} --recipe {bad}/latin.yaml | latin.yaml
pretrain --out {out} --recipe {bad}/twice.yaml | twice.yaml
pretrain --out {out} --recipe {bad}/tag.yaml | tag.yaml
pretrain --out {out} --recipe {bad}/unknown.yaml | optimiser
pretrain --out {out} --recipe {bad}/interpolation.yaml | nowhere
pretrain --out {out} --recipe digits --depth 3 | --depth
pretrain --out {out} --recipe digits word | word
pretrain --out {out} --recipe digits --from-scratch | --from-scratch
pretrain --out {out} --recipe digits --decoder {run} | --decoder
pretrain --out {out} --recipe digits --init {out}/none | none
pretrain --out {out} --recipe digits --init {file} | file.txt
pretrain --out {out} --recipe digits data.source=folder | data.root
pretrain --out {out} --recipe digits data.source=folder data.root={out} | data.root
pretrain --out {out} --recipe digits data.source=folder data.root={file} | data.root
pretrain --out {out} --recipe digits data.source=folder data.root={bad} | data.root
pretrain --out {file} --recipe digits | file.txt
pretrain --out {file}/run --recipe digits | file.txt
prepare-head --out {out} --recipe digits | --init
prepare-head --out {out} --recipe digits --init {run} --from-scratch | --from-scratch
prepare-head --out {out} --recipe digits --init {bad} | bad
prepare-head --out {out} --recipe digits --init {run} encoder.depth=1 | encoder
prepare-head --out {out} --recipe digits --init {run} stage=tune | stage
tune --out {out} --recipe digits | --init
tune --out {out} --recipe digits --init {run} | prepare-head
tune --out {out} --recipe digits --init {file} | file.txt
tune --out {out} --recipe digits --from-scratch --decoder {run} | --decoder
tune --out {out} --recipe digits --from-scratch frozen_blocks=99 | frozen_blocks
tune --out {out} --recipe digits --from-scratch reconstruction_weight=1 | --decoder
tune --out {run} | stage
plan | --recipe
plan --recipe l17 | l17
plan --recipe l16 --stage x | --stage
plan --recipe l16 --gpus 0 | --gpus
plan --recipe l16 --gpus 7 | --gpus
plan --recipe l16 --gpus x | --gpus
plan --recipe l16 batch_size=0 | batch_size
evaluate | RUN
evaluate {out} | checkpoint
evaluate {bad} | checkpoint
evaluate {run} {out} | checkpoint
evaluate {run} vit_tiny_patch16_224 | timm:NAME
evaluate {run} {file} | file.txt
evaluate {run} timm:vit_nope | timm:vit_nope
evaluate {run} timm:resnet50 | timm:resnet50
evaluate {run} timm:vit_tiny_patch16_224.none | pretrained weights
evaluate timm:vit_tiny_patch16_224 | --out
evaluate timm:vit_tiny_patch16_224 timm:vit_tiny_patch16_224 --out {out} | RUN
evaluate timm:vit_tiny_patch16_224 --out {out} | data.root
evaluate timm:vit_tiny_patch16_224 --out {out} encoder.depth=2 | encoder.depth
evaluate timm:vit_tiny_patch16_224 --out {out} encoder.img_size=100 | encoder.img_size
evaluate {run} {run} | RUN
evaluate x=1 | RUN
evaluate {run} --methods svm | --methods
evaluate {run} --methods knn epochs=0 | epochs
evaluate {run} --clusters 1 | --clusters
evaluate {run} --clusters many | --clusters
evaluate {run} --weights best | --weights
evaluate {run} --seed x | --seed
evaluate {run} --seed -1 | --seed
evaluate {run} --out {file} | file.txt
evaluate {run} data.test_root=/nowhere data.source=folder | data.
extract {run} | --out
extract {out} --out {out}.safetensors | checkpoint
extract {file} --out {out}/x.csv | file.txt
extract timm:vit_nope --out {out}/x.csv | timm:vit_nope
extract {run} --out {out}/x.safetensors --split all | --split
extract {run} --out {file}/x.safetensors | file.txt
extract {run} --out {bad} | bad
extract {run} --out {out}/x | --out
extract {run} --out {out}/x.h5 | --out
extract {run} --out {out}/x.npy --weights best | --weights
cluster {run} | --out
cluster {run} --out {file} | file.txt
cluster {run} --out {out} --k 1 | --k
cluster {run} --out {out} --k many | --k
cluster {run} --out {out} --format xlsx | --format
cluster {out} --out {out} | checkpoint
cluster timm:vit_nope --out {out} | timm:vit_nope
doctor x | x
doctor epochs=3 | epochs=3
demo --seeds | --seeds
demo --data {out} | --data
demo --k 3 | --k
demo --seeds one | --seeds
demo --out {out} --seeds -1 | seed
demo --out {file} | file.txt
demo epochs=3 | epochs=3
bench nothing | nothing
--version=3 | --version
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run, a folder of bad files, and a file where a folder is expected."""
    folder = tmp_path_factory.mktemp("places")
    run, bad, file = folder / "run", folder / "bad", folder / "file.txt"
    file.write_text("a text")
    bad.mkdir()
    for name, text in {
        "list": "- 1",
        "broken": "a: [1",
        "twice": "epochs: 1\nepochs: 2",
        "tag": "epochs: !!python/object/apply:os.getcwd []",
        "unknown": "optimiser: {lr: 1}",
        "interpolation": "epochs: ${nowhere}",
    }.items():
        (bad / f"{name}.yaml").write_text(text)
    (bad / "latin.yaml").write_bytes("data: {root: Gr\xfc\xdfe}".encode("latin-1"))
    command = ["pretrain", "--recipe", "digits", "--out", str(run), "epochs=1", "device=cpu"]
    assert main([*command, "batch_size=700", "encoder.depth=2"]) == 0
    return {"run": run, "bad": bad, "file": file}


@pytest.mark.parametrize(("words", "key"), rows(COMMANDS))
def test_a_command(
    words: str,
    key: str,
    tmp_path: Path,
    places: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "_loop", never)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runs, "extract_features", never)
    out = tmp_path / "out"
    before = contents(places["run"].parent)
    command = [word.format(out=out, **places) for word in words.split(" ")]
    line = told(capsys, command)
    assert key in line.partition(": ")[2], line
    assert len(line) < 400
    assert not list(tmp_path.iterdir())
    assert contents(places["run"].parent) == before


def contents(folder: Path) -> dict[str, int]:
    """Every file below, with its time."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
