"""The command line, `maect-fast`: the three stages, evaluation, benchmarks and diagnosis."""

import argparse
import io
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from signal import Signals
from typing import Any

from maect_fast import __version__
from maect_fast.config import ConfigError, Stage, load_config, load_recipe
from maect_fast.errors import Parser, explain
from maect_fast.names import printable
from maect_fast.settings import describe_settings

__all__ = ["main"]

EXAMPLES = """\
examples:
  maect-fast demo
  maect-fast pretrain --recipe l16 --out runs/mae data.root=/images/train
  maect-fast prepare-head --recipe l16 --init runs/mae --out runs/head data.root=/images/train
  maect-fast tune --recipe l16 --init runs/head --out runs/mae-ct data.root=/images/train
  maect-fast pack /images/train --out train.pack
  maect-fast plan --recipe h14 batch_size=512
  maect-fast evaluate runs/mae runs/mae-ct data.test_root=/images/val
  maect-fast cluster runs/mae-ct --out clusters data.root=/images/train
  torchrun --nproc-per-node 8 -m maect_fast.cli tune ...
key=value changes a setting of the recipe (epochs=10 optim.encoder_lr=5e-5 data.workers=8).
The same command on an existing run directory continues the run; --change KEY=VALUE continues it
with another setting, --restart starts it anew.
"""

# As shells have it, and schedulers that tell a stopped job from a finished one.
SIGNALLED = 128
ENCODER = "a run directory, a file with an encoder's weights, or timm:NAME for timm's weights"
REPORT = "these lines, the command and what `maect-fast doctor` prints"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that the user can mend are one line on stderr and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["bench"]:
        from maect_fast.benchmarks.cli import main as bench

        return bench(given[1:])
    # Of ranks with the same arguments, one says what is wrong with them.
    is_heard = os.environ.get("RANK", "0") == "0"
    with nullcontext() if is_heard else redirect_stderr(io.StringIO()):
        options = _parse(given)

    if "WORLD_SIZE" in os.environ:
        # Where a rank is lost, torch warns with C++ stacks; `RankWatch` has a line for it.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # After the parsing, because torch takes seconds to import and --help does not need it.
    from maect_fast.training.distributed import close_world
    from maect_fast.training.ranks import RankWatch, join_ranks

    watch: RankWatch | None = None
    try:
        if options.run is _train:
            # First of all, so that an error of one rank ends the others.
            watch = join_ranks()
        code: int = options.run(options)
        close_world()
        return code
    except KeyboardInterrupt:
        text, code = "interrupted", 130
    except Exception as error:
        line = explain(error)
        if line is None or options.debug:
            if line is None:
                error.add_note(f"a fault of maect-fast: please report it with {REPORT}")
            if watch is not None:
                watch.fail_of(error)
            raise
        text, code = line, 2
    if watch is not None:
        # What rank 0 says is about the run, and is not said again.
        name = "" if watch.place.rank == 0 else f"{watch.name}: "
        watch.fail(text, report=f"maect-fast {options.command}: {name}{text}", code=code)
    print(f"maect-fast {options.command}: {text}", file=sys.stderr)
    return code


def _parse(given: list[str]) -> argparse.Namespace:
    parser = _parser()
    options, words = parser.parse_known_args(given)
    options.overrides = words
    options.typed = shlex.join(["maect-fast", *given])
    unknown = [word for word in words if word.startswith("-") or "=" not in word]
    if unknown or (words and options.command in ("demo", "doctor")):
        parser.error(f"{options.command} does not know: {' '.join(unknown or words)}")
    return options


def seed(text: str) -> int:
    """What NumPy and scikit-learn take; its name is what argparse calls it."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise ValueError
    return value


def cluster_count(text: str) -> int:
    """What k-means can look for; its name is what argparse calls it."""
    value = int(text)
    if not 2 <= value <= 1_000_000:
        raise ValueError
    return value


def cluster_count_or_auto(text: str) -> int | str:
    """The same, or that the program chooses."""
    return text if text == "auto" else cluster_count(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="maect-fast",
        description="Contrastive tuning of masked autoencoders (MAE-CT, arXiv 2304.10520).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"maect-fast {__version__}")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="all three stages on real digits or your images, in minutes, with a report"
    )
    demo.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="of images, with or without class sub-folders, in the digits' place: a small encoder "
        "is trained on them from scratch, and their clusters are shown in a gallery",
    )
    demo.add_argument(
        "--k",
        type=cluster_count_or_auto,
        default="auto",
        metavar="K",
        help="with --data: clusters in the gallery; auto (default) as in `cluster`",
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    demo.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="S", help="default: 0")
    demo.add_argument(
        "--control", action="store_true", help="also tune a random encoder, without pre-training"
    )
    demo.set_defaults(run=_demo)

    for stage, help_text in (
        ("pretrain", "stage 1: learn by reconstruction (MAE)"),
        ("prepare-head", "stage 2: train the head, fill the queue, encoder frozen"),
        ("tune", "stage 3: tune the upper blocks by contrast with neighbours"),
    ):
        train = commands.add_parser(
            stage,
            help=help_text,
            usage=f"maect-fast {stage} --out RUN [OPTION ...] [KEY=VALUE ...]",
            epilog=describe_settings(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        train.add_argument(
            "--recipe",
            metavar="NAME",
            help="b16, l16, h16, h14, those with -aug, digits, small, or a YAML file; "
            "not needed to continue a run, or with --init RUN: that run's",
        )
        train.add_argument("--out", type=Path, required=True, metavar="RUN", help="run directory")
        train.add_argument(
            "--init",
            type=Path,
            metavar="PATH",
            help="run directory of the stage before, whose images and given encoder, augmentation "
            "and head sizes the run inherits, or a file with an encoder's weights",
        )
        train.add_argument(
            "--change",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="continue the run with this setting changed, and record it there (epochs, rates "
            "and other optim.*, precision, augment.*, temperature, top-k, mask ratio); data.root "
            "accepts other images",
        )
        train.add_argument(
            "--restart",
            action="store_true",
            help="start anew in a run directory; the earlier run goes to a folder in it",
        )
        if stage != "pretrain":
            train.add_argument(
                "--from-scratch",
                action="store_true",
                help="start from random weights (a control; without it --init is required)",
            )
        if stage == "tune":
            train.add_argument(
                "--decoder",
                type=Path,
                metavar="RUN",
                help="pretrain run whose decoder reconstruction_weight uses",
            )
        train.add_argument(
            "--no-capture",
            action="store_true",
            help="on a GPU, launch updates kernel by kernel instead of as one CUDA graph",
        )
        train.set_defaults(run=_train)

    plan = commands.add_parser(
        "plan", help="memory and time of an update, and which chunk_size fits; needs no GPU"
    )
    plan.add_argument("--recipe", metavar="NAME", required=True, help="name, or a YAML file")
    plan.add_argument(
        "--stage",
        choices=("pretrain", "prepare-head", "tune"),
        default="tune",
        help="default: tune",
    )
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="default: 1")
    plan.set_defaults(run=_plan)

    pack = commands.add_parser(
        "pack",
        help="make images small once: a file from which training reads as fast as it can augment",
        usage="maect-fast pack SOURCE --out FILE.pack [OPTION ...] [data.KEY=VALUE ...]",
    )
    pack.add_argument(
        "source", metavar="SOURCE", help="what data.root may be: a folder, shards, tables"
    )
    pack.add_argument("--out", type=Path, required=True, metavar="FILE.pack")
    pack.add_argument(
        "--short-side",
        type=int,
        default=256,
        metavar="PIXELS",
        help="to which the short side is resized where it is longer; default: 256",
    )
    pack.add_argument(
        "--workers", type=int, default=4, metavar="N", help="processes that decode; default: 4"
    )
    pack.set_defaults(run=_pack)

    evaluate = commands.add_parser(
        "evaluate", help="k-NN, linear probe, low-shot and clustering of encoders, with a report"
    )
    evaluate.add_argument("encoders", nargs="+", metavar="RUN", help=f"each {ENCODER}")
    evaluate.add_argument(
        "--out", type=Path, metavar="DIR", help="default: report/ in the last run directory"
    )
    evaluate.add_argument("--seed", type=seed, default=0, help="of probe, draws and k-means")
    evaluate.add_argument(
        "--methods",
        nargs="+",
        metavar="M",
        default=(),
        help="some of: knn, linear_probe, low_shot, clustering, views; default: all that the "
        "labels allow",
    )
    evaluate.add_argument(
        "--clusters",
        type=cluster_count,
        default=10,
        metavar="K",
        help="clusters of images without labels; default: 10",
    )
    evaluate.set_defaults(run=_evaluate)

    extract = commands.add_parser("extract", help="write an encoder's features to a file")
    extract.add_argument("encoder", metavar="RUN", help=ENCODER)
    extract.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="FILE.parquet or .csv: a row per image with path, id, label and feature; .npy or "
        ".safetensors: the features, and FILE.files.csv with the rest",
    )
    extract.add_argument("--split", choices=("train", "test"), default="train")
    extract.set_defaults(run=_extract)

    cluster = commands.add_parser(
        "cluster", help="put images into clusters by an encoder's features, and show them in a page"
    )
    cluster.add_argument("encoder", metavar="RUN", help=ENCODER)
    cluster.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="of clusters.csv (a row per image: path, id, label, class, cluster, distance to its "
        "centre) and gallery.html",
    )
    cluster.add_argument(
        "--k",
        type=cluster_count_or_auto,
        default="auto",
        metavar="K",
        help="clusters; auto (default): of 2 to 30 the number of the largest silhouette on at most "
        "4,096 images",
    )
    cluster.add_argument(
        "--format", choices=("csv", "parquet"), default="csv", help="of the table; default: csv"
    )
    cluster.add_argument("--seed", type=seed, default=0, help="of k-means; default: 0")
    cluster.set_defaults(run=_cluster)
    for command in (evaluate, extract, cluster):
        command.add_argument(
            "--weights",
            choices=("ema", "model"),
            default="ema",
            help="of runs: the encoder's EMA where one was kept (default), or it as trained",
        )

    _add_convert(commands)

    doctor = commands.add_parser("doctor", help="versions, devices, and which backends work")
    doctor.add_argument(
        "--check",
        action="store_true",
        help="also run every op against its definition in fp64; exit code 1 if one is wrong",
    )
    doctor.set_defaults(run=_doctor)
    for command in commands.choices.values():
        command.add_argument(
            "--debug", action="store_true", help="show the traceback of an error, not only its line"
        )
    # Listed here for --help; its own command line is in benchmarks/cli.py.
    commands.add_parser("bench", help="time every op beside its peers and the device's floor")
    return parser


def _add_convert(commands: Any) -> None:
    """`convert inspect`, `import` and `export`."""
    convert = commands.add_parser(
        "convert", help="what a file of weights is; other programs' encoders to ours, and back"
    )
    actions = convert.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser("inspect", help="what a file is, and what would be taken of it")
    inspect.add_argument("files", nargs="+", type=Path, metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="for programs: one list")
    take = actions.add_parser("import", help="write a file's encoder as ours")
    take.add_argument("file", type=Path, metavar="FILE")
    take.add_argument("--out", type=Path, required=True, metavar="X.safetensors")
    for action in (inspect, take):
        action.add_argument(
            "--encoder",
            metavar="NAME",
            help="which encoder of a file with several (student, teacher, ...); default: the "
            "averaged one (target_encoder, teacher, an EMA), of MoCo v3 base_encoder",
        )
    give = actions.add_parser("export", help="write an encoder as another program's")
    give.add_argument("source", metavar="RUN", help="a run directory, or a file with weights")
    give.add_argument(
        "--to",
        required=True,
        dest="target",
        choices=("timm", "huggingface", "facebook", "mae-ct", "onnx", "torch-export"),
        help="timm, huggingface: a folder; the others: a file",
    )
    give.add_argument("--out", type=Path, required=True, metavar="PATH", help="not there yet")
    give.add_argument(
        "--weights",
        choices=("ema", "model"),
        default="ema",
        help="of runs: the encoder's EMA where one was kept (default), or it as trained",
    )
    give.add_argument("--opset", type=int, metavar="N", help="of ONNX; default: PyTorch's")
    for action in (inspect, take, give):
        # The last one on the line counts, before or behind the action.
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
    convert.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    if options.action == "inspect":
        from maect_fast.convert.inspect import describe, lines

        if options.overrides:
            raise ConfigError(f"convert inspect takes no settings, got {options.overrides[0]}")
        told = [describe(file, encoder=options.encoder) for file in options.files]
        if options.json:
            print(json.dumps(told, indent=2))
        else:
            print("\n".join(line for file in told for line in lines(file)))
        return 0
    from maect_fast.convert.export import export, import_file

    if options.action == "import":
        told_lines = import_file(
            options.file, options.out, encoder=options.encoder, overrides=options.overrides
        )
        told_lines = [*told_lines, f"{printable(options.out)}: written"]
    else:
        told_lines = export(
            options.source,
            options.target,
            options.out,
            weights=options.weights,
            overrides=options.overrides,
            opset=options.opset,
        )
    print("\n".join(told_lines))
    return 0


def _demo(options: argparse.Namespace) -> int:
    if options.data is None and options.k != "auto":
        raise ConfigError("--k: expected with --data, whose images it is about")
    from maect_fast.demo import run_demo

    stopped_by = run_demo(
        options.out,
        seeds=options.seeds,
        control=options.control,
        data=options.data,
        number=options.k,
    )
    return _stopped(stopped_by, options.out)


def _train(options: argparse.Namespace) -> int:
    from maect_fast.training.start import start_run

    stage: Stage = options.command
    stopped_by = start_run(
        stage,
        options.out,
        recipe=options.recipe,
        init=options.init,
        decoder=options.decoder if stage == "tune" else None,
        from_scratch=stage != "pretrain" and options.from_scratch,
        overrides=options.overrides,
        change=options.change,
        restart=options.restart,
        capture=not options.no_capture,
    )
    return _stopped(stopped_by, options.out)


def _stopped(by: int, out: Path) -> int:
    """The exit code of a run: 0 where it is finished, else that of the signal which stopped it."""
    if not by:
        return 0
    name, code = Signals(by).name, SIGNALLED + by
    if os.environ.get("RANK", "0") == "0":
        print(
            f"stopped by {name} and saved; the same command continues {out} (exit code {code})",
            file=sys.stderr,
        )
    return code


def _plan(options: argparse.Namespace) -> int:
    from maect_fast.plan import report

    config = load_config(load_recipe(options.recipe, options.stage), overrides=options.overrides)
    if options.gpus < 1 or config.batch_size % options.gpus:
        raise ConfigError(
            f"--gpus: expected a divisor of batch_size = {config.batch_size}, got {options.gpus}"
        )
    print(report(options.recipe, config, num_gpus=options.gpus))
    return 0


def _pack(options: argparse.Namespace) -> int:
    from maect_fast.data.build import open_source
    from maect_fast.data.pack import write_pack
    from maect_fast.training.log import progress
    from maect_fast.training.run_directory import check_writable

    source: str = options.source
    for word in options.overrides:
        if not word.startswith("data."):
            raise ConfigError(f"{word}: expected data.KEY=VALUE")
    for name, value, low in (
        ("--short-side", options.short_side, 8),
        ("--workers", options.workers, 0),
    ):
        if value < low:
            raise ConfigError(f"{name}: expected at least {low}, got {value}")
    check_writable(options.out, folder=False)
    data = load_config(overrides=options.overrides).data
    images = open_source("SOURCE", source, data, in_chans=3)
    print(f"{printable(source)}: {images.about()}", file=sys.stderr)
    packed = write_pack(
        images,
        options.out,
        short_side=options.short_side,
        workers=options.workers,
        max_broken=data.max_broken,
        progress=lambda items, total: progress(items, "pack", total=total),
    )
    size = options.out.stat().st_size
    left_out = len(images) - len(packed)
    told = f", {left_out:,} left out" if left_out else ""
    print(f"{options.out}: {packed.about()}, {size / 1e6:,.1f} MB{told}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from maect_fast.evaluation import METHODS
    from maect_fast.evaluation.compare import compare
    from maect_fast.evaluation.encoders import is_run

    # argparse hands `RUN key=value` and `--methods knn key=value` to their lists as they stand.
    words = [*options.encoders, *options.methods]
    overrides = [word for word in words if "=" in word] + options.overrides
    encoders = [word for word in options.encoders if "=" not in word]
    methods = [word for word in options.methods if "=" not in word] or METHODS
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"--methods: expected some of {', '.join(METHODS)}, got {method}")
    if not encoders:
        raise ConfigError(f"RUN: expected at least one, {ENCODER}")
    runs = [Path(word) for word in encoders if is_run(word)]
    if not options.out and not runs:
        raise ConfigError("--out: expected a folder, as there is no run to put the report into")
    out = options.out or runs[-1] / "report"
    told = compare(
        encoders,
        out,
        methods=methods,
        seed=options.seed,
        overrides=overrides,
        weights=options.weights,
        num_clusters=options.clusters,
        command=options.typed,
    )
    print(told)
    return 0


def _extract(options: argparse.Namespace) -> int:
    from maect_fast.evaluation.encoders import check_encoder, open_encoder
    from maect_fast.evaluation.feature_file import check_suffix, write_features
    from maect_fast.evaluation.runs import split_features
    from maect_fast.training.run_directory import check_writable

    word: str = options.encoder
    check_encoder(word, options.overrides, options.split)
    check_writable(options.out, folder=False)
    check_suffix(options.out)
    opened = open_encoder(word, options.overrides, weights=options.weights)
    config = opened.config
    title = Path(word).name
    extracted = split_features(config, options.split, opened.encoder, title=title)
    written = write_features(extracted, options.out)
    print(f"{printable(word)}: {opened.weights}")
    number, width = extracted.features.x.shape
    left_out = f", {len(extracted.missing)} images missing" if extracted.missing else ""
    names = ", ".join(map(str, written))
    print(f"{names}: {number} x {width} ({config.head.pooling}){left_out}")
    return 0


def _cluster(options: argparse.Namespace) -> int:
    from maect_fast.evaluation.cluster_images import cluster_images

    print(
        cluster_images(
            options.encoder,
            options.out,
            number=options.k,
            table=options.format,
            weights=options.weights,
            seed=options.seed,
            overrides=options.overrides,
            command=options.typed,
        )
    )
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from maect_fast.doctor import report

    for line in report():
        print(line)
    if not options.check:
        return 0
    from maect_fast.benchmarks.cli import main as bench

    print("ops against their definition in fp64")
    return bench(["check"])


if __name__ == "__main__":
    sys.exit(main())
