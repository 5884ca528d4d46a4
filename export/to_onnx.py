"""A module with a signature -> a checked ONNX file."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from rsd_trt.errors import UserError, missing_extra
from rsd_trt.manifest import Batch
from rsd_trt.models.signature import BATCH, Exportable, Signature

OPSET = 18
EMBED_BELOW = 100_000_000  # bytes; larger weights go into a file beside the graph
TRACE_BATCH = 2  # of the example inputs of a dynamic export: 1 would be specialised


def export_onnx(module: Exportable, batch: Batch, path: Path) -> list[Path]:
    """Writes `path`, and `path.data` for large weights -> the files written.

    Raises:
        UserError: onnx is not installed, or the exporter produced a graph that is not valid standard ONNX.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (the exporter needs it)
    except ImportError as error:
        raise missing_extra(str(error.name), "export") from None

    signature = module.signature
    shapes = [{0: BATCH} if BATCH in port.dims else None for port in signature.inputs]
    # By parameter, since the exporter wants the shapes of `*condition` as one tuple.
    dynamic = tuple(inspect.signature(module.forward).bind(*shapes).arguments.values())
    with quiet_exporter():
        program = torch.onnx.export(
            module,
            tuple(example_inputs(signature, 1 if batch == "1" else TRACE_BATCH).values()),
            input_names=[port.name for port in signature.inputs],
            output_names=[port.name for port in signature.outputs],
            dynamic_shapes=dynamic if batch == "dynamic" else None,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        del node.metadata_props[:]  # stack traces with the paths of the machine that exported
    data = path.with_name(path.name + ".data")
    external = model.ByteSize() >= EMBED_BELOW
    onnx.save_model(model, str(path), save_as_external_data=external, location=data.name if external else None)
    _check(path)
    return [path, data] if external else [path]


def example_inputs(signature: Signature, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Seeded inputs by port name: normal floats, bytes of every value, zeros for integers and booleans."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for port in signature.inputs:
        shape = signature.shape(port, batch)
        if port.dtype == "float32":
            inputs[port.name] = torch.randn(shape, generator=generator)
        elif port.dtype == "uint8":
            inputs[port.name] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        else:
            inputs[port.name] = torch.zeros(shape, dtype=getattr(torch, port.dtype))
    return inputs


def _check(path: Path) -> None:
    """Standard operators of the pinned opset only, and a graph that onnx accepts."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"{path} is not valid ONNX: {error}") from None
    model = onnx.load(str(path), load_external_data=False)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    custom = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    if custom or opsets.get("") != OPSET:
        raise UserError(f"{path} has opsets {opsets} and custom domains {custom}; wanted opset {OPSET} alone")


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keeps the exporter's hints about optional packages off the screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
