"""Clients as they are published drive LIBERO episodes of the reference policy through a server."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from command import rsd_trt
from msgspec import structs
from numpy.typing import NDArray
from serving import as_request, running

from rsd_trt.bundle import Bundle
from rsd_trt.config import ARM_DIMS, DEFAULT_BUNDLE, Mode
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.serve.launch import ServedPolicy, open_service
from rsd_trt.runtime.serve.service import ServeOptions

pytestmark = [pytest.mark.slow, pytest.mark.libero]

TRIALS = 2
ENVIRONMENT = "RSD_TRT_CLIENTS"  # a folder that keeps the clients' environments for the next run


def environment(name: str, folder: Path, *packages: str, shared: bool = False) -> Path:
    """The scripts of an environment of its own with some packages; `shared`: and with ours behind them."""
    where = Path(os.environ.get(ENVIRONMENT, folder)) / name
    if not where.exists():
        subprocess.run([sys.executable, "-m", "venv", str(where)], check=True)
        if shared:
            library = next(where.glob("lib/python3*/site-packages"))
            (library / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([where / "bin" / "pip", "install", "--quiet", *packages], check=True)
    return where / "bin"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """openpi's and json_numpy's clients, with the NumPy that openpi's asks for."""
    packages = ("openpi-client==0.1.2", "typing_extensions", "json-numpy==2.1.1", "numpy<2")
    return environment("openpi", tmp_path_factory.mktemp("clients"), *packages)


class Foreign:
    """A client in its own process."""

    def __init__(self, scripts: Path, kind: str, port: int) -> None:
        command = [scripts / "python", Path(__file__).with_name("foreign_clients.py"), kind, str(port)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def begin(self) -> None:
        self._write({})

    def act(self, seen: dict[str, object]) -> NDArray[np.float32]:
        self._write(seen)
        assert self.process.stdout is not None
        head = self.process.stdout.read(8)
        assert len(head) == 8, "the client broke"
        data = io.BytesIO(self.process.stdout.read(*struct.unpack("<q", head)))
        actions: NDArray[np.float32] = np.load(data)["actions"]
        return actions

    def _write(self, seen: dict[str, object]) -> None:
        stream = io.BytesIO()
        np.savez(stream, **seen)  # type: ignore[arg-type]
        assert self.process.stdin is not None
        self.process.stdin.write(struct.pack("<q", len(stream.getvalue())) + stream.getvalue())
        self.process.stdin.flush()


@pytest.mark.parametrize(("kind", "mode"), [("openpi", "rsd"), ("act", "baseline")])
def test_episodes_are_those_of_the_policy_in_process(published: Path, kind: str, mode: Mode) -> None:
    """Every reply bit-equal to what the policy in process commits, on the same initial states; so is success."""
    from rsd_trt.eval.libero.episode import Assignment, run_episode
    from rsd_trt.eval.libero.simulator import Simulator

    bundle = Bundle.open(DEFAULT_BUNDLE)
    control, n = bundle.config.control, bundle.config.rsd.n_action_steps
    policy = Policy.load(bundle, mode, device="cpu")
    service = open_service(ServedPolicy(mode=mode, device="cpu"), ServeOptions(port=0))
    steps, solved = 0, 0
    with running(service) as port:
        client = Foreign(published, kind, port)
        simulator = Simulator("libero_spatial", 0, control)
        for trial in range(TRIALS):
            client.begin()
            chunk = Chunk(fixed=n)

            def act(simulator: Simulator, step: int, chunk: Chunk = chunk) -> Query:
                observation: Observation = simulator.observation()
                [expected] = policy.answer([observation], [chunk])
                actions = client.act(as_request(observation, control))
                if kind == "act":
                    np.testing.assert_array_equal(actions[:, ARM_DIMS], np.sign(expected.actions[:, ARM_DIMS]))
                    actions[:, ARM_DIMS] = expected.actions[:, ARM_DIMS]
                np.testing.assert_array_equal(actions, expected.actions)
                return structs.replace(expected, actions=actions)

            finished = run_episode(simulator, Assignment(0, trial, 220), act)
            steps, solved = steps + len(finished.actions), solved + finished.success
        simulator.close()
        client.process.kill()
    assert solved == TRIALS
    assert steps > 60


def test_vla_eval_runs_against_the_server(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`vla-eval run --no-docker`, as it is published: `rsd-trt eval` takes as many steps from the same states."""
    scripts = environment("vla-eval", tmp_path_factory.mktemp("clients"), "vla-eval==0.8.0", shared=True)
    config = {
        "server": {"timeout": 120},
        "output_dir": str(tmp_path / "out"),
        "benchmarks": [
            {
                "benchmark": "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark",
                "mode": "sync",
                "episodes_per_task": TRIALS,
                "max_tasks": 1,
                "params": {"suite": "libero_spatial", "seed": 7},
            }
        ],
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    with running(open_service(ServedPolicy(device="cpu"), ServeOptions(port=0))) as port:
        url = f"ws://127.0.0.1:{port}/vla-eval"
        command = [scripts / "vla-eval", "run", "--no-docker", "--yes", "-c", tmp_path / "config.yaml"]
        done = subprocess.run([*command, "--server-url", url], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [aggregate] = (tmp_path / "out").glob("*_aggregate.json")
    theirs = json.loads(aggregate.read_text())["tasks"][0]["episodes"]
    options = ["--tasks", "0", "--trials", str(TRIALS), "--device", "cpu", "--out", str(tmp_path / "ours")]
    ours = json.loads(rsd_trt("eval", *options, "--json").stdout)["episodes"]
    assert [x["metrics"]["success"] for x in theirs] == [x["success"] for x in ours] == [True] * TRIALS
    assert [x["steps"] for x in theirs] == [x["steps"] for x in ours]
