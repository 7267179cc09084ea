"""A server of one's own: the port it gets, and what happens when somebody else has it."""

from __future__ import annotations

import socket
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
