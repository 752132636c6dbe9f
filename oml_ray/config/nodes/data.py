"""Nodes of runs, tables, images and batches."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from oml_ray.config.nodes.base import Node, Positive, Probability, Rate


class Run(Node):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Folder of the run under `storage`: letters, digits, dot, dash, underscore."""
    storage: Annotated[str, Field(min_length=1)] = "runs"
    """Path or URI under which runs lie; on a cluster all nodes must reach it."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue an unfinished run of the same config; never: start afresh, replacing what the name holds."""


class Data(Node):
    table: Annotated[str, Field(min_length=1)]
    """`figures` (generated), or a path or URI of a CSV or Parquet table."""
    root: str | None = None
    """Folder or URI that the table's paths are relative to; null: the table's own folder."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What an unreadable image does: stop, or be replaced (training) or left out and listed (evaluation)."""
    max_pixels: Positive = 89_478_485
    """Images announcing more pixels are refused before they are decoded."""


class SplitData(Data):
    split: Literal["train", "validation", "all"] = "validation"
    """Rows of the table to use."""


class Resize(Node):
    name: Literal["resize"]
    size: Positive
    """Side of the square, in pixels."""


class CropFlip(Node):
    name: Literal["crop_flip"]
    size: Positive
    """Side of the square, in pixels."""
    scale: Annotated[list[Probability], Field(min_length=2, max_length=2)] = [0.6, 1.0]
    """Smallest and largest share of the image's area that the crop covers."""
    ratio: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [0.75, 1.3333333333333333]
    """Smallest and largest width over height of the crop."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} must be [smallest, largest] with 0 < smallest <= largest, found {[low, high]}"
                )
        return self


Transform = Annotated[Resize | CropFlip, Field(discriminator="name")]


class Transforms(Node):
    train: Transform
    """Augmentation of train images."""
    eval: Transform
    """Preparation of images that are embedded: nothing random."""
