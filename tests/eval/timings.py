"""Made-up rows of a profile. Their numbers mean nothing."""

from __future__ import annotations

from rsd_trt.eval.profile.components import Timing
from rsd_trt.eval.profile.costs import Cost


def timing(
    what: str, backend: str, *ms: float, batch: int = 1, graph: bool = False, reason: str | None = None
) -> Timing:
    return Timing(what, backend, "fp32", batch, graph, ms, None, reason)


MADE_UP = [
    timing("head", "torch", 4, 2, 3),
    timing("head", "ort", 1.5, 1.5, 9),
    timing("head", "ort", 1, 1, 1, graph=True),
    timing("head", "torch", 6, 6, batch=8),
    timing("head", "ort", 12, 12, batch=8),
    timing("draft", "graph", 1, 1, graph=True),
    timing("head", "trt", graph=True, reason="no GPU"),
    timing("predict", "torch", 5, 5, 5),
]
COSTS = [
    Cost("check", "ort", "fp32", "eager", "bundle", (0.2, 0.2)),
    Cost("full", "ort", "fp32", "eager", "bundle", (2.0, 2.0)),
    *(Cost(what, "trt", "fp32", "graph", "bundle", reason="no GPU") for what in ("check", "full")),  # type: ignore[arg-type]
]
