from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from oml_ray.errors import CheckpointError, StorageError
from oml_ray.learning.extractors import timm_extractor
from oml_ray.learning.weights import State, fit_names, from_clip, from_dinov2, from_moco, from_oml, read_weights


def assert_equal(one: State, other: State) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def randomised(state: State) -> State:
    return {name: torch.randn(value.shape) for name, value in state.items()}


def test_moco_keeps_the_query_encoder_without_its_head(tmp_path: Path) -> None:
    state = randomised(timm.create_model("resnet18", num_classes=0).state_dict())
    published = {f"module.encoder_q.{name}": value for name, value in state.items()}
    published |= {f"module.encoder_k.{name}": torch.zeros(1) for name in state}
    published |= {f"module.encoder_q.fc.{part}": torch.zeros(1) for part in ("0.weight", "0.bias", "2.weight")}
    published |= {"module.queue": torch.zeros(1), "module.queue_ptr": torch.zeros(1)}
    assert_equal(from_moco(published), state)
    torch.save({"epoch": 800, "arch": "resnet50", "state_dict": published}, tmp_path / "moco.pth.tar")
    assert_equal(from_moco(read_weights(tmp_path / "moco.pth.tar")), state)
    assert_equal(from_moco(state), state)


@pytest.mark.parametrize("prefix", ["", "model.", "extractor.model."])
def test_oml_checkpoints_lose_their_prefix_and_criterion(prefix: str) -> None:
    state = randomised(timm.create_model("test_vit", num_classes=0).state_dict())
    published = {f"{prefix}{name}": value for name, value in state.items()}
    assert_equal(from_oml({**published, "criterion.weight": torch.zeros(1)}), state)


def clip_state(width: int, depth: int, patches: int, out: int) -> State:
    """The names and shapes of OpenAI's code, with a tower for texts."""
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "positional_embedding": (patches + 1, width),
        "proj": (width, out),
        "conv1.weight": (width, 3, 16, 16),
    }
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for block in range(depth):
        prefix = f"transformer.resblocks.{block}."
        shapes |= {
            f"{prefix}attn.in_proj_weight": (3 * width, width),
            f"{prefix}attn.in_proj_bias": (3 * width,),
            f"{prefix}attn.out_proj.weight": (width, width),
            f"{prefix}attn.out_proj.bias": (width,),
            f"{prefix}mlp.c_fc.weight": (4 * width, width),
            f"{prefix}mlp.c_fc.bias": (4 * width,),
            f"{prefix}mlp.c_proj.weight": (width, 4 * width),
            f"{prefix}mlp.c_proj.bias": (width,),
        }
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{prefix}{name}.weight": (width,), f"{prefix}{name}.bias": (width,)}
    texts = {"logit_scale": (), "positional_embedding": (7, 8), "transformer.resblocks.0.ln_1.weight": (8,)}
    return {
        **{name: torch.randn(shape) for name, shape in texts.items()},
        **{f"visual.{name}": torch.randn(shape) for name, shape in shapes.items()},
    }


def test_clip_is_named_as_timm_names_it() -> None:
    model = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=5, pre_norm=True
    )
    state = clip_state(width=24, depth=2, patches=4, out=5)
    renamed = from_clip(state)
    assert_equal(renamed, checkpoint_filter_fn(dict(state), model))
    model.load_state_dict(renamed)
    assert_equal(from_clip(renamed), renamed)
    assert_equal(from_clip({f"clip.{name}": value for name, value in state.items()}), renamed)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_is_named_as_timm_names_it(registers: int) -> None:
    model = VisionTransformer(
        img_size=28,
        patch_size=14,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=0,
        init_values=1e-5,
        reg_tokens=registers,
        no_embed_class=registers > 0,
    )
    state = randomised(model.state_dict())
    published = {**state, "mask_token": torch.zeros(1, 24)}
    if registers:
        published["register_tokens"] = published.pop("reg_token")
        published["pos_embed"] = torch.randn(1, 5, 24)
    renamed = from_dinov2(published)
    assert_equal(renamed, checkpoint_filter_fn(dict(published), model))
    model.load_state_dict(renamed)
    assert_equal(from_dinov2(renamed), renamed)


@pytest.mark.parametrize(
    "wrappers",
    [
        *(["state_dict"], ["model_state_dict"], ["net"], ["teacher"], ["model"], ["state_dict_ema"], ["ema"]),
        *(["model", "state_dict"], ["ema", "module"], []),
    ],
)
def test_the_wrappers_of_training_scripts_are_known(wrappers: list[str], tmp_path: Path) -> None:
    state = randomised({"a.weight": torch.zeros(2), "b.weight": torch.zeros(3)})
    content: Any = state
    for wrapper in reversed(wrappers):
        content = {"epoch": 3, "optimizer": {"state": {}}, wrapper: content}
    torch.save(content, tmp_path / "weights.pth")
    assert_equal(read_weights(tmp_path / "weights.pth"), state)


def test_of_a_student_and_its_teacher_the_teacher_is_read(tmp_path: Path) -> None:
    student, teacher = ({"w": torch.full((2,), value)} for value in (1.0, 2.0))
    torch.save({"student": student, "teacher": teacher}, tmp_path / "dino.pth")
    assert_equal(read_weights(tmp_path / "dino.pth"), teacher)


def test_pickled_objects_are_refused_with_a_safe_way(tmp_path: Path) -> None:
    path = tmp_path / "dino.pth"
    torch.save({"model": {"w": torch.zeros(2)}, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(CheckpointError) as error:
        read_weights(path)
    message = str(error.value)
    assert "\x1b" not in message
    assert "\n" not in message
    assert "argparse.Namespace" in message
    assert "Where you trust the file" in message
    command = message.partition('python -c "')[2].partition('"')[0]
    assert "save_file" in command
    exec(command.replace("'weights.safetensors'", repr(str(tmp_path / "w.safetensors"))))
    assert_equal(read_weights(tmp_path / "w.safetensors"), {"w": torch.zeros(2)})


def test_weights_that_may_not_be_read_are_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "w.pth")

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match="permission denied"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("prefix", ["model.", "module._orig_mod.", "backbone.", "student.", "_orig_mod.", ""])
@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
def test_weights_with_a_prefix_and_other_classes_are_loaded(prefix: str, name: str) -> None:
    state = randomised(timm.create_model(name, num_classes=7).state_dict())
    published = {f"{prefix}{key}": value for key, value in state.items()} | {"criterion.proxies": torch.zeros(7, 2)}
    backbone = timm_extractor(name, size=32, weights=published).backbone.state_dict()
    assert len(backbone) > 10
    for key, value in backbone.items():
        is_comparable = value.shape == state[key].shape and value.is_floating_point()  # positions are resampled
        assert not is_comparable or torch.equal(value, state[key]), key
    assert any(torch.equal(value, state[key]) for key, value in backbone.items() if key.endswith("weight"))


def test_of_two_networks_in_one_file_the_teacher_or_none_is_taken() -> None:
    reference = {"a.weight": torch.zeros(2), "b.weight": torch.zeros(3)}
    one, other = randomised(reference), randomised(reference)

    def both(first: str, second: str) -> State:
        return {f"{first}{key}": value for key, value in one.items()} | {
            f"{second}{key}": value for key, value in other.items()
        }

    assert_equal(fit_names(both("student.", "teacher."), [reference], name="x"), other)
    with pytest.raises(CheckpointError, match="another architecture"):
        fit_names(both("left.", "right."), [reference], name="x")
