"""Run by another Python, in the environment of an unmodified client: python foreign_clients.py openpi|act PORT.

Reads observations from stdin and writes actions to stdout, each as an npz behind its length. An observation of no
arrays is a new episode, for which the client connects anew.
"""

import io
import struct
import sys
import urllib.request

import numpy as np


def read():
    (size,) = struct.unpack("<q", sys.stdin.buffer.read(8))
    return {key: value for key, value in np.load(io.BytesIO(sys.stdin.buffer.read(size))).items()}


def write(actions):
    stream = io.BytesIO()
    np.savez(stream, actions=actions)
    sys.stdout.buffer.write(struct.pack("<q", len(stream.getvalue())) + stream.getvalue())
    sys.stdout.buffer.flush()


def openpi(port):
    from openpi_client.action_chunk_broker import ActionChunkBroker
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    def connected():
        client = WebsocketClientPolicy("127.0.0.1", port)
        horizon = client.get_server_metadata()["n_action_steps"]
        return ActionChunkBroker(client, horizon), horizon

    broker = None
    while True:
        seen = read()
        if not seen:
            broker, horizon = connected()
            continue
        seen["prompt"] = str(seen["prompt"])
        write(np.stack([broker.infer(seen)["actions"] for _ in range(horizon)]))


def act(port):
    import json_numpy

    while True:
        seen = read()
        if seen:
            body = {"full_image": seen["observation/image"], "wrist_image": seen["observation/wrist_image"]}
            body = dict(body, state=seen["observation/state"], instruction=str(seen["prompt"]))
            request = urllib.request.Request(f"http://127.0.0.1:{port}/act", json_numpy.dumps(body).encode())
            actions = np.stack(json_numpy.loads(urllib.request.urlopen(request).read().decode()))
            actions[:, 6] = -np.sign(2 * actions[:, 6] - 1)  # as OpenVLA-OFT's client does
            write(actions)


{"openpi": openpi, "act": act}[sys.argv[1]](int(sys.argv[2]))
