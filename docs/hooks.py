"""What the site shows of other files and of the code, made when it is built: no copy is committed.

The site mirrors the repository: README.md, the kernels' READMEs and the results keep their paths,
so that one link works on the site and where files are read as they are.
"""

import os
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import groupby
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

from maect_fast.benchmarks import cli as bench
from maect_fast.benchmarks.figures import draw
from maect_fast.benchmarks.results import by_case, device_name, provenance, read_folder
from maect_fast.benchmarks.table import summary
from maect_fast.cli import _parser
from maect_fast.config import RECIPES, Stage, flat_settings, load_config, load_recipe
from maect_fast.settings import Setting, list_settings

ROOT = Path(__file__).parents[1]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *("benchmarks/README.md", "examples/README.md"),
]
STAGES: tuple[Stage, ...] = ("pretrain", "prepare-head", "tune")
SIZES = ("b16", "l16", "h16", "h14")
PUBLISHED = (*SIZES, *(f"{size}-aug" for size in SIZES))
RESULTS = "benchmarks/results"
# [text](target) and ![text](target); a text may hold one pair of brackets.
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
PLACE = re.compile(r"<!-- made here: (\w+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages that lie outside of docs/, notebooks, and results with their pictures."""
    readmes = (str(path.relative_to(ROOT)) for path in ROOT.glob("kernels/*/README.md"))
    for name in [*PAGES, *readmes]:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for path in sorted((ROOT / "examples").glob("*.py")):
        name = str(path.relative_to(ROOT))
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        markdown, made = MarkdownExporter().from_filename(str(path))  # type: ignore[no-untyped-call]
        for name, content in made["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
        markdown += f"\n[{path.name}]({path.name})"
        files.append(File.generated(config, f"notebooks/{path.name}.md", content=markdown))
    for folder in sorted((ROOT / RESULTS).iterdir()):
        for path in sorted(folder.glob("*.csv")):
            name = str(path.relative_to(ROOT))
            files.append(File.generated(config, name, abs_src_path=str(path)))
        pictures = draw(folder, Path(mkdtemp(prefix="maect-fast-docs-")))
        for path in pictures:
            name = f"{RESULTS}/{folder.name}/{path.name}"
            files.append(File.generated(config, name, content=path.read_bytes()))
            path.unlink()
        pictures[0].parent.rmdir()
        page = f"{RESULTS}/{folder.name}/index.md"
        names = [path.name for path in pictures]
        files.append(File.generated(config, page, content=_results(folder, names)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill the marked places, and lead links to where the site has their targets."""
    markdown = PLACE.sub(lambda place: MADE[place[1]](), markdown)
    return LINK.sub(lambda link: _link(link, page.file.src_uri, files), markdown)


def _link(link: re.Match[str], source: str, files: Files) -> str:
    """The link as the site needs it; the text alone of what the site does not have."""
    mark, text, target = link.groups()
    path, hash_, anchor = target.partition("#")
    if not path or "://" in path:
        return link[0]
    # Pages of docs/ link as they lie in the repository.
    folder = PurePosixPath("docs") if (ROOT / "docs" / source).exists() else PurePosixPath()
    found = os.path.normpath(folder / PurePosixPath(source).parent / path)
    found = found.removeprefix("docs/")
    for name in (f"{found}.md", found, f"{found}/index.md"):
        if files.get_file_from_path(name):
            here = PurePosixPath(source).parent
            return f"{mark}[{text}]({os.path.relpath(name, here)}{hash_}{anchor})"
    return text


def _results(folder: Path, pictures: list[str]) -> str:
    """A device's page: of every op who was measured when, pictures, ours and the best peer."""
    rows = read_folder(folder)
    parts = [f"# {device_name(rows)}", "Drawn and tabled from the CSV files when this was built."]
    if "roofline.png" in pictures:
        parts += ["## Every op and its floor", "![roofline](roofline.png)"]
    for op, cases in groupby(by_case(rows), key=lambda case: case[0].op):
        members = [row for case in cases for row in case]
        parts += [f"## {op}", f"{provenance(members)}: [every row]({op}.csv)."]
        own = [name for name in pictures if name.startswith(f"{op}_")]
        parts += [f"![{Path(name).stem}]({name})" for name in own]
        parts.append(summary(members))
    known = {f"{case[0].op}.csv" for case in by_case(rows)}
    others = sorted(path.name for path in folder.glob("*.csv") if path.name not in known)
    parts += ["## Other tables", "\n".join(f"- [{name}]({name})" for name in others)]
    return "\n\n".join(parts)


def _settings() -> str:
    """A table per group of settings."""
    parts = []
    for group, members in groupby(
        list_settings(), key=lambda setting: setting.key.rpartition(".")[0]
    ):
        title = f"`{group}.`" if group else "The run"
        parts.append(f"## {title}\n\n{_setting_rows(members)}")
    return "\n\n".join(parts)


def _setting_rows(settings: Iterator[Setting]) -> str:
    lines = ["| setting | default | values | |", "|---|---|---|---|"]
    for one in settings:
        default = f"`{one.default}`" if one.default else "none"
        values = one.values.replace("|", "\\|")
        lines.append(f"| `{one.key}` | {default} | {values} | {one.meaning} |")
    return "\n".join(lines)


def _recipes() -> str:
    """Of each stage the settings in which its published recipes differ."""
    parts = []
    for stage in STAGES:
        names = [name for name in PUBLISHED if (RECIPES / name / f"{stage}.yaml").exists()]
        values = {name: flat_settings(load_config(load_recipe(name, stage))) for name in names}
        lines = [f"| `{stage}` | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for key in values[names[0]]:
            cells = [str(values[name][key]) for name in names]
            # What the encoder is, and what -aug adds, is said in words.
            if len(set(cells)) > 1 and not key.startswith(("encoder.", "augment.views")):
                lines.append(f"| `{key}` | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _ops() -> str:
    """The public names of each op's package, by mkdocstrings."""
    parts = []
    for package in OPS:
        module = import_module(f"maect_fast.kernels.{package}")
        parts.append(f"## {package}")
        parts += [
            f"::: maect_fast.kernels.{package}.{name}"
            for name in sorted(module.__all__, key=str.swapcase)
        ]
    return "\n\n".join(parts)


def _commands() -> str:
    """What --help says, of each command; a stage's settings have a page of their own."""
    parts = []
    (commands,) = (a for a in _parser()._actions if a.dest == "command")
    parsers = {**(commands.choices or {}), "bench": bench._parser("maect-fast bench")}  # type: ignore[dict-item]
    for name, parser in parsers.items():
        if name in STAGES:
            parser.epilog = None
        parts.append(f"## {name}\n\n```text\n{parser.format_help().strip()}\n```")
    return "\n\n".join(parts)


OPS = (
    *("masked_attention", "queue_topk", "info_nce", "mae_tokens"),
    *("residual_norm", "gelu", "int8_linear"),
)
MADE: dict[str, Callable[[], str]] = {
    "settings": _settings,
    "recipes": _recipes,
    "commands": _commands,
    "ops": _ops,
}
