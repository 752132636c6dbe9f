from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from oml_ray.errors import CheckpointError, ConfigError
from oml_ray.learning import unicom
from oml_ray.learning.unicom import Architecture, from_unicom, unicom_extractor
from oml_ray.learning.weights import State

TINY = Architecture(patch=8, width=12, depth=2, heads=3, num_features=5, size=16)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(unicom.ARCHITECTURES, "tiny", TINY)


def published() -> State:
    """The names and shapes of Unicom's files, in half precision as they are."""
    width, tokens = TINY.width, (TINY.size // TINY.patch) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, TINY.patch, TINY.patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "feature.0.weight": (width, width * tokens),
        "feature.2.weight": (TINY.num_features, width),
    }
    for index, size in (("1", width), ("3", TINY.num_features)):
        names = ("weight", "bias", "running_mean", "running_var")
        shapes |= {f"feature.{index}.{name}": (size,) for name in names}
    for block in range(TINY.depth):
        prefix = f"blocks.{block}."
        shapes |= {f"{prefix}norm{i}.{name}": (width,) for i in (1, 2) for name in ("weight", "bias")}
        shapes |= {
            f"{prefix}attn.qkv.weight": (3 * width, width),
            f"{prefix}attn.proj.weight": (width, width),
            f"{prefix}attn.proj.bias": (width,),
            f"{prefix}mlp.fc1.weight": (4 * width, width),
            f"{prefix}mlp.fc1.bias": (4 * width,),
            f"{prefix}mlp.fc2.weight": (width, 4 * width),
            f"{prefix}mlp.fc2.bias": (width,),
        }
    state = {name: torch.randn(shape).mul(0.3).half() for name, shape in shapes.items()}
    for block in range(TINY.depth):  # so that the activation is cut at both ends
        state[f"blocks.{block}.mlp.fc1.bias"] *= 20
    for index in ("1", "3"):
        state[f"feature.{index}.running_var"] = torch.rand_like(state[f"feature.{index}.running_var"]) + 0.5
        state[f"feature.{index}.num_batches_tracked"] = torch.tensor(3)
    return state


def naive(state: State, pixels: Tensor) -> Tensor:
    """Unicom's forward pass, written down from its code."""
    state = {name: value.float() for name, value in state.items()}

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = functional.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=TINY.patch)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]  # (images, tokens, width)
    for block in range(TINY.depth):
        qkv = linear(layer_norm(x, f"blocks.{block}.norm1"), f"blocks.{block}.attn.qkv")
        heads = []
        for head in range(TINY.heads):
            length = TINY.width // TINY.heads
            start = head * length
            q, k, v = (qkv[..., i * TINY.width + start : i * TINY.width + start + length] for i in range(3))
            heads.append((q @ k.transpose(1, 2) / length**0.5).softmax(-1) @ v)
        x = x + linear(torch.cat(heads, dim=-1), f"blocks.{block}.attn.proj")
        hidden = linear(layer_norm(x, f"blocks.{block}.norm2"), f"blocks.{block}.mlp.fc1").clamp(0, 6)
        x = x + linear(hidden, f"blocks.{block}.mlp.fc2")
    x = layer_norm(x, "norm").flatten(1)
    for index in ("0", "2"):
        x = linear(x, f"feature.{index}")
        norm = f"feature.{int(index) + 1}"
        x = (x - state[f"{norm}.running_mean"]) / (state[f"{norm}.running_var"] + 2e-5).sqrt()
        x = x * state[f"{norm}.weight"] + state[f"{norm}.bias"]
    return x


def test_a_published_file_gives_unicoms_features() -> None:
    state = published()
    extractor = unicom_extractor("tiny", size=16, weights=state, normalize=False).eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    mean, std = torch.tensor(unicom.MEAN).view(3, 1, 1), torch.tensor(unicom.STD).view(3, 1, 1)
    with torch.no_grad():
        embeddings = extractor(images)
    assert embeddings.shape == (3, extractor.embedding_dim) == (3, 5)
    torch.testing.assert_close(embeddings, naive(state, (images / 255 - mean) / std), atol=1e-4, rtol=1e-4)


def test_the_key_map_is_pure_and_knows_its_own_names() -> None:
    state = published()
    names = list(state)
    renamed = from_unicom(state)
    assert list(state) == names
    assert {name for name in renamed if name.startswith("head")} >= {"head.1.weight", "head.4.running_var"}
    assert from_unicom(renamed).keys() == renamed.keys()


def test_other_sizes_and_weights_are_refused() -> None:
    assert unicom_extractor("tiny", size=24, embedding_dim=4).embedding_dim == 4
    with pytest.raises(ConfigError, match="whole patches of 8"):
        unicom_extractor("tiny", size=20)
    with pytest.raises(ConfigError, match="images of 16 pixels, not of 24"):
        unicom_extractor("tiny", size=24, weights=published())
    with pytest.raises(CheckpointError, match=r"another architecture than tiny.*first: head.1.weight"):
        unicom_extractor("tiny", size=16, weights={k: v for k, v in published().items() if k != "feature.0.weight"})
    with pytest.raises(CheckpointError, match="do not fit tiny"):
        unicom_extractor("tiny", size=16, weights={**published(), "pos_embed": torch.zeros(1, 9, 12)})
