"""A server of one's own: the port it gets, and what happens when somebody else has it."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from sts_sglang.tools import local_server
from sts_sglang.tools.local_server import LocalServer

# Serves what LocalServer asks for, and binds its port as uvicorn does.
FAKE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"here")
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

# Does not end when it is asked to.
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def fake(tmp_path):
    """fake() -> LocalServer of the module above."""
    (tmp_path / "fake_of_sts.py").write_text(FAKE)

    def start(**more) -> LocalServer:
        env = {"PYTHONPATH": str(tmp_path)}
        return LocalServer(
            Path("m"), tmp_path / "log", module="fake_of_sts", env=env, start_seconds=30, **more
        )

    return start


def taken(port: int = 0) -> tuple[socket.socket, int]:
    """Bound without SO_REUSEADDR: nobody else gets it, and connections to it are refused at once."""
    other = socket.socket()
    other.bind(("127.0.0.1", port))
    return other, other.getsockname()[1]


def test_a_server_gets_its_port_though_it_binds_it_late(fake):
    with fake() as server:
        assert server.get("/x") == b"here" and str(server.port) in server.command
        assert server.shown_command().startswith("python")


def test_a_port_that_somebody_took_meanwhile_is_given_up_for_another(fake, monkeypatch, tmp_path):
    hold, others = local_server._hold_port, []

    def taken_once():
        held, port = hold()
        if not others:
            held.close()
            others.append(taken(port))
        return held, port

    monkeypatch.setattr(local_server, "_hold_port", taken_once)
    with fake() as server:
        assert server.get("/x") == b"here" and server.port != others[0][1]
        assert str(server.port) in server.command
        assert "already in use" not in (tmp_path / "log").read_text()
    others[0][0].close()


def test_a_port_is_not_tried_for_ever_and_other_ends_not_again(fake, monkeypatch, tmp_path):
    started = []
    other, port = taken()
    monkeypatch.setattr(local_server, "_hold_port", lambda: started.append(1) or (socket.socket(), port))
    with other, pytest.raises(RuntimeError, match="already in use"):
        fake().__enter__()
    assert len(started) == local_server.ATTEMPTS
    started.clear()
    (tmp_path / "fake_of_sts.py").write_text("raise SystemExit('no such model')")
    with pytest.raises(RuntimeError, match="no such model"):
        fake().__enter__()
    assert len(started) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_of_a_start_that_is_interrupted(fake, monkeypatch, tmp_path, error):
    (tmp_path / "fake_of_sts.py").write_text("import time\ntime.sleep(600)")

    def interrupted(*_, **__):
        raise error

    monkeypatch.setattr(LocalServer, "get", interrupted)
    server = fake()
    with pytest.raises(error), server:
        pytest.fail("entered")
    assert_gone(server.pid)


def test_a_second_interruption_ends_the_server_at_once(fake, monkeypatch, tmp_path):
    (tmp_path / "fake_of_sts.py").write_text(STUBBORN)
    server = fake()
    while "ready" not in server.log.read_text():
        time.sleep(0.02)
    monkeypatch.setattr(server._process, "wait", interrupted_once(server._process.wait))
    with pytest.raises(KeyboardInterrupt):
        server.stop()
    assert_gone(server.pid)


def interrupted_once(wait):
    def waited(timeout=None):
        if timeout is not None:
            raise KeyboardInterrupt
        return wait()

    return waited


def assert_gone(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def test_nobody_who_asks_for_any_port_gets_one_that_is_held():
    held, port = local_server._hold_port()
    others = [socket.socket() for _ in range(200)]
    try:
        for other in others:
            other.bind(("127.0.0.1", 0))
        assert port not in [other.getsockname()[1] for other in others]
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen()
    finally:
        for one in (held, *others):
            one.close()
