"""Training as a plain PyTorch script has it: DDP, a DataLoader, and a triplet loss on each process's own batch.

The suite `train` runs it, one process for each rank, with its arguments as JSON; rank 0 prints one line of JSON. It
imports nothing of oml_ray.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from jobs.benchmarks.processes import peak_above_idle


class Images(Dataset[tuple[Tensor, int]]):
    """Augmented images of the train split, with their labels."""

    def __init__(self, table: str, root: str, size: int) -> None:
        frame = pd.read_csv(table)
        frame = frame[frame["split"] == "train"]
        self.paths, self.labels = frame["path"].tolist(), frame["label"].to_numpy()
        self.root = Path(root)
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(0.8, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.root / self.paths[index]) as image:
            return self.transform(image.convert("RGB")), int(self.labels[index])


def batches(labels: np.ndarray[Any, Any], given: dict[str, Any]) -> Iterator[list[int]]:
    """This rank's share of the labels of each step, some instances of each."""
    generator = np.random.default_rng([given["rank"], 0])
    rows = {label: np.flatnonzero(labels == label) for label in np.unique(labels)}
    for _ in range(given["steps"]):
        drawn = generator.choice(list(rows), given["n_labels"] // given["world_size"], replace=False)
        yield [int(row) for label in drawn for row in generator.choice(rows[label], given["n_instances"])]


def hard_triplet_loss(embeddings: Tensor, labels: Tensor, margin: float = 0.2) -> Tensor:
    """The mean over anchors of max(0, margin + farthest positive - nearest negative)."""
    distances = torch.cdist(embeddings, embeddings)  # (batch, batch)
    same = labels[:, None] == labels
    positive = distances.masked_fill(~same, -1).amax(1)
    negative = distances.masked_fill(same, float("inf")).amin(1)
    return (positive - negative + margin).relu().mean()


def main(given: dict[str, Any]) -> None:
    """Train for some steps; tell when the first one ended, the speed of the later ones, and the memory."""
    torch.set_num_threads(1)
    times: list[float] = []
    memory = peak_above_idle(lambda: times.extend(train(given)))
    if given["rank"] == 0:
        counted = len(times) * 3 // 4  # the first ones warm up
        speed = counted * given["n_labels"] * given["n_instances"] / (times[-1] - times[-1 - counted])
        print(json.dumps({"first_step": times[0], "images_per_s": speed, "memory": memory}))


def train(given: dict[str, Any]) -> list[float]:
    """Train, and return the time at the end of each step."""
    dist.init_process_group("gloo", init_method=given["rendezvous"], rank=given["rank"], world_size=given["world_size"])
    images = Images(given["table"], given["root"], given["size"])
    loader = DataLoader(images, batch_sampler=list(batches(images.labels, given)), num_workers=1, prefetch_factor=8)
    model = nn.parallel.DistributedDataParallel(timm.create_model(given["model"], num_classes=0).train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    times = []
    for pixels, labels in loader:
        loss = hard_triplet_loss(nn.functional.normalize(model(pixels)), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        times.append(time.time())
    dist.destroy_process_group()
    return times


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
