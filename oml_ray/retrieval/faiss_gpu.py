"""GPU forms of FAISS indexes: which of them `index_cpu_to_gpu` can move, decided on machines without a GPU.

============================  ====================================================================================
``Flat``                      yes
``IVF...,Flat``               yes
``IVF...,PQ<M>``              with 8 bits and M of 1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40 or 48 sub-quantizers
``IVF...,SQ...``              SQ4, SQ8 and SQfp16
``OPQ...,``, ``PCA...,``      as what follows
anything else                 no: HNSW, NSG, PQ and SQ without IVF, fast-scan PQ, RFlat, LSH; stays on the CPU
============================  ====================================================================================

Source: `ToGpuCloner` and the checks of `GpuIndexIVFPQ` and `GpuIndexIVFScalarQuantizer` in FAISS 1.15, with the default
options of cloning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import faiss

MAX_SELECTED = 2048
"""Largest nprobe, and most candidates of a query, on a GPU."""
SUB_QUANTIZERS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48)  # more need more shared memory than every card has
SCALAR_TYPES = ("QT_4bit", "QT_4bit_uniform", "QT_8bit", "QT_8bit_uniform", "QT_8bit_direct", "QT_fp16")
PARAMETERS = ("use_precomputed_table", "verbose")


def has_gpu_build() -> bool:
    """Return whether the installed FAISS was built for GPUs, such as by the package faiss-gpu."""
    return "GPU" in faiss.get_compile_options().split()


def cpu_reason(index: Any, nprobe: int | None, parameters: Iterable[str]) -> str | None:
    """Tell why an index must stay on the CPU.

    Args:
        index: an index of the CPU, trained or not.
        nprobe: lists that its searches look through; None: FAISS's default.
        parameters: names of further search parameters.

    Returns:
        A clause for a message; None: the index has a GPU form.
    """
    if not has_gpu_build():
        return "this FAISS is built without GPUs; install faiss-gpu"
    if nprobe is not None and nprobe > MAX_SELECTED:
        return f"FAISS looks through at most {MAX_SELECTED} lists on a GPU, found nprobe={nprobe}"
    if refused := [name for name in parameters if name not in PARAMETERS]:
        return f"FAISS has no parameter {refused[0]} on a GPU"
    return _form_reason(faiss.downcast_index(index))


def _form_reason(index: Any) -> str | None:
    name = type(index).__name__
    if name in ("IndexIDMap", "IndexPreTransform"):
        return _form_reason(faiss.downcast_index(index.index))
    if name in ("IndexFlat", "IndexFlatL2"):
        return None
    if name not in ("IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer"):
        return f"FAISS has no GPU form of {name}"
    if name == "IndexIVFPQ" and (index.pq.nbits != 8 or index.pq.M not in SUB_QUANTIZERS):
        return f"FAISS has no GPU form of {name} with {index.pq.M} sub-quantizers of {index.pq.nbits} bits"
    if name == "IndexIVFScalarQuantizer" and index.sq.qtype not in _scalar_types():
        return f"FAISS has no GPU form of {name} with this type of code"
    return _form_reason(faiss.downcast_index(index.quantizer))


def _scalar_types() -> list[int]:
    return [getattr(faiss.ScalarQuantizer, name) for name in SCALAR_TYPES]
