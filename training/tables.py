"""What came of a distillation, as tables."""

from __future__ import annotations

from rsd_trt.eval.table import Column, Table, Value
from rsd_trt.training.measure import SHOWN, TOLERANCES
from rsd_trt.training.outcome import Distilled


def tables(result: Distilled) -> list[Table]:
    """Agreement by tolerance, by step of the chunk and by task; the codec's errors; the costs."""
    found = [_agreement(result), _steps(result), _tasks(result), _codec(result)]
    return found if result.cost.full is None else [*found, _cost(result)]


def _agreement(result: Distilled) -> Table:
    held = result.held_out
    rows: list[tuple[Value, ...]] = [
        (f"{tolerance:g}", a, b, a - b) for tolerance, a, b in zip(TOLERANCES, held.agreement, held.blind, strict=True)
    ]
    rate = f", {result.samples_per_second:,.0f} frames/s" if result.samples_per_second else ""
    busy = f", GPU busy {result.gpu_busy:.0%}" if result.gpu_busy is not None else ""
    labelled = f"; labelled at {result.label_rate:,.0f} frames/s" if result.label_rate else ""
    left_out = f"; {result.unlabelled} queries asked no main head" if result.unlabelled else ""
    note = (
        f"{held.frames} frames of {held.episodes} held-out episodes of {result.episodes}; first steps of draft and "
        f"main head. {result.parameters / 1e6:.1f} M parameters, {result.steps} steps in {result.seconds:.0f} s on "
        f"{result.device}{rate}{busy}. {result.frames} frames{labelled}{left_out}"
    )
    columns = (Column("tolerance"), Column("agreement", "%"), Column("blind", "%"), Column("what the eyes add", "%"))
    return Table("draft and main head", columns, tuple(rows), note)


def _steps(result: Distilled) -> Table:
    rows = [(str(step), share) for step, share in enumerate(result.held_out.by_step, start=1)]
    return Table("by step", (Column("step"), Column(f"agreement at {SHOWN}", "%")), tuple(rows))


def _tasks(result: Distilled) -> Table:
    rows = sorted(result.held_out.by_task.items(), key=lambda row: row[1])
    return Table("by task", (Column("task"), Column(f"agreement at {SHOWN}", "%")), tuple(rows))


def _codec(result: Distilled) -> Table:
    errors = zip(result.codec.largest, result.codec.mean, result.codec.wrong_grippers, strict=True)
    rows: list[tuple[Value, ...]] = [(str(layers), *values) for layers, values in enumerate(errors, start=1)]
    columns = (
        Column("layers"),
        Column("largest error", "error"),
        Column("mean error", "error"),
        Column("wrong grippers", "rate"),
    )
    what = "constructed here" if result.new_codec else "the bundle's"
    return Table(f"codec, {what}", columns, tuple(rows), "of the main head's actions, in halves of their ranges")


def _cost(result: Distilled) -> Table:
    cost, chance = result.cost, result.held_out.shown[0]
    expected = cost.expected(chance, len(result.held_out.by_step))
    rows: list[tuple[Value, ...]] = [(str(n), value, 1 / n) for n, value in expected.items()]
    check = "no check" if cost.check is None or cost.full is None else f"check {cost.check:.2f} ms"
    share = f", {cost.check / cost.full:.1%} of it" if cost.check is not None and cost.full else ""
    note = (
        f"in full queries; full query {cost.full:.2f} ms, {check}{share} (medians, {cost.backend}, {result.device}); "
        f"if {chance:.1%} of the checks are accepted, each by itself. An estimate: episodes decide"
    )
    columns = (Column("n"), Column("expected cost per action", "ratio"), Column("open loop", "ratio"))
    return Table("expected cost per action", columns, tuple(rows), note)
