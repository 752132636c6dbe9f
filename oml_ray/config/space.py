"""The space of a sweep: the values that dotted keys of a training config may take, and how they are drawn."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Discriminator, Field, Tag, model_validator

from oml_ray.config.nodes import Node, Rate
from oml_ray.errors import ConfigError

Values = dict[str, Any]
"""A value for each entry of a space."""
MAX_COMBINATIONS = 1000

_KEY = r"[^\s\[\],.]+(?:\.[^\s\[\],.]+)*"
_ENTRY = re.compile(rf"{_KEY}|\[\s*{_KEY}(?:\s*,\s*{_KEY})+\s*\]")
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Ends(Node):
    """A range of numbers, named by the only field of its kind."""

    @property
    def ends(self) -> tuple[Any, Any]:
        """Smallest and largest value as they stand in the config."""
        low, high = next(iter(self.model_dump().values()))
        return low, high

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.ends
        if not low < high:
            raise ValueError(f"the first end must be below the second, found {[low, high]}")
        return self


class Uniform(_Ends):
    uniform: Annotated[list[_Finite], Field(min_length=2, max_length=2)]
    """[smallest, largest]: every number between them is as likely."""

    @property
    def corners(self) -> list[Any]:
        """Values that bound all others."""
        return list(self.ends)

    def at(self, share: float) -> float:
        """The value below which `share` of all draws lie."""
        low, high = self.ends
        return float(low + share * (high - low))


class LogUniform(_Ends):
    loguniform: Annotated[list[Rate], Field(min_length=2, max_length=2)]
    """[smallest, largest], both positive: every order of magnitude between them is as likely."""

    @property
    def corners(self) -> list[Any]:
        """Values that bound all others."""
        return list(self.ends)

    def at(self, share: float) -> float:
        """The value below which `share` of all draws lie."""
        low, high = self.ends
        return float(min(max(low * math.exp(share * math.log(high / low)), low), high))


class RandInt(_Ends):
    randint: Annotated[list[int], Field(min_length=2, max_length=2)]
    """[smallest, end]: integers, the end itself excluded, as in Ray Tune."""

    @property
    def corners(self) -> list[Any]:
        """Values that bound all others."""
        return list(dict.fromkeys([self.ends[0], self.ends[1] - 1]))

    def at(self, share: float) -> int:
        """The value below which `share` of all draws lie."""
        low, high = self.ends
        return int(low + math.floor(share * (high - low)))


class Choice(Node):
    choice: Annotated[list[Any], Field(min_length=1)]
    """Values, each as likely: numbers, texts, or whole nodes."""

    @property
    def corners(self) -> list[Any]:
        """All values."""
        return self.choice

    def at(self, share: float) -> Any:
        """The value below which `share` of all draws lie."""
        return self.choice[math.floor(share * len(self.choice))]


class Grid(Node):
    grid: Annotated[list[Any], Field(min_length=1)]
    """Values that are all tried, with every value of the other grid keys."""

    @property
    def corners(self) -> list[Any]:
        """All values."""
        return self.grid


KINDS = {"uniform": Uniform, "loguniform": LogUniform, "randint": RandInt, "choice": Choice, "grid": Grid}


def _kind(value: object) -> str | None:
    keys = value.keys() if isinstance(value, dict) else getattr(type(value), "model_fields", {}).keys()
    return next((kind for kind in KINDS if list(keys) == [kind]), None)


Domain = Annotated[
    Annotated[Uniform, Tag("uniform")]
    | Annotated[LogUniform, Tag("loguniform")]
    | Annotated[RandInt, Tag("randint")]
    | Annotated[Choice, Tag("choice")]
    | Annotated[Grid, Tag("grid")],
    Discriminator(
        _kind,
        custom_error_type="domain_kind",
        custom_error_message=f"needs exactly one of the keys: {', '.join(KINDS)}",
    ),
]
Space = Mapping[str, Uniform | LogUniform | RandInt | Choice | Grid]


def keys_of(entry: str) -> list[str]:
    """Dotted keys that an entry of a space sets.

    Example:
        >>> keys_of("criterion.margin"), keys_of("[sampler.n_labels, sampler.n_instances]")
        (['criterion.margin'], ['sampler.n_labels', 'sampler.n_instances'])
    """
    text = entry.strip()
    if not text.startswith("["):
        return [text]
    return [key.strip() for key in text.removeprefix("[").removesuffix("]").split(",")]


def assignments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, those of joint entries one by one.

    Example:
        >>> assignments({"criterion.margin": 0.2, "[a.b, a.c]": [8, 4]})
        {'criterion.margin': 0.2, 'a.b': 8, 'a.c': 4}
    """
    result: dict[str, Any] = {}
    for entry, value in values.items():
        keys = keys_of(entry)
        result.update(zip(keys, value, strict=True) if len(keys) > 1 else [(keys[0], value)])
    return result


def shown(values: Mapping[str, Any]) -> str:
    """Values for people.

    Example:
        >>> shown({"criterion.margin": 0.123456789, "[a.b, a.c]": [8, 4]})
        'criterion.margin=0.1235 a.b=8 a.c=4'
    """
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in assignments(values).items()
    )


def check_entries(space: Space) -> None:
    """Refuse entries that are no keys, that set a key twice, or that draw too few values for their keys.

    Raises:
        ValueError: one sentence that names the entry.
    """
    owners: dict[str, str] = {}
    for entry, domain in space.items():
        keys = keys_of(entry)
        if not _ENTRY.fullmatch(entry.strip()):
            raise ValueError(
                f"space: {entry!r} is neither a dotted key, such as criterion.margin, nor several in brackets, such as "
                "'[sampler.n_labels, sampler.n_instances]'."
            )
        if len(keys) > 1:
            _check_joint(entry, domain, len(keys))
        for key in keys:
            for other, owner in owners.items():
                if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                    raise ValueError(
                        f"space: {key} ({entry}) and {other} ({owner}) set the same key: keep one of them."
                    )
            owners[key] = entry


def _check_joint(entry: str, domain: Node, num_keys: int) -> None:
    if not isinstance(domain, Choice | Grid):
        raise ValueError(f"space: {entry}: several keys are drawn together by choice or grid alone.")
    for value in domain.corners:
        if not isinstance(value, list) or len(value) != num_keys:
            raise ValueError(f"space: {entry}: each value should be a list of {num_keys}, found {value!r}.")


def with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a plain config with the values of a space's entries set.

    Raises:
        ConfigError: a key leads through a value that has no keys.
    """
    result = deepcopy(dict(tree))
    for dotted, value in assignments(values).items():
        *parents, last = dotted.split(".")
        node = result
        for depth, part in enumerate(parents):
            if node.get(part) is None:
                node[part] = {}
            if not isinstance(node[part], dict):
                found = ".".join(parents[: depth + 1])
                raise ConfigError(f"space: {dotted}: {found} is the value {node[part]!r}, which has no keys.")
            node = node[part]
        node[last] = deepcopy(value)
    return result


def combinations(space: Space, seed: int = 0) -> Iterator[Values]:
    """Combinations of all values and of the ends of ranges; of many, as many as are soon checked, chosen at random.

    Every value is in at least one of them.
    """
    corners = {entry: domain.corners for entry, domain in space.items()}
    if math.prod(map(len, corners.values())) <= MAX_COMBINATIONS:
        for values in itertools.product(*corners.values()):
            yield dict(zip(corners, values, strict=True))
        return
    generator = np.random.default_rng(seed)

    def some() -> Values:
        return {entry: values[generator.integers(len(values))] for entry, values in corners.items()}

    for entry, domain in space.items():
        for value in domain.corners:
            yield some() | {entry: value}
    for _ in range(MAX_COMBINATIONS):
        yield some()


def draw(space: Space, seed: int, index: int) -> Values:
    """The values of trial `index`: a pure function of its arguments, whatever was drawn before.

    Grid entries go through all their combinations, the first entry slowest; the others are drawn anew for each trial.
    """
    grids = {entry: domain.grid for entry, domain in space.items() if isinstance(domain, Grid)}
    position = index % math.prod(map(len, grids.values()))
    on_grid = {}
    for entry in reversed(grids):
        position, at = divmod(position, len(grids[entry]))
        on_grid[entry] = grids[entry][at]
    shares = iter(np.random.default_rng([seed, index]).random(len(space)).tolist())
    return {
        entry: on_grid[entry] if isinstance(domain, Grid) else domain.at(next(shares))
        for entry, domain in space.items()
    }
