"""From episodes to the figures of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rsd_trt.config import state_and_seed
from rsd_trt.eval.results import (
    SCHEMA_VERSION,
    Episode,
    QueryRecord,
    Results,
    RsdStats,
    Settings,
    TaskResult,
    Throughput,
)
from rsd_trt.eval.statistics import Interval, bootstrap_share, percentiles, wilson
from rsd_trt.load import Steadiness, steadiness
from rsd_trt.runtime.speculate import Checks


def summarise(
    settings: Settings,
    episodes: Sequence[Episode],
    tasks: Mapping[int, str],
    codec_round_trip_mse: float | None,
    command: str,
    throughput: Throughput | None = None,
) -> Results:
    """The summary of a run's episodes; `tasks`: the description of every task that was evaluated."""
    done = [episode for episode in episodes if episode.error is None]
    queries = [query for episode in done for query in episode.queries]
    steps, seconds = sum(e.steps for e in done), sum(e.seconds for e in done)
    successes = sum(e.success for e in done)
    single = settings.timing == "single"
    by_task: dict[int, list[Episode]] = {}
    for episode in episodes:
        by_task.setdefault(episode.task_id, []).append(episode)
    return Results(
        task_suite=settings.suite,
        use_speculative_decoding=settings.mode == "rsd",
        total_episodes=len(done),
        total_successes=successes,
        final_success_rate=successes / len(done) if done else None,
        final_success_interval=rate_interval(done, settings.seeds, lambda episode: episode.success),
        errors=len(episodes) - len(done),
        avg_inference_time_ms=sum(q.ms for q in queries) / steps if steps and queries and single else None,
        rsd_stats=RsdStats(**Checks.of(query.route for query in queries).rates()),
        routes=dict(sorted(Counter(query.route for query in queries).items())),
        token_agreement=_token_agreement(queries),
        token_agreement_chance=1 / settings.bundle.levels if settings.bundle else None,
        query_ms=percentiles([query.ms for query in queries]) if single else None,
        queries=len(queries),
        checks=sum(query.checked for query in queries),
        full_queries=sum(query.full_query for query in queries),
        unusable_drafts=sum(query.unusable for query in queries),
        steps=steps,
        clipped_steps=sum(query.clipped for query in queries),
        actions_per_query=steps / len(queries) if queries else None,
        steps_per_second=steps / seconds if seconds and single else None,
        throughput=throughput,
        codec_round_trip_mse=codec_round_trip_mse,
        task_results=tuple(
            _task(task_id, tasks[task_id], by_task.get(task_id, []), settings.seeds) for task_id in sorted(tasks)
        ),
        settings=settings,
        episodes=tuple(sorted(episodes, key=lambda e: e.key)),
        command=command,
        schema_version=SCHEMA_VERSION,
        clock=_clock(settings, done),
    )


def _clock(settings: Settings, episodes: Sequence[Episode]) -> Steadiness:
    """Of the machine during the episodes. Queries that share a forward have no times of their own."""
    measured = [(e.others, e.seconds) for e in episodes if e.others is not None]
    seconds = sum(weight for _, weight in measured)
    others = sum(others * weight for others, weight in measured) / seconds if seconds else None
    times: dict[str, list[float]] = {}
    single = settings.timing == "single"
    for query in (query for episode in episodes for query in episode.queries if single):
        times.setdefault(query.route, []).append(query.ms)
    cores = int(settings.hardware.get("cores", 1))
    return steadiness(times, others, cores, int(settings.hardware.get("threads", 1)) if single else cores)


def rate_interval(episodes: Sequence[Episode], seeds: int, solved: Callable[[Episode], bool]) -> Interval | None:
    """95% interval of the rate of episodes that are `solved`: Wilson's score, or where several episodes begin in one
    initial state, with so many seeds, a bootstrap over the states; None for too few of them."""
    if seeds == 1:
        return wilson(sum(map(solved, episodes)), len(episodes))
    states: dict[tuple[int, int], list[bool]] = {}
    for episode in episodes:
        states.setdefault((episode.task_id, state_and_seed(episode.trial, seeds)[0]), []).append(solved(episode))
    return bootstrap_share([sum(each) for each in states.values()], [len(each) for each in states.values()])


def _task(task_id: int, description: str, mine: Sequence[Episode], seeds: int) -> TaskResult:
    done = [episode for episode in mine if episode.error is None]
    successes = sum(episode.success for episode in done)
    return TaskResult(
        task_id=task_id,
        task_description=description,
        success_rate=successes / len(done) if done else None,
        success_interval=rate_interval(done, seeds, lambda episode: episode.success),
        successes=successes,
        episodes=len(done),
        errors=len(mine) - len(done),
    )


def _token_agreement(queries: Sequence[QueryRecord]) -> tuple[float, ...] | None:
    """Share of the draft's tokens that the main head gave too, for each coarse layer."""
    rows = [query.token_agreement for query in queries if query.token_agreement is not None]
    return tuple(sum(layer) / len(rows) for layer in zip(*rows, strict=True)) if rows else None
