"""The page of a sweep is one balanced, escaped HTML file that fetches nothing, whatever was swept and came of it."""

from __future__ import annotations

import dataclasses
import math
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oml_ray.retrieval.report.sweep_page import SweepPage, SweepTrial, render_sweep
from oml_ray.retrieval.report.sweep_plots import Scale

EVIL = "\"'><script>alert(1)</script>&amp;"
VOID = {"meta", "br"}


class Seen(HTMLParser):
    """What a browser sees: every tag closed in order, attributes, texts, and the rows of the table of trials."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]) and data.strip():
            self.texts.append(data.strip())
            if "tr" in self.open:
                self.rows[-1].append(data.strip())


def trial(name: str, value: float | None, margin: Any, labels: int, **changes: Any) -> SweepTrial:
    values = {"criterion.margin": margin, "sampler.n_labels": labels, "sampler.n_instances": 32 // labels}
    curve = [] if value is None else [(0, 0.1), (1, value)]
    return SweepTrial(name, "finished", values, value, 1, 1, 12, curve, **changes)


def page(**changes: Any) -> SweepPage:
    trials = [
        trial("0001", 0.75, 0.2, 8),
        dataclasses.replace(trial("0000", 0.5, 0.05, 4), state="stopped"),
        dataclasses.replace(trial("0002", None, 0.4, 8, reason=EVIL), state="failed"),
    ]
    shown = SweepPage(
        title=EVIL,
        metric="cmc.1",
        larger_is_better=True,
        entries=[["criterion.margin"], ["sampler.n_labels", "sampler.n_instances"]],
        log_keys=["criterion.margin"],
        trials=trials,
        best="0001",
        facts={"cmc.1": 0.75, "checkpoint": EVIL},
        links={"its evaluation": "best/report.html"},
        best_config=EVIL,
        versions={"ray": "2.60"},
        config=EVIL,
    )
    return dataclasses.replace(shown, **changes)


def test_the_page_shows_what_came_of_each_trial() -> None:
    seen = Seen(render_sweep(page()))
    rows = {row[0]: row for row in seen.rows if row and row[0].isdigit()}
    assert rows["0001"] == ["0001", "finished", "0.750", "0.2", "8", "4", "1", "1", "12"]
    assert rows["0000"][1] == "stopped"
    assert rows["0002"] == ["0002", EVIL], "the last table says why it failed"
    assert next(row[1:3] for row in seen.rows if row[:1] == ["0002"]) == ["failed", "—"]
    assert seen.tags.count("svg") == 6  # parallel coordinates, a heat map, three keys, the curves
    assert ("href", "best/report.html") in seen.attributes
    assert "3 trials: 1 finished, 1 stopped, 1 failed. cmc@1, larger is better." in " ".join(seen.texts)


def test_texts_stay_texts_and_nothing_is_fetched() -> None:
    text = render_sweep(page())
    seen = Seen(text)
    assert seen.tags.count("script") == 1
    assert seen.tags.count("img") == 0
    assert seen.texts.count(EVIL) >= 4
    assert not [value for name, value in seen.attributes if name == "src"]
    assert render_sweep(page()) == text


def test_a_sweep_of_which_nothing_came() -> None:
    failed = [dataclasses.replace(each, value=None, curve=(), state="failed") for each in page().trials]
    seen = Seen(render_sweep(page(trials=failed, best=None, facts={}, links={}, best_config="")))
    assert seen.tags.count("svg") == 0
    assert "3 failed" in " ".join(seen.texts)


MIXED: list[list[Any]] = [
    [0.1, 0.2, 0.3],
    [4, 8, 4],
    ["adamw", "sgd", "adamw"],
    [None, "a", 3],
    [True, False, True],
    [{"name": "triplet"}, {"name": "arcface", "margin": 0.5}, {"name": "triplet"}],
    [1, 1, 1],
    [1e-9, 1e9, 1.0],
]


@pytest.mark.parametrize("margins", MIXED, ids=str)
@pytest.mark.parametrize("larger_is_better", [True, False])
def test_any_values_can_be_drawn(margins: list[Any], larger_is_better: bool) -> None:
    trials = [trial(f"{index:04d}", 0.5, margin, 8) for index, margin in enumerate(margins)]
    seen = Seen(render_sweep(page(trials=trials, best="0000", larger_is_better=larger_is_better)))
    assert seen.tags.count("svg") == 6


def test_one_key_needs_no_coordinates() -> None:
    trials = [SweepTrial("0000", "finished", {"seed": 1}, 0.5, 1, 1, 2, [(1, 0.5)])]
    seen = Seen(render_sweep(page(trials=trials, best="0000", entries=[["seed"]], log_keys=[])))
    assert seen.tags.count("svg") == 2


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), st.booleans())
def test_numbers_lie_by_size(numbers: list[float], is_log: bool) -> None:
    scale = Scale.of(numbers, is_log=is_log)
    places = [scale.at(number) for number in numbers]
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert all(
        (a <= b) == (one <= other) or math.isclose(a, b, abs_tol=1e-9)
        for one, a in zip(numbers, places, strict=True)
        for other, b in zip(numbers, places, strict=True)
    )
    names, count = scale.bins()
    assert len(names) == count
    assert all(0 <= scale.bin(number) < count for number in numbers)


def test_values_that_are_no_numbers_lie_side_by_side() -> None:
    scale = Scale.of([(16, 2), (4, 8), (8, 4), (4, 8)])
    assert scale.names == ("4, 8", "8, 4", "16, 2")
    assert [scale.at(value) for value in ((4, 8), (8, 4), (16, 2))] == [0, 0.5, 1]
    assert Scale.of([0.01, 1.0], is_log=True).at(0.1) == pytest.approx(0.5)
    assert Scale.of([0.0, 1.0], is_log=True).at(0.1) == pytest.approx(0.1), "zero has no logarithm"
