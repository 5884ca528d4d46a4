"""The append-only file of a run's episodes."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec.structs import replace

from rsd_trt.errors import UserError, shown
from rsd_trt.eval.read import MAX_BYTES
from rsd_trt.eval.results import Episode, EpisodeKey, Settings
from rsd_trt.files import read_bounded, write_atomically
from rsd_trt.records import differing, from_text, parse, to_json, to_text, write_record


class EpisodeLog:
    """The append-only file of a run. A run that was cut short goes on where it stopped.

    Raises:
        UserError: the file belongs to a run with other settings, is not such a file, or cannot be written.
    """

    def __init__(self, folder: Path, name: str, settings: Settings, fresh: bool) -> None:
        self.path = folder / f"{name}_episodes.jsonl"
        self.settings = settings
        self.done: set[EpisodeKey] = set()  # the episodes that ended without an error
        self._broken: set[EpisodeKey] = set()  # those that ended in one
        settings_file = folder / f"{name}_settings.json"
        if fresh or not (self.path.exists() or settings_file.exists()):
            self.path.unlink(missing_ok=True)
            write_record(settings_file, settings)
            write_atomically(self.path, "")
        else:
            self._check_settings(settings_file)
            self._drop_half_a_line()
            for episode in self.read():
                self._note(episode)

    def lacks(self, task: int, trial: int) -> bool:
        """Whether a trial has still to be run: it is absent, or ended in an error."""
        return (task, trial) not in self.done

    def missing(self) -> list[EpisodeKey]:
        """The episodes that the run still lacks; those that ended in an error come last."""
        keys = [(task, trial) for task in self.settings.tasks for trial in range(self.settings.trials)]
        return sorted((key for key in keys if self.lacks(*key)), key=lambda key: key in self._broken)

    def read(self) -> list[Episode]:
        """The episodes, from the disk: a long run's are too many to be kept in memory.

        Raises:
            UserError: the file is damaged, or holds episodes of another run, or one of them twice.
        """
        lines: dict[EpisodeKey, int] = {}
        found: dict[EpisodeKey, Episode] = {}
        for number, line in enumerate(read_bounded(self.path, MAX_BYTES).splitlines(), start=1):
            where = f"{self.path}, line {number}"
            try:
                episode = from_text(Episode, line, where)
            except UserError as error:
                raise UserError(f"{error}. Start over: --fresh") from None
            if episode.run != self.settings.run:
                raise UserError(
                    f"{where} is of run {episode.run or '(none)'}, not {self.settings.run}: runs are mixed. "
                    "Start over: --fresh"
                )
            before = found.get(episode.key)
            if before is not None and before.error is None:
                task, trial = episode.key
                raise UserError(
                    f"{where} holds task {task}, trial {trial} again after line {lines[episode.key]}. "
                    "Remove one of them, or start over: --fresh"
                )
            lines[episode.key] = number
            found[episode.key] = episode
        return list(found.values())

    def append(self, episode: Episode) -> None:
        """Stores an episode for good: it is on the disk when this returns. If that fails, the file is as before."""
        episode = replace(episode, run=self.settings.run)
        with self.path.open("ab", buffering=0) as stream:  # a buffer would try again when it is closed
            end, rest = stream.tell(), memoryview(to_text(episode, indent=0).encode())
            try:
                while rest:
                    rest = rest[stream.write(rest) :]
                os.fsync(stream.fileno())
            except BaseException:
                os.ftruncate(stream.fileno(), end)
                raise
        self._note(episode)

    def _note(self, episode: Episode) -> None:
        (self.done if episode.error is None else self._broken).add(episode.key)

    def _check_settings(self, path: Path) -> None:
        if not path.exists():
            raise UserError(f"{self.path} has no {path.name} beside it: whose episodes are they? Start over: --fresh")
        try:
            stored = parse(read_bounded(path), str(path))
        except UserError as error:
            raise UserError(f"{error}. Start over: --fresh") from None
        if differences := [
            f"{key or 'its first line'} is {shown(there)} there and {shown(here)} here"
            for key, here, there in differing(to_json(self.settings), stored)
        ]:
            told = ", ".join(differences)
            raise UserError(f"{path} is of another run: {told}. Another --out, or start over: --fresh")

    def _drop_half_a_line(self) -> None:
        """A killed run may leave one, or settings without a log."""
        data = read_bounded(self.path, MAX_BYTES) if self.path.exists() else None
        whole = b"" if data is None else data[: data.rfind(b"\n") + 1]
        if whole != data:
            write_atomically(self.path, whole.decode("utf-8"))
