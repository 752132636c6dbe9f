"""Transforms: a decoded image becomes uint8 pixels of the network's size.

Random ones draw from a generator that the caller seeds by the position in the plan. Scaling to floats and the
normalisation belong to the extractor: pixels travel as bytes. All of it is Pillow, whose functions torchvision calls
for Pillow's images: a process that decodes need not import torch.
"""

from oml_ray.data.transforms.crops import CropFlip, RandomResizedCrop
from oml_ray.data.transforms.jitter import ColorJitter
from oml_ray.data.transforms.pixels import Interpolation, Pixels, Transform, to_pixels
from oml_ray.data.transforms.resize import Resize, ResizeCrop, ResizeFlip

__all__ = [
    "ColorJitter",
    "CropFlip",
    "Interpolation",
    "Pixels",
    "RandomResizedCrop",
    "Resize",
    "ResizeCrop",
    "ResizeFlip",
    "Transform",
    "to_pixels",
]
