"""Nodes of runs, tables, images and batches."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from oml_ray.config.nodes.base import Node, Positive, Probability, Rate

Interpolation = Literal["bilinear", "bicubic"]
Exif = Literal["apply", "ignore"]
Color = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]


class Run(Node):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Folder of the run under `storage`: letters, digits, dot, dash, underscore."""
    storage: Annotated[str, Field(min_length=1)] = "runs"
    """Path or URI under which runs lie; on a cluster all nodes must reach it."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue an unfinished run of the same config; never: start afresh, replacing what the name holds."""


ALLOWED_CHANGES = (
    "optimizer",
    "schedule",
    "training.clip_grad_norm",
    "training.epochs",
    "training.precision",
    "validation",
)  # keys that run.allow_changes may name, with all keys below them


class TrainRun(Run):
    allow_changes: list[str] = []
    """Keys that may differ from those of the run that is continued, e.g. [optimizer.lr]: keys of optimizer, schedule
    and validation, training.clip_grad_norm, training.epochs, training.precision."""

    @field_validator("allow_changes")
    @classmethod
    def _may_change(cls, value: list[str]) -> list[str]:
        for key in value:
            if not any(f"{key}.".startswith(f"{allowed}.") for allowed in ALLOWED_CHANGES):
                raise ValueError(
                    f"{key!r} may not change when a run is continued; allowed: "
                    f"{', '.join(ALLOWED_CHANGES)}, and keys below these"
                )
        return value


class Data(Node):
    table: Annotated[str, Field(min_length=1)]
    """`figures` (generated), or a path or URI of a CSV, TSV or Parquet table, or of a folder of Parquet files."""
    root: str | None = None
    """Folder or URI that the table's paths are relative to; null: the table's own folder."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What an unreadable image does: stop, or be replaced (training) or left out and listed (evaluation)."""
    max_pixels: Positive = 89_478_485
    """Images announcing more pixels are refused before they are decoded."""
    exif: Exif = "apply"
    """EXIF orientation: apply turns images upright, and boxes are those of the upright image; ignore: as stored."""
    background: Color = [255, 255, 255]
    """Colour [red, green, blue], 0 to 255, that transparent pixels are composited over."""


class TrainData(Data):
    store: Annotated[str, Field(min_length=1)] | None = None
    """Embeddings store of the whole table (data.split: all), for models that judge pairs; null: none."""


class SplitData(Data):
    split: Literal["train", "validation", "all"] = "validation"
    """Rows of the table to use."""


class Resize(Node):
    name: Literal["resize"]
    size: Positive
    """Side of the square, in pixels."""


class ResizeFlip(Node):
    name: Literal["resize_flip"]
    size: Positive
    """Side of the square, in pixels."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""


class ResizeCrop(Node):
    name: Literal["resize_crop"]
    size: Positive
    """Side of the centre crop, in pixels."""
    resize: Positive
    """Length that the shorter side is resized to before, in pixels."""
    interpolation: Interpolation = "bilinear"
    """How pixels are resampled."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.resize < self.size:
            raise ValueError(f"resize must be at least size ({self.size}), found {self.resize}")
        return self


class Jitter(Node):
    brightness: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.4
    """Factors are drawn from [1 - brightness, 1 + brightness]; 0: none."""
    contrast: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.4
    """As brightness."""
    saturation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.4
    """As brightness."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Shares of the colour circle are drawn from [-hue, hue]."""


class OfCrops(Node):
    """A random crop, resized to a square, and flipped."""

    size: Positive
    """Side of the square, in pixels."""
    ratio: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [0.75, 1.3333333333333333]
    """Smallest and largest width over height of the crop."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Jitter | None = None
    """Random brightness, contrast, saturation and hue after it; null: none."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} must be [smallest, largest] with 0 < smallest <= largest, found {[low, high]}"
                )
        return self


class CropFlip(OfCrops):
    name: Literal["crop_flip"]
    scale: Annotated[list[Probability], Field(min_length=2, max_length=2)] = [0.6, 1.0]
    """Smallest and largest share of the image's area that the crop covers."""


class RandomResizedCrop(OfCrops):
    name: Literal["random_resized_crop"]
    scale: Annotated[list[Probability], Field(min_length=2, max_length=2)] = [0.2, 1.0]
    """Smallest and largest share of the image's area that the crop covers."""
    interpolation: Interpolation = "bicubic"
    """How pixels are resampled."""


Transform = Annotated[Resize | ResizeFlip | ResizeCrop | CropFlip | RandomResizedCrop, Field(discriminator="name")]
EvalTransform = Annotated[Resize | ResizeCrop, Field(discriminator="name")]


class Transforms(Node):
    train: Transform
    """Augmentation of train images."""
    eval: EvalTransform
    """Preparation of images that are embedded: nothing random."""
