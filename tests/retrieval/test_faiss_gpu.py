"""Which FAISS indexes have a GPU form: what `ToGpuCloner` of FAISS 1.15 moves, decided without a GPU."""

import faiss
import pytest

from oml_ray.retrieval import faiss_gpu
from oml_ray.retrieval.faiss_index import FaissSettings
from oml_ray.retrieval.hnswlib_index import HnswlibSettings


@pytest.fixture(autouse=True)
def built_for_gpus(monkeypatch):
    monkeypatch.setattr(faiss, "get_compile_options", lambda: "OPTIMIZE GPU ")


@pytest.mark.parametrize(
    "factory",
    ["Flat", "IVF16,Flat", "IVF16,PQ16", "IVF16,PQ48", "IVF16,SQ8", "IVF16,SQfp16", "OPQ16_64,IVF16,PQ16", "PCA32,Flat",
     "L2norm,IVF16,Flat", "IDMap,IVF16,Flat"],
)  # fmt: skip
def test_indexes_with_a_gpu_form(factory):
    index = faiss.index_factory(480, factory, faiss.METRIC_L2)
    assert faiss_gpu.cpu_reason(index, None, ()) is None


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("HNSW32", "IndexHNSWFlat"),
        ("NSG32", "IndexNSGFlat"),
        ("PQ16", "IndexPQ"),
        ("SQ8", "IndexScalarQuantizer"),
        ("IVF16,SQ6", "this type of code"),
        ("IVF16,PQ8x4fs", "IndexIVFPQFastScan"),
        ("IVF16,PQ8x4", "8 sub-quantizers of 4 bits"),
        ("IVF16,PQ6", "6 sub-quantizers of 8 bits"),
        ("OPQ64_256,IVF16,PQ64", "64 sub-quantizers"),
        ("IVF16,PQ64", "'IVF16,PQ64'"),
        ("IVF16,PQ8+4", "IndexIVFPQR"),
        ("IVF16_HNSW8,Flat", "IndexHNSWFlat"),
        ("IMI2x4,Flat", "MultiIndexQuantizer"),
        ("IVF16,SQ8,RFlat", "IndexRefineFlat"),
        ("IVF16,FlatDedup", "IndexIVFFlatDedup"),
        ("LSH", "IndexLSH"),
        ("Nonsense", "'Nonsense'"),
    ],
)
def test_indexes_without_a_gpu_form_say_why(factory, reason):
    assert reason in (FaissSettings(factory).cpu_reason() or "")


def test_settings_that_no_gpu_takes():
    assert FaissSettings("IVF4096,Flat", nprobe=2048).cpu_reason() is None
    assert "nprobe=2049" in (FaissSettings("IVF4096,Flat", nprobe=2049).cpu_reason() or "")
    assert FaissSettings("IVF16,PQ16", parameters={"use_precomputed_table": 1}).cpu_reason() is None
    assert "max_codes" in (FaissSettings("IVF16,Flat", parameters={"max_codes": 100}).cpu_reason() or "")
    assert HnswlibSettings().cpu_reason()


def test_a_faiss_without_gpus_keeps_everything_on_the_cpu(monkeypatch):
    monkeypatch.setattr(faiss, "get_compile_options", lambda: "OPTIMIZE DD AVX2 ")
    assert "built without GPUs" in (FaissSettings("Flat").cpu_reason() or "")
