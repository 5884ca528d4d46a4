"""A robot's control loop around the edge client: replace the camera, the state and the arm by your own.

python -m examples.robot.robot ws://gpu-box:8000 --engines engines --task "pick up the bowl"
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.serve.edge import EdgePolicy

HZ = 20  # control steps a second, as the policy was trained


def look(cameras: int, side: int, task: str) -> Observation:
    """Frames [cameras, side, side, 3] RGB as the cameras give them, and the robot's state: hand position 3 (m),
    axis-angle 3 (rad), gripper joints 2 (m). Your drivers go here."""
    return Observation(np.zeros((cameras, side, side, 3), np.uint8), np.zeros(8, np.float32), task)


def move(action: np.ndarray) -> None:
    """One step of the arm: dx dy dz droll dpitch dyaw gripper, each in [-1, 1]. Your controller goes here."""


def stop(why: str) -> None:
    """The robot stands still. Your brake goes here."""
    raise SystemExit(f"stopped: {why}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--engines", type=Path, default=Path("engines"), help="the draft's export, copied here")
    parser.add_argument("--mode", default="rsd", help="baseline: without a draft")
    parser.add_argument("--task", default="pick up the bowl")
    parser.add_argument("--ahead", type=int, default=0, help="steps that a full query takes: go on meanwhile")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args(arguments)
    alarm = {"expected_rejections": 0.3, "on_alarm": lambda share: stop(f"{share:.0%} of the checks were rejected")}
    with EdgePolicy(given.url, given.engines, mode=given.mode, timeout_s=1.0, ahead=given.ahead, **alarm) as policy:
        policy.prepare(given.task)
        step, due = 0, time.monotonic()
        try:
            while step < given.steps:
                query = policy.query(look(len(policy.control.cameras), policy.control.camera_size, given.task))
                if query.fault is not None:
                    stop(query.fault)
                due = max(due, time.monotonic())  # what was waited for is not made up for
                for action in query.actions:
                    move(action)
                    step, due = step + 1, due + 1 / HZ
                    time.sleep(max(0.0, due - time.monotonic()))
                print(f"step {step}: {query.route}, {len(query.actions)} actions, {query.ms:.1f} ms")
        except BaseException as error:  # also a camera's, a bug, Ctrl-C
            if not isinstance(error, SystemExit):  # the alarm's, which has stopped it
                stop(f"{type(error).__name__}: {error}")
            raise


if __name__ == "__main__":
    main()
