"""The policy at the robot's side: the draft checks here, and only full queries cross the network.

It needs NumPy, ONNX Runtime, a websocket client and msgpack, and no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import DEFAULT_ENGINES, PROPRIO_DIM, Mode, Precision
from rsd_trt.errors import PolicyFault, UserError
from rsd_trt.recorder import EpisodeRecorder, Recorder
from rsd_trt.recordings import SERVER, Facts
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.loop import Guess, Loop
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.serve.edge_draft import OrtDraft, exported_draft
from rsd_trt.runtime.serve.interface import no_state
from rsd_trt.runtime.serve.line import Line, Unreachable
from rsd_trt.runtime.serve.remote import Known, Remote, Timing
from rsd_trt.runtime.serve.sessions import Alarm

TOKEN_RULES = ("tokens", "likelihood")


class EdgePolicy:
    """`reset` and `act` as `rsd_trt.Policy` has them, for one robot: the same loop and the same decisions.

    An accepted chunk goes on while the network is away. Where a full query is due and cannot be had, `act` raises
    `Unreachable`: nothing is repeated.
    """

    def __init__(
        self,
        url: str,
        engines: Path | str = DEFAULT_ENGINES,
        *,
        mode: Mode = "rsd",
        n_action_steps: int | None = None,
        api_key: str | None = None,
        timeout_s: float = 5.0,
        precision: Precision = "fp32",
        threads: int = 0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        expected_rejections: float | None = None,
        on_alarm: Callable[[float], None] | None = None,
        record: Path | None = None,
        known: Known | None = None,
    ) -> None:
        """engines: the folder of exports with the draft's ONNX graph; mode `baseline` needs none. timeout_s: for a full
        query. on_alarm(share of rejected checks): called when many more of the recent checks were rejected than
        `expected_rejections`: stop the robot there. record: a folder for recordings. known: of the policy of a server
        that is not `rsd-trt serve`.

        Raises:
            UserError: the server cannot be reached, or draft and server do not fit each other.
        """
        if mode not in ("rsd", "baseline"):
            raise UserError(f"mode {mode!r} is not one of the client's: rsd, baseline")
        self.timing = Timing()
        self._line = Line(url, api_key, timeout_s)
        self._main = Remote(self._line, known, n_action_steps, self.timing)
        known = self._main.known
        self.control, self.name = known.control, known.name
        self._draft: OrtDraft | None = None
        if mode == "rsd":
            if known.propose is None:
                raise UserError(f"{url} serves a policy without a draft that could check here", "Use: mode='baseline'")
            if not self._line.ours and known.rsd.rule in TOKEN_RULES:
                raise UserError(f"the rule {known.rsd.rule} needs the main model's tokens, and {url} gives none")
            file = exported_draft(Path(engines), known.name, known.propose, precision)
            self._draft = OrtDraft(file, providers, threads)
        self._loop = Loop(known.dims, known.rsd, known.control.limits, mode, self._check, self._main.full)
        self.n_action_steps = self._loop.n_action_steps
        self._rows: dict[str, NDArray[np.float32]] = {}
        self._chunk = Chunk()
        self._alarm = Alarm(expected_rejections)
        self._on_alarm = on_alarm
        self._record, self._steps = record, 0
        self._recorder: Recorder | None = None
        self._episode: EpisodeRecorder | None = None

    def __enter__(self) -> EdgePolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up, and writes the episode that is being recorded."""
        self._save(None)
        self._line.close()

    def prepare(self, instruction: str) -> None:
        """Gets what the draft reads of an instruction, so that the first check need not."""
        if self._draft is not None and instruction not in self._rows:
            self._rows[instruction] = self._main.rows(instruction)

    def reset(self, success: bool | None = None) -> None:
        """A new episode. success: of the one before, for its recording."""
        self._save(success)
        self._chunk = Chunk()
        self._alarm.recent.clear()
        self._steps = 0

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """The next actions [n, A], in environment units.

        Raises:
            Unreachable: a full query is due and cannot be had.
            PolicyFault: the main model's answer is not finite.
        """
        query = self.query(observation)
        if query.fault is not None:
            raise PolicyFault(query.fault)
        return query.actions

    def query(self, observation: Observation) -> Query:
        """As `act`, with how the query went."""
        self.prepare(observation.instruction)
        started = time.perf_counter()
        before = replace(self._chunk)
        try:
            [query] = self._loop.query([observation], [self._chunk])
        except UserError as error:
            self._chunk = before
            if isinstance(error, Unreachable):
                raise Unreachable(f"a full query is due, and {error}") from None
            raise
        if query.checked:
            self._alarm.recent.append(query.route == "rejected")
            if self._alarm.raised and self._on_alarm is not None:
                self._on_alarm(self._alarm.share or 0.0)
        if query.fault is None:
            self._keep(observation, query)
        self._steps += len(query.actions)
        return replace(query, ms=(time.perf_counter() - started) * 1e3)

    def measure(self, instruction: str, samples: int, warm_up: int = 5) -> Timing:
        """Times checks and full queries alone, on noise. Nothing is executed."""
        random = np.random.default_rng(0)
        shape = (len(self.control.cameras), self.control.camera_size, self.control.camera_size, 3)
        state = np.zeros(PROPRIO_DIM, np.float32)
        self.prepare(instruction)
        for i in range(warm_up + samples):
            if i == warm_up:
                for kept in (self.timing.check, self.timing.full, self.timing.server):
                    kept.clear()
            observation = Observation(random.integers(0, 256, shape, np.uint8), state, instruction)
            if self._draft is not None:
                self._check([observation])
            self._main.full([observation], None)
        return self.timing

    def _check(self, observations: Sequence[Observation]) -> Guess:
        assert self._draft is not None
        started = time.perf_counter()
        out = self._draft(observations[0], self._rows[observations[0].instruction])
        self.timing.check.append((time.perf_counter() - started) * 1e3)
        dims = self._main.known.dims
        logits = out["logits"].reshape(-1, dims.T, dims.D, dims.K)
        return Guess(out["tokens"], out["actions"], logits, out["finite"])  # type: ignore[arg-type]

    def _keep(self, observation: Observation, query: Query) -> None:
        """Adds a query to the recording."""
        if self._record is None:
            return
        if self._recorder is None:
            known = self._main.known
            size = min(128, observation.images.shape[1])
            steps = known.dims.T if query.chunk is None else len(query.chunk)
            facts = Facts(known.name, known.main or f"{SERVER}{self._line.url}", self.control.cameras, size, steps)
            self._recorder = Recorder(self._record, facts)
        if self._episode is None:
            self._episode = self._recorder.episode()
        state = no_state() if observation.proprio is None else observation.proprio
        seen = observation.images, state, observation.instruction
        self._episode.add(self._steps, *seen, query.actions, query.chunk, query.tokens)

    def _save(self, success: bool | None) -> None:
        episode, self._episode = self._episode, None
        if episode is not None:
            name = f"edge_{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}_{time.monotonic_ns() % 10**9}"
            episode.save(name, success)
