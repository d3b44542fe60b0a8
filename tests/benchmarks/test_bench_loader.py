import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maect_fast.benchmarks import loader as bench
from maect_fast.cli import main
from maect_fast.config import load_config
from maect_fast.data import build_source, write_pack

SMALL = ["encoder.img_size=16", "batch_size=4", "data.workers=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six PNGs that take long to decode, beside their pack."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "raw").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((900, 900), Image.Resampling.BICUBIC)
    for i in range(6):
        large.save(folder / "raw" / f"{i}.png", compress_level=1)
    config = load_config(overrides=[f"data.root={folder / 'raw'}", *SMALL])
    source = build_source(config.data, config.encoder, split="train")
    write_pack(source, folder / "x.pack", short_side=32)
    return folder


def test_stages_and_whole_of_a_folder_beside_its_pack(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, pack = str(images / "raw"), str(images / "x.pack")
    words = ["bench", "loader", "--recipe", "l16", pack, f"data.root={raw}", "--seconds", "0.2"]
    assert main([*words, *SMALL]) == 0
    told = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()]
    cells = {(row[0], row[1]): row[2:] for row in rows if len(row) == 5}
    stages = ("read", "decode", "augment", "collate", "hand-over")
    for name in (raw, pack):
        own = [cells[name, stage] for stage in stages]
        assert sum(float(share.rstrip("%")) for _, share, _ in own) == pytest.approx(100, abs=3)
        # In one process the whole is the sum of its stages; how fast the machine is may change.
        of_stages = sum(float(ms) for ms, _, _ in own)
        assert 0.3 < float(cells[name, "in this process"][0]) / of_stages < 3
    ratio = re.search(r"beside .*raw: .*x\.pack ([\d.]+) x", told)
    assert ratio is not None
    assert float(ratio[1]) > 2
    assert "6 images\n  decode: " in told
    assert "`maect-fast pack SOURCE --out FILE.pack` would leave at most" in told


def test_images_in_memory_have_no_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loader", "--recipe", "digits", "--seconds", "0.05"]) == 0
    told = capsys.readouterr().out
    assert "in this process" in told
    assert "| decode" not in told
    assert "the images are in memory" in told


@pytest.mark.parametrize(
    ("times", "workers", "message"),
    [
        (
            (6, 2, 1, 0, 1),
            2,
            "read: 67% of .* pack SOURCE --out FILE.pack` would leave at most 1.00 of 9.00 ms",
        ),
        (
            (1, 7, 2, 0, 1),
            2,
            "decode: 70% of .* pack SOURCE --out FILE.pack` would leave at most 2.00 of 10.0 ms",
        ),
        ((0, 1, 3, 0, 1), 2, r"augment: 75% of .*; data\.workers=8 would use all 8 cores"),
        (
            (0, 1, 3, 0, 1),
            8,
            "hand-over: the main process takes 1.00 ms .* 8 workers together 0.500 ms",
        ),
        ((0, 1, 3, 0, 0), 8, r"augment: 75% of .*; all 8 cores are used: .* augment\.\*"),
        ((1, 0, 0, 3, 1), 0, "collate: 75% of"),
    ],
)
def test_the_bottleneck_is_told_in_words(
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    times: tuple[float, ...],
    workers: int,
    message: str,
) -> None:
    monkeypatch.setattr(bench, "num_cores", lambda: 8)
    config = load_config(overrides=[f"data.root={images / 'raw'}", *SMALL])
    source = build_source(config.data, config.encoder, split="train")
    measured = bench.Measured("x", bench._loader(config, source), workers)
    read, decode, augment, collate, hand_over = (10 * ms / 1e3 for ms in times)
    measured.stages = bench.Stages(read, decode, augment, collate, hand_over, num_images=10)
    assert re.search(message, bench.bottleneck(measured))


def test_mistakes_are_one_line(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--recipe", "no"], "no recipe 'no' for tune"),
        (["--recipe", "l16"], "data.root: expected a folder of images, got none"),
        (["--recipe", "l16", str(images / "gone")], "data.root: there is no folder"),
        (["--recipe", "l16", "--seconds", "0", f"data.root={images}"], "--seconds: expected more"),
    ):
        assert main(["bench", "loader", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    with pytest.raises(SystemExit):
        main(["bench", "loader", "--recipe", "l16", "--nonsense"])
    assert "unrecognized: --nonsense" in capsys.readouterr().err


def test_the_whole_counts_images_per_second(images: Path) -> None:
    config = load_config(overrides=[f"data.root={images / 'raw'}", *SMALL])
    source = build_source(config.data, config.encoder, split="train")
    measured = bench.Measured("x", bench._loader(config, source), 0)
    (batch, *_) = measured.loader.batches(0)

    def batches() -> Iterator[object]:
        for _ in itertools.count():
            time.sleep(0.01)
            yield batch

    bench._time_whole(measured, batches(), 0.1)
    assert 0.1 <= measured.seconds < 1
    assert measured.rate <= 4 / 0.01
