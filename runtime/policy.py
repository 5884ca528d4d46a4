"""A bundle as a policy: observations in, action chunks out, in the modes `baseline`, `rsd`, `shadow` and `random`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray
from torch import Tensor

from rsd_trt.bundle import Bundle
from rsd_trt.config import (
    ARM_DIMS,
    DEFAULT_BUNDLE,
    DEFAULT_ENGINES,
    MAX_COUNT,
    MODES,
    PROPRIO_DIM,
    RULES,
    BackboneKind,
    BackbonePrecision,
    BundleConfig,
    Mode,
    Precision,
    RuleName,
)
from rsd_trt.errors import PolicyFault, UserError, did_you_mean
from rsd_trt.records import from_json, to_json
from rsd_trt.runtime.backends import Launcher, check_backend, check_device, open_forward
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.forward import Forward
from rsd_trt.runtime.loop import Loop, Main
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import fit_frames
from rsd_trt.runtime.speculate import Rule, Tokens

log = logging.getLogger(__name__)


class Policy:
    """Drives `environments` at once, each with a chunk of its own.

    Modes: `baseline` makes a full query every time and commits `n_action_steps` of its chunk: open loop. `rsd` is the
    loop that `rsd_trt.runtime.speculate` describes, with the bundle's rule. `shadow` acts as `baseline` and records
    what `rsd` would have decided, and how far draft and main head are from every step that was left of the chunk
    before. `random` is the loop of `rsd` with a `RandomAcceptance` for its rule. A conditioned head is fed the draft's
    tokens where a check was rejected, and zeros otherwise.

    exports: sha256 of the exported files that run components, by component.
    """

    def __init__(
        self,
        config: BundleConfig,
        forward: Forward,
        mode: Mode,
        n_action_steps: int | None = None,
        environments: int = 1,
        rule: Rule | None = None,
        batch: int = 1,
        resize: bool = False,
    ) -> None:
        for name, count in (("environments", environments), ("batch", batch)):
            if type(count) is not int or not 1 <= count <= MAX_COUNT:
                raise UserError(f"{name} is {count!r}; it is a whole number in 1..{MAX_COUNT}")
        self.config = config
        self.mode = mode
        rsd = config.rsd if n_action_steps is None else structs.replace(config.rsd, n_action_steps=n_action_steps)
        self.loop = Loop(config.dims, rsd, config.control.limits, mode, forward.check, forward.full, rule, self._fault)
        self.n_action_steps, self.check_steps = self.loop.n_action_steps, self.loop.check_steps
        if mode != "baseline" and "propose" not in forward.sessions:
            raise UserError(f"{config.name} has no draft, and mode {mode} checks with one", "Use: --mode baseline")
        self.exports: dict[str, str] = {
            name: session.sha256 for name, session in forward.sessions.items() if session.sha256 is not None
        }
        self.hidden_states: list[Tensor] | None = None  # set to a list: `shadow` records into it
        self._forward = forward
        self.batch = batch
        self._resize = resize
        self._chunks = [Chunk() for _ in range(environments)]
        self._turn = threading.RLock()  # forwards and buffers are one thread's at a time
        if mode != "baseline" and config.late_draft is not None:
            log.warning("%s", config.late_draft)

    @classmethod
    def load(
        cls,
        bundle: Bundle | Path | str = DEFAULT_BUNDLE,
        mode: Mode = "rsd",
        backend: str = "torch",
        device: str = "auto",
        n_action_steps: int | None = None,
        environments: int = 1,
        batch: int = 1,
        precision: Precision = "fp32",
        engines: Path | str = DEFAULT_ENGINES,
        backbone: BackboneKind | None = None,
        backbone_precision: BackbonePrecision = "bundle",
        rule: Rule | RuleName | None = None,
        tolerance: float | Sequence[float] | None = None,
        threshold: float | None = None,
        resize: bool = False,
    ) -> Policy:
        """Loads every part of the bundle, or of the one in that folder, onto `device` and warms up.

        backend: what runs draft, head and decoder: torch, graph, compiled, ort or trt. device: cpu, cuda, cuda:N, or
        auto: CUDA if there is one. n_action_steps: actions that a full query commits, 1..T (default: the bundle's).
        environments: how many are driven at once. batch: queries that may share a forward. precision: of draft and
        head. engines: the folder of exports. rule: by its name (see `rsd_trt.config.RuleName`), by default the
        bundle's; mode `random` needs a `RandomAcceptance`. tolerance: of the
        rules first, actions and path, in environment units, for all arm dimensions or for each. threshold: of the rule
        likelihood. resize: frames of any size are made those that the bundle takes, as its `control.resize` says.
        On the CPU, PyTorch's threads are the caller's: with as many as there are cores, one other busy process makes a
        query several times as long; call `torch.set_num_threads` with one core fewer.

        backbone: by default `eager` with the backend `torch` and on the CPU, `compiled` with `compiled`, else `graph`.

        Raises:
            UserError: a part that is missing or does not fit, an unknown mode or backend, no such device, or one
                without enough memory.
        """
        if mode not in MODES:
            raise UserError(f"mode {mode!r} is unknown{did_you_mean(mode, MODES)}")
        for name, path in (("bundle", bundle), ("engines", engines)):
            if not isinstance(path, (Bundle, str, Path)):
                raise UserError(f"{name} is {path!r}, of type {type(path).__name__}", "Give the path of a folder")
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(Path(bundle))
        named = None if callable(rule) else rule
        bundle = replace(bundle, config=with_rule(bundle.config, mode, named, tolerance, threshold))
        target = check_device(device)
        launcher = Launcher(bundle, check_backend(backend), target, precision, Path(engines))
        forward = open_forward(launcher, "1" if batch == 1 else "dynamic", backbone, backbone_precision)
        given = rule if callable(rule) else None
        policy = cls(bundle.config, forward, mode, n_action_steps, environments, given, batch, resize)
        policy.warm_up()
        return policy

    def beside(self, config: BundleConfig, mode: Mode, rule: Rule | None = None) -> Policy:
        """A policy of another mode, or of other settings of the loop, on the same loaded parts; the two take turns."""
        other = Policy(config, self._forward, mode, None, len(self._chunks), rule, self.batch, self._resize)
        other._turn = self._turn
        return other

    def warm_up(self, instruction: str = "") -> None:
        """Queries on a black image, so that those that follow with this instruction make no buffers, choose no kernels
        and capture no graphs."""
        control = self.config.control
        side = control.camera_size
        black = np.zeros((len(control.cameras), side, side, 3), np.uint8)
        with self._turn:
            self._forward.warm_up(Observation(black, np.zeros(PROPRIO_DIM, np.float32), instruction), self.batch)

    def reset(self, env: int | None = None, episode: tuple[int, ...] | None = None) -> None:
        """Forgets the chunk of one environment, or of all: to be called at the start of an episode.

        episode: its task and trial, which together with the number of the query decide what the rule `random` draws.
        None: the environment goes on counting where it was.

        Raises:
            UserError: there is no such environment.
        """
        if env is not None:
            self._check_environments([env])
        with self._turn:
            for i in range(len(self._chunks)) if env is None else (env,):
                old = self._chunks[i]
                same = Chunk(episode=old.episode, queries=old.queries)
                self._chunks[i] = same if episode is None else Chunk(episode=episode)

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """The next actions [n, A] of environment 0, in environment units.

        Raises:
            PolicyFault: a hidden state, or the main head's logits or actions are not finite.
        """
        return self.query(observation).actions

    def query(self, observation: Observation) -> Query:
        """What `act` gives with how it came about: route, prefix, score, ms.

        Raises:
            PolicyFault: as `act`.
        """
        [query] = self.answer([observation], self._chunks[:1])
        if query.fault is not None:
            raise PolicyFault(query.fault)
        return query

    def act_batch(self, observations: Sequence[Observation], environments: Sequence[int]) -> list[Query]:
        """One query for each observation and the index of its environment. A fault ends that query only. Threads take
        turns.

        Raises:
            UserError: no observation, as many environments as observations are not named, one is named twice or is not
                there, or an observation is not what the bundle takes.
        """
        if isinstance(observations, Observation):
            raise UserError("act_batch got one Observation, not a list of them", "Give a list, or use query")
        if not observations or len(observations) != len(environments):
            raise UserError(f"act_batch got {len(observations)} observations for {len(environments)} environments")
        self._check_environments(environments)
        return self.answer(observations, [self._chunks[env] for env in environments])

    def answer(self, observations: Sequence[Observation], chunks: Sequence[Chunk]) -> list[Query]:
        """`act_batch` for a caller who keeps the chunks, which are brought up to date."""
        observations = self._fitted(observations)
        with self._turn:
            started = time.perf_counter()
            self._forward.begin(observations)
            queries = self.loop.query(observations, chunks)
            ms = (time.perf_counter() - started) * 1e3  # the answers are on the host: nothing is left to wait for
            if self.hidden_states is not None:
                self.hidden_states.append(self._forward.hidden.cpu())
            return [structs.replace(query, ms=ms) for query in queries]

    def full(self, observations: Sequence[Observation], condition: Tokens | None = None) -> Main:
        """Full queries alone: whole chunks, as the main head gives them, for a caller who runs the loop elsewhere. The
        next query overwrites what they give."""
        observations = self._fitted(observations)
        with self._turn:
            self._forward.begin(observations)
            return self._forward.full(observations, condition)

    def instruction_rows(self, instruction: str) -> NDArray[np.float32]:
        """What a draft with eyes of its own reads of an instruction [P, E], for a caller who runs it elsewhere."""
        with self._turn:
            return self._forward.rows(instruction).cpu().numpy()

    @property
    def reads_state(self) -> bool:
        """Whether observations need the robot's own state."""
        return self._forward.reads_state

    def _fitted(self, observations: Sequence[Observation]) -> Sequence[Observation]:
        """With frames as the bundle takes them, where they are to be resized. Raises UserError for what is none."""
        if strange := [type(x).__name__ for x in observations if not hasattr(x, "instruction")]:
            raise UserError(f"the policy got {strange[0]}, not an Observation")
        if not self._resize:
            return observations
        control, mean = self.config.control, self.config.backbone.towers[0].mean
        return [replace(x, images=fit_frames(x.images, control, mean)) for x in observations]

    def _check_environments(self, environments: Sequence[int]) -> None:
        """Raises UserError unless each is there, and named once."""
        there = range(len(self._chunks))
        known = all(isinstance(env, (int, np.integer)) and env in there for env in environments)
        if not known or len(set(environments)) < len(environments):
            raise UserError(
                f"the policy got the environments {list(environments)}, each of 0..{there[-1]} at most once",
                "More at a time: Policy.load(..., environments=N)",
            )

    def _fault(self, place: int) -> str:
        """Why a main head's chunk cannot be used; names the hidden state when that is where the trouble began."""
        known = bool(torch.isfinite(self._forward.hidden[place]).all())
        return f"{'the logits or actions of the main head are' if known else 'the hidden state is'} not finite"


def with_rule(
    config: BundleConfig,
    mode: Mode,
    rule: str | None,
    tolerance: float | Sequence[float] | None,
    threshold: float | None,
) -> BundleConfig:
    """The configuration with another rule, tolerance or threshold; None leaves the bundle's.

    Raises:
        UserError: an unknown rule, a value out of bounds, or one that mode or rule do not read.
    """
    if rule is not None and rule not in RULES:
        raise UserError(f"rule {rule!r} is unknown{did_you_mean(rule, RULES)}")
    each = (tolerance,) * ARM_DIMS if isinstance(tolerance, (int, float)) else tolerance
    given: dict[str, object] = {"rule": rule, "tolerance": each, "threshold": threshold}
    for name, why in config.rsd.idle(mode, given).items():
        raise UserError(f"{name} {why}")
    told = {name: value for name, value in given.items() if value is not None}
    return (
        from_json(BundleConfig, to_json(config) | {"rsd": to_json(config.rsd) | told}, "Policy.load")
        if told
        else config
    )
