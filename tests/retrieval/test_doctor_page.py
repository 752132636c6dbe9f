"""The page of the data set doctor is one balanced, escaped HTML file that fetches nothing and runs nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from page_checks import EVIL, Seen, check_fetches_nothing, image

from oml_ray.errors import ImageError
from oml_ray.retrieval.report.doctor_page import MAX_LABELS, DoctorPage, Finding, Measure, render_doctor
from oml_ray.retrieval.report.page import MAX_BAD_IMAGES
from oml_ray.retrieval.report.search_page import SearchItem


def page(text: str = "cats", **changes: Any) -> DoctorPage:
    pair = [
        SearchItem(f"row {text}", f"one {text}", image()),
        SearchItem("row 8", f"other {text}", image("PNG"), distance=3),
        SearchItem("row 9", "gone", problem=f"lost {text}"),
    ]
    whole = DoctorPage(
        title=f"Check of {text}",
        table=[f"table {text}", "  train: 5 instances"],
        findings=[
            Finding(f"copies {text}", f"meaning {text}", 1234, 7, [pair]),
            Finding("blank", "nothing to see", 0),
        ],
        notes=[f"note {text}"],
        bad_images=[(f"bad {text}", f"reason {text}")],
        num_bad_images=1,
        labels=[(-3, 1200, 2)],
        measures=[Measure(f"width {text}", np.array([1.0, 2.5, 9.0]), [1.0, 2.5, 9.0])],
        quantiles=[0.0, 0.5, 1.0],
        versions={f"version {text}": text},
        config=f"name: {text}",
    )
    return dataclasses.replace(whole, **changes)


def test_texts_of_users_are_escaped_everywhere() -> None:
    text = render_doctor(page(EVIL))
    seen = Seen(text)
    assert seen.tags["script"] == 0
    assert seen.tags["img"] == 2
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "<script" not in text
    everything = " | ".join(seen.texts)
    for expected in (
        *("Check of", "row", "other", "no picture: lost", "table", "copies", "meaning", "note", "bad", "reason"),
        *("width", "version", "name:"),
    ):
        assert f"{expected} {EVIL}" in everything, expected
    assert seen.values("alt") == [f"one {EVIL}", f"other {EVIL}"]


def test_the_page_fetches_nothing() -> None:
    check_fetches_nothing(render_doctor(page()), pictures=2)


def test_findings_are_counted_and_shown_with_what_is_left_out() -> None:
    texts = Seen(render_doctor(page())).texts
    start = texts.index("looked for")
    assert texts[start : start + 6] == ["looked for", "rows", "copies cats", "1,234", "blank", "0"]
    assert "1,234 rows. meaning cats The first 1 of 7 are shown." in texts
    assert not [text for text in texts if "nothing to see" in text], "what was not found has no section"
    start = texts.index("row cats")
    assert texts[start : start + 9] == [
        *("row cats", "one cats", "3", "· row 8", "other cats"),
        *("no picture: lost cats", "row 9", "gone", "Images that cannot be read"),
    ]


def test_all_groups_are_shown_without_a_word() -> None:
    finding = Finding("copies", "meaning", 1, 1, [[SearchItem("row 1", "a.png")]])
    texts = Seen(render_doctor(page(findings=[finding]))).texts
    assert "1 row. meaning" in texts


def test_measures_are_a_table_and_plots() -> None:
    text = render_doctor(page())
    texts = Seen(text).texts
    start = texts.index("quantile")
    assert texts[start : start + 8] == ["quantile", "0%", "50%", "100%", "width cats", "1.000", "2.500", "9.000"]
    assert text.count("<svg") == 1
    assert "<svg" not in render_doctor(page(measures=[]))


def test_one_value_has_a_plot() -> None:
    assert "<svg" in render_doctor(page(measures=[Measure("width", np.array([96.0] * 5), [96.0] * 3)]))


def test_long_lists_are_cut_and_say_so() -> None:
    text = render_doctor(
        page(
            bad_images=[(f"{row}.jpg", "truncated") for row in range(MAX_BAD_IMAGES + 1)],
            num_bad_images=54321,
            labels=[(row, 1, 1) for row in range(10**6, 10**6 + MAX_LABELS + 1)],
        )
    )
    assert "54,321 not readable, 1,000 of them" in text
    assert ">999.jpg<" in text
    assert ">1000.jpg<" not in text
    assert "1,001 labels, the first 1,000 of them" in text
    assert ">1000999<" in text
    assert ">1001000<" not in text


def test_a_clean_table_has_no_lists() -> None:
    text = render_doctor(page(findings=[], bad_images=[], num_bad_images=0, labels=[], measures=[], notes=[]))
    assert "cannot be read" not in text
    assert "both splits" not in text
    assert "Sizes" not in text


def test_equal_contents_give_equal_pages() -> None:
    assert render_doctor(page()) == render_doctor(page())


def test_another_image_format_is_an_error() -> None:
    finding = Finding("copies", "", 1, 1, [[SearchItem("row 3", "a.bmp", image("BMP"))]])
    with pytest.raises(ImageError, match="neither JPEG nor PNG"):
        render_doctor(page(findings=[finding]))
