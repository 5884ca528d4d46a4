"""Which backend runs a component, and how the backbone runs: one place that opens both, and says why it cannot."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.config import (
    BACKBONE_PRECISIONS,
    BACKBONES,
    BACKENDS,
    DEFAULT_ENGINES,
    PRECISIONS,
    BackboneKind,
    BackbonePrecision,
    Backend,
    Component,
    Precision,
    VisionDraftConfig,
    torch_dtype,
)
from rsd_trt.errors import Unavailable, UserError, did_you_mean
from rsd_trt.manifest import Batch, usable
from rsd_trt.models.backbone import Backbone
from rsd_trt.runtime.forward import EagerBackbone, Forward
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.runtime.session import GraphSession, Session, TorchSession
from rsd_trt.runtime.speculate import Actions, Tokens
from rsd_trt.trt import runnable_distribution

if TYPE_CHECKING:
    from rsd_trt.models.fast.backbone import FusedBackbone

log = logging.getLogger(__name__)

NO_HEAD = (
    "Pack it with one: --head, or OpenVLA-OFT's folder with its action_head--*_checkpoint.pt. OpenVLA's own action "
    "tokens (greedy decoding) are not read"
)
DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")
FP8_CAPABILITY = (8, 9)  # of the first GPUs with E4M3 matrix products


@dataclass(frozen=True)
class Launcher:
    """How components are run: the backend and what it needs to open a session."""

    bundle: Bundle
    backend: Backend
    device: torch.device
    precision: Precision = "fp32"  # of draft and head
    engines: Path = DEFAULT_ENGINES
    cuda_graph: bool = True  # `ort` alone can do without

    def __post_init__(self) -> None:
        """Raises UserError: a precision that draft and head are not run in."""
        if self.precision not in PRECISIONS:
            raise UserError(f"precision {self.precision!r} is unknown{did_you_mean(self.precision, PRECISIONS)}")

    def open(self, component: Component, batch: Batch) -> Session:
        """A session for a batch of one, or of any size.

        Raises:
            UserError: the backend cannot run here, or its artefact is missing or not fresh; with the remedy.
        """
        device, precision = self.device, self.precision
        if self.backend == "torch":
            return TorchSession(self.bundle.component(component, device, precision), device)
        if self.backend in ("graph", "compiled"):
            if device.type != "cuda":
                raise Unavailable(
                    f"backend {self.backend} needs a CUDA device, not {device}", "Use: --backend torch or ort"
                )
            if compiled := self.backend == "compiled":
                check_triton("backend", "--backend graph")
            return GraphSession(self.bundle.component(component, device, precision), device, compiled)
        signature = self.bundle.component(component).signature
        if self.backend == "ort":
            from rsd_trt.runtime.ort_session import OrtSession

            artefact, file = usable(self.bundle, self.engines, (component, precision, batch, "onnx"))
            return OrtSession(file, signature, device, self.cuda_graph, artefact.files)
        from rsd_trt.runtime.trt_session import TrtSession

        gpu = host.gpu(str(device)) if device.type == "cuda" else None
        distribution = runnable_distribution(gpu)
        key = (component, precision, batch, distribution.kind)
        artefact, file = usable(self.bundle, self.engines, key, distribution, gpu)
        return TrtSession(file, signature, device, distribution, artefact.files[0].sha256)


def check_backend(name: str) -> Backend:
    """Raises UserError unless there is such a backend."""
    if name not in BACKENDS:
        raise UserError(f"backend {name!r} is unknown{did_you_mean(name, BACKENDS)}")
    return name


def check_triton(what: str, otherwise: str) -> None:
    """Raises Unavailable where torch.compile cannot make kernels for the GPU. what: a backend or a backbone."""
    if find_spec("triton") is None:
        raise Unavailable(f"{what} compiled needs Triton, which PyTorch for CUDA brings along", f"Use: {otherwise}")


def default_backbone(backend: Backend, device: torch.device) -> BackboneKind:
    """`eager` with the backend `torch` and on the CPU, `compiled` with the backend of that name; else `graph`."""
    if backend == "torch" or device.type != "cuda":
        return "eager"
    return "compiled" if backend == "compiled" else "graph"


def open_forward(
    launcher: Launcher,
    batch: Batch,
    backbone: BackboneKind | None = None,
    precision: BackbonePrecision = "bundle",
    checks: bool = True,
) -> Forward:
    """Everything that a query computes, loaded. checks: whether the draft is, too, where there is one.

    Raises:
        UserError: the backbone cannot run like that here, or the device has too little memory.
    """
    bundle, device = launcher.bundle, launcher.device
    kind = backbone or default_backbone(launcher.backend, device)
    needed: list[str] = ["backbone", *bundle.parts_of("predict"), *(["codec"] if bundle.has("draft") else [])]
    if missing := [part for part in needed if not bundle.has(part)]:
        raise UserError(
            f"{bundle.path} has no {missing[0]}: nothing can act by it", NO_HEAD if "head" in missing else None
        )
    started = time.perf_counter()
    forward = assemble(launcher, batch, open_backbone(bundle, device, kind, precision), checks)
    log.info("backbone %s, %s, on %s: loaded in %.1f s", kind, precision, device, time.perf_counter() - started)
    return forward


def open_backbone(
    bundle: Bundle, device: torch.device, kind: BackboneKind, precision: BackbonePrecision = "bundle"
) -> Backbone | FusedBackbone:
    """The backbone as `kind` runs it, on the device.

    Raises:
        UserError: it cannot run like that here, or the device has too little memory.
    """
    if kind not in BACKBONES:
        raise UserError(f"backbone {kind!r} is unknown{did_you_mean(kind, BACKBONES)}")
    if precision not in BACKBONE_PRECISIONS:
        raise UserError(f"backbone precision {precision!r} is unknown{did_you_mean(precision, BACKBONE_PRECISIONS)}")
    if precision == "fp8" and kind != "compiled":
        raise UserError(
            f"backbone precision fp8 does not go with --backbone {kind}: only what is compiled is faster than bf16",
            "Use: --backbone compiled",
        )
    if kind != "eager" and device.type != "cuda":
        raise Unavailable(f"backbone {kind} needs a CUDA device, not {device}", "Use: --backbone eager")
    if kind == "compiled":
        check_triton("backbone", "--backbone graph")
    if precision == "fp8":
        check_fp8(bundle, device)
    weights: Precision = bundle.config.backbone.precision if precision == "bundle" else "bf16"
    backbone = bundle.backbone(device, torch_dtype(weights))
    if kind == "eager":
        return backbone
    from rsd_trt.models.fast.backbone import FusedBackbone
    from rsd_trt.models.fast.products import fp8_products

    blocks = bundle.config.backbone.language.blocks
    fused = FusedBackbone(backbone, fp8=fp8_products(blocks) if precision == "fp8" else ())
    if kind == "compiled":
        fused.compile()
    return fused


def assemble(launcher: Launcher, batch: Batch, backbone: Backbone | FusedBackbone, checks: bool = True) -> Forward:
    """What a query computes, from a loaded backbone: forwards of several configurations may share one."""
    bundle, device = launcher.bundle, launcher.device
    config = bundle.config
    propose = launcher.open("propose", batch) if checks and bundle.has("draft") else None
    predict = launcher.open("predict", batch)
    dtype: torch.dtype = backbone.projector.fc1.weight.dtype
    state = propose is not None and isinstance(config.draft, VisionDraftConfig) and config.draft.state
    preprocess = Preprocessor(config.control, config.backbone, bundle.tokenizer(), device, dtype, state)
    encode = Encoder(bundle) if config.rsd.rule == "likelihood" and not config.head.gives_tokens and propose else None
    if isinstance(backbone, Backbone):
        embed_tokens = backbone.llama.embed_tokens
        return Forward(config, EagerBackbone(backbone, preprocess), embed_tokens, propose, predict, preprocess, encode)
    from rsd_trt.runtime.graph_backbone import GraphBackbone

    if backbone.compiled:
        preprocess.compile()
    graphs = GraphBackbone(backbone, preprocess)
    return Forward(config, graphs, backbone.embed_tokens, propose, predict, preprocess, encode)


class Encoder:
    """The environment's actions [B, T, A] -> the codec's tokens [B, T, D, L], for a main head that gives none. A chunk
    is encoded quicker on the host than by a launch."""

    def __init__(self, bundle: Bundle) -> None:
        self._codec, self._transform = bundle.codec(), bundle.transform()

    @torch.inference_mode()
    def __call__(self, actions: Actions) -> Tokens:
        tokens: Tokens = self._codec.encode(self._transform.inverse(torch.from_numpy(actions))).numpy()
        return tokens


def check_fp8(bundle: Bundle, device: torch.device) -> None:
    """Raises UserError unless the backbone's matrix products can be computed in E4M3."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        raise Unavailable(f"backbone precision fp8 needs compute capability 8.9 or later, {device} has {capability}")
    from rsd_trt.models.fast.products import ALIGNMENT

    language = bundle.config.backbone.language
    if language.hidden % ALIGNMENT or language.intermediate % ALIGNMENT:
        raise UserError(
            f"backbone precision fp8 needs widths that are multiples of {ALIGNMENT}: hidden is {language.hidden}, "
            f"intermediate {language.intermediate}",
            "Use: --backbone-precision bf16",
        )


def check_device(device: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:N`, or `auto` (CUDA if there is one) as a device that works.

    Raises:
        UserError: no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str) or not DEVICE.fullmatch(device):
        raise UserError(f"device {device!r} is unknown: there are cpu, cuda, cuda:N and auto")
    try:
        target = torch.device(device)
        torch.zeros(1, device=target)
        if target.type == "cuda" and target.index is not None:
            torch.cuda.set_device(target)  # graphs are captured, and engines loaded, on the current device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {device!r} cannot be used: {str(error).splitlines()[0]}", "Try: --device cpu"
        ) from None
    return target
