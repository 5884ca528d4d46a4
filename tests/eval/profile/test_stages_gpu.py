"""The stages of a query on a GPU: captured graphs, the device's own clock, and what is left of the host's."""

from __future__ import annotations

import pytest
import torch

from rsd_trt.bundle import Bundle
from rsd_trt.eval.profile.clock import Clock
from rsd_trt.eval.profile.roofline import STAGES
from rsd_trt.eval.profile.stages import FULL, ORACLE, QueryRequest, profile_query

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")


def test_every_backbone_is_timed_stage_by_stage(bundle: Bundle) -> None:
    kinds = ("eager", "graph", "compiled")
    request = QueryRequest(kinds, ("bundle",), (1, 2), (28,), CUDA, "fp32", samples=5, warm_up=3)
    found = profile_query(bundle, request)
    for row in found.rows:
        assert row.ms or row.configuration.backbone == ORACLE, row
        captured = row.what == FULL and row.configuration.backbone in ("graph", "compiled")
        assert (row.host_overhead_ms is not None) == captured, row
    assert {row.what for row in found.rows} == {*STAGES, FULL}
    assert found.machine.bytes_per_s > 1e11


def test_the_devices_time_is_without_the_hosts() -> None:
    x = torch.randn(2048, 2048, device=CUDA)

    def run() -> None:
        for _ in range(20):
            x @ x

    clock = Clock(CUDA)
    for _ in range(3):
        clock.queued(run)
    busy = min(ms for _ in range(5) if (ms := clock.queued(run)) is not None)
    assert 0 < busy <= min(clock.wall(run) for _ in range(5))
    assert clock.queued(lambda: x.sum().item()) is None
