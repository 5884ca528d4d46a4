"""rsd-trt: deploy Residual Speculative Decoding robot policies, and prove that the deployment is right.

A policy is loaded from a bundle's folder (without one: the reference policy, which is shipped with the toolkit) and
asked for actions whenever those that it gave are used up:

>>> import numpy as np
>>> import rsd_trt
>>> policy = rsd_trt.Policy.load(backend="torch", mode="rsd")
>>> control = policy.config.control
>>> control.cameras
('agentview_image', 'robot0_eye_in_hand_image')
>>> observation = rsd_trt.Observation(
...     images=np.zeros((2, control.camera_size, control.camera_size, 3), np.uint8),
...     proprio=np.zeros(8, np.float32),
...     instruction="pick up the black bowl on the stove and place it on the plate",
... )
>>> policy.reset()  # at the start of every episode
>>> actions = policy.act(observation)  # [n, 7]: position, rotation and gripper, each in [-1, 1] of the controller
>>> actions.shape[1], str(actions.dtype), 1 <= len(actions) <= policy.n_action_steps
(7, 'float32', True)

How an answer came about is told by `query`: which route it took, how much of the old chunk passed, and its ms:

>>> query = policy.query(observation)
>>> query.route in ("accepted", "partial", "rejected", "exhausted", "gripper"), query.ms > 0
(True, True)

What the user can mend is raised as `UserError`, whose message names the remedy; `PolicyFault` is a `UserError` that
says that the policy has nothing safe to do:

>>> rsd_trt.Policy.load("no/such/bundle")
Traceback (most recent call last):
    ...
rsd_trt.errors.UserError: there is no folder no/such/bundle. A bundle is a folder, made by rsd-trt pack
>>> rsd_trt.Policy.load(backend="tr")
Traceback (most recent call last):
    ...
rsd_trt.errors.UserError: backend 'tr' is unknown; did you mean 'trt'?

Importing the package is instant: each of its names is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rsd_trt.bundle import Bundle
    from rsd_trt.errors import PolicyFault, UserError
    from rsd_trt.runtime.observation import Observation
    from rsd_trt.runtime.policy import Policy

__version__ = "0.2.0"
__all__ = ["Bundle", "Observation", "Policy", "PolicyFault", "UserError", "__version__"]

_HOMES = {
    "Bundle": "rsd_trt.bundle",
    "Observation": "rsd_trt.runtime.observation",
    "Policy": "rsd_trt.runtime.policy",
    "PolicyFault": "rsd_trt.errors",
    "UserError": "rsd_trt.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'rsd_trt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOMES)
