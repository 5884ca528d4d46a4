"""Result files: episodes appended as they finish, and the summary that is made from them.

`<suite>_<mode>_episodes.jsonl`: the first line holds the run's settings, each further line one episode.
`<suite>_<mode>_results.json`: the summary, under the original experiment's names and more.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rsd_trt.config import Dims
from rsd_trt.errors import UserError
from rsd_trt.eval.statistics import percentiles, wilson
from rsd_trt.jsonio import from_json
from rsd_trt.runtime.plan import Query
from rsd_trt.runtime.speculate import Acceptance

Json = dict[str, object]


@dataclass(frozen=True)
class QueryRecord:
    """A query as it is stored: what it decided and what it cost. ms is synchronised wall time."""

    step: int  # of the episode, before the query's first action
    route: str
    committed: int
    ms: float
    full_pass: bool
    prefix: int | None = None
    token_agreement: tuple[float, ...] | None = None
    verdict: str | None = None

    @classmethod
    def of(cls, query: Query, step: int) -> QueryRecord:
        return cls(
            step=step,
            route=query.route,
            committed=len(query.actions),
            ms=round(query.ms, 4),
            full_pass=query.full_pass,
            prefix=query.prefix,
            token_agreement=query.token_agreement,
            verdict=query.verdict,
        )


@dataclass(frozen=True)
class Episode:
    """One finished trial. An `error` (the simulator or the policy broke) is neither a success nor a failure."""

    task_id: int
    trial: int
    success: bool
    steps: int
    seconds: float  # wall time of the whole episode, simulation included
    queries: tuple[QueryRecord, ...]
    error: str | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.task_id, self.trial


class EpisodeLog:
    """The append-only file of a run. A run that was cut short goes on where it stopped.

    Raises:
        UserError: the file belongs to a run with other settings, or is not such a file.
    """

    def __init__(self, path: Path, settings: Json, fresh: bool) -> None:
        self.path = path
        self.settings = settings
        self.episodes: dict[tuple[int, int], Episode] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if fresh or not path.exists():
                write_atomically(path, json.dumps(settings) + "\n")
            else:
                self._resume()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    def lacks(self, task: int, trial: int) -> bool:
        """Whether a trial has still to be run: it is absent, or ended in an error."""
        episode = self.episodes.get((task, trial))
        return episode is None or episode.error is not None

    def append(self, episode: Episode) -> None:
        """Stores an episode for good: it is on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(dataclasses.asdict(episode)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.episodes[episode.key] = episode

    def _resume(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a killed run may leave half a line
        try:
            lines = whole.decode("utf-8").splitlines()
            stored = json.loads(lines[0])
            episodes = [from_json(Episode, json.loads(line), str(self.path)) for line in lines[1:]]
        except (IndexError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{self.path} is not an episode file ({error}). Start over: --fresh") from None
        if difference := _differences(stored, self.settings):
            raise UserError(f"{self.path} is of another run: {difference}. Another --out, or start over: --fresh")
        if whole != data:
            write_atomically(self.path, whole.decode("utf-8"))
        self.episodes = {episode.key: episode for episode in episodes}


def summarise(settings: Json, episodes: Sequence[Episode], tasks: Mapping[int, str], dims: Dims) -> Json:
    """The summary of a run's episodes; `tasks`: the description of every task that was evaluated."""
    done = [episode for episode in episodes if episode.error is None]
    queries = [query for episode in done for query in episode.queries]
    steps, policy_ms = sum(e.steps for e in done), sum(q.ms for q in queries)
    successes = sum(e.success for e in done)
    acceptance = Acceptance()
    for query in queries:
        acceptance.add(query.route)  # type: ignore[arg-type]
    return {
        "task_suite": settings["suite"],
        "use_speculative_decoding": settings["mode"] == "rsd",
        "total_episodes": len(done),
        "total_successes": successes,
        "final_success_rate": successes / len(done) if done else None,
        "final_success_interval": wilson(successes, len(done)),
        "errors": len(episodes) - len(done),
        "avg_inference_time_ms": policy_ms / steps if steps else None,
        "rsd_stats": acceptance.rates(),
        "routes": _counts(query.route for query in queries),
        "verdicts": _counts(query.verdict for query in queries if query.verdict),
        "token_agreement": _token_agreement(queries),
        "token_agreement_chance": 1 / dims.K,
        "query_ms": percentiles([query.ms for query in queries]),
        "queries": len(queries),
        "full_passes": sum(query.full_pass for query in queries),
        "steps": steps,
        "actions_per_query": steps / len(queries) if queries else None,
        "steps_per_second": steps / seconds if (seconds := sum(e.seconds for e in done)) else None,
        "task_results": [_task(task_id, tasks[task_id], episodes) for task_id in sorted(tasks)],
        "trained": settings["trained"],
        "settings": settings,
        "episodes": [dataclasses.asdict(episode) for episode in sorted(episodes, key=lambda e: e.key)],
    }


def write_atomically(path: Path, text: str) -> None:
    """Writes beside `path` and renames: the file is whole or what it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _task(task_id: int, description: str, episodes: Sequence[Episode]) -> Json:
    mine = [episode for episode in episodes if episode.task_id == task_id]
    done = [episode for episode in mine if episode.error is None]
    successes = sum(episode.success for episode in done)
    return {
        "task_id": task_id,
        "task_description": description,
        "success_rate": successes / len(done) if done else None,
        "success_interval": wilson(successes, len(done)),
        "successes": successes,
        "episodes": len(done),
        "errors": len(mine) - len(done),
    }


def _counts(names: object) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:  # type: ignore[attr-defined]
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def _token_agreement(queries: Sequence[QueryRecord]) -> list[float] | None:
    """Share of the draft's tokens that the main head gave too, for each coarse layer."""
    rows = [query.token_agreement for query in queries if query.token_agreement is not None]
    return [sum(layer) / len(rows) for layer in zip(*rows, strict=True)] if rows else None


def _differences(stored: object, wanted: object, path: str = "") -> str:
    """Every setting that differs, by its path and with both values; empty when none does."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = {**wanted, **stored}
        found = (_differences(stored.get(key), wanted.get(key), f"{path}.{key}" if path else key) for key in keys)
        return ", ".join(text for text in found if text)
    return "" if stored == wanted else f"{path or 'its first line'} is {stored!r} there and {wanted!r} here"
