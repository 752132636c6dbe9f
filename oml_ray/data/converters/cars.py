"""CARS-196: 16,185 pictures of 196 models of cars.

Krause et al. 2013, "3D object representations for fine-grained categorization".
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pandas as pd

from oml_ray.data.converters.layout import Conversion, Layout, check_protocol, splits
from oml_ray.errors import ConfigError, TableError, reason_of

PROTOCOLS = ("disjoint", "oml")
_SIDES = {"x_1": "bbox_x1", "y_1": "bbox_y1", "x_2": "bbox_x2", "y_2": "bbox_y2"}
_EXPECTED = "a folder with devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat, cars_train/ and cars_test/"


def convert_cars(source: Path, protocol: str = "disjoint") -> Conversion:
    """Convert CARS-196.

    Args:
        source: the folder of `devkit/`, `cars_train/` and `cars_test/`; `cars_test_annos_withlabels.mat` lies in it, or
            in `devkit/`.
        protocol: `disjoint`, the literature's: labels 1 to 98 train, 99 to 196 validate, whole images of both folders
            (Oh Song et al. 2016, "Deep metric learning via lifted structured feature embedding"). `oml`, that of Open
            Metric Learning: `cars_train/` trains, `cars_test/` validates, all labels on both sides, images cut to their
            boxes.

    Returns:
        The rows of the train file, then of the test file, in their order; labels 1 to 196.

    Raises:
        StorageError: files are missing.
        TableError: they are damaged.
        ConfigError: there is no such protocol, or SciPy is not installed.
    """
    check_protocol("cars", protocol, PROTOCOLS)
    layout = Layout("cars", source, _EXPECTED)
    test = layout.find("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat")
    parts = []
    for folder, file in (("cars_train", layout.find("devkit/cars_train_annos.mat")), ("cars_test", test)):
        rows = _annotations(file)
        columns = {"label": layout.labels(file, rows["class"], 196), "path": f"{folder}/" + rows["fname"]}
        columns |= {name: layout.integers(file, rows[side]) for name, side in _SIDES.items()}
        parts.append(pd.DataFrame(columns).assign(folder=folder))
    frame = pd.concat(parts, ignore_index=True)
    is_train = frame["label"] <= 98 if protocol == "disjoint" else frame["folder"] == "cars_train"
    frame = frame.assign(**splits(is_train))
    wanted = ["label", "path", "split", "is_query", "is_gallery", *(_SIDES if protocol == "oml" else ())]
    return Conversion(frame[wanted], layout.compare(frame["label"], 16_185, 196))


def _annotations(file: Path) -> pd.DataFrame:
    """Read the struct array `annotations` of a MATLAB file: one row per image, one column of texts per field."""
    try:
        loadmat = importlib.import_module("scipy.io").loadmat
    except ImportError:
        raise ConfigError("cars: MATLAB files are read by SciPy: pip install 'oml_ray[cars]'.") from None
    try:
        rows = loadmat(file)["annotations"].ravel()
        names = ("class", "fname", *_SIDES.values())
        return pd.DataFrame({name: [str(value.item()) for value in rows[name]] for name in names}, dtype=str)
    except Exception as error:  # SciPy's reader raises anything on what is damaged, and NumPy on other fields
        fields = f"a struct array 'annotations' with the fields {', '.join(_SIDES.values())}, class and fname"
        raise TableError(f"cars: {file} should hold {fields}: {reason_of(error)}") from None
