"""What the documentation says can be done: its commands exist, and its examples run.

An example that cannot run here stands below a comment, `<!-- not run: needs a GPU -->`.
"""

import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import pytest

import maect_fast
from maect_fast.benchmarks.cli import main as bench
from maect_fast.cli import _parse, _parser
from maect_fast.config import Stage, load_config, load_recipe
from maect_fast.settings import list_settings

ROOT = Path(maect_fast.__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: ([^\n]+) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# Seconds that an example may take on a CPU that others use too.
PATIENCE = 900
# Options of other programs.
ELSEWHERE = ("--logdir", "--nproc-per-node", "--shm-size", "--no-build-isolation")
# What stands before "=" in the text without being a setting.
OTHERS = ("backend", "fullgraph", "key", "shadow", "simd")
BENCH_COMMANDS = ("check", "trace", "plot", "table", "step", "host", "loader")


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    text: str
    not_run: str
    """Why it is not run; "" where it is."""


def blocks(page: Path) -> list[Block]:
    found = BLOCK.findall(page.read_text())
    return [Block(page, language, text, reason) for reason, language, text in found]


def commands(block: Block) -> list[list[str]]:
    """The words of each `maect-fast` command, also behind torchrun or a profiler."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "-m" in words and words[words.index("-m") + 1] == "maect_fast.cli":
            found.append(words[words.index("-m") + 2 :])
        elif "maect-fast" in words:
            found.append(words[words.index("maect-fast") + 1 :])
    return found


ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [(b.page.name, words) for b in ALL if b.language == "sh" for words in commands(b)]
RUN = [page for page in PAGES if any(not block.not_run for block in blocks(page))]


def parsers() -> dict[str, ArgumentParser]:
    (choices,) = (action.choices for action in _parser()._actions if action.dest == "command")
    return cast("dict[str, ArgumentParser]", choices)


def with_commands(parser: ArgumentParser) -> Iterator[ArgumentParser]:
    """A parser and those of its commands, of theirs too."""
    yield parser
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for below in action.choices.values():
                yield from with_commands(below)


def test_there_is_documentation() -> None:
    assert len(PAGES) > 10
    assert {"sh", "python"} <= {block.language for block in ALL if not block.not_run}
    assert set(parsers()) <= {words[0] for _, words in COMMANDS}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{p}-{w[0]}" for p, w in COMMANDS])
def test_commands_and_settings_exist(
    page: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if words[0] == "bench":
        # Each command of it has a parser of its own, whose --help is reached through what is right.
        name = words[1] if len(words) > 1 and words[1] in BENCH_COMMANDS else ""
        with pytest.raises(SystemExit) as left:
            bench([*filter(None, [name]), "--help"])
        assert left.value.code == 0
        known = capsys.readouterr().out
        assert [word for word in words if word.startswith("--") and word not in known] == []
        return
    options: Any = _parse(words)
    stage: Stage = options.command if options.command in get_args(Stage) else "tune"
    recipe = getattr(options, "recipe", None)
    layers = [load_recipe(recipe, stage)] if recipe and not recipe.endswith(".yaml") else []
    overrides = [word for word in words if "=" in word and not word.startswith("--")]
    load_config(*layers, overrides=[*options.overrides, *overrides])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_and_settings_in_the_text_exist(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    known = {o for p in with_commands(_parser()) for o in p._option_string_actions}
    keys = {setting.key for setting in list_settings()}
    keys |= {key.partition(".")[0] for key in keys}
    wrong = []
    for code in INLINE.findall(text):
        for word in code.split():
            if word.startswith("--") and word.strip(":") not in (*known, *ELSEWHERE):
                wrong.append(word)
            key, equals, _ = word.partition("=")
            if equals and re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key) and key not in (*keys, *OTHERS):
                wrong.append(word)
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page in its order, in one folder; Python's share their names, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.not_run:
            print(f"{page.name}: not run, {block.not_run}: {block.text}")  # noqa: T201
        elif block.language == "python":
            exec(compile(block.text, page.name, "exec"), names)
        else:
            run_shell(block.text)


def run_shell(text: str) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONSAFEPATH": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    # Set for the tests' own kernels; a reader has not set it.
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
