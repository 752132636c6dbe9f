"""Copies over splits and labels: planted ones are found, and nothing else; against a loop over all pairs of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import HEADER, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from oml_ray.data.doctor import repeats as module
from oml_ray.data.doctor.examined import Examined, examine
from oml_ray.data.doctor.repeats import NEAR_COLOR, Repeats, repeats
from oml_ray.data.images import ImageReader
from oml_ray.data.table import Table, read_table, table_of


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((80, 80), Image.Resampling.BICUBIC)


def judged(folder: Path, *rows: str, header: str = HEADER) -> module.AllRepeats:
    (folder / "df.csv").write_text("\n".join([header, *rows]))
    table = read_table(folder / "df.csv")
    return repeats(table, examine(ImageReader(table, max_pixels=10**6)))


def shown(found: Repeats) -> list[tuple[int, ...]]:
    assert found.num_pairs == len(found.pairs) == len(found.distances)
    return [tuple(pair) for pair in found.pairs.tolist()]


def test_an_exact_copy_in_both_splits(tmp_path: Path) -> None:
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    picture(1).save(tmp_path / "other.bmp")
    found = judged(
        tmp_path, "1,0.png,train,,", "1,1.png,train,,", "2,other.bmp,validation,1,1", "2,2.png,validation,1,1"
    )
    assert shown(found.exact_splits) == shown(found.exact_labels) == [(1, 2)]
    assert found.exact_splits.rows.tolist() == found.exact_labels.rows.tolist() == [1, 2]
    assert shown(found.near_splits) == shown(found.near_labels) == []
    assert found.near_splits.rows.tolist() == []


def test_a_near_copy_in_both_splits(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.png")
    picture(1).resize((50, 50)).save(tmp_path / "small.jpg", quality=60)
    found = judged(tmp_path, "1,a.png,train,,", "1,b.png,train,,", "1,small.jpg,validation,1,1")
    assert shown(found.near_splits) == [(1, 2)]
    assert found.near_splits.rows.tolist() == [1, 2]
    assert found.near_splits.distances.max() <= 4
    assert shown(found.near_labels) == shown(found.exact_splits) == shown(found.exact_labels) == []


def test_one_picture_under_two_labels_of_one_split(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    picture(0).save(tmp_path / "b.png")
    picture(0).save(tmp_path / "c.jpg", quality=60)
    found = judged(tmp_path, "1,a.png,train,,", "2,b.png,train,,", "2,c.jpg,train,,")
    assert (shown(found.exact_labels), found.exact_labels.rows.tolist()) == ([(0, 1)], [0, 1])
    assert (shown(found.near_labels), found.near_labels.rows.tolist()) == ([(0, 2)], [0, 2])
    assert shown(found.exact_splits) == shown(found.near_splits) == []


def test_copies_within_a_label_and_a_split_do_no_harm(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    picture(0).save(tmp_path / "b.jpg")
    found = judged(tmp_path, "1,a.png,train,,", "1,a.png,train,,", "1,b.jpg,train,,")
    assert [kind.num_pairs for kind in vars(found).values()] == [0, 0, 0, 0]


def test_boxes_of_one_file_are_pictures_of_their_own(tmp_path: Path) -> None:
    both = Image.new("RGB", (160, 80))
    both.paste(picture(0), (0, 0))
    both.paste(picture(1), (80, 0))
    both.save(tmp_path / "both.png")
    picture(1).save(tmp_path / "right.png")
    found = judged(
        tmp_path,
        *("1,both.png,train,,,0,0,80,80", "2,both.png,train,,,80,0,160,80", "2,right.png,validation,1,1,,,,"),
        header=f"{HEADER},x_1,y_1,x_2,y_2",
    )
    assert (shown(found.exact_splits), shown(found.exact_labels)) == ([(1, 2)], [])
    assert shown(found.near_splits) == shown(found.near_labels) == []


def test_grey_shapes_of_other_colours_are_no_copies(tmp_path: Path) -> None:
    for name, colour in (("red", (200, 40, 40)), ("green", (40, 120, 40))):
        image = Image.new("RGB", (64, 64))
        image.paste(colour, (10, 10, 30, 50))
        image.save(tmp_path / f"{name}.png")
    found = judged(tmp_path, "1,red.png,train,,", "2,green.png,validation,1,1")
    assert shown(found.near_splits) == shown(found.near_labels) == []


def test_blank_pictures_are_copies_only_when_equal(tmp_path: Path) -> None:
    for name, colour in (("a", "white"), ("b", "white"), ("c", (254, 255, 255))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    found = judged(tmp_path, "1,a.png,train,,", "1,b.png,validation,1,1", "2,c.png,validation,1,1")
    assert shown(found.exact_splits) == [(0, 1)]
    assert shown(found.near_splits) == shown(found.near_labels) == shown(found.exact_labels) == []


def test_a_clean_table_has_none(tmp_path: Path) -> None:
    table = read_table(write_images(tmp_path / "t", labels=12, instances=1, validation=0))
    found = repeats(table, examine(ImageReader(table, max_pixels=10**6)))
    assert [kind.num_pairs for kind in vars(found).values()] == [0, 0, 0, 0]


def test_the_nearest_pairs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PAIRS", 3)
    table, examined = made([(number, bool(number % 2), number, 0, False) for number in range(6)], [0, 0b11, 0b1])
    found = repeats(table, examined)
    every = naive(table, examined, lambda one, other: table.is_train[one] != table.is_train[other], near=True)
    assert found.near_splits.num_pairs == len(every) == 9
    assert [
        (d, *pair) for d, pair in zip(found.near_splits.distances, found.near_splits.pairs.tolist(), strict=True)
    ] == (sorted((d, *pair) for pair, d in every.items())[:3])


Row = tuple[int, bool, int, int, bool]  # label, whether it is in train, picture, colour, whether it is blank


def made(rows: list[Row], looks: list[int]) -> tuple[Table, Examined]:
    """A table, and what would be known of images that are given by numbers; picture -1: not readable."""
    columns = pa.table(
        {
            "label": [label for label, *_ in rows],
            "split": ["train" if train else "validation" for _, train, *_ in rows],
            **{name: [None if train else True for _, train, *_ in rows] for name in ("is_query", "is_gallery")},
        }
    )
    table, found = table_of(columns, "made"), Examined.nothing(len(rows))
    for row, (_, _, picture, _, _) in enumerate(rows):
        if picture >= 0:
            found.readable[row], found.contents[row] = True, (picture % 2, 10**19 + picture)
            # What is known of a picture follows from its pixels: it is that of its first row.
            first = next(other for other in rows if other[2] == picture)
            found.looks[row], found.colors[row], found.blank[row] = looks[picture % len(looks)], first[3], first[4]
    return table, found


def naive(table: Table, examined: Examined, crosses, near: bool) -> dict[tuple[int, int], int]:
    """Pairs of rows and their distances, one after another."""
    pairs = {}
    for other in range(len(table)):
        for one in range(other):
            if not (examined.readable[one] and examined.readable[other] and crosses(one, other)):
                continue
            equal = examined.contents[one].tolist() == examined.contents[other].tolist()
            distance = (int(examined.looks[one]) ^ int(examined.looks[other])).bit_count()
            colors = np.abs(examined.colors[one].astype(int) - examined.colors[other]).max()
            alike = distance <= 4 and colors <= NEAR_COLOR and not (examined.blank[one] or examined.blank[other])
            if (not equal and alike) if near else equal:
                pairs[one, other] = distance if near else 0
    return pairs


rows = st.lists(
    st.tuples(st.integers(-2, 2), st.booleans(), st.integers(-1, 6), st.sampled_from([0, 9, 17, 30]), st.booleans()),
    min_size=1,
    max_size=14,
)


@settings(deadline=None, max_examples=300)
@given(rows, st.lists(st.integers(0, 2**8 - 1), min_size=1, max_size=4))
def test_rows_and_pairs_are_those_of_a_loop(rows: list[Row], looks: list[int]) -> None:
    table, examined = made(rows, looks)
    found = repeats(table, examined)

    def over_splits(one: int, other: int) -> bool:
        return bool(table.is_train[one] != table.is_train[other])

    def over_labels(one: int, other: int) -> bool:
        return bool(table.labels[one] != table.labels[other])

    for kind, crosses, near in (
        (found.exact_splits, over_splits, False),
        (found.exact_labels, over_labels, False),
        (found.near_splits, over_splits, True),
        (found.near_labels, over_labels, True),
    ):
        every = naive(table, examined, crosses, near)
        assert kind.rows.tolist() == sorted({row for pair in every for row in pair})
        assert kind.distances.tolist() == sorted(kind.distances.tolist())
        contents = [tuple(content) for content in examined.contents.tolist()]
        by_pictures = {frozenset((contents[one], contents[other])) for one, other in every}
        pairs = dict(zip(shown(kind), kind.distances.tolist(), strict=True))
        assert pairs.items() <= every.items()
        # Every pair of pictures is shown once.
        assert {frozenset(contents[row] for row in pair) for pair in pairs} == by_pictures
        assert len(pairs) == len(by_pictures)
