"""The page of a search is one balanced, escaped HTML file that fetches nothing and runs nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from page_checks import EVIL, Seen, check_fetches_nothing, image

from oml_ray.errors import ImageError
from oml_ray.retrieval.report.page import MAX_BAD_IMAGES
from oml_ray.retrieval.report.search_page import SearchItem, SearchPage, SearchRow, render_search


def page(text: str = "cats", **changes: Any) -> SearchPage:
    neighbors = [
        SearchItem(f"id {text}", f"near {text}", image("PNG"), distance=0.125),
        SearchItem("id 8", f"far {text}", distance=0.25),
        SearchItem("id 9", "gone", problem=f"lost {text}", distance=0.5),
    ]
    whole = SearchPage(
        title=f"run {text}",
        rows=[
            SearchRow(SearchItem(f"query {text}", f"asked {text}", image()), neighbors),
            SearchRow(SearchItem("q", "p"), []),
        ],
        num_queries=5,
        k=7,
        num_shown=3,
        metrics={"counts": {"queries": 5}, "timings": {"search": 1.5}, "versions": {text: text}},
        config=f"name: {text}",
        notes=[f"note {text}"],
        bad_images=[(f"bad {text}", f"reason {text}")],
    )
    return dataclasses.replace(whole, **changes)


def test_texts_of_users_are_escaped_everywhere() -> None:
    text = render_search(page(EVIL))
    seen = Seen(text)
    assert seen.tags["script"] == 0
    assert seen.tags["img"] == 2
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "<script" not in text
    everything = " | ".join(seen.texts)
    for expected in (
        "run",
        "asked",
        "query",
        "near",
        "far",
        "id",
        "no picture: lost",
        "note",
        "bad",
        "reason",
        "name:",
    ):
        assert f"{expected} {EVIL}" in everything, expected
    assert seen.values("alt") == [f"asked {EVIL}", f"near {EVIL}"]


def test_the_page_fetches_nothing() -> None:
    check_fetches_nothing(render_search(page()), pictures=2)


def test_queries_and_neighbors_stand_in_order_with_their_distances() -> None:
    texts = Seen(render_search(page())).texts
    rows = [text for text in texts[texts.index("query") : texts.index("Bad images")] if text != "query"]
    assert rows == [
        *("query cats", "asked cats", "neighbors"),
        *("0.125", "· id cats", "near cats", "0.250", "· id 8", "far cats"),
        *("no picture: lost cats", "0.500", "· id 9", "gone"),
        *("q", "p", "neighbors", "none was found"),
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "The first 2 of 5 queries, in order, with the first 3 of their 7 neighbors"),
        ({"num_queries": 2, "num_shown": 7}, "All 2 queries, in order, with their 7 neighbors"),
        ({"num_queries": 12345, "rows": []}, "The first 0 of 12,345 queries"),
    ],
)
def test_the_page_says_what_it_leaves_out(changes: dict[str, Any], expected: str) -> None:
    assert any(text.startswith(expected) for text in Seen(render_search(page(**changes))).texts)


def test_long_lists_of_bad_images_are_cut_and_say_so() -> None:
    text = render_search(page(bad_images=[(f"{row}.jpg", "truncated") for row in range(MAX_BAD_IMAGES + 1)]))
    assert "1,001 not readable, the first 1,000 of them" in text
    assert "999.jpg" in text
    assert "1000.jpg" not in text


def test_without_bad_images_there_is_no_list_of_them() -> None:
    assert "Bad images" not in render_search(page(bad_images=[]))


def test_another_image_format_is_an_error() -> None:
    row = SearchRow(SearchItem("query 3", "a.bmp", image("BMP")), [])
    with pytest.raises(ImageError, match="neither JPEG nor PNG"):
        render_search(page(rows=[row]))
