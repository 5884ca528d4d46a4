"""Made-up rows of a profile. Their numbers mean nothing."""

from __future__ import annotations

from rsd_trt.eval.profile.components import TEXTBOOK, Timing


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
    timing(TEXTBOOK, "torch", 5, 5),
]
