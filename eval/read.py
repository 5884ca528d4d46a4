"""Results files, read with suspicion: within bounds, checked against their schema and against their own episodes."""

from __future__ import annotations

import gzip
import math
import zlib
from collections import Counter
from pathlib import Path

import msgspec
from msgspec.structs import replace

from rsd_trt.errors import UserError, named, reason, shown
from rsd_trt.eval.results import Results, run_name
from rsd_trt.eval.statistics import counted
from rsd_trt.eval.summary import summarise
from rsd_trt.files import opened
from rsd_trt.records import from_text, parse, to_json

MAX_BYTES = 1 << 29  # of a results file
MAX_RATIO = 100  # by which it may have been compressed (ours are by 10 to 40): a small file may not fill the memory
ALWAYS = 1 << 22  # bytes that a compressed file may have, however small it is
RECORDED = ("episodes", "settings", "throughput", "command", "clock")  # no figures of the episodes alone
EXPECTED = "Give a results file of rsd-trt eval, SUITE_MODE_results.json, or its .json.gz"
RELATIVE = 1e-6  # difference of two figures that are still the same: sums depend on the order


class _Written(msgspec.Struct):
    """A results file, in its settings as they were written."""

    settings: msgspec.Raw


def read_run(path: Path) -> Results:
    """A results file, plain or compressed (`.json.gz`), whose figures follow from its episodes.

    Raises:
        UserError: it cannot be read, holds an episode twice or one that was not asked for, mixes runs, or its
            figures are not those of its episodes.
    """
    text = _text(path)
    results = _results(text, path)
    settings = results.settings
    run = run_name(msgspec.json.decode(msgspec.json.decode(text, type=_Written).settings))
    repeated = [key for key, count in Counter(episode.key for episode in results.episodes).items() if count > 1]
    if repeated:
        raise UserError(f"{path} holds task {repeated[0][0]}, trial {repeated[0][1]} twice. Evaluate again")
    asked = set(settings.tasks)
    for episode in results.episodes:
        if episode.task_id not in asked or not 0 <= episode.trial < settings.trials:
            raise UserError(
                f"{path} holds task {episode.task_id}, trial {episode.trial}, which its settings do not ask for "
                f"(tasks {shown(list(settings.tasks))}, {counted(settings.trials, 'trial')}). Evaluate again"
            )
        if episode.run != run:
            raise UserError(
                f"{path} mixes runs: task {episode.task_id}, trial {episode.trial} is of run "
                f"{episode.run or '(none)'}, its settings are of {run}. Evaluate again"
            )
    tasks = {task.task_id: task.task_description for task in results.task_results}
    if set(tasks) != asked:
        found_there, wanted = shown(sorted(tasks)), shown(list(settings.tasks))
        raise UserError(f"{path} has results for tasks {found_there}, its settings ask for {wanted}")
    found = summarise(settings, results.episodes, tasks, results.codec_round_trip_mse, results.command)
    figures = to_json(replace(found, episodes=()))
    for name, value in to_json(replace(results, episodes=())).items():
        if name not in RECORDED:
            _check_figure(path, name, value, figures[name])
    return results


def _text(path: Path) -> bytes:
    try:
        compressed = path.suffix == ".gz"
        most = min(MAX_BYTES, max(ALWAYS, MAX_RATIO * path.stat().st_size)) if compressed else MAX_BYTES
        with opened(path) as stream:
            text = (gzip.GzipFile(fileobj=stream) if compressed else stream).read(most + 1)
    except FileNotFoundError:
        raise UserError(f"{path} is not there", "rsd-trt eval writes results") from None
    except IsADirectoryError:
        beside = next(path.glob("*_results.json*"), path / "SUITE_MODE_results.json")
        raise UserError(f"{path} is a folder", f"Give a results file: {beside}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}", EXPECTED) from None
    if path.suffix == ".jsonl":
        whole = path.name.replace("_episodes.jsonl", "_results.json")
        raise UserError(f"{path} is a run's log of episodes", f"Give its results: {path.with_name(whole)}")
    if len(text) > most:
        raise UserError(f"{path} holds more than {most:,} bytes: no results file does")
    return text


def _results(text: bytes, path: Path) -> Results:
    try:
        return from_text(Results, text, str(path))
    except UserError:
        try:
            data = parse(text, str(path))
        except UserError as error:
            raise UserError(error.message, EXPECTED) from None
        if not isinstance(data, dict) or not {"task_suite", "final_success_rate"} <= data.keys():
            raise UserError(f"{path} is not a results file of rsd-trt eval", EXPECTED) from None
        raise


def _check_figure(path: Path, name: str, value: object, found: object) -> None:
    """Raises UserError unless a JSON value is the one found, floats being equal but for `RELATIVE`."""
    if isinstance(value, dict) and isinstance(found, dict):
        for key in {**found, **value}:
            _check_figure(path, f"{name}.{named(key)}", value.get(key), found.get(key))
    elif isinstance(value, list) and isinstance(found, list) and len(value) == len(found):
        for i, pair in enumerate(zip(value, found, strict=True)):
            _check_figure(path, f"{name}[{i}]", *pair)
    elif isinstance(value, float) and isinstance(found, (int, float)):
        if not math.isclose(value, found, rel_tol=RELATIVE):
            raise UserError(f"{path} is damaged: {name} is {shown(value)}, its episodes give {shown(found)}")
    elif value != found:
        raise UserError(f"{path} is damaged: {name} is {shown(value)}, its episodes give {shown(found)}")
