"""The last lines of `make demo`: what was found, where to look, and what to do next."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

from rsd_trt.eval.read import read_run
from rsd_trt.eval.results import QueryRecord, Results


def main(arguments: list[str] | None = None) -> None:
    """Prints them for the folder that a run of modes baseline and rsd wrote into."""
    (folder,) = map(Path, sys.argv[1:] if arguments is None else arguments)
    baseline, rsd = (read_run(folder / f"libero_spatial_{mode}_results.json") for mode in ("baseline", "rsd"))
    print("\n".join(told(folder, baseline, rsd)))


def told(folder: Path, baseline: Results, rsd: Results) -> list[str]:
    """The lines. Medians of queries that took turns, so that a busy machine slows both sides of a ratio."""
    queries = [query for run in (baseline, rsd) for episode in run.episodes for query in episode.queries]
    share = _median(queries, ("accepted", "partial")) / _median(queries, ("full", "exhausted", "gripper"))
    cost = rsd.full_queries / rsd.steps + share * rsd.checks / rsd.steps
    open_loop = baseline.full_queries / baseline.steps
    n = baseline.settings.n_action_steps
    verb = "less" if cost < open_loop else "more"
    lines = [
        f"open loop (n = {n}) solved {baseline.total_successes} of {baseline.total_episodes} episodes, "
        f"rsd {rsd.total_successes} of {rsd.total_episodes}.",
        f"A check took {share:.0%} of a full query. An action of rsd cost {cost:.2f} full queries, of open loop "
        f"{open_loop:.2f}: {abs(1 - cost / open_loop):.0%} {verb}.",
        f"Open loop is as cheap with n = {math.ceil(1 / cost)}. Which of the two succeeds more often, so few episodes "
        "cannot tell: docs/reference-results.md has 1,350 a run.",
    ]
    clocks = [run.clock for run in (baseline, rsd) if run.clock is not None]
    disturbed = dict.fromkeys(sentence for clock in clocks for sentence in clock.disturbed)
    lines += [f"disturbed: {sentence}" for sentence in disturbed]
    if disturbed:
        lines.append("The shares are of medians of queries that took turns: they hold on a busy machine, too.")
    videos = sorted((folder / "videos" / "beside").glob("*.mp4"))
    return [
        *lines,
        "",
        f"video:  {videos[0] if videos else 'none'}",
        f"report: {folder / 'report' / 'report.html'}",
        "",
        "next:   .venv/bin/rsd-trt sweep examples/reference_policy/frontier.toml --dry-run    # which setting is best",
        "        .venv/bin/rsd-trt pack --help    # your own policy: docs/your-policy.md",
    ]


def _median(queries: list[QueryRecord], routes: tuple[str, ...]) -> float:
    """ms of the queries with these routes."""
    return statistics.median(query.ms for query in queries if query.route in routes)


if __name__ == "__main__":
    main()
