"""The report is one balanced, escaped, deterministic HTML file that fetches nothing."""

import base64
import dataclasses
import io
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from oml_ray.errors import ImageError, StorageError
from oml_ray.retrieval.approximation import ComparedSetting
from oml_ray.retrieval.report import Picture, QueryRow, Report, page, plots, render, write_report

EVIL = "<script>alert(1)</script>\"'&"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser sees: every tag closed in order, attributes, and text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data.strip())

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]

    def cells(self, head: str) -> list[str]:
        """The texts of the table row that starts with `head`, up to the next row head."""
        texts = [text for text in self.texts if text]
        start = texts.index(head)
        return texts[start : start + 6]


def image(kind: str, color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, kind)
    return buffer.getvalue()


def score(value: float | None) -> dict[str, Any]:
    return {"value": value, "ci95": None if value is None else [value - 0.02, value + 0.02]}


def metrics(value: float, text: str = "shoes") -> dict[str, Any]:
    of_family = {"cmc": {"1": score(value), "5": score(value + 0.05)}, "fnmr": {"0.01": score(None)}, "mrr": score(0.5)}
    return {
        "overall": of_family,
        "categories": {text: of_family, "lamps": {"cmc": {"1": score(0.25)}}},
        "counts": {"queries": 1234, "without_ground_truth": 2},
        "timings": {"embed_s": 12.5},
        "versions": {"torch": text},
    }


def full(text: str = "shoes") -> Report:
    row = QueryRow(
        Picture(image("PNG"), f"query {text}"),
        [
            Picture(image("JPEG", "green"), f"near {text}", 0.125, True),
            Picture(image("PNG", "blue"), "far", 0.25, False),
        ],
        [Picture(image("PNG", "gray"), f"missed {text}", 0.75)],
        {"cmc.1": 0.0},
    )
    history = [
        {"kind": "train", "epoch": 0, "step": 10, "loss": 0.5, "lr": 1e-3, "images_per_s": 600.0, "note": text},
        {"kind": "train", "epoch": 0, "step": 20, "loss": float("nan"), "lr": 1e-3, "images_per_s": None},
        {"kind": "validation", "epoch": 0, "step": 20, "cmc.1": 0.25, "cmc.5": np.float32(0.5), "map.5": 0.125},
    ]
    rng = np.random.default_rng(0)
    return Report(
        title=f"run {text}",
        metrics=metrics(0.75, text),
        baseline=metrics(0.5, text),
        history=history,
        positive_distances=rng.normal(0.4, 0.1, 300).astype(np.float32),
        negative_distances=rng.normal(1.0, 0.1, 400).astype(np.float32),
        worst=[row],
        random=[row, row],
        config=f"name: {text}\n",
        bad_images=[(f"images/{text}.jpg", f"truncated {text}")],
        baseline_title=f"before {text}",
        comparisons=comparisons(f"index {text}"),
    )


def comparisons(text: str = "IVF16,Flat") -> list[ComparedSetting]:
    change = {"value": 0.5, "change": -0.25, "change_ci95": [-0.375, 0.125]}
    nothing = {"value": None, "change": None, "change_ci95": None}
    return [
        ComparedSetting("exact", 10, 1.0, {"cmc": {"1": {**change, "change": 0.0}}}, 12.5, 0, 0.0, is_pareto=True),
        ComparedSetting(text, 10, 0.75, {"cmc": {"1": change}, "map": {"5": nothing}}, 2500.0, 3 * 2**19, 2.0, True),
        ComparedSetting("slow", 10, 0.5, {}, 1.25, 1023, 0.125),
    ]


def minimal(**changes: Any) -> Report:
    nothing = np.zeros(0, dtype=np.float32)
    return dataclasses.replace(Report("run", {}, None, [], nothing, nothing, [], [], ""), **changes)


def sections(text: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)"', text)


def test_a_full_report_has_all_sections() -> None:
    text = render(full())
    assert sections(text) == [
        *("metrics", "training", "categories", "distances", "approximate-search", "queries", "bad-images", "run")
    ]
    seen = Page(text)
    assert seen.tags["img"] == 3 * 4
    # loss, learning rate, images/s, cmc, map; bars of cmc@1 and mrr (fnmr is unknown everywhere); the histogram; Pareto
    assert seen.tags["svg"] == 5 + 2 + 1 + 1
    assert {"1,234", "12.500", "0.125", "✓", "✗", "○", "images/shoes.jpg"} <= set(seen.texts)
    assert "300 positive pairs" in text
    assert "400 negative pairs" in text


def test_a_report_of_nothing_is_a_page() -> None:
    text = render(minimal())
    assert sections(text) == []
    assert "run" in Page(text).texts


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metrics": {"overall": {"cmc": {"1": score(0.5)}}}}, ["metrics"]),
        ({"history": [{"kind": "train", "epoch": 0, "step": 1, "loss": 0.5}]}, ["training"]),
        ({"positive_distances": np.ones(3)}, ["distances"]),
        ({"negative_distances": np.ones((2, 2))}, ["distances"]),
        ({"random": [QueryRow(Picture(image("PNG"), "alone"), [], [])]}, ["queries"]),
        ({"bad_images": [("a.jpg", "truncated")]}, ["bad-images"]),
        ({"config": "seed: 42"}, ["run"]),
        ({"comparisons": comparisons()}, ["approximate-search"]),
    ],
)
def test_what_is_missing_is_left_out(changes: dict[str, Any], expected: list[str]) -> None:
    text = render(minimal(**changes))
    assert sections(text) == expected
    Page(text)


def test_metrics_stand_beside_the_baseline() -> None:
    seen = Page(render(full()))
    assert seen.cells("cmc@1") == ["cmc@1", "0.750", "[0.730, 0.770]", "0.500", "[0.480, 0.520]", "+0.250"]
    assert seen.cells("fnmr@0.01") == ["fnmr@0.01", "—", "—", "—", "—", "—"]
    assert seen.cells("mrr") == ["mrr", "0.500", "[0.480, 0.520]", "0.500", "[0.480, 0.520]", "+0.000"]
    without = render(dataclasses.replace(full(), baseline=None))
    assert "before shoes" not in without
    assert Page(without).cells("cmc@1")[:4] == ["cmc@1", "0.750", "[0.730, 0.770]", "cmc@5"]


def test_settings_of_the_search_are_numbered_and_compared() -> None:
    text = render(minimal(comparisons=comparisons()))
    seen = Page(text)
    cells = [text for text in seen.texts if text]
    table = cells[cells.index("#") :]
    rows = [
        "#, setting, Pareto, recall@10, queries/s, memory, build, s, cmc@1, change, map@5, change",
        "1, exact, ●, 1.000, 12.500, 0 B, 0.000, 0.500, +0.000, [-0.375, +0.125], —, —",
        "2, IVF16,Flat, ●, 0.750, 2,500.0, 1.5 MiB, 2.000, 0.500, -0.250, [-0.375, +0.125], —, —",
        "3, slow, 0.500, 1.250, 1023 B, 0.125, —, —, —, —",
    ]
    assert ", ".join(table) == ", ".join(rows)
    svg = text[text.index("<svg") : text.index("</svg>")]
    assert re.findall(r">(\d)</text>", svg)[-3:] == ["1", "2", "3"]  # beside their points
    assert "recall of the exact neighbors" in svg


@pytest.mark.parametrize("rates", [[0.0, 5.0], [1e-9, 1e9], [3.0]])
def test_any_speeds_can_be_drawn(rates: list[float]) -> None:
    svg = plots.pareto("<speed>", [plots.Point(EVIL, 1.0, rate, rate == rates[0]) for rate in rates])
    assert Page(svg).tags["svg"] == 1


def test_texts_of_users_are_escaped_everywhere() -> None:
    text = render(full(EVIL))
    seen = Page(text)
    assert seen.tags["script"] == 1  # the page's own
    assert "<script>alert" not in text
    assert not [name for _, name, _ in seen.attributes if name.startswith("on")]
    for expected in (
        f"run {EVIL}",
        f"before {EVIL}",
        f"index {EVIL}",
        f"near {EVIL}",
        f"images/{EVIL}.jpg",
        f"truncated {EVIL}",
        EVIL,
    ):
        assert expected in seen.texts
    assert f"name: {EVIL}" in seen.texts
    assert f"missed {EVIL}" in seen.values("alt")


def test_the_page_fetches_nothing() -> None:
    text = render(full())
    seen = Page(text)
    fetching = seen.values("src", "href", "xlink:href", "srcset", "data", "action", "poster")
    assert fetching
    assert all(value.startswith(("data:image/", "#")) for value in fetching)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert any(value.startswith("default-src 'none'") for value in seen.values("content"))


def test_pictures_are_embedded_as_they_are() -> None:
    sources = Page(render(full())).values("src")
    assert f"data:image/png;base64,{base64.b64encode(image('PNG')).decode()}" in sources
    assert f"data:image/jpeg;base64,{base64.b64encode(image('JPEG', 'green')).decode()}" in sources


def test_frames_say_whether_a_neighbor_is_relevant() -> None:
    classes = Counter(
        value for tag, name, value in Page(render(full())).attributes if (tag, name) == ("figure", "class")
    )
    assert classes == {"relevant": 3, "irrelevant": 3, "missed": 3}


def test_equal_reports_give_equal_pages_whatever_the_users_matplotlibrc() -> None:
    once = render(full())
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path"}):
        assert render(full()) == once
        assert matplotlib.rcParams["font.size"] == 30


def test_another_image_format_is_an_error() -> None:
    row = QueryRow(Picture(image("BMP"), "a bitmap"), [], [])
    with pytest.raises(ImageError, match=r"'a bitmap'.*neither JPEG nor PNG"):
        render(minimal(worst=[row]))


def test_write_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, minimal(title="first"))
    write_report(str(path), full())
    assert path.read_text(encoding="utf-8") == render(full())
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(path, minimal())
    old = path.read_bytes()

    def refuse(self: Path, target: Path) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StorageError, match=r"report\.html cannot be written: disk is full"):
        write_report(path, full())
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_path_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"report\.html cannot be written: "):
        write_report(tmp_path / "file" / "report.html", minimal())


def test_long_lists_are_cut_and_say_so() -> None:
    bad = [(f"images/{i}.jpg", "truncated") for i in range(page.MAX_BAD_IMAGES + 1)]
    categories = {f"c{i}": {"cmc": {"1": score(i / 100)}} for i in range(plots.MAX_BARS + 1)}
    text = render(minimal(bad_images=bad, metrics={"overall": {"cmc": {"1": score(0.5)}}, "categories": categories}))
    assert "1,001 not readable, the first 1,000 of them" in text
    assert "images/999.jpg" in text
    assert "images/1000.jpg" not in text
    assert "the lowest 30 of 31 categories" in text
    svg = text[text.index("<svg") : text.index("</svg>")]
    assert ">c29<" in svg
    assert ">c30<" not in svg
    assert ">c30<" in text


def test_a_long_history_does_not_make_a_long_page() -> None:
    def history(num_steps: int) -> list[dict[str, Any]]:
        loss = np.random.default_rng(0).random(num_steps)
        return [{"kind": "train", "step": step, "loss": float(loss[step])} for step in range(num_steps)]

    assert len(render(minimal(history=history(50_000)))) < 1.2 * len(render(minimal(history=history(500))))


@pytest.mark.parametrize("name", ["$5 - $10 _x^2", "靴", "a\x00b\nc\x1bd", "x" * 500, "", "&lt;", "]]>", "-->"])
def test_any_name_of_a_category_can_be_drawn(name: str) -> None:
    svg = plots.bars("cmc@1", [plots.Bar(name, 0.5, (0.4, 0.6)), plots.Bar("no interval", 0.0)], overall=0.5)
    assert Page(svg).tags["svg"] == 1
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", svg)


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        ([1.0], [1.0]),
        ([0.0, 0.0], []),
        ([1.0, np.nextafter(1.0, 2.0)], [np.inf, np.nan]),
        ([1e30], [-1e30]),
    ],
)
def test_any_distances_can_be_drawn(positive: list[float], negative: list[float]) -> None:
    report = minimal(positive_distances=np.array(positive), negative_distances=np.array(negative))
    assert Page(render(report)).tags["svg"] == 1


def test_distances_that_are_not_finite_are_no_distances() -> None:
    assert sections(render(minimal(positive_distances=np.array([np.nan]), negative_distances=np.array([np.inf])))) == []


def test_an_unknown_value_sorts_as_unknown() -> None:
    text = render(
        minimal(metrics={"overall": {"pcf": {"0.5": {"value": None, "ci95": None}}, "ap": {"value": np.nan}}})
    )
    assert Page(text).values("data-value") == ["", "", "", ""]
