"""The server: what it answers is what the policy would, whoever else asks, and whatever else is sent."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from serving import (
    SIDE,
    STUB_CONTROL,
    STUB_DIMS,
    Client,
    Stub,
    as_request,
    bundle_service,
    first,
    request,
    running,
    stub_service,
    wait_until,
)
from test_serve_hostile import UPGRADE
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from rsd_trt.bundle import Bundle
from rsd_trt.recorder import Recorder
from rsd_trt.recordings import Facts, Recordings
from rsd_trt.runtime.chunk import Chunk
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.preprocess import resize
from rsd_trt.runtime.serve.arrays import BadMessage, arrays, pack, parse, to_json, unpack
from rsd_trt.runtime.serve.protocols import Frames
from rsd_trt.runtime.serve.server import Websocket
from rsd_trt.runtime.serve.service import ServeOptions
from rsd_trt.runtime.serve.sessions import Alarm
from rsd_trt.runtime.serve.worker import Job, Worker

Observe = Callable[..., Observation]


def post(port: int, body: bytes) -> tuple[int, bytes]:
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/act", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_served_is_in_process(lenient: Bundle, scene: Observe) -> None:
    """Bit for bit, over 500 steps, with two clients in turns."""
    policy = Policy.load(lenient, device="cpu")
    control, n = lenient.config.control, lenient.config.rsd.n_action_steps
    chunks = [Chunk(fixed=n), Chunk(fixed=n)]
    steps, outcomes = [0, 0], set()
    with running(bundle_service(lenient)) as port:
        clients = [Client(port), Client(port)]
        assert clients[0].metadata["n_action_steps"] == n  # type: ignore[index]
        while min(steps) < 250:
            who = steps[0] > steps[1]
            seed = steps[who] // 9 * 2 + who  # a scene stays for some queries
            observation = scene(control, seed, f"task {seed % 3}")
            reply = clients[who].infer(as_request(observation, control))
            [expected] = policy.answer([observation], [chunks[who]])
            np.testing.assert_array_equal(reply["actions"], expected.actions)  # type: ignore[arg-type]
            assert (reply["outcome"], reply["prefix"]) == (expected.route, expected.prefix)
            assert len(expected.actions) == n
            steps[who] += n
            outcomes.add(expected.route)
    assert {"accepted", "rejected", "start", "exhausted"} <= outcomes


def test_vla_eval_gets_one_action_at_a_time(lenient: Bundle, scene: Observe) -> None:
    """The loop with the bundle's own numbers of steps: what `Policy.act` commits."""
    policy = Policy.load(lenient, device="cpu")
    control = lenient.config.control
    with running(bundle_service(lenient)) as port, connect(f"ws://127.0.0.1:{port}/vla-eval") as line:

        def say(kind: str, payload: object, seq: int) -> None:
            line.send(pack({"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0}, keys=str))

        def hear() -> dict[str, object]:
            return arrays(unpack(line.recv(20)))  # type: ignore[arg-type, return-value]

        say("hello", {"harness_version": "0.8.0", "protocol_version": 1}, 1)
        hello = hear()
        assert (hello["type"], hello["seq"]) == ("hello", 1)
        assert hello["payload"]["observation_params"]["send_wrist_image"] is True  # type: ignore[index]
        say("episode_start", {"task": {"name": "x"}}, 2)
        policy.reset(0)
        expected: list[np.ndarray] = []
        task = "a task"
        for step in range(40):
            changes = step > 20 and bool(expected) and task == "a task"  # while actions of the old task wait
            task = "another task" if changes else task
            observation = scene(control, step // 9, task)
            if not expected or changes:
                expected = list(policy.act(observation))
            frames = as_request(observation, control)
            images = {"agentview": png(frames["observation/image"]), "wrist": png(frames["observation/wrist_image"])}
            payload = {"images": images, "states": observation.proprio, "task_description": observation.instruction}
            if changes:
                for wrong, told in (
                    ({"task_description": None}, "the instruction is None"),
                    ({"images": {}}, "missing"),
                ):
                    say("observation", payload | wrong, 99)
                    error = hear()
                    assert (error["type"], error["seq"]) == ("error", 99)
                    assert told in error["payload"]["error"]  # type: ignore[index]
            say("observation", payload, step + 3)
            answer = hear()
            assert (answer["type"], answer["seq"]) == ("action", step + 3), answer
            np.testing.assert_array_equal(answer["payload"]["actions"], expected.pop(0))  # type: ignore[index]
        assert task == "another task"


def png(image: object) -> dict[str, object]:
    assert isinstance(image, np.ndarray)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return {"__image__": True, "format": "png", "data": stream.getvalue(), "shape": list(image.shape)}


def test_act_is_open_loop_without_a_session(lenient: Bundle, scene: Observe) -> None:
    policy = Policy.load(lenient, mode="baseline", device="cpu")
    control = lenient.config.control
    observation = scene(control, 5)
    frames = as_request(observation, control)
    body = {
        "full_image": frames["observation/image"],
        "wrist_image": frames["observation/wrist_image"],
        "state": observation.proprio,
        "instruction": observation.instruction,
    }
    policy.reset(0)
    expected = policy.act(observation)
    expected[:, 6] = (1 - expected[:, 6]) / 2
    with running(bundle_service(lenient)) as port:
        for _ in range(2):
            status, answer = post(port, to_json(body))
            assert status == 200
            np.testing.assert_array_equal(arrays(parse(answer)), expected)  # a list of arrays [7]
        encoded = post(port, json.dumps({"encoded": to_json(body).decode()}).encode())[1]
        np.testing.assert_array_equal(arrays(parse(json.loads(encoded))), expected)
        one = {"image": body["full_image"], **{key: body[key] for key in ("wrist_image", "state", "instruction")}}
        np.testing.assert_array_equal(arrays(parse(post(port, to_json(one))[1])), expected[0])
        status, answer = post(port, to_json({"image": body["full_image"], "instruction": "x"}))
        assert status == 400
        assert json.loads(answer).startswith("error: wrist_image is missing")


def test_what_act_clips_is_counted() -> None:
    service = stub_service()
    body = {"image": request(200)["observation/image"], "wrist_image": request()["observation/wrist_image"]}
    body |= {"state": np.zeros(8), "instruction": "go"}
    service._high[0] = 0.205
    with running(service) as port:
        status, answer = post(port, to_json(body | {"full_image": body["image"]}))
    assert (status, [round(float(x[0]), 3) for x in arrays(parse(answer))]) == (200, [0.2, 0.205])  # type: ignore[attr-defined]
    assert "rsd_clipped_actions_total 1.0" in service.metrics.page().decode()


def test_a_client_says_what_was_executed() -> None:
    with running(stub_service(n=3)) as port:
        client = Client(port)
        assert first(client.infer(request())) == [0.0, 0.01, 0.02]
        assert first(client.infer(request(20, executed=2))) == [0.02, 0.03, 0.04]  # agrees from the second step on
        assert first(client.infer(request(50, executed=3))) == [0.05, 0.06, 0.07]
        fresh = client.infer(request(executed=0))
        assert (fresh["outcome"], first(fresh)) == ("rejected", [0.0, 0.01, 0.02])
        assert client.infer(request(executed=0))["outcome"] == "start"  # nothing of the chunk was executed
        assert client.send(request(executed=4)) == "executed is 4, and the last reply had 3 actions"
        assert "executed is True" in client.send(request(executed=True))


def test_replies_hold_n_actions_whatever_is_left() -> None:
    with running(stub_service(n=3)) as port:
        client = Client(port)
        replies = [client.infer(request(step % 90)) for step in (0, 30, 60, 90)]
        assert [reply["outcome"] for reply in replies] == ["start", "accepted", "exhausted", "rejected"]
        assert {len(first(reply)) for reply in replies} == {3}


def test_a_new_episode() -> None:
    with running(stub_service()) as port:
        client = Client(port)

        def outcome(**more: object) -> object:
            return client.infer(request(**more))["outcome"]  # type: ignore[arg-type]

        assert outcome() == "start"
        assert outcome(prompt="stop") == "instruction"
        assert client.infer({"endpoint": "reset"})["status"] == "reset successful"
        assert outcome(prompt="stop") == "start"
        near, far = request(20, prompt="stop"), request(40, prompt="stop")
        near["observation/state"] = np.array([0.08, 0, 0, 0, 0, 0, 0, 0])
        assert client.infer(near)["outcome"] == "accepted"
        far["observation/state"] = np.array([0.2, 0, 0, 0, 0, 0, 0, 0])  # 12 cm in 2 steps
        assert client.infer(far)["outcome"] == "start"
        assert client.infer(far | {"session_id": "b"})["outcome"] == "start"
        assert Client(port).infer(far)["outcome"] == "start"


def test_sessions_are_limited_and_end_with_their_connection(tmp_path: Path) -> None:
    service = stub_service(sessions=2)
    service.recorder = Recorder(tmp_path, Facts("stub", "0" * 64, STUB_CONTROL.cameras, SIDE, STUB_DIMS.T))
    with running(service) as port:
        one, two = Client(port), Client(port)
        with pytest.raises(InvalidStatus) as refused:
            Client(port)
        assert refused.value.response.status_code == 503
        assert b"2 sessions are open" in refused.value.response.body
        assert one.infer(request(session_id="a"))["outcome"] == "start"
        assert one.infer(request(20, session_id="a"))["outcome"] == "accepted"
        assert one.infer(request(session_id="b"))["outcome"] == "start"  # in the place of a
        assert one.infer(request(session_id="a"))["outcome"] == "start"
        two.close()
        wait_until(lambda: len(service.sessions) == 1)
        three = Client(port)
        assert three.infer(request(session_id="x"))["outcome"] == "start"
        assert three.infer(request(session_id="x") | {"observation/state": np.ones(8)})["outcome"] == "start"  # a jump
        assert three.infer(request(session_id="x", prompt="stop") | {"observation/state": np.ones(8)})["late"] is False
        one.close()
        three.close()
        wait_until(lambda: len(service.sessions) == 0)
    episodes = Recordings(tmp_path).episodes
    assert sorted(map(len, episodes)) == [1, 1, 1, 1, 1, 2]
    assert {x.facts.instructions: x.read("step")["step"].tolist() for x in episodes}[("stop",)] == [0]


def test_many_clients_share_forwards_and_keep_their_chunks() -> None:
    stub = Stub()
    service = stub_service(stub, sessions=8)
    with running(service) as port:
        clients = [Client(port) for _ in range(4)]
        clients[0].infer(request())  # the instruction is warm
        stub.hold.clear()
        answers: dict[int, dict[str, object]] = {}
        threads = [
            threading.Thread(target=lambda i=i: answers.update({i: clients[i].infer(request(10 * i, 255))}))  # type: ignore[misc]
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: service.worker.working == 4)
        stub.hold.set()
        for thread in threads:
            thread.join(20)
        assert max(stub.full_queries) >= 2  # those that waited shared one
        for i, answer in answers.items():
            assert first(answer) == [0.01 * i, 0.01 * i + 0.01]
        for i, client in enumerate(clients):
            assert first(client.infer(request(10 * i + 20))) == [round(0.01 * i + 0.02, 4), round(0.01 * i + 0.03, 4)]


def test_deadlines() -> None:
    stub = Stub("baseline")
    service = stub_service(stub, n=3, mode="baseline", deadline_ms=80)
    with running(service) as port:
        client = Client(port)
        assert first(client.infer(request())) == [0.0, 0.01, 0.02]
        stub.hold.clear()
        late = client.infer(request(250))
        assert (late["late"], late["outcome"]) == (True, "late")
        assert first(late) == [0.03, 0.04, 0.05]  # the next of the old chunk
        nothing = client.send(request(250))
        assert isinstance(nothing, str)
        assert "took longer than 80 ms" in nothing
        assert "nothing is left" in nothing
        assert Client(port).send(request(endpoint="full"))["type"] == "error"  # type: ignore[index]
        stub.hold.set()
        time.sleep(0.1)
        assert first(client.infer(request(100))) == [0.1, 0.11, 0.12]  # of its own frame, not of a late answer
    page = service.metrics.page().decode()
    for line in ("rsd_late_total 3.0", 'rsd_queries_total{outcome="late"} 1.0', 'rsd_errors_total{kind="late"} 2.0'):
        assert line in page


def test_after_a_rejected_check_a_late_answer_is_an_error() -> None:
    stub = Stub()
    with running(stub_service(stub, deadline_ms=80)) as port:
        client = Client(port)
        client.infer(request())
        stub.hold.clear()
        told = client.send(request(250, 255))
        assert isinstance(told, str)
        assert "a check had to be made" in told
        stub.hold.set()
        assert client.infer(request(20))["outcome"] == "accepted"  # the old chunk is as it was


def test_the_main_head_alone_closes_the_gripper() -> None:
    """What is left of a chunk never does: neither in a check's place nor in that of a late answer."""
    stub = Stub(closes=3)
    with running(stub_service(stub, deadline_ms=80)) as port:
        client = Client(port)
        client.infer(request())
        stub.hold.clear()
        assert "the gripper would switch" in str(client.send(request(250)))
        stub.hold.set()
        asked = client.infer(request(20))
        assert (asked["outcome"], asked["rejected_share"]) == ("gripper", None)


def test_the_alarm_compares_with_what_was_expected() -> None:
    alarm = Alarm(expected=0.3)
    for _ in range(20):
        alarm.recent.append(False)
    assert (alarm.share, alarm.raised) == (0.0, False)
    for rejected in range(20):
        alarm.recent.append(True)
        assert alarm.raised == (rejected + 1 >= 14)  # 14 of 20 come by chance in 0.03% of windows at 0.3
    assert not Alarm(None, alarm.recent).raised
    with running(stub_service(expected_rejections=0.05)) as port:
        client = Client(port)
        client.infer(request())
        replies = [client.infer(request(0, 255)) for _ in range(8)]
        assert (replies[0]["alarm"], replies[-1]["alarm"], replies[-1]["rejected_share"]) == (False, True, 1.0)
        another = client.infer(request(prompt="stop"))  # an episode of its own
        assert (another["outcome"], another["alarm"], another["rejected_share"]) == ("instruction", False, None)


def test_a_new_instruction_is_warmed_up_once() -> None:
    stub = Stub()
    with running(stub_service(stub, instructions=("known",))) as port:
        assert stub.warmed == ["known"]
        client = Client(port)
        for prompt in ("known", "new", "known", "new"):
            client.infer(request(prompt=prompt))
        assert stub.warmed == ["known", "new"]


def busy(port: int, count: int, seconds: float) -> list[float]:
    """How long each reply took that `count` robots got who ask without a pause."""
    took: list[float] = []
    end = time.monotonic() + seconds

    def ask() -> None:
        client = Client(port)
        while (started := time.monotonic()) < end:
            client.send(request())
            took.append(time.monotonic() - started)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took


def test_a_new_instruction_is_warmed_up_whatever_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsd_trt.runtime.serve.worker.MOST_WAITING", 0.3)
    stub = Stub("baseline", seconds=0.02)
    stub.batch = 1
    with running(stub_service(stub, mode="baseline", deadline_ms=100, instructions=("go",))) as port:
        robots = threading.Thread(target=busy, args=(port, 3, 1.0))
        robots.start()
        time.sleep(0.1)
        assert "took longer than 100 ms" in str(Client(port).send(request(prompt="new")))
        robots.join()
        assert stub.warmed == ["go", "new"]


def test_robots_that_are_warm_wait_for_one_new_instruction_at_a_time() -> None:
    """However late those are: whatever came in meanwhile is answered before the next."""
    stub = Stub("baseline")
    order: list[str] = []
    answered = threading.Event()

    def ask(instruction: str, arrived: float) -> None:
        def done(answer: object) -> None:
            order.append(instruction)
            if len(order) == 10:
                answered.set()

        seen = stub_service().interface.openpi(request(prompt=instruction))
        worker._incoming.put(Job("loop", instruction, seen, Chunk(), arrived=arrived, done=done))

    def warm_up(instruction: str) -> None:
        order.append(f"warm up {instruction}")
        ask("go", time.perf_counter())

    worker = Worker(lambda: stub)
    worker.prepare(stub, "go")
    stub.warm_up = warm_up  # type: ignore[method-assign]
    for instruction in ("go", "a", "b", "c"):
        ask(instruction, 0.0)
    worker.start()
    assert answered.wait(10)
    assert worker.stop()
    assert order == ["warm up a", "go", "a", "go", "warm up b", "b", "go", "warm up c", "c", "go"]


def test_faults_and_bugs_are_told_without_a_traceback(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = stub_service()
    with running(service) as port:
        client = Client(port)
        assert "not finite" in client.send(request(prompt="nan"))
        told = client.send(request(prompt="break"))
        assert told == "the policy broke on this query: RuntimeError: secret of the server"
        assert "Traceback" in caplog.text  # in the log
        assert client.infer(request())["outcome"] == "start"
        asked = client.infer(request(prompt="nan", endpoint="full"))
        assert (asked["type"], "not finite" in str(asked["message"])) == ("error", True)
        monkeypatch.setattr("rsd_trt.runtime.serve.server.act", None)  # a bug of the server
        assert post(port, b"{}") == (500, b"the server broke on this request\n")
        status, metrics = get(port, "/metrics")
    assert status == 200
    for line in ('rsd_errors_total{kind="fault"} 2.0', 'rsd_errors_total{kind="broken"} 2.0', "rsd_sessions 1.0"):
        assert line in metrics


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"observation/image": None}, "observation/image is missing"),
        ({"observation/image": np.zeros((SIDE, SIDE), np.uint8)}, "not a frame [height, width, 3]"),
        ({"observation/image": np.zeros((SIDE + 1, SIDE, 3), np.uint8)}, "start the server with --resize"),
        ({"observation/image": np.zeros((0, 0, 3), np.uint8)}, "pixels a side"),
        ({"observation/image": np.full((SIDE, SIDE, 3), 7.0)}, "floats outside of 0..1"),
        ({"observation/image": np.full((SIDE, SIDE, 3), np.nan)}, "floats outside of 0..1"),
        ({"observation/image": np.zeros((SIDE, SIDE, 3), np.int64)}, "not uint8"),
        ({"observation/state": np.zeros(7)}, "the policy takes 8 numbers"),
        ({"observation/state": np.full(8, np.inf)}, "not finite"),
        ({"observation/state": ["a"] * 8}, "the policy takes 8 numbers"),
        ({"observation/state": [[1.0] * 7, [1.0]]}, "the policy takes 8 numbers"),
        ({"prompt": 3}, "the instruction is 3"),
        ({"prompt": ""}, "the instruction is ''"),
        ({"prompt": "x" * 2000}, "1..1000 characters"),
        ({"endpoint": "shutdown"}, "the endpoint 'shutdown' is unknown"),
        ({"session_id": 3}, "session_id is 3"),
    ],
)
def test_what_an_observation_must_be(change: dict[str, object], told: str) -> None:
    service = stub_service()
    service.worker.ready.set()
    from rsd_trt.errors import UserError
    from rsd_trt.runtime.serve.protocols import Openpi

    class Socket:
        pass

    service.sessions.connect(socket := Socket())
    with pytest.raises(UserError) as refused:
        asyncio.run(Openpi(service, socket)._answer(request() | change))  # type: ignore[arg-type]
    assert told in str(refused.value)


def test_frames_are_taken_in_every_usual_form() -> None:
    from rsd_trt.runtime.serve.interface import Interface

    interface = stub_service().interface
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    base = request()

    def seen(interface: Interface, frame: np.ndarray) -> np.ndarray:
        return interface.openpi(base | {"observation/image": frame}).images[0]

    np.testing.assert_array_equal(seen(interface, image), image)
    np.testing.assert_array_equal(seen(interface, image.transpose(2, 0, 1)), image)
    np.testing.assert_array_equal(seen(interface, image[::-1][::-1]), image)
    np.testing.assert_array_equal(seen(interface, image / np.float32(255) + np.float32(1e-4)), image)
    from dataclasses import replace

    upright = replace(interface, frames="upright")
    np.testing.assert_array_equal(seen(upright, image), image[::-1, ::-1])
    large = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.NEAREST))
    fitted = seen(replace(interface, resize=True), large)
    expected = resize(torch.from_numpy(large.copy()).permute(2, 0, 1)[None].float(), SIDE)[0].permute(1, 2, 0)
    np.testing.assert_array_equal(fitted, expected)


def test_no_more_posts_than_sessions_are_under_way() -> None:
    """Each holds the memory of its body, for as long as that may take."""
    service = stub_service(sessions=1)
    with running(service) as port, socket.create_connection(("127.0.0.1", port), 5) as slow:
        slow.sendall(b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{")
        wait_until(service.posts.locked)
        status, told = post(port, b"{}")
        assert (status, json.loads(told)[:39]) == (503, "error: 1 requests to /act are under way")
        slow.sendall(b"}")
        assert slow.recv(100).startswith(b"HTTP/1.1 400")
        assert post(port, b"{}")[0] == 400


def test_keys_and_web_pages() -> None:
    with running(stub_service(api_key="secret")) as port:
        for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Origin": "https://example.com"}):
            with pytest.raises(InvalidStatus) as refused:
                Client(port, headers=headers)
            assert refused.value.response.status_code in (401, 403)
        assert Client(port, headers={"Authorization": "Api-Key secret"}).infer(request())["outcome"] == "start"
        assert get(port, "/healthz") == (200, "OK\n")
        assert get(port, "/metrics")[0] == post(port, b"{}")[0] == 401


def test_ready_is_not_alive(tmp_path: Path) -> None:
    service = stub_service()
    gate, policy = threading.Event(), Stub()

    def load() -> Stub:
        gate.wait(20)
        return policy

    service.load = load
    thread = threading.Timer(0.5, gate.set)
    listening_seen: list[tuple[int, int]] = []

    def look(port: int) -> None:
        wait_until(lambda: get(port, "/healthz")[0] == 200)
        listening_seen.append((get(port, "/readyz")[0], get(port, "/health")[0]))
        with pytest.raises(InvalidStatus):
            Client(port)
        thread.start()

    from rsd_trt.runtime.serve import server

    original = server.listen

    def listen(options: ServeOptions):  # type: ignore[no-untyped-def]
        listening = original(options)
        threading.Thread(target=look, args=(listening.getsockname()[1],), daemon=True).start()
        return listening

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rsd_trt.runtime.serve.server.listen", listen)
        with running(service) as port:
            assert listening_seen == [(503, 503)]
            assert (get(port, "/readyz")[0], get(port, "/health")) == (200, (200, '{"status":"ok"}'))


def test_idle_connections_are_closed() -> None:
    with running(stub_service(idle_s=0.2)) as port:
        client = Client(port)
        with pytest.raises(ConnectionClosed) as closed:
            client.socket.recv(10)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1000, "idle")


def test_uvloop_reads_into_the_servers_memory() -> None:
    pytest.importorskip("uvloop")
    received = Websocket.buffer_updated
    with (
        running(stub_service()) as port,
        mock.patch.object(Websocket, "buffer_updated", autospec=True, side_effect=received) as read,
    ):
        assert Client(port).infer(request())["outcome"] == "start"
        assert read.called


def test_too_large_messages_are_refused() -> None:
    with running(stub_service(max_message=4096)) as port:
        client = Client(port)
        with pytest.raises(ConnectionClosed) as closed:
            client.send(b"\xc4" + bytes(5000))
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
        assert b"larger than 4096 bytes" in post(port, b" " * 5000)[1]
        assert Client(port).infer(request())["outcome"] == "start"


def test_whoever_sends_no_messages_or_does_not_wait_for_replies_is_cut_off() -> None:
    with running(stub_service()) as port:
        client = Client(port)
        for count in (99, 100):  # in a row
            client.infer(request())
            for _ in range(count):
                assert "no msgpack message" in str(client.send(b""))
        with pytest.raises(ConnectionClosed) as closed:
            client.socket.recv(10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
        reset = pack({"endpoint": "reset"})
        with socket.create_connection(("127.0.0.1", port), 5) as raw, contextlib.suppress(ConnectionError):
            raw.sendall(UPGRADE.format(path="/").encode())
            raw.recv(1 << 16)
            raw.sendall((b"\x82" + bytes([0x80 | len(reset)]) + bytes(4) + reset) * 10_000)
            while raw.recv(1 << 16):
                pass


def test_others_have_their_turn_between_frames_that_wait_already() -> None:
    class Endless:
        async def receive(self) -> dict[str, object]:
            return {"type": "websocket.receive", "bytes": b"x"}

    async def turns() -> int:
        count = 0

        async def other() -> None:
            nonlocal count
            while True:
                count += 1
                await asyncio.sleep(0)

        task, frames = asyncio.create_task(other()), 0
        async for _ in Frames(Endless(), 60):  # type: ignore[arg-type]
            frames += 1
            if frames == 10:
                break
        task.cancel()
        return count

    assert asyncio.run(turns()) >= 9


def test_a_thousand_connections_leave_nothing_behind() -> None:
    service = stub_service(sessions=64)
    with running(service) as port:
        for i in range(1000):
            client = Client(port)
            if i % 10 == 0:
                client.infer(request())
            if i % 3 == 0:
                client.socket.socket.shutdown(socket.SHUT_RDWR)  # without a word
            client.close()
        wait_until(lambda: len(service.sessions) == 0)
        assert threading.active_count() < 40
        assert Client(port).infer(request())["outcome"] == "start"


def test_base64_is_what_json_numpy_writes() -> None:
    value = np.arange(6, dtype=np.float64).reshape(2, 3)
    text = json.dumps({"__numpy__": base64.b64encode(value.tobytes()).decode(), "dtype": "<f8", "shape": [2, 3]})
    np.testing.assert_array_equal(arrays(parse(text)), value)
    assert json.loads(to_json(value)) == json.loads(text)


def test_what_unfolds_is_refused_before_it_does() -> None:
    """Few bytes that would become many items or pixels; each part of them alone is read."""
    lists: list[object] = [[]] * 1000
    assert unpack(pack([lists, lists])) == parse(to_json([lists, lists])) == [lists, lists]
    for read, data in ((unpack, pack([lists] * 3)), (parse, to_json([lists] * 3))):
        with pytest.raises(BadMessage, match="more than 4096 items"):
            read(data)
    image = png(np.zeros((1100, 4096), np.uint8))
    assert arrays([image])[0].shape == (1100, 4096)  # type: ignore[index]
    with pytest.raises(BadMessage, match="more than 8388608 pixels together"):
        arrays({"a": [image], "b": {"c": image}})


def test_no_bytes_are_an_array_of_a_size_that_can_be_counted() -> None:
    with pytest.raises(BadMessage, match="the shape"):
        arrays({"__ndarray__": True, "data": b"", "dtype": "|u1", "shape": [0, 1 << 31, 1 << 31, 1 << 31]})
