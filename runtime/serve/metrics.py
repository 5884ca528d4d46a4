"""What is counted and timed while serving, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from rsd_trt.errors import missing_extra
from rsd_trt.runtime.chunk import Query

BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # s


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, sessions: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Raises Unavailable: prometheus-client is not installed."""
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError:
            raise missing_extra("prometheus-client", "serve") from None
        self.registry = kept = CollectorRegistry()
        self._queries = Counter("rsd_queries", "Queries that were answered, by outcome", ["outcome"], registry=kept)
        self._errors = Counter("rsd_errors", "Requests that were refused or broke, by kind", ["kind"], registry=kept)
        self._late = Counter("rsd_late", "Answers that were not there within the deadline", registry=kept)
        self._clipped = Counter("rsd_clipped_actions", "Actions that were clipped to the limits", registry=kept)
        self._alarms = Counter("rsd_alarms", "Replies whose alarm was raised", registry=kept)
        self._seconds = Histogram(
            "rsd_seconds", "Time of a query: waiting, in the policy, in all", ["part"], buckets=BUCKETS, registry=kept
        )
        self._parts = [self._seconds.labels(part) for part in ("queue", "policy", "total")]
        Gauge("rsd_sessions", "Sessions that are open", registry=kept).set_function(sessions)
        Gauge("rsd_waiting", "Requests that are not answered yet", registry=kept).set_function(waiting)

    def answered(self, query: Query, queue: float, policy: float, total: float, alarm: bool) -> None:
        """A query's reply; times in s."""
        self._queries.labels(query.route).inc()
        self.clipped(query.clipped)
        if alarm:
            self._alarms.inc()
        for part, seconds in zip(self._parts, (queue, policy, total), strict=True):
            part.observe(seconds)

    def clipped(self, actions: int) -> None:
        self._clipped.inc(actions)

    def late(self) -> None:
        self._late.inc()

    def error(self, kind: str) -> None:
        self._errors.labels(kind).inc()

    def page(self) -> bytes:
        """In Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
