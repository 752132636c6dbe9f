from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oml_ray.errors import ConfigError
from oml_ray.learning.losses.circle import CircleLoss
from oml_ray.learning.losses.contrastive import ContrastiveLoss
from oml_ray.learning.losses.multi_similarity import MultiSimilarityLoss
from oml_ray.learning.losses.ntxent import NTXentLoss
from oml_ray.learning.losses.pytorch_metric_learning import PytorchMetricLearningLoss
from oml_ray.learning.losses.supcon import SupConLoss


def need_package() -> None:
    pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)


def batch(labels: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit embeddings in float64, so that it does not matter which side normalises."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(len(labels), 6, dtype=torch.float64, generator=generator)
    return nn.functional.normalize(embeddings), torch.tensor(labels)


def value_and_gradient(criterion: nn.Module, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    embeddings = embeddings.clone().requires_grad_()
    loss, _ = criterion(nn.functional.normalize(embeddings), labels)
    loss.backward()
    assert embeddings.grad is not None
    return loss.detach(), embeddings.grad


# Where they differ: the package's SupConLoss is zero in a batch of one label, ours still spreads the positives. Its
# CircleLoss leaves losses that underflow to zero out of the mean. Its SmoothAPLoss counts the anchor as a positive.
@pytest.mark.parametrize(
    ("own", "name", "arguments"),
    [
        (ContrastiveLoss(0.0, 0.9), "ContrastiveLoss", {"pos_margin": 0.0, "neg_margin": 0.9}),
        (MultiSimilarityLoss(2.0, 40.0, 0.4), "MultiSimilarityLoss", {"alpha": 2.0, "beta": 40.0, "base": 0.4}),
        (NTXentLoss(0.1), "NTXentLoss", {"temperature": 0.1}),
        (SupConLoss(0.1), "SupConLoss", {"temperature": 0.1}),
        (CircleLoss(0.25, 8.0), "CircleLoss", {"m": 0.25, "gamma": 8.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]])
def test_own_losses_equal_those_of_the_package(
    own: nn.Module, name: str, arguments: dict[str, float], labels: list[int]
) -> None:
    need_package()
    theirs = PytorchMetricLearningLoss(name, arguments)
    for seed in range(10):
        found, expected = (value_and_gradient(loss, *batch(labels, seed)) for loss in (own, theirs))
        assert expected[0] > 0
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name",
    [
        "ArcFaceLoss",
        "CosFaceLoss",
        "FastAPLoss",
        "MarginLoss",
        "NPairsLoss",
        "P2SGradLoss",
        "ProxyAnchorLoss",
        "ProxyNCALoss",
        "SoftTripleLoss",
        "SubCenterArcFaceLoss",
        "TripletMarginLoss",
        "TupletMarginLoss",
    ],
)
def test_losses_of_all_kinds_learn(name: str) -> None:
    need_package()
    torch.manual_seed(0)
    criterion = PytorchMetricLearningLoss(name, {}, num_labels=4, embedding_dim=6)
    embeddings, labels = batch([0, 0, 1, 1, 2, 2, 3, 3])
    loss, gradient = value_and_gradient(criterion, embeddings.float(), labels)
    assert loss > 0
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).any()
    assert all(parameter.grad is not None for parameter in criterion.parameters())


def test_sizes_that_are_given_win() -> None:
    need_package()
    criterion = PytorchMetricLearningLoss("ArcFaceLoss", {"num_classes": 9}, num_labels=4, embedding_dim=6)
    assert criterion.state_dict()["loss.W"].shape == (6, 9)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ContrastivLos", {}, "no loss 'ContrastivLos' .* near: ContrastiveLoss"),
        ("ntxentloss", {}, "near: NTXentLoss"),
        ("CrossBatchMemory", {}, "no loss 'CrossBatchMemory'"),
        ("Nonsense", {}, "there are: AngularLoss, ArcFaceLoss"),
        (
            "ContrastiveLoss",
            {"margin": 1.0},
            "ContrastiveLoss takes no margin; it takes .*embedding_regularizer, neg_margin",
        ),
        ("RankedListLoss", {"margin": 1.0}, r"RankedListLoss\(margin=1.0\) is refused: .*'Tn'"),
        ("ArcFaceLoss", {}, "ArcFaceLoss needs num_classes, embedding_size: give num_labels and embedding_dim"),
        ("CircleLoss", {"distance": 3}, r"CircleLoss\(distance=3\) is refused: .*CosineSimilarity"),
    ],
)
def test_mistakes_are_one_clear_message(name: str, arguments: dict[str, Any], message: str) -> None:
    need_package()
    with pytest.raises(ConfigError, match=message) as caught:
        PytorchMetricLearningLoss(name, arguments)
    assert "\n" not in str(caught.value)


def test_warnings_of_the_import_are_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "pytorch_metric_learning"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "losses.py").write_text(
        "import warnings\nimport torch\nwarnings.warn('old')\n"
        "class BaseMetricLossFunction(torch.nn.Module): pass\n"
        "class SumLoss(BaseMetricLossFunction):\n    def forward(self, embeddings, labels): return embeddings.sum()\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "pytorch_metric_learning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    loss, logs = PytorchMetricLearningLoss("SumLoss", {})(torch.ones(2, 3), torch.tensor([0, 1]))
    for name in ("pytorch_metric_learning", "pytorch_metric_learning.losses"):
        del sys.modules[name]  # the real ones come back, if there were any
    assert (float(loss), logs) == (6.0, {})


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)
    with pytest.raises(ConfigError, match=r"pip install 'oml_ray\[pml\]'"):
        PytorchMetricLearningLoss("ContrastiveLoss", {})
