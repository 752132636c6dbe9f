"""Configs: whatever a file or `--set` says, it is a whole config or one message that names the file or the key."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from campaign_checks import SECONDS, campaign, check_message, damaged, outcome
from hypothesis import example, given
from hypothesis import strategies as st

from oml_ray.config import (
    EmbedConfig,
    EvaluateConfig,
    SearchConfig,
    SweepConfig,
    TrainConfig,
    dump,
    load,
    load_sweep,
    parse_yaml,
    validate,
)
from oml_ray.errors import ConfigError, OmlRayError

pytestmark = pytest.mark.timeout(SECONDS)

ROOT = Path(__file__).parents[2]
SCHEMAS: dict[str, Any] = {
    "train": TrainConfig,
    "embed": EmbedConfig,
    "evaluate": EvaluateConfig,
    "search": SearchConfig,
    "sweep": SweepConfig,
}
SHIPPED = [
    (verb, yaml.safe_load(path.read_text()))
    for verb in SCHEMAS
    for path in sorted((ROOT / "configs" / verb).glob("*.yaml"))
    if "smoke" not in path.name
]
TEXTS = [
    (path.parent.name, path.read_bytes())
    for name in ("figures", "margins")
    for path in sorted((ROOT / "configs").glob(f"*/{name}.yaml"))
]


@pytest.fixture(autouse=True, scope="module")
def _in_the_repository() -> Iterator[None]:
    """Where the base of the shipped sweep lies."""
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


def names_in(node: Any) -> set[str]:
    """Every key and text of a config: what belongs somewhere, and can stand in another place."""
    if isinstance(node, dict):
        return set(node).union(*map(names_in, node.values()))
    if isinstance(node, list):
        return set().union(*map(names_in, node))
    return {node} if isinstance(node, str) else set()


KNOWN = sorted({name for _, tree in SHIPPED for name in names_in(tree)})
ODD = [
    "",
    " ",
    "a\nb",
    "\x00",
    "\x1b[2J",
    "../x",
    "/",
    "ü",
    "1e5",
    "0x_",
    "null",
    "<<",
    "=",
    "2001-13-45",
    "[",
    "a" * 999,
]
NUMBERS = [
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    -(2**70),
    10**400,
    0.0,
    -0.5,
    1e-320,
    1e308,
    1e999,
    float("nan"),
    float("-inf"),
]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9),
    st.sampled_from(NUMBERS), st.sampled_from(KNOWN), st.sampled_from(ODD),
)  # fmt: skip
KEYS = st.one_of(st.sampled_from(KNOWN), st.sampled_from(ODD), st.text(max_size=5))
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=9
)


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or position) of a config."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in inside for place in [(node, key), *places(value)]]


@st.composite
def edited(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A shipped config with a few keys removed, renamed, moved, or given other values."""
    verb, tree = draw(st.sampled_from(SHIPPED))
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 4))):
        if not (all_places := places(tree)):
            break
        container, key = draw(st.sampled_from(all_places))
        kind = draw(st.sampled_from(["junk", "junk", "remove", "rename", "wrap", "text", "another's"]))
        if kind == "junk":
            container[key] = draw(JUNK)
        elif kind == "remove":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[draw(KEYS)] = container.pop(key)
        elif kind == "wrap":
            container[key] = [container[key]]
        elif kind == "text":
            container[key] = str(container[key])
        elif kind == "another's":
            other, from_key = draw(st.sampled_from(all_places))
            container[key] = copy.deepcopy(other[from_key])
    return verb, tree


def loaded(verb: str, path: Path, overrides: list[str]) -> Any:
    return load_sweep(path, overrides) if verb == "sweep" else load(SCHEMAS[verb], path, overrides)


def check_whole(config: Any) -> None:
    """An accepted config is of plain values, and what it resolves to is itself that config."""
    if not isinstance(config, OmlRayError):
        text = dump(config)
        assert dump(validate(type(config), parse_yaml(text, "dump"), "dump")) == text


@campaign(300)
@given(edited())
def test_edited_configs(folder: Path, case: tuple[str, dict[str, Any]]) -> None:
    verb, tree = case
    path = folder / "edited.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    check_whole(outcome(lambda: loaded(verb, path, []), str(path)))


def laughs(kind: str) -> bytes:
    """The billion laughs: ten lines that are 9 ** 9 values when their aliases are written out."""
    of = {"list": "[{}]", "mapping": "{{{}}}"}[kind]
    lines = ["a0: &a0 {x: ha}"]
    for level in range(1, 10):
        aliases = [f"k{i}: *a{level - 1}" if kind == "mapping" else f"*a{level - 1}" for i in range(9)]
        lines.append(f"a{level}: &a{level} {of.format(', '.join(aliases))}")
    return "\n".join([*lines, "seed: *a9"]).encode()


def ladder() -> bytes:
    """Anchors that each hold the one before: flat as a text, and very deep as data."""
    return "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 3000)), "seed: *a2999"]).encode()


@st.composite
def damaged_texts(draw: st.DrawFn) -> tuple[str, bytes]:
    verb, text = draw(st.sampled_from(TEXTS))
    return verb, draw(damaged(text))


@campaign(300)
@given(damaged_texts())
@example(("train", laughs("list")))
@example(("train", laughs("mapping")))
@example(("train", ladder()))
@example(("train", b"seed: &a [*a]"))
@example(("train", b"seed: &a {b: *a}"))
@example(("train", b"seed: " + b"[" * 5000))
@example(("train", b"? " * 3000))
@example(("train", b"seed: " + b"9" * 5000))
@example(("train", b"seed: 0x" + b"f" * 5000))
@example(("train", b"seed: 1" + b":59" * 5000))
@example(("train", b"seed: 2001-13-45"))
@example(("train", b"seed: 0x_"))
@example(("train", b"seed: !!int a"))
@example(("train", b'seed: !!int ""'))
@example(("train", b"seed: !!bool a"))
@example(("train", b"seed: !!timestamp a"))
@example(("train", b"seed: !!set {a, b}"))
@example(("train", b'seed: "\\ud800"'))
@example(("train", b"a: &a {b: 1}\nc: {<<: *a}"))
@example(("train", b"a: 1\n---\nb: 2"))
@example(("train", b"%YAML 9.9\n---\na: 1"))
@example(("train", b"\xff\xfea\x00"))
@example(("train", b"\xef\xbb\xbfseed: 1"))
@example(("sweep", b'{base: "\\0", run: {name: a}, space: {seed: {grid: [1]}}}'))
def test_damaged_texts(folder: Path, case: tuple[str, bytes]) -> None:
    verb, text = case
    path = folder / "damaged.yaml"
    path.write_bytes(text)
    check_whole(outcome(lambda: loaded(verb, path, []), str(path)))


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """`--set` texts: keys that exist and others, values that parse and others."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        key = ".".join(draw(st.lists(st.sampled_from(KNOWN), min_size=1, max_size=4)))
        container = draw(st.sampled_from([tree for verb, tree in SHIPPED if verb == "train"]))
        if draw(st.booleans()):
            key = ".".join(draw(st.sampled_from(paths_of(container))))
        value = draw(
            st.one_of(JUNK.map(lambda junk: yaml.safe_dump(junk, default_flow_style=True)), st.text(max_size=20))
        )
        found.append(f"{key}{draw(st.sampled_from(['=', '=', '=', '==', '', '.=', '.a=']))}{value}")
    return found


def paths_of(tree: dict[str, Any]) -> list[list[str]]:
    """The keys that lead to every node of a config."""
    below = [[key, *rest] for key, value in tree.items() if isinstance(value, dict) for rest in paths_of(value)]
    return [[key] for key in tree] + below


@campaign(300)
@given(overrides())
@example(["extractor.embedding_dim" + ".a" * 3000 + "=1"])
@example(["optimizer.options={a: !!binary /w==}"])
@example(["optimizer.options={a: 2001-01-01}"])
@example(['extractor.weights="1e5"'])
@example(['evaluation.gallery={backend: faiss, factory: Flat, parameters: {"a\\nb": x}}'])
@example(["evaluation.gallery={backend: [1]}"])
def test_overrides(given_overrides: list[str]) -> None:
    check_whole(outcome(lambda: load(TrainConfig, ROOT / "configs" / "train" / "figures.yaml", given_overrides)))


@pytest.mark.parametrize("depth", [30, 60, 3000])
def test_a_deep_tree_of_python_is_refused_by_name(depth: int) -> None:
    """Trees come from JSON as well, which our YAML's bounds do not hold for."""
    deep: Any = 1
    for _ in range(depth):
        deep = [deep]
    with pytest.raises(ConfigError) as caught:
        validate(TrainConfig, {**SHIPPED[0][1], "seed": deep}, "meta.json")
    check_message(str(caught.value), "meta.json", "seed")


@pytest.mark.parametrize(
    ("space", "tune"),
    [
        ({"criterion.margin": {"uniform": [0.1, 0.5]}}, {"num_samples": 10**9}),
        ({f"optimizer.options.o{n}": {"grid": list(range(100))} for n in range(5)}, {"search": "grid"}),
    ],
)
def test_a_sweep_without_end_is_refused_before_it_is_drawn(
    space: dict[str, Any], tune: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({"base": "configs/train/figures.yaml", "run": {"name": "a"}, "space": space, "tune": tune})
    )
    with pytest.raises(ConfigError, match=r"would have 10?,000,000,000 trials"):
        load_sweep(path)
