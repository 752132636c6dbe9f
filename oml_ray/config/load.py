"""Loading: YAML and `--set` overrides become a checked config, and everything wrong with them one message."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from oml_ray.config.nodes import Node
from oml_ray.config.plain_yaml import MAX_DEPTH, parse_yaml, write_yaml
from oml_ray.errors import ConfigError
from oml_ray.redaction import redact, redacted

T = TypeVar("T", bound=Node)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a config file as a plain mapping.

    Raises:
        ConfigError: the file is absent, unreadable, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"There is no config file {path}.") from None
    except (OSError, ValueError) as error:  # the latter: no UTF-8, or a path with a null byte
        raise ConfigError(f"The config file {str(path)!r} cannot be read: {error}.") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of config keys, found {type(tree).__name__}.")
    return tree


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set dotted keys, e.g. `criterion.margin=0.3`; a mapping given as value replaces the node whole.

    Example:
        >>> apply_overrides({"a": {"b": 1, "c": 2}}, ["a.b=3"])
        {'a': {'b': 3, 'c': 2}}
    """
    result = _copied(tree)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        *parents, last = dotted.split(".")
        if not equals or not all((*parents, last)) or len(parents) > MAX_DEPTH:
            raise ConfigError(f"--set takes dotted.key=value, found {_shown(override)}.")
        node = result
        for depth, part in enumerate(parents):
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                if child is not None:
                    found = ".".join(parents[: depth + 1])
                    raise ConfigError(
                        f"--set {_line(override)}: {found} is the value {_shown(child)}, which has no keys."
                    )
                child = node[part] = {}
            node = child
        node[last] = parse_yaml(text, f"--set {dotted}")
    return result


def load(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read, override and check a config.

    Raises:
        ConfigError: lists everything that is wrong, each with its key, what was found and what is allowed.
    """
    return validate(schema, apply_overrides(read_yaml(path), overrides), str(path))


def validate(schema: type[T], tree: Mapping[str, Any], name: str) -> T:
    """Check a plain mapping against a schema; `name` is how messages call it."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(detail, schema, tree) for detail in error.errors(include_url=False)]
        raise ConfigError(f"{name}: " + ("\n  " if len(lines) > 1 else "") + "\n  ".join(lines)) from None


def dump(config: Node) -> str:
    """Return the resolved config as YAML: every default spelled out, credentials inside URIs hidden."""
    return write_yaml(stored(config))


def stored(config: Node) -> dict[str, Any]:
    """Return the resolved config as plain data to be stored or shown: credentials inside URIs are hidden."""
    plain: dict[str, Any] = redacted(config.model_dump(mode="json"))
    return plain


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys at which two plain configs differ."""
    keys: list[str] = []
    for key in [*one, *(key for key in other if key not in one)]:
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(f"{prefix}{key}")
    return keys


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _describe(detail: ErrorDetails, schema: type[Node], tree: Mapping[str, Any]) -> str:
    location = _within(detail["loc"], tree)
    key, found, kind = _line(".".join(map(str, location))), detail["input"], detail["type"]
    at = f"{key}: " if key else ""
    if kind == "extra_forbidden":
        legal = _legal_keys(schema, detail["loc"][:-1])
        near = difflib.get_close_matches(str(location[-1]), legal, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"unknown key {key!r}.{hint} Legal keys here: {', '.join(legal)}."
    if kind == "missing":
        return f"{key} is missing; it has no default."
    if kind == "union_tag_invalid":
        context = detail.get("ctx", {})
        tag = str(context.get("discriminator")).strip("'_()")  # 'name', or the function _backend()
        return f"{key}.{tag} is {_line(context.get('tag'))!r}; allowed: {context.get('expected_tags')}."
    if kind == "union_tag_not_found":
        return f"{key} needs a key 'name' that says which kind it is."
    if kind in ("model_type", "model_attributes_type", "dataclass_type"):
        return f"{at}should be a mapping of keys, such as {{name: ...}}, found {_shown(found)}."
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if kind == "value_error" and (not key or ", found " in message):
        return f"{at}{message}." if key else message
    return f"{at}{message}, found {_shown(found)}."


def _line(text: object) -> str:
    """A text as a part of one line."""
    line = redact(" ".join(str(text).split()))
    return line if len(line) <= 200 else f"{line[:197]}..."


def _shown(found: object) -> str:
    """A value as a part of one line."""
    try:
        text = redact(repr(found))
    except RecursionError:
        text = f"{type(found).__name__} of very many levels"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _within(location: Sequence[int | str], tree: Any) -> list[int | str]:
    """Drop from pydantic's location the tags of unions, which are no keys of the config."""
    kept: list[int | str] = []
    for position, part in enumerate(location):
        is_last = position == len(location) - 1
        if isinstance(tree, Mapping):
            if part not in tree and (not is_last or part == tree.get("name")):
                continue
            # A tag at the very end stands for the node itself.
            tree = tree.get(part) if part in tree else None
            kept.append(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
            kept.append(part)
    return kept


def _legal_keys(schema: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Keys of the node at a location, following fields and the tags of unions."""
    candidates: list[type[BaseModel]] = [schema]
    for part in location:
        following = [
            model
            for candidate in candidates
            if part in candidate.model_fields
            for model in _models_in(candidate.model_fields[str(part)].annotation)
        ]
        tagged = [
            model
            for model in candidates
            if any(
                part in typing.get_args(getattr(model.model_fields.get(tag), "annotation", None))
                for tag in ("name", "backend")
            )
        ]
        candidates = following or tagged or [model for model in candidates if part in model.model_fields] or candidates
    keys = dict.fromkeys(key for model in candidates for key in model.model_fields)
    return sorted(keys, key=lambda key: key != "name")  # the name first: it decides on the others


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []
