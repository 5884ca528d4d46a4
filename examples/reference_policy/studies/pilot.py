"""Can a verifier win at all? Open loop, and loops with a check, over perturbations and latency, on pilot seeds.

Every episode is a line of OUT/episodes_SHARD.jsonl. The same command goes on where it stopped; --report reads what
all shards have written.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from examples.reference_policy.studies import cells as study
from examples.reference_policy.studies import summary
from examples.reference_policy.studies.cells import Cell, Job, JobSimulator
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.episode import serve
from rsd_trt.files import write_atomically

if TYPE_CHECKING:
    from examples.reference_policy.studies.loops import Loops
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval.results import Episode

log = logging.getLogger(__name__)

SUITE = "libero_spatial"
TASKS = (0, 1, 2, 3, 4, 6, 7, 8, 9)  # nothing can be moved in task 5
STEPS_PER_SECOND = 18.0  # of one simulator process, cameras included
STEPS_PER_EPISODE = 95.0  # about
RESET_SECONDS = 1.5  # before each episode, about
TIMEOUT = 300.0  # s
LAG = 30  # episodes that a task may be behind, for each process at work on it, before one changes over to it


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if args.report:
            _report(args.out)
        else:
            _study(args)
    except UserError as error:
        sys.exit(f"error: {error}")


def _study(args: argparse.Namespace) -> None:
    from rsd_trt.bundle import Bundle

    bundle = Bundle.open(args.bundle)
    steps = bundle.config.dims.T
    wanted = list(study.jobs(_cells(args, steps), args.conditions, args.tasks, args.trials, args.seeds))
    mine = study.shard(wanted, *args.shard)
    done = _done(args.out)
    missing = [job for job in mine if job.key not in done]
    estimate = len(missing) * (STEPS_PER_EPISODE / STEPS_PER_SECOND + RESET_SECONDS) / args.workers / 60
    log.info(
        "%d cells, %d episodes; this shard %d, still to run %d: about %.1f minutes with %d workers",
        len({(job.condition, job.cell) for job in wanted}),
        len(wanted),
        len(mine),
        len(missing),
        estimate,
        args.workers,
    )
    if args.dry_run or not missing:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    index, count = args.shard
    with (args.out / f"episodes_{index}_of_{count}.jsonl").open("a") as file:
        _run(args, missing, file)


def _run(args: argparse.Namespace, missing: Sequence[Job], file: TextIO) -> None:
    """Runs the jobs until the time is up; an episode is on disk when it is over."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads would take the cores from the simulators
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval.libero.pool import Meter, run_episodes
    from rsd_trt.eval.libero.rendering import gpu_number

    started = time.monotonic()
    bundle = Bundle.open(args.bundle)
    policy, batch = _loops(args, missing, bundle)
    assignments = [job.assignment(number, args.max_steps) for number, job in enumerate(missing)]
    process = partial(
        serve, build=partial(JobSimulator, SUITE, control=bundle.config.control, gpu=gpu_number(args.device))
    )
    running = run_episodes(policy, process, assignments, args.workers, batch, TIMEOUT, meter := Meter(), LAG)
    finished = 0
    with closing(running) as episodes:
        for episode in episodes:
            job = missing[episode.trial // study.TRIALS]
            file.write(json.dumps(_record(job, episode)) + "\n")
            file.flush()
            finished += 1
            minutes = (time.monotonic() - started) / 60
            if finished % 50 == 0:
                log.info("%d of %d episodes, %.1f minutes", finished, len(missing), minutes)
            if args.minutes is not None and minutes >= args.minutes:
                log.info("time is up: %d of %d episodes", finished, len(missing))
                break
    log.info("the policy computed for %.0f%% of the time", 100 * meter.seconds / (time.monotonic() - started))


def _loops(args: argparse.Namespace, missing: Sequence[Job], bundle: Bundle) -> tuple[Loops, int]:
    """The bundle's forward on the device, and the queries that may share one."""
    from examples.reference_policy.studies.loops import Loops
    from rsd_trt.runtime.backends import Launcher, check_device, open_forward

    device = check_device(args.device)
    on_gpu = device.type == "cuda"
    launcher = Launcher(bundle, "graph" if on_gpu else "torch", device)
    batch = args.workers if on_gpu else 1
    forward = open_forward(launcher, "1" if batch == 1 else "dynamic")
    return Loops(forward, lambda number: missing[number].cell), batch


def _record(job: Job, episode: Episode) -> dict[str, object]:
    """What is kept of an episode."""
    queries = episode.queries
    tested = [query for query in queries if query.route in ("accepted", "partial", "rejected")]
    event = episode.perturbed_at
    seen = [query.step for query in queries if event is not None and query.full_query and query.step > event]
    return {
        "condition": job.condition,
        "cell": job.cell.name,
        "latency": job.cell.latency,
        "task": job.task,
        "trial": job.trial,
        "seed": job.seed,
        "success": episode.success,
        "steps": episode.steps,
        "steps_to_success": episode.steps if episode.success else None,
        "full_queries": sum(query.full_query for query in queries),
        "checks": len(tested),
        "accepted": sum(query.route != "rejected" for query in tested),
        "event": episode.perturbed_by,
        "event_step": event,
        "displacement": episode.displacement,
        "reaction": seen[0] + job.cell.latency - event if seen and event is not None else None,
        "seconds": episode.seconds,
        "error": episode.error,
    }


def _done(folder: Path) -> set[tuple[object, ...]]:
    """The keys of the episodes that are there; one that ended in an error is run again."""
    names = ("condition", "cell", "task", "trial", "seed")
    return {tuple(record[name] for name in names) for record in summary.read(folder) if record["error"] is None}


def _report(folder: Path) -> None:
    table = summary.rows(summary.read(folder))
    if not table:
        raise UserError(f"{folder} has no episodes")
    rooms = summary.room(table)
    print(summary.text(table, rooms))
    path = folder / "summary.json"
    write_atomically(path, json.dumps(summary.as_json(table, rooms), indent=1) + "\n")
    log.info("written: %s", path)


def _cells(args: argparse.Namespace, steps: int) -> list[Cell]:
    """The cells of the options, without those that a chunk of `steps` is too short for."""
    made = [Cell(n, latency) for latency in args.latency for n in args.open if 0 < n <= steps]
    for guess, latency, (rule, tolerance), n, m in product(args.guess, args.latency, args.rules, args.n, args.m):
        if n <= steps:
            made.append(Cell(n, latency, guess, rule, tolerance, m, args.refresh))
    for n, latency in product(args.alone, args.latency):
        if 0 < n <= steps:
            made.append(Cell(n, latency, "alone"))
    for rate, latency, n, m in product(args.random, args.latency, args.n, args.m):
        if n <= steps:
            made.append(Cell(n, latency, "random", "first", rate, m, args.refresh))
    return made


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.reference_policy.studies.pilot", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the episodes and of summary.json")
    add("--bundle", type=Path, default=_default_bundle(), help="default: the shipped one")
    add("--conditions", type=_conditions, default=study.CONDITIONS, help=f"default {','.join(study.CONDITIONS)}")
    add("--latency", type=_numbers, default=(0, 1, 2, 4, 8), help="steps until a full query is answered")
    add("--open", type=_numbers, default=(*range(1, 9), 12), metavar="N", help="actions a query of open loop; 0: none")
    add("--alone", type=_numbers, default=(), metavar="N", help="actions a query where the draft acts alone")
    add("--guess", type=_guesses, default=("main",), help="what checks: main (oracle), draft, or none")
    add(
        "--rules",
        type=_rules,
        default=_rules("first:0.2,actions:0.2,path:0.3"),
        help="RULE:TOLERANCE,... of the checks",
    )
    add("--n", type=_numbers, default=(2, 4), help="actions that a full query of a loop with checks commits")
    add("--m", type=_numbers, default=(1, 2), help="actions between checks")
    add("--random", type=_floats, default=(), metavar="RATE", help="coins in the check's place, by their acceptance")
    add("--refresh", type=int, help="every that many queries at the latest is a full one")
    add("--tasks", type=_numbers, default=TASKS)
    add("--trials", type=_numbers, default=tuple(range(4)), help="initial states, as in 0-3")
    add("--seeds", type=_numbers, default=(101,), help="of the perturbations: pilot seeds, of no evaluation")
    add("--max-steps", type=int, default=220)
    add("--workers", type=int, default=16, help="simulator processes")
    add("--device", default="auto")
    add("--shard", type=_shard, default=(0, 1), metavar="I/N", help="which of N processes this is, from 0")
    add("--minutes", type=float, help="stop after that time")
    add("--dry-run", action="store_true", help="say how many episodes there are and how long they take")
    add("--report", action="store_true", help="print the table of what --out has, and write summary.json")
    return parser


def _default_bundle() -> Path:
    from rsd_trt.config import DEFAULT_BUNDLE

    return DEFAULT_BUNDLE


def _numbers(text: str) -> tuple[int, ...]:
    """`0-3,8` -> 0, 1, 2, 3, 8; of --open, 0 is no cell."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _guesses(text: str) -> tuple[str, ...]:
    found = tuple(part for part in text.split(",") if part != "none")
    if not set(found) <= {"main", "draft"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not main, draft or none")
    return found


def _conditions(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    try:
        for condition in found:
            study.perturb_spec(condition, 0)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return found


def _rules(text: str) -> tuple[tuple[str, float], ...]:
    found = []
    for part in text.split(","):
        rule, _, tolerance = part.partition(":")
        if rule not in ("first", "actions", "path"):
            raise argparse.ArgumentTypeError(f"rule {rule!r} is not first, actions or path")
        found.append((rule, float(tolerance)))
    return tuple(found)


def _shard(text: str) -> tuple[int, int]:
    index, count = (int(part) for part in text.split("/"))
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N")
    return index, count


if __name__ == "__main__":
    main()
