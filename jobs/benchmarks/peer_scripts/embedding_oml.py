"""Embedding with OML 4.0's `inference`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from oml.datasets import ImageBaseDataset
from oml.inference import inference
from oml.interfaces.models import IExtractor
from oml.transforms.images.torchvision import get_normalisation_resize_torch

from jobs.benchmarks.peer_scripts.embedding import run
from jobs.benchmarks.peer_scripts.measured import Checked, options


class Extractor(IExtractor):  # type: ignore[misc]
    """A timm network whose embeddings have unit length."""

    def __init__(self, model: str) -> None:
        """Build the network, with random weights."""
        super().__init__()
        self.backbone = timm.create_model(model, num_classes=0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed normalised images (n, 3, height, width) as (n, D)."""
        return torch.nn.functional.normalize(self.backbone(images), dim=1)


def main() -> None:
    """Embed with so many processes that load images."""
    given = options()
    torch.manual_seed(given["seed"])
    extractor = Extractor(given["model"]).eval()
    transform = get_normalisation_resize_torch(given["size"])
    paths = pd.read_csv(given["table"])["path"]

    def embed(num_images: int) -> Checked:
        some = [Path(path) for path in np.resize(paths, num_images)]
        dataset = ImageBaseDataset(some, dataset_root=given["root"], transform=transform)
        found = inference(extractor, dataset, batch_size=given["batch_size"], num_workers=given["loaders"])
        embeddings = found.numpy()
        return {"mean": float(embeddings.mean()), "spread": float(embeddings.std(axis=0).mean())}

    run(embed)


if __name__ == "__main__":
    main()
