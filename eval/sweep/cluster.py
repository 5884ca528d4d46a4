"""The seats of a Ray cluster.

A seat is an actor on a node, with a GPU where the policy wants one and a core for each of its simulators. It has an
`Executor`, so that its model stays loaded and its simulators stay built from shard to shard. Nothing but this module
imports Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from rsd_trt.errors import UserError, missing_extra, reason
from rsd_trt.eval.libero.pool import Meter
from rsd_trt.eval.libero.request import EvalRequest
from rsd_trt.eval.libero.run import Executor, Job
from rsd_trt.eval.results import Episode, EpisodeKey
from rsd_trt.eval.sweep.board import Lost, Place, Refused
from rsd_trt.files import explained
from rsd_trt.host import GpuMeter
from rsd_trt.load import LoadMeter

if TYPE_CHECKING:
    from ray import ObjectRef, ObjectRefGenerator
    from ray.actor import ActorHandle

    from rsd_trt.eval.sweep.board import Answer

log = logging.getLogger(__name__)

LOCAL = "local"  # the address of a cluster that is started for the sweep, on this machine
LOOK_SECONDS = 5.0  # between two looks at which nodes there are
WAIT_SECONDS = 1.0
STORE_BYTES = 200 << 20  # of a local cluster's object store: episodes are all that goes through it


class Seat:
    """What runs in a seat's process, on its node."""

    def __init__(self, folder: Path, cores: int, pictures_on: str, alone: bool) -> None:
        """folder: that the driver works in, for relative paths. pictures_on: the node that pictures are kept on. alone:
        no other seat is on the node."""
        import ray

        if folder.is_dir():
            os.chdir(folder)
        self._keep_pictures = ray.get_runtime_context().get_node_id() == pictures_on
        self._cores, self._executor, self._alone = cores, Executor(), alone

    def open(self, requests: Sequence[EvalRequest]) -> list[Job] | Refused:
        """Makes the requests' model, exports and LIBERO ready here."""
        try:
            with explained(requests[0].out):
                self._jobs = self._executor.open(requests)
        except UserError as error:
            return Refused(str(error))
        except Exception as error:
            log.exception("a request cannot be opened")
            return Refused(f"{type(error).__name__}: {reason(error)}")
        return self._jobs

    def run(self, keys: Sequence[Sequence[EpisodeKey]]) -> Iterator[Episode | Meter | Refused]:
        """Executes episodes of each request that is open; at last tells what that took."""
        import torch

        device = self._jobs[0].settings.device
        meter = Meter(cores=self._cores, gpus=int(device.startswith("cuda")))
        try:
            with (
                GpuMeter(torch.device(device)) as gpu,
                contextlib.closing(self._executor.run(self._jobs, keys, meter, self._keep_pictures)) as episodes,
            ):
                load = LoadMeter()
                for episode in episodes:
                    # what a node's seats keep busy of each other's cores is no disturbance, and cannot be told apart
                    yield structs.replace(episode, others=load.lap() if self._alone else None)
        except UserError as error:
            yield Refused(str(error))
            return
        meter.utilisation = gpu.mean
        yield meter


class RaySeats:
    """Seats on the nodes of a cluster: one for each GPU, or as many as there are cores for where no run wants a GPU."""

    def __init__(self, address: str, verbose: bool) -> None:
        """Connects to the cluster.

        Raises:
            UserError: there is none at that address, or Ray is not installed.
        """
        try:
            import ray
        except ImportError:
            raise missing_extra("Ray", "ray") from None
        self._ray = ray
        local = {"include_dashboard": False, "object_store_memory": STORE_BYTES} if address == LOCAL else {}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(address=address, log_to_driver=verbose, logging_level=logging.ERROR, **local)
        except Exception as error:  # a node that does not come up in time is a bare one
            raise UserError(
                f"--ray {address}: {reason(error)}", "Start a cluster (ray start --head), or give --ray alone"
            ) from None
        self._wants_gpu, self._workers = False, 1
        self._seats: dict[Place, ActorHandle] = {}
        self._nodes: dict[Place, str] = {}
        self._waiting: dict[ObjectRef | ObjectRefGenerator, Place] = {}
        self._looked = -LOOK_SECONDS

    def close(self) -> None:
        """Ends the seats, and a local cluster."""
        for actor in self._seats.values():
            self._ray.kill(actor)
        self._ray.shutdown()

    def plan(self, wants_gpu: bool, workers: int | None) -> int:
        """What a seat gets: a GPU, where the cluster has any and they are wanted, and simulators: so many, or as many
        as the node with fewest cores has for each seat. Returns how many.

        Raises:
            UserError: no node has room for such a seat.
        """
        nodes = self._alive()
        self._wants_gpu = wants_gpu and any(node.get("GPU") for node in nodes.values())
        if self._wants_gpu:
            nodes = {name: node for name, node in nodes.items() if node.get("GPU")}
        each = [int(node.get("CPU", 0) // (node["GPU"] if self._wants_gpu else 1)) for node in nodes.values()]
        self._workers = workers or max(1, min(each, default=1))
        if max(each, default=0) < self._workers:
            raise UserError(
                f"no node of the cluster has {self._workers} cores for a seat, at most {max(each, default=0)}",
                "Use fewer --workers",
            )
        return self._workers

    def places(self) -> Sequence[Place]:
        """The seats, with those of new nodes."""
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            for node, resources in self._alive().items():
                room = int(resources.get("CPU", 0) // self._workers)
                room = min(room, int(resources.get("GPU", 0))) if self._wants_gpu else room
                for _ in range(room - list(self._nodes.values()).count(node)):
                    self._add(node, str(resources["name"]), alone=room == 1)
        return list(self._seats)

    def open(self, place: Place, requests: Sequence[EvalRequest]) -> None:
        self._waiting[self._seats[place].open.remote(requests)] = place

    def run(self, place: Place, keys: Sequence[Sequence[EpisodeKey]]) -> None:
        self._waiting[self._seats[place].run.options(num_returns="streaming").remote(keys)] = place

    def answers(self) -> Iterable[tuple[Place, Answer]]:
        if not self._waiting:
            time.sleep(WAIT_SECONDS)
            return
        waiting = list(self._waiting)
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=WAIT_SECONDS)
        for source in ready:
            place = self._waiting[source]
            for answer in self._read(source):
                if not isinstance(answer, Episode):
                    del self._waiting[source]
                if isinstance(answer, (Lost, Refused)):
                    self._drop(place)
                yield place, answer

    def _read(self, source: ObjectRef | ObjectRefGenerator) -> Iterator[Answer]:
        """What a source has ready; nothing behind what ends it."""
        from ray import ObjectRefGenerator
        from ray.exceptions import RayError

        try:
            if not isinstance(source, ObjectRefGenerator):
                yield self._ray.get(source)
                return
            while True:
                answer = self._ray.get(next(source))
                yield answer
                if not isinstance(answer, Episode) or not source.next_ready():
                    return
        except StopIteration:
            yield Lost("its shard ended early")
        except RayError as error:
            yield Lost(f"{type(error).__name__}: {reason(error)}")

    def _alive(self) -> dict[str, dict[str, Any]]:
        """The resources of the nodes that are there, by id, with the `name` of each."""
        return {
            node["NodeID"]: {**node["Resources"], "name": node["NodeManagerAddress"]}
            for node in self._ray.nodes()
            if node["Alive"]
        }

    def _add(self, node: str, name: str, alone: bool) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {
            "num_cpus": self._workers,
            "num_gpus": int(self._wants_gpu),
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        here = self._ray.get_runtime_context().get_node_id()
        actor = self._ray.remote(Seat).options(**options).remote(Path.cwd(), self._workers, here, alone)
        place = Place(name, self._workers)
        self._seats[place], self._nodes[place] = actor, node

    def _drop(self, place: Place) -> None:
        with contextlib.suppress(Exception):  # it may be gone
            self._ray.kill(self._seats[place])
        del self._seats[place], self._nodes[place]
