"""Resource requests against described clusters: what is refused and how, shares of GPUs, and reservations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from helpers import train_config
from hypothesis import given
from hypothesis import strategies as st

from oml_ray.config import TrainConfig, nodes, validate
from oml_ray.distributed import embed, trainer, validation
from oml_ray.distributed.runtime import gallery_resources
from oml_ray.distributed.runtime.devices import FAKE_GPUS
from oml_ray.distributed.runtime.resources import ProcessGroup, check_resources, gpu_share
from oml_ray.errors import ResourceError

UNITS = 10_000  # of a GPU or CPU, as Ray counts


def node(cpus: float, gpus: float = 0, labels: dict[str, str] | None = None, **custom: float) -> dict[str, Any]:
    return {"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus, **custom}, "Labels": labels or {}}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Describe the nodes of the connected cluster, whose GPUs are simulated."""

    def describe(*described: dict[str, Any]) -> None:
        names = {name for each in described for name in each["Resources"]}
        total = {name: sum(each["Resources"].get(name, 0) for each in described) for name in names}
        monkeypatch.setenv(FAKE_GPUS, "1")
        monkeypatch.setattr(ray, "nodes", lambda: list(described))
        monkeypatch.setattr(ray, "cluster_resources", lambda: total)
        monkeypatch.setattr(ray, "available_resources", lambda: total)

    return describe


def scaling_of(**keys: Any) -> nodes.Scaling:
    return nodes.Scaling.model_validate(keys)


def config_of(folder: Path, **keys: Any) -> TrainConfig:
    return validate(TrainConfig, train_config(folder / "df.csv", folder, **keys), "config")


def test_the_stages_of_gpus() -> None:
    stages: tuple[nodes.Stage, ...] = ("workers", "embedding", "gallery")
    for keys, expected in (
        ({}, [False, False, False]),
        ({"use_gpu": True}, [True, True, True]),
        ({"use_gpu": True, "gpu": {"gallery": False}}, [True, True, False]),
        ({"gpu": {"embedding": True}}, [False, True, False]),
    ):
        assert [scaling_of(**keys).uses_gpu(stage) for stage in stages] == expected


def test_a_placement_without_gpus_is_refused(cluster: Any) -> None:
    cluster(node(8, 4, {"role": "train"}), node(32, 0, {"role": "gallery"}))
    placement = {"gallery": {"labels": {"role": "gallery"}}}
    gallery = nodes.ExactGallery(shards=2)
    with pytest.raises(ResourceError, match=r"^scaling.gpu.gallery: .* the 1 nodes .* have none: set scaling.gpu.gall"):
        check_resources(gallery_resources.needs(gallery, scaling_of(use_gpu=True, placement=placement)))
    check_resources(
        gallery_resources.needs(gallery, scaling_of(use_gpu=True, gpu={"gallery": False}, placement=placement))
    )
    check_resources(gallery_resources.needs(gallery, scaling_of(use_gpu=True)))


def test_processes_that_do_not_fit_side_by_side_are_refused(cluster: Any) -> None:
    """GPUs and CPUs suffice in all, but not on the same nodes."""
    cluster(node(2, 4), node(32, 0))
    node_config = nodes.Embed(actors=3, cpus_per_actor=2)
    message = (
        r"^evaluation.embed.actors: 3 processes of 2 CPUs, 1 GPUs each .* scaling.placement.embedding .* room for 1"
    )
    with pytest.raises(ResourceError, match=message):
        check_resources(embed.needs(node_config, scaling_of(use_gpu=True)))
    check_resources(embed.needs(node_config, scaling_of()))
    check_resources(embed.needs(nodes.Embed(actors=[1, 3], cpus_per_actor=2), scaling_of(use_gpu=True)))


def test_custom_resources_bound_the_processes(cluster: Any, tmp_path: Path) -> None:
    cluster(node(8, train=1), node(8, train=1), node(8))
    placement = {"workers": {"resources": {"train": 1}}}
    check_resources(trainer.needs(config_of(tmp_path, scaling={"num_workers": 2, "placement": placement})))
    with pytest.raises(
        ResourceError, match=r"^scaling.num_workers: 3 processes of 1 CPUs, 1 train each .* room for 2:"
    ):
        check_resources(trainer.needs(config_of(tmp_path, scaling={"num_workers": 3, "placement": placement})))


def test_too_few_gpus_name_the_switch(cluster: Any, tmp_path: Path) -> None:
    cluster(node(8, 1))
    config = config_of(tmp_path, scaling={"num_workers": 2, "use_gpu": True})
    with pytest.raises(ResourceError, match=r"has 1 GPUs, but 2 are needed: set scaling.use_gpu \(or scaling.gpu.work"):
        check_resources(trainer.needs(config))


def test_an_autoscaler_is_waited_for(cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster(node(2))
    config = config_of(tmp_path, scaling={"num_workers": 2, "use_gpu": True, "autoscaling": True})
    check_resources(trainer.needs(config))
    assert (
        capsys.readouterr().out == "waiting for the autoscaler to add 1 CPUs and 2 GPUs (scaling.autoscaling: true)\n"
    )


def num_placed(described: list[tuple[int, int]], num: int, cpus: int, share: float) -> int:
    """How many processes Ray places: each on one node, its share on one GPU."""
    placed, each = 0, round(share * UNITS)
    for node_cpus, node_gpus in described:
        free = [UNITS] * node_gpus
        for _ in range(node_cpus // cpus):
            gpu = next((index for index, units in enumerate(free) if units >= each), None)
            if gpu is None:
                break
            free[gpu] -= each
            placed += 1
    return min(placed, num)


@given(
    described=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 4)), min_size=1, max_size=3),
    num=st.integers(1, 13),
    cpus=st.integers(1, 3),
)
def test_shards_spread_over_all_gpus_and_all_fit(described: list[tuple[int, int]], num: int, cpus: int) -> None:
    group = ProcessGroup("gallery", nodes.Placement(), num, "", cpus)
    share = gpu_share(group, [node(*each) for each in described])
    per_gpu = round(1 / share)
    if num_placed(described, num, cpus, 1e-4) < num:  # the CPUs do not suffice, whatever the share
        assert per_gpu == num
        return
    assert num_placed(described, num, cpus, share) == num
    if per_gpu > 1:
        assert num_placed(described, num, cpus, 1 / (per_gpu - 1)) < num


def test_shares_that_ray_can_hold() -> None:
    """Six shares of a sixth, rounded up, would not fit on one GPU."""
    group = ProcessGroup("gallery", nodes.Placement(), 6, "", 1)
    assert gpu_share(group, [node(8, 1)]) == 0.1666
    assert gpu_share(group, [node(8, 4)]) == 0.5
    assert gpu_share(group, [node(8, 8)]) == 1
    assert gpu_share(group, [node(8, 8)], most_gpus=3) == 0.5


def test_an_index_on_the_cpu_needs_no_gpu() -> None:
    scaling = scaling_of(use_gpu=True)
    for gallery, gpus in (
        (nodes.ExactGallery(), 1),
        (nodes.FaissGallery(backend="faiss", factory="IVF16,Flat"), 1),
        (nodes.FaissGallery(backend="faiss", factory="HNSW32"), 0),
        (nodes.HnswlibGallery(backend="hnswlib"), 0),
    ):
        assert gallery_resources.needs(gallery, scaling).gpus == gpus


@pytest.mark.parametrize(
    ("embedding", "gallery", "expected"),
    [
        # One GPU first embeds and then holds both shards, with their CPUs.
        ({"actors": 1}, {"shards": 2, "cpus_per_shard": 3}, [{"CPU": 6, "GPU": 1}]),
        ({"actors": 3}, {"shards": 2, "cpus_per_shard": 3}, [{"CPU": 3, "GPU": 1}] * 2 + [{"CPU": 1, "GPU": 1}]),
        ({"actors": 2, "cpus_per_actor": 4}, {"shards": 5}, [{"CPU": 4, "GPU": 1}] * 2),
        # Without a GPU form the shards hold CPUs alone.
        (
            {"actors": 1},
            {"backend": "faiss", "factory": "HNSW8", "shards": 2, "cpus_per_shard": 2},
            [{"CPU": 2, "GPU": 1}, {"CPU": 2}],
        ),
    ],
)
def test_elastic_workers_leave_what_either_stage_of_a_validation_holds(
    embedding: dict[str, Any], gallery: dict[str, Any], expected: list[dict[str, float]], tmp_path: Path
) -> None:
    config = config_of(
        tmp_path,
        scaling={"num_workers": [1, 4], "use_gpu": True},
        validation={"mode": "async"},
        evaluation={"embed": embedding, "gallery": gallery},
    )
    assert validation.bundles(config) == expected
    needed = trainer.needs(config)  # a cluster that passes the check holds the reservation and the least workers
    assert needed.gpus == 1 + sum(bundle.get("GPU", 0) for bundle in expected)
    assert needed.cpus == 1 + 1 + sum(bundle["CPU"] for bundle in expected)


def test_shards_of_a_validation_leave_the_gpus_of_others(cluster: Any, tmp_path: Path) -> None:
    cluster(node(32, 8))
    evaluation = {"gallery": {"shards": 4}, "embed": {"actors": 2}}
    for num_workers, is_trial, expected in ((3, False, 5), (7, False, 2), (3, True, 2), ([1, 4], False, 2)):
        scaling = {"num_workers": num_workers, "use_gpu": True}
        config = config_of(tmp_path, scaling=scaling, validation={"mode": "async"}, evaluation=evaluation)
        assert validation.gpu_limit(config, is_trial=is_trial) == expected
    config = config_of(tmp_path, scaling={"use_gpu": True, "gpu": {"gallery": False}}, validation={"mode": "async"})
    assert validation.gpu_limit(config, is_trial=False) is None
