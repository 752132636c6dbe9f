"""Stanford Online Products: 120,053 pictures of 22,634 products from auctions, in 12 categories.

Oh Song et al. 2016, "Deep metric learning via lifted structured feature embedding".
"""

from pathlib import Path

import pandas as pd

from oml_ray.data.converters.layout import Conversion, Layout, check_protocol, splits

PROTOCOLS = ("official",)
_EXPECTED = (
    "the unpacked Stanford_Online_Products, or the folder that holds it, with Ebay_train.txt, Ebay_test.txt and a "
    "folder of images for each category (bicycle_final/, ...)"
)


def convert_sop(source: Path, protocol: str = "official") -> Conversion:
    """Convert Stanford Online Products.

    Args:
        source: the folder `Stanford_Online_Products`, or the one that holds it.
        protocol: `official`: the labels of `Ebay_train.txt` train, the others, those of `Ebay_test.txt`, validate.

    Returns:
        The rows of both files in their order; labels are `class_id`, categories the folders of the images.

    Raises:
        StorageError: files are missing.
        TableError: they are damaged.
        ConfigError: there is no such protocol.
    """
    check_protocol("sop", protocol, PROTOCOLS)
    layout = Layout("sop", source, _EXPECTED, inside="Stanford_Online_Products", marker="Ebay_train.txt")
    parts = []
    for name in ("Ebay_train.txt", "Ebay_test.txt"):
        file = layout.find(name)
        rows = layout.read(file, ("image_id", "class_id", "super_class_id", "path"), header=0)
        folders = rows["path"].str.extract(r"([^/]+)/[^/]+$", expand=False)
        layout.check(file, rows["path"], folders.isna(), "in no folder")
        labels = layout.labels(file, rows["class_id"], 22_634)
        columns = {"label": labels, "path": layout.paths(rows["path"])}
        is_train = pd.Series(name == "Ebay_train.txt", index=rows.index)
        parts.append(pd.DataFrame({**columns, **splits(is_train), "category": folders}))
    frame = pd.concat(parts, ignore_index=True)
    return Conversion(frame, layout.compare(frame["label"], 120_053, 22_634))
