"""The command line, `maect-fast`: the three stages, evaluation, benchmarks and diagnosis."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from maect_fast import __version__
from maect_fast.config import ConfigError, Stage, load_config, load_recipe

__all__ = ["main"]

EXAMPLES = """\
examples:
  maect-fast demo
  maect-fast pretrain --recipe l16 --out runs/mae data.root=/images/train
  maect-fast prepare-head --recipe l16 --init runs/mae --out runs/head data.root=/images/train
  maect-fast tune --recipe l16 --init runs/head --out runs/mae-ct data.root=/images/train
  maect-fast plan --recipe h14 batch_size=512
  maect-fast evaluate runs/mae runs/mae-ct data.test_root=/images/val
  torchrun --nproc-per-node 8 -m maect_fast.cli tune ...
key=value changes a setting of the recipe (epochs=10 optim.encoder_lr=5e-5 data.workers=8).
The same command on an existing run directory continues the run.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that the user can mend are one line on stderr and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["bench"]:
        from maect_fast.benchmarks.cli import main as bench

        return bench(given[1:])
    parser = _parser()
    options, words = parser.parse_known_args(given)
    options.overrides = words
    unknown = [word for word in words if word.startswith("-") or "=" not in word]
    if unknown or (words and options.command in ("demo", "doctor")):
        parser.error(f"{options.command} does not know: {' '.join(unknown or words)}")

    # After the parsing, because torch takes seconds to import and --help does not need it.
    from maect_fast.checkpoint import CheckpointError
    from maect_fast.data import DataError
    from maect_fast.training.distributed import close_world
    from maect_fast.training.engine import TrainingError

    try:
        code: int = options.run(options)
    except (ConfigError, CheckpointError, DataError, TrainingError) as error:
        print(f"maect-fast {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"maect-fast {options.command}: interrupted", file=sys.stderr)
        return 130
    finally:
        close_world()
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="maect-fast",
        description="Contrastive tuning of masked autoencoders (MAE-CT, arXiv 2304.10520).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"maect-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="all three stages on real digits, about three minutes")
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
        train = commands.add_parser(stage, help=help_text)
        train.add_argument(
            "--recipe",
            metavar="NAME",
            help="b16, l16, h16, h14, those with -aug, digits, or a YAML file; "
            "not needed to continue a run",
        )
        train.add_argument("--out", type=Path, required=True, metavar="RUN", help="run directory")
        train.add_argument(
            "--init",
            type=Path,
            metavar="PATH",
            help="run directory of the stage before, or a file with an encoder's weights",
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

    evaluate = commands.add_parser(
        "evaluate", help="k-NN, linear probe, low-shot and clustering of runs, with a report"
    )
    evaluate.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    evaluate.add_argument(
        "--out", type=Path, metavar="DIR", help="default: report/ in the last run directory"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of probe, draws and k-means")
    evaluate.add_argument(
        "--methods",
        nargs="+",
        metavar="M",
        choices=("knn", "linear_probe", "low_shot", "clustering"),
        default=("knn", "linear_probe", "low_shot", "clustering"),
        help="some of: %(choices)s; default: all",
    )
    evaluate.set_defaults(run=_evaluate)

    extract = commands.add_parser("extract", help="write a run's features to a safetensors file")
    extract.add_argument("run_directory", type=Path, metavar="RUN")
    extract.add_argument("--out", type=Path, required=True, metavar="FILE")
    extract.add_argument("--split", choices=("train", "test"), default="train")
    extract.set_defaults(run=_extract)

    # Listed here for --help; its own command line is in benchmarks/cli.py.
    commands.add_parser("bench", help="time every op beside its peers and the device's floor")

    doctor = commands.add_parser("doctor", help="versions, devices, and which backends work")
    doctor.add_argument(
        "--check",
        action="store_true",
        help="also run every op against its definition in fp64; exit code 1 if one is wrong",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from maect_fast.demo import run_demo

    return 0 if run_demo(options.out, seeds=options.seeds, control=options.control) else 1


def _train(options: argparse.Namespace) -> int:
    from maect_fast.training.engine import run_stage
    from maect_fast.training.stages import last_checkpoint

    stage: Stage = options.command
    continues = last_checkpoint(options.out).exists()
    if options.recipe is not None:
        layer = load_recipe(options.recipe, stage)
    elif continues:
        layer = load_recipe(str(options.out / "config.yaml"), stage)
    else:
        raise ConfigError(f"{options.out}: no run to continue there; start one with --recipe NAME")
    config = load_config(layer, overrides=options.overrides)
    if config.stage != stage:
        raise ConfigError(f"stage: the command is {stage}, the recipe is for {config.stage}")
    from_scratch = stage == "pretrain" or options.from_scratch
    if options.init is None and not from_scratch and not continues:
        raise ConfigError(
            f"--init: {stage} starts from the stage before (or give --from-scratch for a control)"
        )
    decoder = options.decoder if stage == "tune" else None
    capture = not options.no_capture
    if run_stage(config, options.out, init=options.init, decoder=decoder, capture=capture):
        return 0
    print(f"stopped and saved; the same command continues {options.out}", file=sys.stderr)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from maect_fast.plan import report

    config = load_config(load_recipe(options.recipe, options.stage), overrides=options.overrides)
    if options.gpus < 1 or config.batch_size % options.gpus:
        raise ConfigError(
            f"--gpus: expected a divisor of batch_size = {config.batch_size}, got {options.gpus}"
        )
    print(report(options.recipe, config, num_gpus=options.gpus))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from maect_fast.evaluation.compare import compare_runs

    # argparse hands `RUN key=value` to the list of runs as it stands.
    words = [str(run) for run in options.runs]
    overrides = [word for word in words if "=" in word] + options.overrides
    runs = [Path(word) for word in words if "=" not in word]
    if not runs:
        raise ConfigError("RUN: expected at least one run directory")
    out = options.out or runs[-1] / "report"
    print(compare_runs(runs, out, methods=options.methods, seed=options.seed, overrides=overrides))
    return 0


def _extract(options: argparse.Namespace) -> int:
    from maect_fast.evaluation.features import save_features
    from maect_fast.evaluation.runs import load_run, run_encoder, split_features

    config, state = load_run(options.run_directory, options.overrides)
    features = split_features(config, options.split, run_encoder(config, state))
    save_features(features, options.out)
    print(f"{options.out}: {len(features)} x {features.x.shape[1]} ({config.head.pooling})")
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
