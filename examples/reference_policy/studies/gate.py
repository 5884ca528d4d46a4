"""Would a head on the draft's trunk judge a chunk better than a rule does?

    python -m examples.reference_policy.studies.gate --out gate.json --device cuda --workers 30 --minutes 5.5

The gate reads the trunk's readout, what is left of the chunk, its age, the draft's chunk and the rules' deviations, and
is trained on the labels of `pairs`. Initial states and perturbation seeds that it is measured on are not those that it
is trained on.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from examples.reference_policy.studies.cells import TRIALS, Job
from examples.reference_policy.studies.pairs import (
    FAR,
    HELD_OUT,
    LATE,
    RULES,
    SEEDS,
    Collector,
    Flags,
    Floats,
    Pair,
    Stage,
    plan,
    play,
)
from examples.reference_policy.studies.pilot import LAG, SUITE, TIMEOUT
from rsd_trt.bundle import Bundle
from rsd_trt.config import DEFAULT_BUNDLE, RsdConfig
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.episode import serve
from rsd_trt.eval.statistics import LEAST_RESAMPLED, SEED
from rsd_trt.eval.table import Column, Measured, Table
from rsd_trt.files import write_atomically
from rsd_trt.host import hardware, versions

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Numbers = NDArray[np.int64]
Gate = Callable[[NDArray[np.float32]], Floats]  # features [N, F] -> scores [N]
Told = dict[str, object]

MAX_STEPS = 220
BINS = (0.0, 1e-9, 0.02, 0.04, 0.06, FAR)  # m, of the table of shifts
RESERVE = 75.0  # s that training and the table get
TRAIN_SECONDS, EPOCHS, WIDTH, BATCH = 15.0, 60, 256, 1024  # of a gate
VALIDATION = 7  # every 7th episode of training says when to stop
RESAMPLES = 2000
FALSE_REJECTS = 0.20  # undisturbed, at which hits are told


def wins(scores: Floats, other: Flags, episodes: Numbers, states: Numbers, count: int) -> tuple[Floats, Floats]:
    """[count, count] each: in how many pairs of an `other` in episode i and a quiet one in episode j, both of one
    state, the former has the larger score, a tie counting half; and how many there are. The AUC is the sums' ratio."""
    quiet, at = scores[~other], episodes[~other]
    found = np.zeros((2, count, count))
    for i in np.unique(episodes[other]):
        mine = other & (episodes == i)
        pairs = states[mine][:, None] == states[~other]
        larger = np.where(scores[mine][:, None] == quiet, 0.5, scores[mine][:, None] > quiet)
        found[:, i] = [np.bincount(at, each.sum(0), count) for each in (pairs * larger, pairs)]
    return found[0], found[1]


def auc(scores: Floats, other: Flags, episodes: Numbers, states: Numbers | None = None) -> Floats:
    """[1 + RESAMPLES]: the AUC, over pairs of the same state where `states` are given, and those of bootstrap samples
    of episodes; NaN where there is nothing to compare."""
    names, places = np.unique(episodes, return_inverse=True)
    count = len(names)
    drawn = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    times = np.concatenate([np.ones((1, count)), drawn])
    # Rows of one episode are compared in each copy of it, and those of different ones in each pair of copies.
    won, of = (
        ((times @ (each - np.diag(np.diag(each)))) * times).sum(1) + times @ np.diag(each)
        for each in wins(scores, other, places, np.zeros_like(places) if states is None else states, count)
    )
    found = np.divide(won, of, out=np.full(len(of), np.nan), where=of > 0)
    found[1:] = found[1:] if count >= LEAST_RESAMPLED else np.nan
    return found


def told(found: Floats) -> list[float | None]:
    """A value, and the middle 95% of the resampled ones behind it; None for what is not known."""
    known = found[1:][np.isfinite(found[1:])]
    numbers = found[0], *(np.percentile(known, (2.5, 97.5)) if len(known) else (np.nan, np.nan))
    return [round(float(x), 4) if np.isfinite(x) else None for x in numbers]


def train(x: NDArray[np.float32], y: Flags, stops: Flags, device: torch.device) -> tuple[Gate, list[list[float]]]:
    """A gate of rows [N, F], those apart that say when it is best; and by epoch its loss on both."""
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    layers: list[nn.Module] = [nn.BatchNorm1d(x.shape[1], affine=False)]
    for width in (x.shape[1], WIDTH):
        layers += [nn.Linear(width, WIDTH), nn.GELU(), nn.Dropout(0.2)]
    gate = nn.Sequential(*layers, nn.Linear(WIDTH, 1)).to(device)
    rows, labels = torch.from_numpy(x).to(device), torch.from_numpy(y).float().to(device)[:, None]
    mine, rest = (torch.from_numpy(np.flatnonzero(kept)).to(device) for kept in (~stops, stops))
    optimizer, loss_of = torch.optim.AdamW(gate.parameters(), 5e-4, weight_decay=0.05), nn.BCEWithLogitsLoss()
    losses: list[list[float]] = []
    best, end = copy.deepcopy(gate.state_dict()), time.monotonic() + TRAIN_SECONDS
    while len(losses) < EPOCHS and time.monotonic() < end:
        gate.train()
        for batch in mine[torch.randperm(len(mine), device=device)].split(BATCH):
            optimizer.zero_grad()
            loss_of(gate(rows[batch]), labels[batch]).backward()
            optimizer.step()
        gate.eval()
        with torch.inference_mode():
            losses.append([round(float(loss_of(gate(rows[part]), labels[part])), 4) for part in (mine, rest)])
        if losses[-1][1] == min(loss for _, loss in losses):
            best = copy.deepcopy(gate.state_dict())
    gate.load_state_dict(best)

    def score(rows: NDArray[np.float32]) -> Floats:
        with torch.inference_mode():
            return np.asarray(gate(torch.from_numpy(rows).to(device))[:, 0].double().cpu())

    return score, losses


def compare(found: Mapping[int, Sequence[Pair]], jobs: Sequence[Job], rsd: RsdConfig, device: torch.device) -> Told:
    """Trains a gate, and a blind one, and lays them beside the rules on the held-out episodes."""
    pairs = [pair for of in found.values() for pair in of]
    number = np.repeat(list(found), [len(of) for of in found.values()])
    features, deviations = (np.stack([getattr(pair, name) for pair in pairs]) for name in ("features", "deviations"))
    other, age, step = (np.array([getattr(pair, name) for pair in pairs]) for name in ("other", "age", "step"))
    shift = np.array([np.nan if pair.shift is None else pair.shift for pair in pairs])
    held, late = np.array([(jobs[n].trial >= HELD_OUT, jobs[n].condition == LATE) for n in number]).T
    executed, ahead = rsd.n_action_steps, rsd.check_steps or rsd.n_action_steps
    checked = np.isnan(shift) & (age >= executed) & ((age - executed) % ahead == 0)
    scores: dict[str, Floats] = {}
    losses = {}
    for row, name in enumerate(("", "blind ")):
        scores |= {name + rule: deviations[:, row, i] for i, rule in enumerate(RULES)}
        x = features[:, row]
        gate, losses[name + "gate"] = train(x[~held], other[~held], number[~held] % VALIDATION == 0, device)
        scores[name + "gate"] = gate(x)
    quiet = held & ~late & checked & ~other
    state, aside = number * MAX_STEPS + step, ~np.isnan(shift)
    holds = np.isin(state, state[(shift == 0) & ~other])  # main confirms the chunk in the state as it is
    sets = {
        f"late, age {executed}": (held & late & checked & (age == executed), None),
        "late": (held & late & checked, None),
        "undisturbed": (held & ~late & checked, None),
        "counterfactual, of chunks that held": (held & aside & holds, None),
        "counterfactual, within a state": (held & aside, state),
    }
    rows: list[Told] = []
    for title, (mine, states) in sets.items():
        if not mine.any():
            continue
        yes, near = other[mine], None if states is None else states[mine]
        of = {name: auc(score[mine], yes, number[mine], near) for name, score in scores.items()}
        best = of[max(RULES, key=lambda rule: np.nan_to_num(of[rule][0]))]
        for name, score in scores.items():
            here = score[mine]
            row: Told = {"set": title, "pairs": len(yes), "episodes": len(np.unique(number[mine])), "other": share(yes)}
            row |= {"score": name, "auc": told(of[name]), "above_best_rule": told(of[name] - best)}
            if quiet.any():
                limit = np.quantile(score[quiet], 1 - FALSE_REJECTS, method="higher")
                row |= {
                    "hits_at_20%_false_rejects": share(here[yes] > limit),
                    "false_rejects": share(here[~yes] > limit),
                }
            rows.append(row)
    shipped = {
        title: [share(scores[rsd.rule][mine & of] > 1) for of in (~other, other)] for title, (mine, _) in sets.items()
    }
    bins = [(low, high, other[holds & (shift >= low) & (shift < high)]) for low, high in pairwise(BINS)]
    by_shift = [{"m": [low, high], "pairs": len(of), "other": share(of)} for low, high, of in bins]
    return {
        "scores": rows,
        "shipped_false_rejects_and_hits": shipped,
        "other_by_shift_of_chunks_that_held": by_shift,
        "losses": losses,
    }


def share(flags: Flags) -> float | None:
    """The share that is set; None of nothing."""
    return round(float(flags.mean()), 4) if len(flags) else None


def as_table(rows: Sequence[Told]) -> Table:
    """The scores for a terminal."""
    columns = ("pairs", "other", "score", "AUC", "above the best rule", "hits at 20% false rejects")
    cells = []
    for row in rows:
        (auc_, *span), (above, *around) = row["auc"], row["above_best_rule"]
        numbers = Measured(auc_, tuple(span)), Measured(above, tuple(around))
        cells.append(
            (
                f"{row['set']} ({row['pairs']})",
                row["other"],
                row["score"],
                *numbers,
                row.get("hits_at_20%_false_rejects"),
            )
        )
    units = ("", "%", "", "ratio", "ratio", "%")
    return Table("", tuple(map(Column, columns, units)), tuple(cells), grouped=True)


def collect(
    args: argparse.Namespace, jobs: Sequence[Job], bundle: Bundle, device: torch.device
) -> dict[int, list[Pair]]:
    """The pairs of every episode that there is time for, by job; the last ones are cut short."""
    from rsd_trt.eval.libero.pool import Meter, run_episodes
    from rsd_trt.models.vision_draft import VisionDraft
    from rsd_trt.runtime.backends import Launcher, open_forward

    end = time.monotonic() + (math.inf if args.minutes is None else args.minutes * 60 - RESERVE)
    on_gpu, draft = device.type == "cuda", bundle.draft(device)
    assert isinstance(draft, VisionDraft), "the study is of a draft with eyes of its own"
    batch = args.workers if on_gpu else 1
    forward = open_forward(Launcher(bundle, "graph" if on_gpu else "torch", device), "1" if batch == 1 else "dynamic")
    collector = Collector(forward, draft.eval(), bundle.config.rsd, jobs, end)
    assignments = [job.assignment(number, MAX_STEPS) for number, job in enumerate(jobs)]
    process = partial(serve, build=partial(Stage, SUITE, control=bundle.config.control), run=partial(play, jobs=jobs))
    running = run_episodes(collector, process, assignments, args.workers, batch, TIMEOUT, Meter(), LAG)
    try:
        with closing(running) as episodes:
            for done, episode in enumerate(episodes, start=1):
                log.info("%.0f s left: %d of %d episodes", end - time.monotonic(), done, len(jobs))
                if episode.error is not None:
                    del collector.pairs[episode.trial // TRIALS]
    except UserError as error:
        log.info("%s", error)
    return collector.pairs


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from rsd_trt.runtime.backends import check_device

    parser = argparse.ArgumentParser(prog="python -m examples.reference_policy.studies.gate", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=16, help="simulator processes")
    parser.add_argument("--rounds", type=int, default=60, help="of six episodes a task (default %(default)s)")
    parser.add_argument("--minutes", type=float, help="for everything")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    device, bundle, jobs = check_device(args.device), Bundle.open(args.bundle), plan(args.rounds)
    pairs = collect(args, jobs, bundle, device)
    about: Told = {
        "command": " ".join((parser.prog, *(sys.argv[1:] if arguments is None else arguments))),
        "bundle": bundle.fingerprint,
        "hardware": hardware(str(device)),
        "versions": versions(),
        "trained_on": f"states 0-{HELD_OUT - 1}, undisturbed and {LATE} with seeds {SEEDS[0]}..",
        "held_out": f"the other states, undisturbed and {LATE} with seeds {SEEDS[1]}..: nothing was chosen on them",
        "episodes": dict(Counter("held out" if jobs[n].trial >= HELD_OUT else "trained on" for n in pairs)),
    }
    found = about | compare(pairs, jobs, bundle.config.rsd, device)
    write_atomically(args.out, json.dumps(found, indent=1) + "\n")
    print(as_table(found["scores"]).markdown())


if __name__ == "__main__":
    main()
