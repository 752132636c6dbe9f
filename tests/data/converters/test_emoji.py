"""Emoji from made-up packages of icon sets: which are labels, which drawings are kept, and how they are split."""

from __future__ import annotations

import colorsys
import hashlib
import io
import json
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converter_checks import converted
from PIL import Image

from oml_ray.data.converters import convert, emoji
from oml_ray.data.converters.emoji import VERSIONS
from oml_ray.errors import ConfigError, StorageError

# By their hashes robot (0.12), dog (0.04) and ghost (0.33) train, cat (0.74), fox (0.70) and moon (0.74) validate.
GROUPS = {
    "Smileys & Emotion": ["robot", "ghost"],
    "Animals & Nature": ["cat", "dog", "fox", "moon", "man-running", "cat-dark", "unicorn-facing-right"],
    "Flags": ["owl"],
}
NAMES = [name for names in GROUPS.values() for name in names]
COLORS = ("#f00", "#0f0", "#00f", "#ff0", "#0ff", "#f0f", "#123", "#456", "#789", "#abc")
Icons = dict[str, dict[str, Any]]


def icons_of(vendor: str) -> Icons:
    """All names, each with a body of its own."""
    return {name: {"body": f"<path d='{vendor} {name}'/>"} for name in NAMES}


def write_package(source: Path, vendor: str, icons: Icons, version: str = "9.9.9", **more: Any) -> Path:
    files = {
        "icons.json": {"prefix": vendor, "icons": icons, "width": 36, "height": 36, **more},
        "metadata.json": {"categories": GROUPS} if vendor == "noto" else {},
    }
    source.mkdir(parents=True, exist_ok=True)
    package = source / f"iconify-json-{vendor}-{version}.tgz"
    with tarfile.open(package, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return package


def write_packages(source: Path, **changed: Icons) -> None:
    for vendor in VERSIONS:
        write_package(source, vendor, changed.get(vendor, icons_of(vendor)))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packages go; drawings become a gradient in a colour of their text, but for those that say otherwise."""

    def svg_to_bytes(*, svg_string: str, width: int, height: int, skip_system_fonts: bool) -> bytes:
        assert (width, height, skip_system_fonts) == (96, 96, True)
        if "broken" in svg_string:
            raise ValueError("unknown token at 1:1")
        hue = int(hashlib.sha256(svg_string.encode()).hexdigest()[:8], 16) / 2**32
        pixels = np.full((96, 96, 4), [*(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 1, 1)), 0], np.uint8)
        if "blank" not in svg_string:
            pixels[..., 3] = np.arange(96)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    monkeypatch.setitem(sys.modules, "resvg_py", types.SimpleNamespace(svg_to_bytes=svg_to_bytes))
    return tmp_path / "emoji"


def test_labels_splits_queries_and_gallery(source: Path) -> None:
    write_packages(source)
    header, rows, told = converted("emoji", source)
    assert header == "label,path,split,is_query,is_gallery,category"
    expected = []
    for label, name in enumerate(["cat", "dog", "fox", "ghost", "moon", "robot"]):  # no flags, skin tones or doubles
        group = "Smileys & Emotion" if name in ("ghost", "robot") else "Animals & Nature"
        for vendor in sorted(VERSIONS):
            split = "train,," if name in ("dog", "ghost", "robot") else "validation,False,True"
            split = "validation,True,False" if "False" in split and vendor == "openmoji" else split
            expected.append(f"{label},images/{vendor}/{name}.png,{split},{group}")
    assert rows == expected
    assert told[3:5] == ["  queries: 3, gallery: 27, both: 0", "  categories: 2"]
    assert "  left out: 0 drawings, blank, broken, the same for two labels, or too few of a label" in told
    with Image.open(source / "images" / "noto" / "cat.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (96, 96))
        assert image.getpixel((0, 0)) == (255, 255, 255)  # white, where the drawing lets it through


def drop(vendors: list[str], name: str, how: str) -> dict[str, Icons]:
    """Packages whose drawing of a name is blank, broken, absent, hidden or shows a file."""
    changed = {}
    for vendor in vendors:
        icons = icons_of(vendor)
        bodies = {"blank": "blank", "broken": "broken", "link": "<image href='/etc/logo.png'/>"}
        if how == "absent":
            del icons[name]
        else:
            icons[name] = {"body": bodies.get(how, "<path/>"), **({"hidden": True} if how == "hidden" else {})}
        changed[vendor] = icons
    return changed


@pytest.mark.parametrize("how", ["blank", "broken", "absent", "hidden", "link"])
def test_a_drawing_that_cannot_be_used_is_left_out(source: Path, how: str) -> None:
    write_packages(source, **drop(["twemoji"], "dog", how))
    rows = converted("emoji", source)[1]
    assert len(rows) == 59
    assert not any("twemoji/dog" in row for row in rows)
    assert not (source / "images" / "twemoji" / "dog.png").exists()


def test_a_label_needs_four_vendors(source: Path) -> None:
    others = [vendor for vendor in sorted(VERSIONS) if vendor != "noto"]
    write_packages(source, **drop(others[:6], "dog", "absent"))
    assert len([row for row in converted("emoji", source)[1] if "/dog." in row]) == 4
    for vendor, icons in drop(others[:7], "dog", "blank").items():
        write_package(source, vendor, icons)
    _, rows, told = converted("emoji", source)
    assert not any("/dog." in row for row in rows)
    assert rows[10].startswith("1,images/emojione/fox.png"), "labels count on without a gap"
    assert "  left out: 10 drawings, blank, broken, the same for two labels, or too few of a label" in told


def test_a_label_without_a_query_is_no_label_of_validation(source: Path) -> None:
    write_packages(source, openmoji={name: icon for name, icon in icons_of("openmoji").items() if name[0] not in "cd"})
    rows = converted("emoji", source)[1]
    assert not any("/cat." in row for row in rows), "validates, and has no query"
    assert len([row for row in rows if "/dog." in row]) == 9, "trains, and needs none"


def test_one_picture_under_two_labels_belongs_to_neither(source: Path) -> None:
    icons = icons_of("twemoji")
    icons["dog"] = icons["fox"]
    write_packages(source, twemoji=icons)
    rows = converted("emoji", source)[1]
    assert len(rows) == 58
    assert [row for row in rows if "twemoji/" in row and ("/dog." in row or "/fox." in row)] == []


def test_other_names_of_a_drawing_count_but_for_turned_ones(source: Path) -> None:
    """`dog` is another name of a puppy, `fox` a mirrored one; in fxemoji `robot` has another hyphen."""
    write_packages(source)
    icons = icons_of("twemoji")
    del icons["dog"], icons["fox"]
    aliases = {"dog": {"parent": "puppy"}, "fox": {"parent": "puppy", "hFlip": True}, "moon": {"parent": "puppy"}}
    write_package(source, "twemoji", {**icons, "puppy": {"body": "<path/>"}}, aliases=aliases)
    icons = icons_of("fxemoji")
    write_package(source, "fxemoji", {"ro-bot" if name == "robot" else name: icon for name, icon in icons.items()})
    paths = [row.split(",")[1] for row in converted("emoji", source)[1]]
    assert "images/twemoji/dog.png" in paths
    assert "images/twemoji/fox.png" not in paths
    assert "images/twemoji/moon.png" in paths
    assert "images/fxemoji/robot.png" in paths


def test_a_second_time_gives_the_same_files(source: Path) -> None:
    write_packages(source)
    told = converted("emoji", source)
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    assert converted("emoji", source) == told
    assert before == {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}


def test_what_blocks_the_images_is_told(source: Path) -> None:
    write_packages(source)
    (source / "images").touch()
    with pytest.raises(StorageError, match=r"emoji: cannot write .*images"):
        convert("emoji", source, source / "df.csv")


def test_without_the_renderer_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ConfigError, match=r"pip install 'oml_ray\[emoji\]'"):
        convert("emoji", tmp_path, tmp_path / "df.csv")


def test_real_drawings(tmp_path: Path) -> None:
    """The part of a square that a drawing covers is where its viewBox says."""
    pytest.importorskip("resvg_py")
    for place, vendor in enumerate(VERSIONS):
        icons: Icons = {}
        for name, color in zip(NAMES, COLORS, strict=True):
            body = f"<path fill='{color}' d='M0 0h18v{place + 1}h-18z'/>"
            icons[name] = {"body": body, "width": 36, "height": 18} if name == "dog" else {"body": body}
        icons["robot"] = {"body": "<path fill='currentColor' d='M9 9h9v9h-9z'/>", "left": 9, "top": 9, "height": 18}
        write_package(tmp_path / "emoji", vendor, icons)
    assert len(converted("emoji", tmp_path / "emoji")[1]) == 60

    def pixels(name: str) -> np.ndarray:
        with Image.open(tmp_path / "emoji" / "images" / "fxemoji" / f"{name}.png") as image:  # the tenth: 10 of 36 high
            return np.asarray(image)

    white = (255, 255, 255)
    cat = pixels("cat")
    assert (cat[:26, :48] == (0, 0, 255)).all()
    assert (cat[27:] == white).all()
    assert (cat[:, 48:] == white).all()
    dog = pixels("dog")  # 96 x 48 in the middle, 26 of it high
    assert (dog[:24] == white).all()
    assert (dog[24:50, :48] == (255, 255, 0)).all()
    assert (dog[51:] == white).all()
    assert (pixels("robot")[24:48, :24] == (0, 0, 0)).all()  # 9 of 36 wide, from the corner


@pytest.mark.parametrize("tag", ["image", "svg:image", "a-b:image", "feImage", "IMAGE"])
def test_links_of_any_spelling_are_no_drawings(tag: str) -> None:
    pytest.importorskip("resvg_py")
    seen = "<path fill='red' d='M0 0h18v18h-18z'/>"
    render = emoji._renderer()
    assert render(f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 36 36'>{seen}</svg>") is not None
    link = f"<{tag} xmlns:a-b='http://www.w3.org/2000/svg' href='/etc/logo.png'/>"
    assert render(f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 36 36'>{seen}{link}</svg>") is None
