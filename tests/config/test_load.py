from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from oml_ray.config import (
    EmbedConfig,
    EvaluateConfig,
    SearchConfig,
    SweepConfig,
    TrainConfig,
    apply_overrides,
    differing_keys,
    dump,
    load,
)
from oml_ray.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
FIGURES = CONFIGS / "train" / "figures.yaml"
SCHEMAS = {
    "train": TrainConfig,
    "embed": EmbedConfig,
    "evaluate": EvaluateConfig,
    "search": SearchConfig,
    "sweep": SweepConfig,
}
SHIPPED = sorted(path for verb in SCHEMAS for path in (CONFIGS / verb).glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_config_loads(path: Path) -> None:
    config = load(SCHEMAS[path.parent.name], path)
    again = yaml.safe_load(dump(config))
    assert type(config).model_validate(again) == config, "the resolved config is itself a config"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_shipped_config_states_no_default(path: Path) -> None:
    """Defaults live in the schema alone: leaving out any one stated value must change the config (or be an error)."""
    schema, tree = SCHEMAS[path.parent.name], yaml.safe_load(path.read_text())
    whole = load(schema, path)

    def leaves(node: dict, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:  # type: ignore[type-arg]
        found = []
        for key, value in node.items():
            found += leaves(value, (*prefix, key)) if isinstance(value, dict) else [(*prefix, key)]
        return found

    for leaf in leaves(tree):
        if leaf[0] in ("criterion", "sampler"):  # what the reader came for, stated on purpose
            continue
        shorter = yaml.safe_load(path.read_text())
        node = shorter
        for part in leaf[:-1]:
            node = node[part]
        del node[leaf[-1]]
        try:
            assert schema.model_validate(shorter) != whole, ".".join(leaf)
        except ValueError:
            continue


def error(text: str = "", overrides: list[str] | None = None, tmp: Path | None = None) -> str:
    path = FIGURES
    if tmp is not None:
        path = tmp / "config.yaml"
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, path, overrides or [])
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("samplr.n_labels=4", "unknown key 'samplr'. Did you mean 'sampler'? Legal keys here: seed, run, data,"),
        ("sampler.labels=4", "unknown key 'sampler.labels'. Did you mean 'n_labels'? Legal keys here: name, n_labels,"),
        ("transforms.train.sise=4", "unknown key 'transforms.train.sise'. Did you mean 'size'?"),
        ("transforms.train.sise=4", "Legal keys here: name, size, ratio, flip, jitter, scale."),
        ("criterion.miner.depth=4", "unknown key 'criterion.miner.depth'. Legal keys here: name."),
        ("transforms.train.name=cropflip", "transforms.train.name is 'cropflip'; allowed: 'resize', 'resize_flip',"),
        ("criterion.name=arcfase", "criterion.name is 'arcfase'; allowed: 'triplet', 'contrastive',"),
        ("schedule={warmup_steps: 3}", "schedule needs a key 'name'"),
        ("training.epochs=five", "training.epochs: should be a valid integer, found 'five'"),
        ("training.epochs=true", "training.epochs: should be a valid integer, found True"),
        ('training.epochs="5"', "training.epochs: should be a valid integer, found '5'"),
        ("training.epochs=0", "training.epochs: should be greater than 0, found 0"),
        ("optimizer.lr=-1e-3", "optimizer.lr: should be greater than 0, found -0.001"),
        ("optimizer.lr=.inf", "optimizer.lr: should be a finite number"),
        ("sampler.n_instances=1", "sampler.n_instances: should be greater than or equal to 2, found 1"),
        ("data.on_bad_image=ignore", "data.on_bad_image: should be 'error' or 'skip', found 'ignore'"),
        ("run.name=../other", "run.name: String should match pattern"),
        ("run.name=null", "run.name: should be a valid string, found None"),
        ("scaling.num_workers=33", "33 workers cannot share a global batch of 32 instances"),
        ("transforms.eval.size=32", "transforms.train.size (64) and transforms.eval.size (32) differ"),
        (
            "transforms.eval={name: crop_flip, size: 64}",
            "transforms.eval.name is 'crop_flip'; allowed: 'resize', 'resize_crop'",
        ),
        ("criterion={name: contrastive, miner: {name: hard}}", "criterion.miner.name is 'hard'; allowed: 'all',"),
        (
            "criterion={name: arcface, head: {sample_rate: 0.5}}",
            "criterion.head: sample_rate below 1 needs sharded: true",
        ),
        ("criterion={name: cosface, margin: 2.0}", "criterion.margin: should be less than or equal to 1, found 2.0"),
        (
            "criterion.miner={name: n_hard, n_positive: [3, 2]}",
            "criterion.miner: n_positive must be [first, last] with",
        ),
        ("criterion={name: arcface, sub_centers: 2, head: {sharded: true}}", "a sharded head has neither sub_centers"),
        ("sampler={name: random, batch_size: 1}", "sampler.batch_size: should be greater than or equal to 2, found 1"),
        ("transforms.eval={name: resize_crop, size: 64, resize: 32}", "resize must be at least size (64), found 32"),
        ("training.ema={decay: 1.0}", "training.ema.decay: should be less than 1, found 1.0"),
        ("criterion={name: arcface, smooth_within_category: true}", "needs a label_smoothing above 0"),
        ("criterion.miner=hard", "criterion.miner: should be a mapping of keys, such as {name: ...}, found 'hard'"),
        ("training.micro_batch=0", "training.micro_batch: should be greater than 0, found 0"),
        ("checkpoint.metric=cmc.7", "checkpoint.metric: 'cmc.7' is not computed: use one of cmc.1, cmc.5, cmc.10"),
        ("training.freeze_epochs=1", "training.freeze_epochs freezes the backbone, and nothing else has parameters"),
        ("extractor={name: timm, model: a, pretrained: true, weights: b}", "exclude each other"),
        ("seed", "--set takes dotted.key=value, found 'seed'"),
        ("a..b=1", "--set takes dotted.key=value, found 'a..b=1'"),
        ("seed.x=1", "--set seed.x=1: seed is the value 42, which has no keys"),
        ("seed=[1", "--set seed is not valid YAML"),
    ],
)
def test_bad_overrides_get_a_clear_message(override: str, expected: str) -> None:
    overrides = ["seed=42", override] if override.startswith("seed.x") else [override]
    message = error(overrides=overrides)
    assert expected in message
    assert "pydantic" not in message


def test_everything_wrong_is_one_message() -> None:
    message = error(overrides=["seed=x", "sampler.n_labels=1", "foo=2"])
    for key in ("seed:", "sampler.n_labels:", "unknown key 'foo'"):
        assert key in message


def test_missing_keys_are_named(tmp_path: Path) -> None:
    message = error("run: {name: a}\nsampler: {name: balance, n_labels: 2}\n", tmp=tmp_path)
    assert str(tmp_path / "config.yaml") in message
    for key in ("data", "transforms", "extractor", "criterion", "sampler.n_instances"):
        assert f"{key} is missing" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must hold a mapping of config keys, found NoneType"),
        ("- a", "must hold a mapping of config keys, found list"),
        ("a: [", "is not valid YAML"),
        ("seed: 1\nseed: 2", "the key 'seed' stands twice"),
        ("run: !!python/object/apply:os.system [echo]", "is not valid YAML"),
        ("seed: !!python/name:os.system", "is not valid YAML"),
    ],
)
def test_bad_files_get_a_clear_message(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in error(text, tmp=tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no config file .*nowhere\.yaml"):
        load(TrainConfig, tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(TrainConfig, tmp_path)


def test_overrides_take_yaml_values_and_replace_whole_nodes() -> None:
    config = load(
        TrainConfig,
        FIGURES,
        [
            "optimizer.lr=1e-2",
            "criterion.margin=null",
            "optimizer.options={momentum: 0.9}",
            "schedule={name: constant}",
        ],
    )
    assert config.optimizer.lr == 0.01
    assert config.criterion.margin is None
    assert config.optimizer.options == {"momentum": 0.9}
    assert config.schedule.name == "constant"


KEYS = st.text("abc", min_size=1, max_size=2)
TREES = st.recursive(st.integers() | st.none(), lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=8)


@given(st.dictionaries(KEYS, TREES, max_size=3), st.lists(KEYS, min_size=1, max_size=3), st.integers())
def test_an_override_sets_its_key_and_nothing_else(tree: dict, path: list[str], value: int) -> None:  # type: ignore[type-arg]
    before = yaml.safe_dump(tree)
    try:
        result = apply_overrides(tree, [f"{'.'.join(path)}={value}"])
    except ConfigError:
        node: object = tree  # only a value in the way is an error
        for part in path[:-1]:
            node = node[part]  # type: ignore[index]
            if not isinstance(node, dict):
                break
        assert isinstance(node, int)
        return
    assert yaml.safe_dump(tree) == before
    found = result
    for part in path:
        found = found[part]
    assert found == value
    assert all(key == ".".join(path) or ".".join(path).startswith(key) for key in differing_keys(tree, result))


def test_differing_keys_are_dotted() -> None:
    one, other = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}, "e": 2}
    assert differing_keys(one, other) == ["a.c", "d", "e"]


DESIGN_EXAMPLE = """
seed: 42
run: {name: figures, storage: runs, resume: auto}
data: {table: figures, root: null, on_bad_image: error}
transforms: {train: {name: crop_flip, size: 64}, eval: {name: resize, size: 64}}
extractor: {name: timm, model: test_vit, pretrained: false, weights: null, embedding_dim: null, normalize: true}
criterion: {name: triplet, margin: 0.2, miner: {name: hard}, bank: null}
sampler: {name: balance, n_labels: 8, n_instances: 4}
optimizer: {name: adamw, lr: 1.0e-3, weight_decay: 1.0e-4}
schedule: {name: cosine, warmup_steps: 0}
training: {epochs: 5, precision: fp32, micro_batch: null, clip_grad_norm: null, freeze_epochs: 0, ema: null}
checkpoint: {every_steps: null, metric: cmc.1, mode: max, keep: 2}
scaling: {num_workers: 2, use_gpu: false, cpus_per_worker: 1, data_cpus: 1, max_failures: 3}
validation: {every: 1, mode: inline}
evaluation:
  embed: {actors: 1, batch_size: 128}
  gallery: {backend: exact, shards: 2, precision: fp32, distance: euclidean, block_rows: 4096}
  rerank: []
  metrics: {cmc: [1, 5, 10], precision: [5], map: [5], bootstrap: {samples: 1000, seed: 0}}
"""


def test_the_whole_config_of_the_main_job_loads(tmp_path: Path) -> None:
    """Every key that users script against, with its default (but for what has none)."""
    path = tmp_path / "config.yaml"
    path.write_text(DESIGN_EXAMPLE)
    short = load(TrainConfig, FIGURES, ["training={}", "validation={}"])
    assert load(TrainConfig, path) == short


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("transforms.train.scale=[0.0, 1.0]", "scale must be [smallest, largest] with 0 < smallest <= largest"),
        ("transforms.train.ratio=[2.0, 0.5]", "ratio must be [smallest, largest]"),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay: should be a finite number"),
        ("seed=4294967296", "seed: should be less than 4294967296"),
        ("seed={[a]: 1}", "is no key"),
        ("evaluation.rerank=[1]", "evaluation.rerank"),
        ("criterion.bank={size_in_batches: 0}", "criterion.bank.size_in_batches: should be greater than 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(override: str, expected: str) -> None:
    assert expected in error(overrides=[override])
