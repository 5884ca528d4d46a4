"""Sweeps on two nodes of one core each, on this machine, in LIBERO: what is killed loses and doubles nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from doubles import lines

from rsd_trt.eval.read import read_run
from rsd_trt.records import to_json

ray = pytest.importorskip("ray")

HERE = Path(__file__).parent
PATIENCE = 900.0  # s
EPISODES = 10

pytestmark = [pytest.mark.slow, pytest.mark.libero]


class Nodes:
    """Ray's processes of a cluster on this machine: a head, and one more node."""

    def __init__(self, held: Path) -> None:
        from ray.cluster_utils import Cluster

        os.environ |= {"HELD": str(held), "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
        quick = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20, "_system_config": quick}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self.cluster.address
        self.add()

    def add(self) -> None:
        self.second = self.cluster.add_node(num_cpus=1, object_store_memory=100 << 20)

    def kill_second(self) -> None:
        """kill -9 of its raylet."""
        (raylet,) = self.second.all_processes["raylet"]
        raylet.process.kill()
        raylet.process.wait()  # as long as nobody has asked for its end, its workers take it for alive


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held")
    (folder / "simulators").mkdir()
    return folder


@pytest.fixture(scope="module")
def nodes(held: Path) -> Iterator[Nodes]:
    before = dict(os.environ)
    found = Nodes(held)
    yield found
    found.cluster.shutdown()
    os.environ.clear()
    os.environ.update(before)


def begin(out: Path, *options: str) -> subprocess.Popen[str]:
    code = "from rsd_trt.cli import main; main(prog_name='rsd-trt')"
    command = [sys.executable, "-c", code, "sweep", "-o", str(out), "--workers", "1", "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(out: Path, *options: str) -> str:
    """What it says on stderr."""
    process = begin(out, *options)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    return stderr


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def without_clocks(results: Path) -> list[object]:
    """The episodes in order, with the name of their run, without what clocks put into them."""
    found = to_json(read_run(results))["episodes"]
    assert isinstance(found, list)
    for episode in found:
        del episode["seconds"], episode["others"]
        for query in episode["queries"]:
            del query["ms"]
    return found


def test_kill_9_of_a_simulator_a_raylet_and_the_driver(nodes: Nodes, held: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"  # a simulator that is held is silent
    file.write_text(f'policy = "held:act"\ntasks = 2\nmax_steps = 6\ntrials = {EPISODES}\ntimeout = {4 * PATIENCE}\n')
    options = (str(file), "--ray", nodes.address)
    log = tmp_path / "held.act" / "libero_spatial_held.act_episodes.jsonl"
    simulators, hold = held / "simulators", held / "hold"

    def acting() -> set[int]:
        return {int(file.name) for file in simulators.iterdir() if Path(f"/proc/{file.name}").exists()}

    hold.touch()
    driver = begin(tmp_path, *options)
    wait_for(lambda: len(acting()) == 2, driver)  # one on each node, in the middle of an episode
    os.kill(min(acting()), signal.SIGKILL)
    wait_for(lambda: len(list(simulators.iterdir())) == 3, driver)  # another one has taken its place
    nodes.kill_second()
    wait_for(lambda: len(acting()) == 1, driver)
    hold.unlink()
    wait_for(lambda: lines(log) >= 2, driver)
    hold.touch()
    driver.kill()
    driver.communicate()
    there = lines(log)
    assert 2 <= there < EPISODES
    nodes.add()
    hold.unlink()
    finish(tmp_path, *options)
    keys = [(line["task_id"], line["trial"]) for line in map(json.loads, log.read_text().splitlines())]
    assert sorted(keys) == [(2, trial) for trial in range(EPISODES)]
    results = log.with_name("libero_spatial_held.act_results.json")
    assert read_run(results).errors == 0
    finish(tmp_path / "here", str(file))
    assert without_clocks(results) == without_clocks(tmp_path / "here" / "held.act" / results.name)


def test_a_bundle_on_two_nodes_gives_what_one_process_gives(nodes: Nodes, tiny_bundle: Path, tmp_path: Path) -> None:
    options = (
        "--bundle",
        str(tiny_bundle),
        "--mode",
        "rsd,baseline",
        "--n-action-steps",
        "2",
        "--rule",
        "first",
        "--tolerance",
        "2",
    )
    options += ("--tasks", "2", "--trials", "6", "--max-steps", "8", "--device", "cpu")
    finish(tmp_path / "two", *options, "--ray", nodes.address)
    finish(tmp_path / "one", *options)
    for mode, folder in (("rsd", "rsd_tiny_first_n2_tolerance2"), ("baseline", "baseline_tiny_n2")):
        name = f"{folder}/libero_spatial_{mode}_results.json"
        assert without_clocks(tmp_path / "two" / name) == without_clocks(tmp_path / "one" / name)
    report = json.loads((tmp_path / "two" / "report" / "performance_comparison.json").read_text())
    assert {run["settings"]["bundle"]["mode"] for run in report["runs"]} == {"rsd", "baseline"}
