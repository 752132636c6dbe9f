"""The four pages under hostile texts: nothing of them becomes a tag, and only the page's own script may run."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from oml_ray.retrieval.approximation import ComparedSetting
from oml_ray.retrieval.report import Picture, QueryRow, Report, RerankedStage, render
from oml_ray.retrieval.report.doctor_page import DoctorPage, Finding, Measure, render_doctor
from oml_ray.retrieval.report.search_page import SearchItem, SearchPage, SearchRow, render_search
from oml_ray.retrieval.report.sweep_page import SweepPage, SweepTrial, render_sweep

EVILS = [
    "<script>alert(1)</script>\"><img src=//x onerror=alert(1)><a href='javascript:alert(1)'>' onclick='alert(1)",
    "</title></style></script></pre></svg><iframe src=//x></iframe>--><svg/onload=alert(1)>]]><base href=//x>",
    "{{ 7 * 191 }}{% for x in ''.__class__.mro() %}{{ x }}{% endfor %}&lt;script&gt;&#60;b&#62;$\\frac{<b>}$ $x^2",
]
ALLOWED_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "script", "h1", "h2", "h3", "p"),
    *("div", "span", "strong", "a", "br", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre"),
    *("figure", "figcaption", "img", "svg", "g", "path", "text", "defs", "use", "rect", "clippath", "line", "circle"),
    *("polyline", "polygon", "image", "lineargradient", "stop", "tspan"),
}


class Seen(HTMLParser):
    """The tags, attributes, scripts and texts of a page, as a browser takes them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        (self.scripts if self.inside == "script" else self.texts).append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def report(evil: str) -> str:
    score = {"value": 0.5, "ci95": [0.4, 0.6], "change": 0.1, "change_ci95": [0.0, 0.2]}
    family = {"cmc": {"1": score}, evil: {"1": score}}
    metrics = {name: {evil: family} for name in ("categories",)} | {"overall": family}
    metrics |= {name: {evil: evil, "n": 1} for name in ("counts", "timings", "versions")}
    row = QueryRow(Picture(image(), evil), [Picture(image(), evil, 0.5, True)], [Picture(image(), evil)], {evil: 0.5})
    history = [{"kind": evil, "epoch": 0, "step": 1, evil: 0.5}, {"kind": "validation", "epoch": 0, f"{evil}.1": 0.5}]
    distances = np.linspace(0, 1, 9)
    return render(
        Report(
            title=evil, metrics=metrics, baseline=metrics, history=history, positive_distances=distances,
            negative_distances=distances, worst=[row], random=[row], config=evil, bad_images=[(evil, evil)],
            baseline_title=evil, comparisons=[ComparedSetting(evil, 5, 0.5, {evil: {evil: score}}, 1.0, 1, 1.0)],
            reranking=[RerankedStage(evil, {evil: {evil: score}})],
        )
    )  # fmt: skip


def search(evil: str) -> str:
    item = SearchItem(evil, evil, image(), evil, 0.5)
    lost = SearchItem(evil, evil, None, evil, 0.5)
    metrics: dict[str, Any] = {name: {evil: {evil: evil}} for name in ("counts", "timings", "versions")}
    rows = [SearchRow(item, [item, lost])]
    return render_search(SearchPage(evil, rows, 1, 1, 1, metrics, evil, [evil], [(evil, evil)]))


def sweep(evil: str) -> str:
    values = [{evil: evil, "lr": 0.1}, {evil: [evil, {evil: evil}], "lr": 0.2}, {evil: None, "lr": 0.3}]
    trials = [
        SweepTrial(f"{n}", "finished", value, 0.5 + n, 1, 1, 1.0, [(1, 0.5)], evil) for n, value in enumerate(values)
    ]
    return render_sweep(
        SweepPage(
            title=evil, metric="cmc.1", larger_is_better=True, entries=[[evil], ["lr"]], log_keys=["lr"],
            trials=trials, best=trials[0].name, facts={evil: evil}, links={evil: "best/report.html"}, best_config=evil,
            versions={evil: evil}, config=evil,
        )
    )  # fmt: skip


def doctor(evil: str) -> str:
    group = [SearchItem(evil, evil, image(), evil, 0.5), SearchItem(evil, evil, None, evil, 0.5)]
    return render_doctor(
        DoctorPage(
            title=evil, table=[evil], findings=[Finding(evil, evil, 2, 1, [group])], notes=[evil],
            bad_images=[(evil, evil)], num_bad_images=1, labels=[(1, 2, 3)], quantiles=[0.5],
            measures=[Measure(evil, np.linspace(0, 1, 9), [0.5])], versions={evil: evil}, config=evil,
        )
    )  # fmt: skip


PAGES: dict[str, Callable[[str], str]] = {name.__name__: cache(name) for name in (report, search, sweep, doctor)}


@pytest.mark.parametrize("evil", EVILS, ids=["tags", "ends", "templates"])
@pytest.mark.parametrize("name", PAGES)
def test_hostile_texts_stay_texts(name: str, evil: str) -> None:
    seen, plain = Seen(PAGES[name](evil)), Seen(PAGES[name]("plain"))
    assert set(seen.tags) <= ALLOWED_TAGS
    assert [tag for tag in seen.tags if tag in ("script", "img", "a", "meta", "style", "iframe", "base", "link")] == [
        tag for tag in plain.tags if tag in ("script", "img", "a", "meta", "style")
    ]
    assert {attribute for _, attribute, _ in seen.attributes} == {attribute for _, attribute, _ in plain.attributes}
    assert not [attribute for _, attribute, _ in seen.attributes if attribute.startswith("on")]
    for tag, attribute, value in seen.attributes:
        if attribute in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert value.startswith(("data:image/", "#")) or (tag, value) == ("a", "best/report.html")
    # The text stands there as it is, more than once: in the title, and wherever else it was given.
    everything = " ".join(seen.texts)
    assert everything.count(evil) >= 5
    assert "1337" not in everything, "nothing of a user's text is taken for a template"


@pytest.mark.parametrize("name", PAGES)
def test_the_policy_lets_the_pages_own_script_run_and_nothing_else(name: str) -> None:
    seen = Seen(PAGES[name](EVILS[0]))
    (policy,) = [value for tag, attribute, value in seen.attributes if tag == "meta" and "default-src" in value]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in seen.scripts]
    expected = {"default-src": "'none'", "img-src": "data:", "style-src": "'unsafe-inline'"}
    assert rules == expected | ({"script-src": f"'sha256-{hashes[0]}'"} if hashes else {})
    assert len(hashes) == (0 if name in ("search", "doctor") else 1)


def test_the_policy_comes_before_all_that_it_is_to_hold_for() -> None:
    for name in PAGES:
        text = PAGES[name]("plain")
        head = text[: text.index("Content-Security-Policy")]
        assert not re.search(r"<(script|style|img|title|link)", head)
