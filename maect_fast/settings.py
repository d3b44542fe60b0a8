"""Every setting of a recipe, read from the configuration's own classes."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from maect_fast import config
from maect_fast.config import Config

__all__ = ["Setting", "describe_settings", "list_settings"]

WIDTH = 100


@dataclass(frozen=True, slots=True)
class Setting:
    """One `key=value` of the command line."""

    key: str
    """With dots."""
    default: str
    """As it is written on the command line, where a recipe does not say otherwise; "" is none."""
    values: str
    """Which it may have."""
    meaning: str
    """The sentence of `config.py`."""


def list_settings() -> Iterator[Setting]:
    """All of them, in the order of the classes, but for the stage, which is the command."""
    tree = ast.parse(inspect.getsource(config))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return (each for each in _settings(Config(), classes, "") if each.key != "stage")


def describe_settings() -> str:
    """A paragraph each, for `--help`."""
    lines = ["settings, KEY=VALUE, with their defaults where the recipe has no other:"]
    for setting in list_settings():
        lines.append(f"\n  {setting.key}={setting.default}    {setting.values}")
        indent = " " * 6
        lines += textwrap.wrap(
            setting.meaning, WIDTH, initial_indent=indent, subsequent_indent=indent
        )
    return "\n".join(lines)


def _settings(node: Any, classes: dict[str, ast.ClassDef], prefix: str) -> Iterator[Setting]:
    hints = get_type_hints(type(node), include_extras=True)
    meanings = _meanings(classes[type(node).__name__])
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _settings(value, classes, f"{key}.")
        else:
            yield Setting(key, _written(value), _values(hints[field.name]), meanings[field.name])


def _meanings(node: ast.ClassDef) -> dict[str, str]:
    """What is written below each field."""
    found, name = {}, ""
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name)):
                pass
            case ast.Expr(value=ast.Constant(value=str(text))) if name:
                found[name] = " ".join(text.split())
    return found


def _written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    return str(value)


def _values(hint: Any) -> str:
    """What a type takes, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, interval = arguments
        return f"{'integer' if kind is int else 'number'} in {interval.text}"
    if origin is Literal:
        return " | ".join(arguments)
    if origin is tuple:
        return f"{len(arguments)} of: {_values(arguments[0])}"
    if origin is list:
        return f"a list of: {_values(arguments[0])}"
    if dataclasses.is_dataclass(hint):
        each = get_type_hints(hint, include_extras=True)
        return "{" + ", ".join(f"{name}: {_values(inner)}" for name, inner in each.items()) + "}"
    if arguments:
        return " | ".join(map(_values, arguments))
    return {str: "text", bool: "true | false", NoneType: "none"}[hint]
