"""Training with OML 4.0, as its README has it: its plain loop, or its Lightning module under DDP with two processes.

Run by the interpreter of the peers, with its arguments as JSON. Writes a line of JSON for each epoch: the wall-clock
time at the end of its validation, the images of its steps, and CMC@1 on the validation part.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import timm
import torch
from oml import datasets
from oml.inference import inference
from oml.interfaces.models import IExtractor
from oml.lightning.callbacks.metric import MetricValCallback
from oml.lightning.modules.extractor import ExtractorModuleDDP
from oml.losses import TripletLossWithMiner
from oml.metrics import EmbeddingMetrics, calc_retrieval_metrics_rr
from oml.miners import NHardTripletsMiner
from oml.retrieval import RetrievalResults
from oml.samplers import BalanceSampler
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

NORMALIZE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Extractor(IExtractor):  # type: ignore[misc]
    """A timm network whose embeddings have unit length."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.backbone = timm.create_model(model, num_classes=0)

    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(self.backbone(images))

    @property
    def feat_dim(self) -> int:
        features: Any = self.backbone.num_features
        return int(features)


class Clock:
    """Images of an epoch, and when it ended."""

    def __init__(self, batch: int) -> None:
        self.batch, self.images = batch, 0

    def step(self) -> None:
        self.images += self.batch

    def tell(self, cmc: float) -> None:
        print(json.dumps({"at": time.time(), "images": self.images, "cmc": cmc}), flush=True)
        self.images = 0


def parts(given: dict[str, Any]) -> tuple[Any, Any]:
    """The two parts of the table, each with its images."""
    frame = pd.read_csv(given["table"])
    size = given["size"]
    augmented = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.8, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            NORMALIZE,
        ]
    )
    plain = transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor(), NORMALIZE])
    train, val = (frame[frame["split"] == split].reset_index(drop=True) for split in ("train", "validation"))
    for flag in ("is_query", "is_gallery"):
        val[flag] = val[flag].astype(bool)
    return (
        datasets.ImageLabeledDataset(train, transform=augmented, dataset_root=given["root"]),
        datasets.ImageQueryGalleryLabeledDataset(val, transform=plain, dataset_root=given["root"]),
    )


def vanilla(given: dict[str, Any]) -> None:
    """One process that has all threads."""
    torch.set_num_threads(given["threads"])
    train, val = parts(given)
    model = Extractor(given["model"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=given["lr"], weight_decay=1e-4)
    criterion = TripletLossWithMiner(given["margin"], NHardTripletsMiner(*given["miner"]))
    sampler = BalanceSampler(train.get_labels(), n_labels=given["n_labels"], n_instances=given["n_instances"])
    loader = DataLoader(train, batch_sampler=sampler, num_workers=1, persistent_workers=True, prefetch_factor=8)
    clock = Clock(given["n_labels"] * given["n_instances"])
    for _ in range(given["epochs"]):
        for batch in loader:
            loss = criterion(model(batch["input_tensors"]), batch["labels"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.step()
        embeddings = inference(model, val, batch_size=128, num_workers=1)
        found = RetrievalResults.from_embeddings(embeddings, val, n_items=1)
        scores = calc_retrieval_metrics_rr(found, map_top_k=(1,), cmc_top_k=(1,), precision_top_k=(1,))
        clock.tell(float(scores["cmc"][1].mean()))


class Times(pl.Callback):  # type: ignore[misc]
    """Tells what `vanilla` tells, of all processes together."""

    def __init__(self, batch: int) -> None:
        self.clock = Clock(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.step()

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking and trainer.is_global_zero:
            self.clock.tell(float(trainer.callback_metrics["OVERALL/cmc/1"]))


def lightning(given: dict[str, Any]) -> None:
    """Two processes of one thread each, whose samplers draw half of the global batch each."""
    torch.set_num_threads(1)
    train, val = parts(given)
    model = Extractor(given["model"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=given["lr"], weight_decay=1e-4)
    criterion = TripletLossWithMiner(given["margin"], NHardTripletsMiner(*given["miner"]))
    sampler = BalanceSampler(train.get_labels(), n_labels=given["n_labels"] // 2, n_instances=given["n_instances"])
    module = ExtractorModuleDDP(
        extractor=model,
        criterion=criterion,
        optimizer=optimizer,
        loaders_train=DataLoader(train, batch_sampler=sampler, num_workers=1, prefetch_factor=8),
        loaders_val=DataLoader(val, batch_size=128, num_workers=1),
    )
    metric = EmbeddingMetrics(val, cmc_top_k=(1,), precision_top_k=(1,), map_top_k=(1,))
    times = Times(given["n_labels"] * given["n_instances"])
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=given["epochs"],
        callbacks=[MetricValCallback(metric), times], use_distributed_sampler=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_checkpointing=False, logger=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    given = json.loads(sys.argv[1])
    torch.manual_seed(given["seed"])
    {"vanilla": vanilla, "lightning": lightning}[given["kind"]](given)
