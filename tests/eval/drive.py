"""`rsd-trt eval` on the simulator's double, as a process of its own: python drive.py OPTIONS."""

from __future__ import annotations

import sys

if __name__ == "__main__":  # the simulators' processes import this file, too, and need none of it
    import doubles

    from rsd_trt.cli import main
    from rsd_trt.eval.libero import run

    run.Simulator = doubles.world  # type: ignore[assignment,misc]
    run._tasks = lambda request: ({task: f"task {task}" for task in request.tasks or ()}, "0" * 64)
    main(["eval", *sys.argv[1:]], prog_name="rsd-trt")
