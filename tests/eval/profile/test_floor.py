"""Floors: the roofline's arithmetic, and that a machine can be measured."""

from __future__ import annotations

import pytest
import torch

from rsd_trt.errors import UserError
from rsd_trt.eval.profile import floor
from rsd_trt.eval.profile.roofline import Floor, Machine, measure_machine
from rsd_trt.eval.profile.stages import bound_of
from rsd_trt.eval.profile.work import Work

RATES = {"fp32": 5e13, "bf16": 8e14, "fp8": 1.6e15}
MACHINE = Machine(bytes_per_s=4e12, flops_per_s=RATES, matrix_side=8192, copied_bytes=1)


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (Work(4_000_000_000), Floor(1.0, "memory")),
        (Work(4_000_000_000, {"bf16": 400_000_000_000}), Floor(1.0, "memory")),
        (Work(4_000_000_000, {"bf16": 1_600_000_000_000}), Floor(2.0, "compute")),
        (Work(0, {"bf16": 800_000_000_000, "fp8": 1_600_000_000_000}), Floor(2.0, "compute")),
    ],
)
def test_a_floor_is_the_longer_of_moving_and_computing(work: Work, expected: Floor) -> None:
    found = MACHINE.floor(work)
    assert (found.ms, found.bound) == (pytest.approx(expected.ms), expected.bound)


def test_several_stages_are_bound_by_what_takes_most_of_their_time() -> None:
    assert bound_of([Floor(1.0, "memory"), Floor(3.0, "compute"), Floor(1.5, "memory")]) == "compute"
    assert bound_of([Floor(1.0, "memory"), Floor(1.0, "compute")]) == "memory"


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "CPU_COPY", 1 << 20)
    monkeypatch.setattr(floor, "CPU_SIDE", 64)
    found = measure_machine(torch.device("cpu"), ["fp32", "bf16"])
    assert 1e7 < found.bytes_per_s < 1e13
    assert set(found.flops_per_s) == {"fp32", "bf16"}
    assert all(1e6 < rate < 1e14 for rate in found.flops_per_s.values())
    assert (found.matrix_side, found.copied_bytes) == (64, 1 << 20)


def test_a_full_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")

    monkeypatch.setattr(floor, "_copy", full)
    with pytest.raises(UserError, match=r"cpu has too little memory free to be measured: CUDA out of memory\. Tried"):
        measure_machine(torch.device("cpu"), ["fp32"])
