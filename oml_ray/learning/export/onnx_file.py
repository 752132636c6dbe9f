"""An extractor as one ONNX file, weights included; `onnxruntime` and its like run it.

=============  =======================================  ===============================================
name           tensor                                   meaning
=============  =======================================  ===============================================
``images``     uint8 (n, 3, height, width), any n >= 1  RGB pixels, as training gets them
``embeddings`` float32 (n, D)                           as `Extractor` gives them
=============  =======================================  ===============================================

Pixels are normalised inside. The model's metadata keeps the facts that the caller gives.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oml_ray.errors import ConfigError, ExportError, reason_of
from oml_ray.learning.export.program import traced
from oml_ray.learning.export.sameness import evaluating, largest_difference, quiet, writing
from oml_ray.learning.extractors import Extractor, Size

INPUT, OUTPUT = "images", "embeddings"
MAX_BYTES = 2**31 - 2**24  # a protobuf message is shorter than 2 GiB; the graph itself takes some of it


def write_onnx(extractor: Extractor, path: Path, *, size: Size, facts: Mapping[str, Any]) -> float:
    """Write the ONNX file of an extractor, and compare what onnxruntime makes of it with the extractor.

    Args:
        extractor: what is written, as in evaluation mode.
        path: local file to write.
        size: side of the images in pixels, or their height and width.
        facts: the model's metadata; what is no text becomes JSON.

    Returns:
        The largest difference found, see `largest_difference`.

    Raises:
        ConfigError: packages are missing. ExportError: ONNX cannot express the network, it is too large for one file,
            or the file gives other embeddings, and is not to be used. StorageError: the file cannot be written.
    """
    check_packages()
    num_bytes = sum(tensor.nbytes for tensor in extractor.state_dict().values())
    if num_bytes > MAX_BYTES:
        raise ExportError(
            f"The weights take {num_bytes / 2**30:.1f} GiB, and one ONNX file holds less than 2 GiB: export the form "
            "torch instead."
        )
    with evaluating(extractor):
        program = traced(extractor, size)
        try:
            with quiet():
                converted: Any = torch.onnx.export(
                    program,
                    dynamo=True,
                    input_names=[INPUT],
                    output_names=[OUTPUT],
                    dynamic_shapes=({0: "n"},),
                    verbose=False,
                )
        except Exception as error:  # the exporter's own kinds, and whatever its converters raise
            raise ExportError(
                f"ONNX cannot express this network: {_first_cause(error)}. Export the form torch instead, or train a "
                "network without that operator."
            ) from None
        for node in converted.model.graph.all_nodes():
            node.metadata_props.clear()  # which module of Python each comes from: a third of the file
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
        converted.model.metadata_props.update(texts)
        with writing(path):
            converted.save(path, external_data=False)
        return largest_difference(extractor, _runner(path), size, what="The ONNX model, run by onnxruntime,")


def check_packages() -> None:
    """See to it that what writes and checks ONNX files is there.

    Raises:
        ConfigError: a package is missing.
    """
    try:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"ONNX needs packages that cannot be imported ({reason_of(error)}): pip install 'oml_ray[onnx]', or export "
            "the form torch, which needs none."
        ) from error


def _runner(path: Path) -> Callable[[Tensor], Tensor]:
    """The model of a file, as onnxruntime runs it on the CPU."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: it warns of machines, such as of GPUs that it cannot use
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises kinds of its own
        raise ExportError(
            f"onnxruntime cannot load the ONNX model: {reason_of(error)}. Export the form torch instead."
        ) from None
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _first_cause(error: BaseException) -> str:
    """What went wrong at the bottom, where the exporter's own message speaks of its steps."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason_of(error).rstrip(".")
