"""Plain YAML: null, booleans, numbers, texts, lists and mappings, in bounded size; anything else is refused.

So that a config is nothing but what it shows: no tags that make objects, no aliases that unfold to billions of values,
no dates in place of texts, and nothing that reads differently once it was written.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from oml_ray.errors import ConfigError

MAX_DEPTH = 50
"""Levels of lists and mappings inside one another."""
MAX_VALUES = 100_000
"""Values of one text, those behind an alias counted wherever the alias stands."""

_CORE = "tag:yaml.org,2002:"
_PLAIN = {f"{_CORE}{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_FLOAT = re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")  # YAML 1.2's, such as 1e-3
_INT_BITS = 1000  # of integers that fit into a float


class _Loader(yaml.SafeLoader):
    """The safe loader, without what is not plain, without bombs and without silently dropped duplicate keys."""

    yaml_constructors = {tag: made for tag, made in yaml.SafeLoader.yaml_constructors.items() if tag in {None, *_PLAIN}}  # noqa: RUF012
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in known if tag != f"{_CORE}timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.sizes: dict[yaml.Node, tuple[int, int]] = {}  # values and levels of every node that is whole

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.depth > MAX_DEPTH:
            raise ConstructorError(None, None, f"there are more than {MAX_DEPTH} levels", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        assert node is not None
        self.depth -= 1
        if is_alias and node not in self.sizes:
            raise ConstructorError(None, None, "an alias stands inside of what it stands for", mark)
        if not is_alias:
            self.sizes[node] = self._size(node)
        values, levels = self.sizes[node]
        if values > MAX_VALUES or levels > MAX_DEPTH:
            what = f"{MAX_VALUES:,} values" if values > MAX_VALUES else f"{MAX_DEPTH} levels"
            raise ConstructorError(None, None, f"with its aliases written out there are more than {what}", mark)
        return node

    def _size(self, node: yaml.Node) -> tuple[int, int]:
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for entry in inside for part in (entry if isinstance(entry, tuple) else (entry,))]
        sizes = [self.sizes[part] for part in parts]
        return 1 + sum(values for values, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()
        except (ValueError, LookupError):  # such as 0x without a digit, or half of a surrogate pair
            kind = node.tag.removeprefix(_CORE)
            raise ConstructorError(None, None, f"{node.value[:40]!r} is no {kind}", node.start_mark) from None
        if isinstance(value, int) and value.bit_length() > _INT_BITS:
            raise ConstructorError(None, None, f"an integer has more than {_INT_BITS} bits", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise ConstructorError(None, None, f"{key!r} is no key", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which quotes the texts that `_Loader` would take for floats."""


for _floats in (_Loader, _Dumper):
    _floats.add_implicit_resolver(f"{_CORE}float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML safely; `name` is how messages call the text.

    Raises:
        ConfigError: not YAML, not plain data, or too much of it.
    """
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None


def write_yaml(tree: Any) -> str:
    """Write plain data so that `parse_yaml` gives it back, in its order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
