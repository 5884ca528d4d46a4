"""The client at the robot's side decides as a policy in process does, with its main model wherever."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import rsd_trt
from msgspec import structs
from serving import SIDE, STUB_CONTROL, STUB_DIMS, STUB_RSD, Stub, bundle_service, running, stub_service
from websockets.sync.server import ServerConnection, serve

from rsd_trt.bundle import Bundle
from rsd_trt.errors import PolicyFault, UserError
from rsd_trt.recordings import Recordings
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.loop import Loop
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.serve.arrays import arrays, pack, unpack
from rsd_trt.runtime.serve.edge import INSTRUCTIONS, EdgePolicy
from rsd_trt.runtime.serve.line import Unreachable
from rsd_trt.runtime.serve.remote import Known

Observe = Callable[..., Observation]


def scenes(observe: Observe, bundle: Bundle, count: int) -> Iterator[Observation]:
    """A scene stays for a few queries, an instruction for a few scenes."""
    for i in range(count):
        yield observe(bundle.config.control, i // 4, f"task {i // 30}")


def test_the_client_decides_as_the_policy_in_process(lenient: Bundle, engines: Path, observe: Observe) -> None:
    policy = Policy.load(lenient, backend="ort", device="cpu", engines=engines)
    routes = set()
    with running(bundle_service(lenient, backend="ort", engines=engines)) as port:
        with EdgePolicy(f"ws://127.0.0.1:{port}", engines) as edge:
            for observation in scenes(observe, lenient, 120):
                [expected] = policy.act_batch([observation], [0])
                query = edge.query(observation)
                np.testing.assert_array_equal(query.actions, expected.actions)
                for name in ("route", "prefix", "score", "clipped", "full_query", "token_agreement"):
                    assert getattr(query, name) == getattr(expected, name)
                routes.add(query.route)
            full = len(edge.timing.full)
            for wrong in ({"images": observation.images[:, 1:]}, {"proprio": np.zeros(7, np.float32)}):
                with pytest.raises(UserError, match="the bundle takes"):
                    edge._check([replace(observation, **wrong)])
        assert routes >= {"start", "accepted", "rejected", "instruction", "exhausted"}
        assert full == len(edge.timing.server) < 100
        with EdgePolicy(f"ws://127.0.0.1:{port}", engines, mode="baseline", n_action_steps=5) as edge:
            assert edge.act(observation).shape == (5, 7)


def test_it_runs_without_torch(lenient: Bundle, engines: Path, observe: Observe, tmp_path: Path) -> None:
    code = f"""
import json, sys

class Torchless:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "starlette", "uvicorn"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Torchless())
import numpy as np
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.serve.edge import EdgePolicy

given = np.load({str(tmp_path / "seen.npz")!r})
with EdgePolicy(sys.argv[1], {str(engines)!r}) as edge:
    acts = [edge.query(Observation(x, y, "go")) for x, y in zip(given["images"], given["states"])]
print(json.dumps([[query.route, query.actions.tolist()] for query in acts]))
"""
    seen = [observe(lenient.config.control, i // 3, "go") for i in range(8)]
    np.savez(tmp_path / "seen.npz", images=[x.images for x in seen], states=[x.proprio for x in seen])
    policy = Policy.load(lenient, backend="ort", device="cpu", engines=engines)
    with running(bundle_service(lenient, backend="ort", engines=engines)) as port:
        command = [sys.executable, "-c", code, f"ws://127.0.0.1:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    expected = [policy.act_batch([x], [0])[0] for x in seen]
    assert json.loads(done.stdout) == [[query.route, query.actions.tolist()] for query in expected]


@contextlib.contextmanager
def plain_server(chunk: Callable[[dict[str, object]], object]) -> Iterator[str]:
    """Somebody else's openpi server: no metadata to speak of, and chunks of actions. Its address."""

    def answer(line: ServerConnection) -> None:
        line.send(pack({}))
        for frame in line:
            assert isinstance(frame, bytes)
            reply = chunk(arrays(unpack(frame)))  # type: ignore[arg-type]
            line.send(reply if isinstance(reply, str) else pack({"actions": reply}))

    with serve(answer, "127.0.0.1", 0, max_size=None, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


def test_any_openpi_server_can_be_the_main_model(
    lenient: Bundle, engines: Path, observe: Observe, tmp_path: Path
) -> None:
    """Chunks of ten steps, made of the first pixel: the draft of the bundle checks them."""
    policy = Policy.load(lenient, backend="ort", device="cpu", engines=engines)
    config = lenient.config

    def chunk(request: dict[str, object]) -> np.ndarray:
        image = request["observation/image"]
        assert isinstance(image, np.ndarray)
        values = np.random.default_rng(image[-1, -1]).uniform(-0.4, 0.4, (10, 7))
        values[:, 6] = 1
        return values

    known = Known(
        config.name,
        config.dims,
        config.rsd,
        config.control,
        propose=lenient.component_fingerprint("propose"),
        rows=policy.instruction_rows,
    )

    def main(observations, condition):  # type: ignore[no-untyped-def]
        from rsd_trt.runtime.loop import Main

        values = chunk({"observation/image": observations[0].images[0, ::-1, ::-1]})[: config.dims.T]
        return Main(None, values.astype(np.float32)[None], np.ones(1, bool))

    loop, alive, routes = (
        Loop(config.dims, config.rsd, config.control.limits, "rsd", policy._forward.check, main),
        Chunk(),
        set(),
    )
    with plain_server(chunk) as url:
        with EdgePolicy(url, engines, known=known, record=tmp_path / "seen") as edge:
            for observation in scenes(observe, lenient, 60):
                [expected] = loop.query([observation], [alive])
                query = edge.query(observation)
                assert query.route == expected.route
                np.testing.assert_array_equal(query.actions, expected.actions)
                routes.add(query.route)
            with pytest.raises(UserError, match="cannot say what the draft reads"):
                edge._main.known = replace(known, rows=None)
                edge.prepare("another")
        with pytest.raises(UserError, match="needs the main model's tokens"):
            rule = structs.replace(config.rsd, rule="tokens")
            EdgePolicy(url, engines, known=replace(known, rsd=rule))
    assert {"start", "accepted", "rejected"} <= routes
    [episode] = Recordings(tmp_path / "seen").episodes
    assert len(episode) == 60  # what `distill` learns from
    with (
        plain_server(lambda request: "Traceback\nValueError: no") as url,
        EdgePolicy(url, mode="baseline") as edge,
        pytest.raises(UserError, match="the server says: ValueError: no"),
    ):
        edge.act(observation)
    with (
        plain_server(lambda request: np.full((8, 7), np.nan)) as url,
        EdgePolicy(url, mode="baseline") as edge,
        pytest.raises(PolicyFault),
    ):
        edge.act(observation)
    with (
        plain_server(lambda request: np.zeros((8, 6))) as url,
        EdgePolicy(url, mode="baseline") as edge,
        pytest.raises(UserError, match=r"answered with actions \[8, 6\]"),
    ):
        edge.act(observation)


@pytest.mark.slow
def test_a_draft_follows_somebody_elses_server(lenient: Bundle, observe: Observe, tmp_path: Path) -> None:
    """From what the server answered to a bundle, from there to an export, and with it the loop at the robot's side."""
    config = lenient.config
    known = Known(config.name, config.dims, config.rsd, config.control)
    chunk = np.zeros((10, 7))
    chunk[:, 0] = np.linspace(0, 0.5, 10)

    def run(*arguments: object) -> None:
        done = rsd_trt(*arguments)
        assert done.exit_code == 0, done.output

    with plain_server(lambda request: chunk) as url:
        with EdgePolicy(url, mode="baseline", known=known, record=tmp_path / "seen") as edge:
            for i in range(40):
                if i % 8 == 0:
                    edge.reset()
                edge.act(observe(config.control, i, "go"))
        out, engines = tmp_path / "theirs", tmp_path / "engines"
        run("distill", lenient.path, tmp_path / "seen", "-o", out, "--device", "cpu", "--steps", 4, "--batch", 8)
        run("export", out, "-o", engines, "--target", "onnx", "--component", "propose")
        made = Bundle.open(out)
        rows = Policy.load(lenient, device="cpu").instruction_rows
        known = replace(known, name=made.config.name, propose=made.component_fingerprint("propose"), rows=rows)
        with EdgePolicy(url, engines, known=known) as edge:
            queries = [edge.query(observe(config.control, i, "go")) for i in range(8)]
    assert [query.checked for query in queries] == [False] + 7 * [True]


def see(first: int, second: int = 0) -> Observation:
    images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    images[0, 0, 0], images[0, 0, 1] = first, second
    return Observation(images, np.zeros(8, np.float32), "go")


def with_draft(edge: EdgePolicy, stub: Stub) -> EdgePolicy:
    """The stub's draft in the place of an export."""
    edge._loop.mode, edge._draft = "rsd", lambda seen, rows: vars(stub.check([seen]))  # type: ignore[assignment]
    return edge


def test_an_accepted_chunk_goes_on_while_the_network_is_away() -> None:
    stub = Stub()
    with running(stub_service(stub)) as port:
        edge = with_draft(EdgePolicy(f"ws://127.0.0.1:{port}", mode="baseline", timeout_s=1), stub)
        assert edge.query(see(0)).route == "start"
    assert [edge.query(see(first)).route for first in (20, 40)] == ["accepted", "accepted"]
    with pytest.raises(Unreachable, match=rf"a full query is due, and ws://127.0.0.1:{port} "):
        edge.act(see(60, 255))
    assert edge.query(see(60)).route == "accepted"  # the chunk is as it was
    with pytest.raises(Unreachable):
        edge.act(see(80))  # nothing is left
    with running(stub_service(stub)) as other:
        edge._line.url = f"ws://127.0.0.1:{other}"
        assert edge.query(see(80)).route == "exhausted"
        edge.close()


def test_few_instructions_are_remembered() -> None:
    stub = Stub()
    with running(stub_service(stub)) as port, EdgePolicy(f"ws://127.0.0.1:{port}", mode="baseline") as edge:
        for i in [0, *range(INSTRUCTIONS + 1), INSTRUCTIONS]:
            with_draft(edge, stub).prepare(f"task {i}")
        assert edge._rows.cache_info()[:4] == (2, INSTRUCTIONS + 1, INSTRUCTIONS, INSTRUCTIONS)


def test_late_replies_are_dropped() -> None:
    """With what was not computed yet: the server owes a client one answer at the most."""
    stub = Stub()
    stub.batch = 1
    with running(stub_service(stub)) as port:
        edge = with_draft(EdgePolicy(f"ws://127.0.0.1:{port}", mode="baseline"), stub)
        edge.prepare("go")
        stub.hold.clear()
        edge._line.timeout_s = 0.1
        for first in (10, 20, 30):
            with pytest.raises(Unreachable, match="did not answer within"):
                edge.act(see(first))
            assert edge._line._socket is None
        stub.hold.set()
        edge._line.timeout_s = 5
        np.testing.assert_allclose(edge.act(see(50))[:, 0], [0.05, 0.06], atol=1e-6)
        edge.close()


def test_a_stalled_link_is_an_error_in_time() -> None:
    """A request is larger than what the system takes of it: nobody reads the rest."""
    go_on = threading.Event()

    def stalled(line: ServerConnection) -> None:
        line.send(pack({}))
        with line.protocol_mutex:
            go_on.wait(5)

    known = Known(request=lambda seen: {"frames": np.zeros(32 << 20, np.uint8)})
    with serve(stalled, "127.0.0.1", 0, max_size=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        with EdgePolicy(url, mode="baseline", known=known) as edge:
            edge._line.timeout_s, began = 0.3, time.monotonic()
            with pytest.raises(Unreachable, match=r"did not answer within 0\.3 s"):
                edge.act(see(0))
        assert time.monotonic() - began < 2
        go_on.set()
        server.shutdown()


def test_a_connection_that_the_server_ended_is_made_anew() -> None:
    with running(stub_service()) as port:
        edge = EdgePolicy(f"ws://127.0.0.1:{port}", mode="baseline")
        assert edge._line._socket is not None
    edge._line._socket.recv_events_thread.join(5)
    with running(stub_service()) as other, edge:
        edge._line.url = f"ws://127.0.0.1:{other}"
        edge.act(see(0))


@contextlib.contextmanager
def asking_ahead(stub: Stub, **options: object) -> Iterator[EdgePolicy]:
    with (
        running(stub_service(stub)) as port,
        EdgePolicy(f"ws://127.0.0.1:{port}", mode="baseline", ahead=2, **options) as edge,  # type: ignore[arg-type]
    ):
        yield with_draft(edge, stub)
        stub.hold.set()


def answered(edge: EdgePolicy) -> None:
    """Waits until the query under way is over."""
    asked = edge._ahead._asked
    assert asked is not None
    wait([asked.coming])  # type: ignore[list-item]


def under_way(edge: EdgePolicy, stub: Stub, observation: Observation) -> Query:
    """A query, when the server has its full query."""
    before, end = len(stub.full_queries), time.monotonic() + 5
    stub.hold.clear()
    query = edge.query(observation)
    while len(stub.full_queries) == before and time.monotonic() < end:
        time.sleep(0.005)
    assert query.route == "late"
    return query


def told(query: Query) -> tuple[str, int, list[int]]:
    """Its route, the steps that went by until it was there, and its actions, in thousandths."""
    return query.route, query.skipped, [round(1e3 * x) for x in query.actions[:, 0].tolist()]


def test_the_old_chunk_goes_on_while_a_full_query_is_under_way(tmp_path: Path) -> None:
    stub = Stub()
    with asking_ahead(stub, record=tmp_path) as edge:
        assert told(edge.query(see(0))) == ("start", 0, [0, 10])
        stub.hold.clear()
        frames = see(120, 255)
        assert told(edge.query(frames)) == ("late", 0, [20])  # rejected
        frames.images[:], frames.proprio[:] = 0, 1  # type: ignore[index]  # they are the caller's
        assert [told(edge.query(see(9))) for _ in range(3)] == [("late", 0, [x]) for x in (30, 40, 50)]
        stub.hold.set()
        answered(edge)
        assert told(edge.query(see(9))) == ("rejected", 4, [160])  # n = 2 of its steps went by
        assert len(stub.full_queries) == 2
        assert told(edge.query(see(170))) == ("accepted", 0, [170])
        stub.hold.clear()
        assert told(edge.query(see(180))) == ("late", 0, [180])  # the chunk's end is two steps away
        stub.hold.set()
        answered(edge)
        assert told(edge.query(see(9))) == ("exhausted", 1, [190])
        stub.hold.clear()
        edge.query(see(200, 255))
        edge.reset()
        threading.Timer(0.1, stub.hold.set).start()
        assert told(edge.query(see(50))) == ("start", 0, [50, 60])  # not what was asked before
    first = max(Recordings(tmp_path).episodes, key=len)
    kept = first.read("step", "committed", "actions", "chunk", "state")
    assert not kept["state"].any()
    np.testing.assert_array_equal(kept["step"], [0, 2, 7, 8, 10])  # when the frames were taken
    np.testing.assert_array_equal(kept["committed"], [2, 5, 1, 2, 1])
    np.testing.assert_allclose(kept["actions"][:7, 0] * 1e3, [0, 10, 20, 30, 40, 50, 160], atol=1e-4)
    np.testing.assert_allclose(kept["chunk"][:, 0, 0] * 1e3, [0, 120, np.nan, 180, np.nan], atol=1e-4)


def test_an_answer_that_does_not_come_is_an_error_of_the_next_query() -> None:
    stub = Stub()
    with asking_ahead(stub, timeout_s=0.3) as edge:
        edge.query(see(0))
        stub.hold.clear()
        assert told(edge.query(see(120, 255))) == ("late", 0, [20])
        answered(edge)
        with pytest.raises(Unreachable, match="did not answer within"):
            edge.act(see(120))
        assert told(edge.query(see(30))) == ("accepted", 0, [30, 40])  # the chunk is as it was
        assert [told(edge.query(see(50, 255)))[2] for _ in range(3)] == [[50], [60], [70]]
        with pytest.raises(Unreachable, match="did not answer within"):  # nothing is left: it waits
            edge.act(see(80))
        stub.hold.set()
        assert told(edge.query(see(80)))[0] == "exhausted"
        stub.hold.clear()
        assert told(edge.query(see(100, 255))) == ("late", 0, [100])
        threading.Timer(0.1, stub.hold.set).start()
        assert told(edge.query(replace(see(90), instruction="elsewhere"))) == ("instruction", 0, [90, 100])
        edge._line.timeout_s = 5
        query = under_way(edge, stub, replace(see(30, 255), instruction="elsewhere"))
        assert told(query) == ("late", 0, [110])
        began = time.monotonic()
        edge.close()  # does not wait for it
        assert time.monotonic() - began < 2
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("query")]


@pytest.mark.parametrize("instruction", ["go", "elsewhere"])
def test_a_query_that_is_dropped_takes_no_time_of_the_next(instruction: str) -> None:
    stub = Stub()
    with asking_ahead(stub) as edge:
        edge.query(see(0))
        under_way(edge, stub, see(120, 255))
        if instruction == "go":
            edge.reset()
        edge._line.timeout_s, began = 0.1, time.monotonic()
        with pytest.raises(Unreachable):
            edge.act(replace(see(0), instruction=instruction))
        assert time.monotonic() - began < 2


def test_what_cannot_be_recorded_is_logged_and_the_robot_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chunks = [np.zeros((6, 7)), np.zeros((8, 7))]
    known = Known(dims=STUB_DIMS, rsd=STUB_RSD, control=STUB_CONTROL)
    with plain_server(lambda request: chunks.pop()) as url:
        with EdgePolicy(url, mode="baseline", known=known, record=tmp_path) as edge:
            assert [len(edge.act(see(0))) for _ in range(2)] == [2, 2]
            tmp_path.joinpath("episodes").rename(tmp_path / "gone").with_name("episodes").touch()
        assert edge._line._socket is None
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
            "a query was not recorded",
            "an episode was not recorded",
        ]
        with (
            running(stub_service()) as port,
            pytest.raises(UserError, match=rf"\(server {url}\), not of stub \(server ws://127.0.0.1:{port}\)"),
        ):
            EdgePolicy(f"ws://127.0.0.1:{port}", mode="baseline", record=tmp_path)


def test_a_chunk_that_was_over_before_it_came_is_asked_anew() -> None:
    """Another server's may be shorter than what went by: of 8 steps, then of 2."""
    hold, chunks = threading.Event(), [np.zeros((2, 7)), np.ones((8, 7))]
    hold.set()

    def chunk(request: dict[str, object]) -> np.ndarray:
        hold.wait(5)
        return chunks.pop()

    known = Known(dims=STUB_DIMS, rsd=STUB_RSD, control=STUB_CONTROL)
    with plain_server(chunk) as url, EdgePolicy(url, mode="baseline", known=known, ahead=2) as edge:
        edge.query(see(0))
        hold.clear()
        assert [edge.query(see(0)).route for _ in range(5)] == ["late"] * 5
        chunks.insert(0, np.full((8, 7), 0.5))
        hold.set()
        answered(edge)
        query = edge.query(see(0))
        assert (query.route, query.skipped, query.actions[0, 0]) == ("full", 0, 0.5)


@pytest.mark.parametrize(("name", "here"), [("fingerprint", "stub"), ("frames", "rendered")])
def test_another_policy_behind_the_same_address_is_refused(name: str, here: str) -> None:
    with running(stub_service()) as port, EdgePolicy(f"ws://127.0.0.1:{port}", mode="baseline") as edge:
        edge.act(see(0))
        edge._line.close()
        edge._line.metadata[name] = "another"
        with pytest.raises(UserError, match=f"serves {name} '{here}', and served 'another' before"):
            edge.act(see(0))


def test_why_a_server_refuses_is_told() -> None:
    with (
        running(stub_service(api_key="k")) as port,
        pytest.raises(Unreachable, match="HTTP 401: the header Authorization: Api-Key KEY is missing or wrong"),
    ):
        EdgePolicy(f"ws://127.0.0.1:{port}", mode="baseline")


def test_a_client_that_does_not_fit_holds_no_place() -> None:
    with running(service := stub_service()) as port:
        with pytest.raises(UserError, match="ahead is 7, and a full query leaves 6 steps"):
            EdgePolicy(f"ws://127.0.0.1:{port}", mode="baseline", ahead=7)
        end = time.monotonic() + 2
        while len(service.sessions) and time.monotonic() < end:
            time.sleep(0.01)
        assert not len(service.sessions)


def test_the_alarm_has_a_hook() -> None:
    """It counts a check when it is made, whether or not the full query is answered."""
    stub, told = Stub(), []
    with running(stub_service(stub)) as port:
        url = f"ws://127.0.0.1:{port}"
        edge = EdgePolicy(url, mode="baseline", expected_rejections=0.05, on_alarm=told.append)
        with_draft(edge, stub).act(see(0))
        for _ in range(8):
            edge.act(see(0, 255))
        assert set(told) == {1.0}
        edge.reset()
        edge.act(see(0))
    told.clear()
    for _ in range(8):
        with pytest.raises(Unreachable):
            edge.act(see(0, 255))
    edge.close()
    assert set(told) == {1.0}


def test_a_draft_that_is_not_the_servers_is_refused(lenient: Bundle, engines: Path, bundle: Bundle) -> None:
    with running(bundle_service(bundle)) as port:
        with pytest.raises(UserError, match=r"was built from weights .* Make it anew"):
            EdgePolicy(f"ws://127.0.0.1:{port}", engines)
        with pytest.raises(UserError, match="has no exports"):
            EdgePolicy(f"ws://127.0.0.1:{port}", "nothing")
    with pytest.raises(Unreachable, match="cannot be reached"):
        EdgePolicy(f"ws://127.0.0.1:{port}", engines)
