"""DeepFashion In-shop Clothes Retrieval: 52,712 pictures of 7,982 clothes.

Liu et al. 2016, "DeepFashion: powering robust clothes recognition and retrieval with rich annotations".
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from oml_ray.data.converters.layout import Conversion, Layout, check_protocol
from oml_ray.errors import TableError

PROTOCOLS = ("official", "boxes")
_SIDES = ("x_1", "y_1", "x_2", "y_2")
_IMAGES, _LABELS = 52_712, 7_982
_EXPECTED = (
    "a folder with list_eval_partition.txt and img_highres/ (or img/); for --protocol boxes with list_bbox_inshop.txt "
    "and img/; the lists may lie in Eval/ and Anno/, the images in Img/"
)


def convert_inshop(source: Path, protocol: str = "official") -> Conversion:
    """Convert DeepFashion In-shop, split as `list_eval_partition.txt` says.

    Args:
        source: the folder of the lists and images, which may lie in `Eval/`, `Anno/` and `Img/`.
        protocol: `official`: whole images, those of `img_highres/` or, where that is not there, of `img/`. `boxes`: the
            images of `img/`, cut to the boxes of `list_bbox_inshop.txt`: these are in pixels of the 256 x 256 images of
            `img/`, and fit no others.

    Returns:
        The rows in the order of `list_eval_partition.txt`, without train labels that have one image; labels are the
        digits of `item_id`, categories the folders that hold those of the items.

    Raises:
        StorageError: files are missing.
        TableError: they are damaged, or do not fit together.
        ConfigError: there is no such protocol.
    """
    check_protocol("inshop", protocol, PROTOCOLS)
    layout = Layout("inshop", source, _EXPECTED)
    file = layout.find("list_eval_partition.txt", "Eval/list_eval_partition.txt")
    rows = _counted(layout, file, "image_name", "item_id", "evaluation_status")
    status, names = rows["evaluation_status"], rows["image_name"]
    layout.check(file, status, ~status.isin(["train", "query", "gallery"]), "not train, query or gallery")
    layout.check(file, names, ~names.str.match(r"img/.+/.+/.+"), "not img/.../category/item/image")
    layout.check(file, names, names.duplicated(), "there before")
    layout.check(file, rows["item_id"], ~rows["item_id"].str.fullmatch(r"id_\d+"), "not id_ and digits")
    labels = layout.labels(file, rows["item_id"].str[len("id_") :], _LABELS)
    if len(rows) == _IMAGES and labels.nunique() != _LABELS:
        raise TableError(
            f"inshop: {file} has all images, but {labels.nunique():,} of {_LABELS:,} labels: it is damaged."
        )
    whole = ("img_highres", "Img/img_highres") if protocol == "official" else ()
    folder = layout.find(*whole, "img", "Img/img").relative_to(source).as_posix()
    is_train = status == "train"
    frame = pd.DataFrame({"label": labels, "path": f"{folder}/" + names.str.removeprefix("img/")})
    frame["split"] = np.where(is_train, "train", "validation")
    for flag in ("query", "gallery"):
        frame[f"is_{flag}"] = np.where(is_train, "", (status == flag).astype(str))
    frame["category"] = names.str.extract(r"([^/]+)/[^/]+/[^/]+$", expand=False)
    if protocol == "boxes":
        frame = frame.assign(**_boxes(layout, names))
    is_single = is_train & (frame.groupby("label")["label"].transform("size") == 1)
    notes = [f"images of {folder}/", f"dropped: {is_single.sum():,} train labels that have one image"]
    return Conversion(frame[~is_single], notes + layout.compare(labels, _IMAGES, _LABELS))


def _counted(layout: Layout, file: Path, *columns: str) -> pd.DataFrame:
    """Read a list, whose first line is the number of its rows and whose second line names its columns."""
    rows = layout.read(file, columns, header=1)
    with open(file, encoding="utf-8", errors="replace") as lines:
        count = lines.readline().strip()
    if count != str(len(rows)):
        raise TableError(
            f"inshop: the first line of {file} announces {count!r} rows, and {len(rows)} follow: it is cut off."
        )
    return rows


def _boxes(layout: Layout, names: pd.Series[str]) -> dict[str, pd.Series[int]]:
    """Read the boxes of these images."""
    file = layout.find("list_bbox_inshop.txt", "Anno/list_bbox_inshop.txt")
    rows = _counted(layout, file, "image_name", "clothes_type", "pose_type", *_SIDES)
    layout.check(file, rows["image_name"], rows["image_name"].duplicated(), "there before")
    layout.check(file, names, ~names.isin(rows["image_name"]), "without a box")
    found = rows.set_index("image_name").loc[names.to_list()].set_index(names.index)
    return {side: layout.integers(file, found[side]) for side in _SIDES}
