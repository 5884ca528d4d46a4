"""What is shown to both sides of a comparison: hidden states to components, observations to a backbone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rsd_trt.bundle import HIDDEN_STATES, Bundle
from rsd_trt.config import PROPRIO_DIM, Component, ControlConfig
from rsd_trt.errors import UserError
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.observation import Observation

EDGE = 1.2  # coarse actions differ from the chunk by up to this many tolerances, so that agreement is a close call
TRIALS = 5  # of each task
INSTRUCTIONS = (  # two, as every length of prompt is captured and compiled for itself
    "pick up the bowl",
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
)


def hidden_states(bundle: Bundle, count: int, file: Path | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states [count, H] after block k and after block N: recorded ones if there are any, else seeded.

    Raises:
        UserError: the file lacks them, or holds too few or of another width.
    """
    recorded = file or bundle.path / HIDDEN_STATES
    if file is None and not recorded.is_file():
        generator = torch.Generator().manual_seed(0)
        seeded = torch.randn(2, count, bundle.config.hidden, generator=generator).to(device)
        return seeded[0], seeded[1]
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        states = load_file(recorded)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{recorded} cannot be read as safetensors: {error}") from None
    found = []
    for name in ("prefix", "final"):
        state = states.get(name)
        if state is None or state.dim() != 2 or state.shape[1] != bundle.config.hidden or len(state) < count:
            size = "nothing" if state is None else list(state.shape)
            raise UserError(f"{recorded} has {size} as {name!r}, not [>= {count}, {bundle.config.hidden}]")
        spread = torch.linspace(0, len(state) - 1, count).long()  # neighbouring queries are nearly alike
        found.append(state[spread].float().to(device))
    return found[0], found[1]


@dataclass(frozen=True)
class Case:
    """What the components are given, and what their answers are judged beside."""

    inputs: dict[Component, dict[str, Tensor]]
    chunks: Tensor  # [n, T, A], beside which the draft's actions are judged
    tolerance: Tensor
    draft_tokens: Tensor  # [n, T, D, C]
    chunk_tokens: Tensor  # [n, T, D, C]
    token_share: float | None  # with the rule `tokens`; None with the rule `actions`


def make_case(launcher: Launcher, early: Tensor, final: Tensor) -> Case:
    """Inputs for every component, made by the reference. Actions to agree with lie around its own by up to EDGE
    tolerances.

    early, final: hidden states [n, H] after block k and after block N.
    """
    config, device, count = launcher.bundle.config, final.device, len(final)
    tolerance = torch.tensor(config.rsd.tolerance, device=device)
    draft = clone(launcher.open("propose", "dynamic").run({"hidden": early}))
    zeros = torch.zeros(count, config.dims.T, config.dims.A, device=device)
    predict: dict[str, Tensor] = {"hidden": final, "coarse_actions": zeros, "tolerance": tolerance}
    head: dict[str, Tensor] = {"hidden": final}
    if config.head.kind == "conditioned":
        predict["condition"] = head["condition"] = draft["tokens"]
    chunk = clone(launcher.open("predict", "dynamic").run(predict))
    scale = torch.linspace(0, EDGE, count)[:, None, None]  # from none to EDGE tolerances: prefixes of every length
    noise = (torch.rand(chunk["actions"].shape, generator=torch.Generator().manual_seed(1)) * 2 - 1) * scale
    noise[..., : len(tolerance)] *= tolerance.cpu()
    noise[..., len(tolerance) :] = 0
    predict["coarse_actions"] = chunk["actions"] + noise.to(device)
    inputs: dict[Component, dict[str, Tensor]] = {
        "draft": {"hidden": early},
        "head": head,
        "decoder": {"tokens": chunk["tokens"]},
        "propose": {"hidden": early},
        "predict": predict,
    }
    coarse = chunk["tokens"][..., : config.dims.C]
    share = config.rsd.token_share if config.rsd.rule == "tokens" else None
    return Case(inputs, draft["actions"] + noise.to(device), tolerance, draft["tokens"], coarse, share)


def clone(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a session returned, kept: its next run may overwrite its own."""
    return {name: value.clone() for name, value in outputs.items()}


def random_observations(control: ControlConfig, count: int) -> list[Observation]:
    """Seeded noise for every camera, under a short instruction and a long one in turn."""
    random, side = np.random.default_rng(0), control.camera_size
    return [
        Observation(
            images=random.integers(0, 256, (len(control.cameras), side, side, 3), dtype=np.uint8),
            proprio=random.uniform(-1, 1, PROPRIO_DIM).astype(np.float32),
            instruction=INSTRUCTIONS[i % len(INSTRUCTIONS)],
        )
        for i in range(count)
    ]


def libero_observations(suite: str, control: ControlConfig) -> Iterator[Observation]:
    """What the robot sees first in the first trials of every task of a suite.

    Raises:
        UserError: LIBERO is not installed, or cannot render here.
    """
    from rsd_trt.eval.libero.simulator import Simulator, open_suite

    for task in range(open_suite(suite).n_tasks):
        simulator = Simulator(suite, task, control)
        for trial in range(TRIALS):
            simulator.reset(trial)
            yield simulator.observation()
        simulator.close()
