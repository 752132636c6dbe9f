"""CUB-200-2011: 11,788 pictures of 200 species of birds.

Wah et al. 2011, "The Caltech-UCSD Birds-200-2011 dataset".
"""

from pathlib import Path

import pandas as pd

from oml_ray.data.converters.layout import Conversion, Layout, check_protocol, splits
from oml_ray.errors import TableError

PROTOCOLS = ("disjoint", "oml")
_EXPECTED = (
    "the unpacked CUB_200_2011, or the folder that holds it, with images.txt, image_class_labels.txt and images/, and "
    "for --protocol oml also train_test_split.txt and bounding_boxes.txt"
)


def convert_cub(source: Path, protocol: str = "disjoint") -> Conversion:
    """Convert CUB-200-2011.

    Args:
        source: the folder `CUB_200_2011`, or the one that holds it.
        protocol: `disjoint`, the literature's: labels 1 to 100 train, 101 to 200 validate, whole images (Oh Song et al.
            2016, "Deep metric learning via lifted structured feature embedding"). `oml`, that of Open Metric Learning:
            the split of `train_test_split.txt`, all labels on both sides, images cut to their boxes.

    Returns:
        The rows in the order of `images.txt`; labels 1 to 200.

    Raises:
        StorageError: files are missing.
        TableError: they are damaged, or do not fit together.
        ConfigError: there is no such protocol.
    """
    check_protocol("cub", protocol, PROTOCOLS)
    layout = Layout("cub", source, _EXPECTED, inside="CUB_200_2011", marker="images.txt")
    images = _by_image(layout, "images.txt", "path")["path"]

    def of_images(name: str, *columns: str) -> pd.DataFrame:
        rows = _by_image(layout, name, *columns)
        if len(odd := images.index.symmetric_difference(rows.index)):
            raise TableError(
                f"cub: {len(odd):,} images are in only one of {layout.find('images.txt')} and {name}: {odd[0]}, ..."
            )
        return rows.loc[images.index]

    file = layout.find("image_class_labels.txt")
    labels = layout.labels(file, of_images(file.name, "label")["label"], 200)
    frame = pd.DataFrame({"label": labels, "path": layout.paths("images/" + images)})
    if protocol == "disjoint":
        frame = frame.assign(**splits(labels <= 100))
    else:
        file = layout.find("train_test_split.txt")
        is_train = layout.integers(file, of_images(file.name, "is_train")["is_train"]) == 1
        file = layout.find("bounding_boxes.txt")
        box = of_images(file.name, "x", "y", "width", "height").apply(lambda side: layout.numbers(file, side))
        sides = {"x_1": box.x, "y_1": box.y, "x_2": box.x + box.width, "y_2": box.y + box.height}
        frame = frame.assign(**splits(is_train), **{name: side.astype(int) for name, side in sides.items()})
    return Conversion(frame, layout.compare(labels, 11_788, 200))


def _by_image(layout: Layout, name: str, *columns: str) -> pd.DataFrame:
    file = layout.find(name)
    rows = layout.read(file, ["image_id", *columns])
    layout.check(file, rows["image_id"], rows["image_id"].duplicated(), "there before")
    return rows.set_index("image_id")
