"""Recipes: YAML files and overrides, made into a `RunConfig` or one line of what is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from nafnet_core import InputError
from pipelines.config.search import SearchConfig
from pipelines.config.sections import BudgetSection, RunConfig
from pipelines.storage import absolute

_Config = TypeVar("_Config", bound=BaseModel)
_PACKAGE = Path(__file__).resolve().parent.parent
# For what Pydantic says in words of its own trade.
_PLAIN_WORDS = {
    "float_parsing": "a number",
    "float_type": "a number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_parsing": "true or false",
    "missing": "a value",
    "tuple_type": "a list, as [a, b]",
    "too_short": "one or more",
    "string_pattern_mismatch": "letters, digits, dots, dashes and underscores, a letter or digit first",
}


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-3` is a number and not a string (YAML 1.2, section 10.3.2)."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_config(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    train: Sequence[Path | str] = (),
    val: Path | str | None = None,
    init: str | None = None,
) -> RunConfig:
    """Read a recipe, apply stores, `key.path=value` overrides and the run's name, and check all of it.

    Args:
        recipe: a file, or the name of a shipped recipe.
        overrides: applied in their order, after the stores: `data.train.0.weight=2` is of the first of these.
        name: of the run; None leaves the recipe's.
        train, val: stores in place of the recipe's; what is empty or None is left as it is.
        init: MODEL whose weights the run begins with, in place of the recipe's; None leaves that.

    Raises:
        InputError: no such recipe, bad YAML, an unknown key (the nearest valid one is named), or a value
            that cannot be.
    """
    content, path, origins = _read(recipe, overrides, name=name, train=train, val=val, init=init)
    if "search" in content:
        raise InputError("this recipe is of a search", file=path, fix="Use `nafnet tune`")
    return parse_config(content, file=path, origins=origins)


def load_search(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    train: Sequence[Path | str] = (),
    val: Path | str | None = None,
    init: str | None = None,
) -> SearchConfig:
    """The same of a search: a recipe with a section `search`. See `load_config`."""
    content, path, origins = _read(recipe, overrides, name=name, train=train, val=val, init=init)
    if "search" not in content:
        raise InputError(
            "this recipe has nothing to search",
            file=path,
            expected="a section `search` with its `space`, as in the shipped recipe `search_mobile`",
        )
    return _parsed(SearchConfig, content, file=path, origins=origins)


def _read(
    recipe: str | Path,
    overrides: Sequence[str],
    *,
    name: str | None,
    train: Sequence[Path | str],
    val: Path | str | None,
    init: str | None,
) -> tuple[dict[str, Any], Path, dict[str, str]]:
    """Content of a recipe with what the command says put in, its file, and which value came from where."""
    path = find_recipe(recipe)
    content = _content(path, "recipe", "model, budget and what else a run is")
    _put_stores(content, train, val)
    origins = {_apply(content, override): f"--set {override}" for override in overrides}
    if name is not None:
        content["name"] = name
        origins["name"] = f"--name {name}"
    if init is not None and isinstance(content.get("model"), dict):
        content["model"]["init"] = init
        origins["model.init"] = f"--init {init}"
    return content, path, origins


def load_as(kind: type[_Config], path: Path, overrides: Sequence[str] = ()) -> _Config:
    """Read a YAML file of another kind than a recipe, such as a cluster's, by the same rules.

    Raises:
        InputError: as `load_config`.
    """
    if not path.is_file():
        raise InputError("no such file", file=path)
    required = [name for name, field in kind.model_fields.items() if field.is_required()]
    content = _content(path, "configuration", f"{', '.join(required)} and what else it is")
    origins = {_apply(content, override): f"--set {override}" for override in overrides}
    return _parsed(kind, content, file=path, origins=origins)


def _content(path: Path, what: str, holds: str) -> dict[str, Any]:
    """What a YAML file holds, which must be a mapping."""
    try:
        content = yaml.load(path.read_text(), _YamlLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("not a YAML file", file=path, got=" ".join(str(error).split())[:150]) from error
    if content is None:
        raise InputError(f"an empty {what}", file=path, expected=holds)
    if not isinstance(content, dict):
        raise InputError(f"not a {what}", file=path, expected="a mapping", got=type(content).__name__)
    return content


def parse_config(
    content: Mapping[str, Any], *, file: str | Path, origins: Mapping[str, str] | None = None
) -> RunConfig:
    """Check plain values against `RunConfig`.

    Args:
        content: nested mappings.
        file: where they come from.
        origins: dotted key → what else it came from, to be named in its stead.

    Raises:
        InputError: naming the first fault.
    """
    return _parsed(RunConfig, content, file=file, origins=origins)


def _parsed(
    kind: type[_Config],
    content: Mapping[str, Any],
    *,
    file: str | Path,
    origins: Mapping[str, str] | None,
) -> _Config:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        location = ".".join(str(part) for part in error.errors()[0]["loc"])
        # A fault of a whole section (three budgets) is the override's that touched the section.
        blamed = [text for key, text in (origins or {}).items() if is_within(key, location)]
        raise _explained(kind, error, blamed[-1] if location and blamed else file) from error


def is_within(key: str, location: str) -> bool:
    """Whether one of two dotted names is the other, or a part of it."""
    return f"{key}.".startswith(f"{location}.") or f"{location}.".startswith(f"{key}.")


def with_stores(config: RunConfig, train: Sequence[Path | str], val: Path | str | None) -> RunConfig:
    """`config` reading other stores; what is empty or None is left as it is."""
    content = config.model_dump(mode="json")
    _put_stores(content, train, val)
    return RunConfig.model_validate(content)


def _put_stores(content: dict[str, Any], train: Sequence[Path | str], val: Path | str | None) -> None:
    # A recipe whose `data` is no mapping is refused later, with the line that says so.
    data = content.setdefault("data", {}) if train or val else None
    if not isinstance(data, dict):
        return
    if train:
        data["train"] = [{"path": absolute(place)} for place in train]
    if val:
        data["val"] = absolute(val)


def find_recipe(recipe: str | Path) -> Path:
    """Path of a recipe: an existing file, or a shipped recipe by name.

    Raises:
        InputError: neither; the shipped names are listed.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in _recipes_folder().glob("*.yaml")}
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    raise InputError(
        "no such recipe", file=recipe, expected=f"a file, or one of {', '.join(sorted(shipped))}"
    )


def _recipes_folder() -> Path:
    # In a wheel they lie inside the package, in a checkout beside it.
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def _apply(content: dict[str, Any], override: str) -> str:
    """Put one override in its place; returns its key."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError("not an override", got=override, expected="key.path=value")
    *parents, last = key.strip().split(".")
    place: Any = content
    for parent in parents:
        number = _list_index(place, parent, key)
        if number is None and place.get(parent) is None:
            place[parent] = {}  # absent, or an optional section that was off
        place = place[parent if number is None else number]
    number = _list_index(place, last, key)
    try:
        place[last if number is None else number] = yaml.load(value, _YamlLoader)
    except yaml.YAMLError as error:
        raise InputError("not a value", file=f"--set {override}", got=value) from error
    if last in BudgetSection.model_fields and parents == ["budget"]:
        # The three exclude each other: naming one replaces the recipe's.
        for other in set(BudgetSection.model_fields) - {last}:
            place.pop(other, None)
    return key.strip()


def _list_index(place: Any, part: str, key: str) -> int | None:
    """Which item of a list `part` of `key` means (`stages.0.patch_px`); None where `place` is a mapping."""
    if isinstance(place, dict) and not part.isdecimal():
        return None
    if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
        return int(part)
    if part.isdecimal() and isinstance(place, (dict, list)):
        fix = "Name the store with --data" if key.startswith("data.train.") else None
        raise InputError("an item of a list that is not there", file=f"--set {key}", got=part, fix=fix)
    raise InputError("not a section of the configuration", file=f"--set {key}", got=part)


def _explained(kind: type[BaseModel], error: ValidationError, file: str | Path) -> InputError:
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        known = _known_keys(kind, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        whole = ".".join(str(part) for part in (*first["loc"][:-1], near[0]))
        return InputError(
            f"unknown key {location!r} in the configuration",
            file=file,
            fix=f"Did you mean {whole!r}? Known here: {', '.join(known)}",
        )
    message = first["msg"].removeprefix("Value error, ").removeprefix("expected ")
    if not location:
        return InputError(message, file=file)
    expected = _PLAIN_WORDS.get(first["type"], message.removeprefix("Input should be "))
    got = first["input"] if not isinstance(first["input"], (dict, BaseModel)) else None
    return InputError(f"bad value for {location!r}", file=file, expected=expected, got=got)


def _known_keys(kind: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] = kind
    for part in location:
        if isinstance(part, int) or part not in model.model_fields:  # of a list, or of a mapping
            continue
        annotation = model.model_fields[part].annotation
        nested = [annotation, *getattr(annotation, "__args__", ())]
        model = next((t for t in nested if isinstance(t, type) and issubclass(t, BaseModel)), model)
    return sorted(model.model_fields)
