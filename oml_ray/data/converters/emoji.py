"""Emoji as up to ten vendors draw them: real pictures for retrieval across styles, under open licences.

A label is one emoji, its instances are drawings of it, its category is its Unicode group. On validation the drawings of
one vendor are the queries, and those of all others the gallery.

The drawings are those of Iconify's packages, and keep their licences: Noto and Firefox OS emoji Apache-2.0, Fluent
emoji MIT, Twemoji and EmojiOne 2 CC-BY-4.0, OpenMoji and EmojiOne 1 CC-BY-SA-4.0.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from PIL import Image

from oml_ray.data.converters.icon_sets import IconSet, read_icon_sets
from oml_ray.data.converters.layout import Conversion
from oml_ray.errors import ConfigError, StorageError

VERSIONS = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
    "openmoji": "1.2.29",
    "emojione": "1.2.3",
    "emojione-v1": "1.2.3",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "fluent-emoji-high-contrast": "1.2.6",
    "fxemoji": "1.2.2",
}
SIZE = 96  # pixels
_NAMING = "noto"  # whose names and groups are the labels and categories
_QUERIES = "openmoji"
_LEAST_VENDORS = 4
_TRAIN_SHARE = 0.6
# Skin tones and variants of one drawing are no labels of their own, and flags look the same everywhere.
_LEFT_OUT = re.compile(
    r"skin-tone|-(dark|light|medium|medium-dark|medium-light)$"
    r"|^(man|woman|men|women|deaf-man|deaf-woman|mrs|family|kiss|couple-with-heart)-"
    r"|^(merman|mermaid|prince|princess)$|-facing-right$"
)
_LINK = re.compile(r"<[^\s<>/]*image\b", re.IGNORECASE)

Picture = tuple[bytes, str]  # a PNG file and the digest of its pixels
Key = tuple[str, str]  # label name and vendor


def convert_emoji(source: Path) -> Conversion:
    """Draw the emoji of ten npm packages, and list them.

    The same packages give the same images and rows. Another version of a package moves no label to another split.

    Args:
        source: a folder, made if absent; packages that are not in it are fetched into it (see `read_icon_sets`), and
            images written below `images/`, 96 x 96 pixels, about 50 MB.

    Returns:
        The rows in the order of label names, then vendors; labels from 0.

    Raises:
        ConfigError: the renderer is not installed.
        StorageError: packages are missing and cannot be fetched, one is damaged, or images cannot be written.
    """
    render = _renderer()
    sets = read_icon_sets(source, VERSIONS)
    groups = {name: group for group, names in sets[_NAMING].groups.items() for name in names}
    labels = sorted(name for name, group in groups.items() if group != "Flags" and not _LEFT_OUT.search(name))
    drawings = _drawings(sets, labels)
    kept = _kept({key: render(sets[key[1]].svg(drawing)) for key, drawing in drawings.items()})
    rows = []
    try:
        for number, label in enumerate(kept):
            for vendor, png in kept[label].items():
                path = f"images/{vendor}/{label}.png"
                (source / path).parent.mkdir(parents=True, exist_ok=True)
                (source / path).write_bytes(png)
                flags = ("train", "", "") if _is_train(label) else ("validation", *_flags(vendor))
                rows.append((number, path, *flags, groups[label]))
    except OSError as error:
        raise StorageError(f"emoji: cannot write {source / 'images'}: {error}") from None
    frame = pd.DataFrame(rows, columns=["label", "path", "split", "is_query", "is_gallery", "category"])
    left_out = len(drawings) - len(frame)
    return Conversion(
        frame,
        [
            f"left out: {left_out:,} drawings, blank, broken, the same for two labels, or too few of a label",
            "the drawings keep the licences of their packages: Apache-2.0, MIT, CC-BY-4.0, CC-BY-SA-4.0",
        ],
    )


def _drawings(sets: dict[str, IconSet], labels: list[str]) -> dict[Key, str]:
    """Find which vendors draw each label, and the names of the drawings; labels of too few vendors are left out."""
    names = {vendor: icons.names() for vendor, icons in sorted(sets.items())}
    squeezed = {name.replace("-", ""): drawing for name, drawing in names["fxemoji"].items()}  # it has fewer hyphens
    drawings: dict[Key, str] = {}
    for label in labels:
        found = {vendor: names[vendor].get(label) for vendor in names}
        found["fxemoji"] = found["fxemoji"] or squeezed.get(label.replace("-", ""))
        drawn = {(label, vendor): drawing for vendor, drawing in found.items() if drawing}
        drawings |= drawn if len(drawn) >= _LEAST_VENDORS else {}
    return drawings


def _kept(pictures: dict[Key, Picture | None]) -> dict[str, dict[str, bytes]]:
    """Choose labels and their images, label name -> vendor -> PNG file.

    Of one picture under two labels neither is right, and a label needs some vendors, on validation that of the queries.
    """
    owners = Counter((vendor, picture[1]) for (_, vendor), picture in pictures.items() if picture)
    kept: dict[str, dict[str, bytes]] = {}
    for (label, vendor), picture in pictures.items():
        if picture and owners[vendor, picture[1]] == 1:
            kept.setdefault(label, {})[vendor] = picture[0]
    return {
        label: vendors
        for label, vendors in sorted(kept.items())
        if len(vendors) >= _LEAST_VENDORS and (_is_train(label) or _QUERIES in vendors)
    }


def _is_train(label: str) -> bool:
    return int(hashlib.sha256(f"emoji:{label}".encode()).hexdigest()[:8], 16) / 2**32 < _TRAIN_SHARE


def _flags(vendor: str) -> tuple[str, str]:
    return str(vendor == _QUERIES), str(vendor != _QUERIES)


def _renderer() -> Callable[[str], Picture | None]:
    try:
        to_png = importlib.import_module("resvg_py").svg_to_bytes
    except ImportError:
        raise ConfigError("emoji: drawings are rendered by resvg: pip install 'oml_ray[emoji]'.") from None

    def render(svg: str) -> Picture | None:
        """Render a drawing on white; None for one that is blank or broken, or would show a file from elsewhere."""
        if _LINK.search(svg):
            return None
        try:
            drawn = bytes(to_png(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))
        except ValueError:
            return None
        with Image.open(io.BytesIO(drawn), formats=["PNG"]) as opened:
            rgba = opened.convert("RGBA")
        image = Image.new("RGB", (SIZE, SIZE), "white")
        image.paste(rgba, ((SIZE - rgba.width) // 2, (SIZE - rgba.height) // 2), rgba)
        if all(low == high for low, high in image.getextrema()):  # type: ignore[misc]
            return None
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue(), hashlib.sha256(image.tobytes()).hexdigest()

    return render
