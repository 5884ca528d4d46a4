"""Made-up runs that can be replayed: short, and with plans that last."""

from __future__ import annotations

from msgspec import structs
from synthetic import run

from rsd_trt.eval.results import Episode, Results

FEW = {"tasks": (0, 1), "trials": 2}


def shortened(episode: Episode, steps: int = 12) -> Episode:
    """The start of an episode."""
    queries = tuple(query for query in episode.queries if query.step < steps)
    return structs.replace(episode, queries=queries, steps=min(episode.steps, steps))


def made(mode: str = "rsd", **settings: object) -> Results:
    """A run of four short episodes whose plans last."""
    return run(mode, change=lambda e: shortened(with_plans(e)), **{**FEW, **settings})  # type: ignore[arg-type]


def with_plans(episode: Episode) -> Episode:
    """The made-up episode with a full query wherever the plan has run out of steps."""
    left, queries = 0, []
    for query in episode.queries:
        if query.route in ("accepted", "partial") and left < query.committed:
            query = structs.replace(query, route="exhausted", full_query=True, prefix=1)
        left = (left if query.route in ("accepted", "partial") else 8) - query.committed
        queries.append(query)
    return structs.replace(episode, queries=tuple(queries))
