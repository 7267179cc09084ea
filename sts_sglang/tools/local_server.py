"""A server of one's own on this machine: start, wait until healthy, ask, stop (demo, tests, benchmarks)."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

ATTEMPTS = 3  # at a port that somebody else takes meanwhile


def stop_when_terminated() -> None:
    """On SIGTERM as on Ctrl-C: who has a server in a `with` block stops it, and it holds no device memory."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


class LocalServer:
    """`with LocalServer(model, log, *args) as server:` listens on 127.0.0.1 and a free port.

    Args:
        model: folder or hub name of the target model.
        log: file that takes the server's output.
        args: further command line arguments of `sglang.launch_server`.
        env: variables on top of this process's environment.
        start_seconds: how long to wait for /health.
        module: what `python -m` runs: SGLang's launcher or one of its kind.

    Raises:
        RuntimeError: on entering, when it ends or is not healthy in time; with the end of its log.
    """

    def __init__(
        self,
        model: Path | str,
        log: Path,
        *args: str,
        env: dict[str, str] | None = None,
        start_seconds: int = 180,
        module: str = "sglang.launch_server",
    ):
        self.log = log
        self._words = [sys.executable, "-m", module, "--model-path", str(model), "--host", "127.0.0.1"]
        self._args, self._env = args, {**os.environ, **(env or {})}
        self._start_seconds = start_seconds
        self._start()

    def _start(self) -> None:
        """On a port that nobody listens on now; the server binds it only when its models are loaded."""
        self._held, self.port = _hold_port()
        self.command = [*self._words, "--port", str(self.port), *self._args]
        with self.log.open("w") as out:
            self._process = subprocess.Popen(
                self.command, env=self._env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """Of the launcher, whose children are the server's other processes."""
        return self._process.pid

    def shown_command(self) -> str:
        """The command for a result file: without this machine's folders."""
        return shlex.join(Path(word).name if word.startswith("/") else word for word in self.command)

    def __enter__(self):
        try:
            for left in reversed(range(ATTEMPTS)):
                if self._wait():
                    return self
                self.stop()
                if not left or "address already in use" not in self.log.read_text(errors="replace").lower():
                    break
                self._start()
        except BaseException:  # an interruption too: `with` does not exit what was not entered
            self.stop()
            raise
        raise RuntimeError(f"the server did not start; the end of {self.log}:\n{self.log_tail()}")

    def _wait(self) -> bool:
        """Whether it is healthy in time; else it has ended, or goes on in vain."""
        end = time.monotonic() + self._start_seconds
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(OSError):
                self.get("/health", timeout=10)
                self._held.close()
                return True
            time.sleep(0.3)
        return False

    def __exit__(self, *exc) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask the launcher to end (it ends its children), then end what is left of its group; at once where
        somebody interrupts the wait."""
        self._held.close()
        self._process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log, each cut to 300 characters (SGLang prints all its arguments in one)."""
        return "\n".join(line[:300] for line in self.log.read_text().splitlines()[-lines:])

    def get(self, path: str, timeout: float = 60) -> bytes:
        """Body of a GET; an HTTP error raises urllib.error.HTTPError (an OSError)."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout) as response:
            return response.read()

    def post(self, path: str, body: dict, timeout: float = 600) -> dict:
        """JSON answer to a JSON POST; an HTTP error raises urllib.error.HTTPError."""
        return json.loads(self.post_text(path, body, timeout) or b"null")

    def post_text(self, path: str, body: dict, timeout: float = 600) -> bytes:
        """Body of the answer to a JSON POST, whatever it is."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read()

    def flush(self, seconds: float = 10) -> None:
        """Forget every cached prefix. SGLang refuses while a round of the last request is still leaving; an
        HTTP error after so many seconds is raised."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.get("/flush_cache")
                return
            except urllib.error.HTTPError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def state(self) -> dict:
        """What /server_info says of its scheduler."""
        return json.loads(self.get("/server_info"))["internal_states"][0]

    def sts(self) -> dict:
        """What /server_info says of STS: the start-up line and the counters so far."""
        return self.state()["sts"]

    def counters(self) -> dict:
        return self.sts()["counters"]


def sparse_between(before: dict, after: dict) -> dict:
    """What was added between two readings of `counters()`; `keep_ratio` is that of these verifies.

    Raises:
        SystemExit: none of them was sparse, or one was dense for want of importance: a benchmark of it
            would be of something else.
    """
    delta = {name: after[name] - before[name] for name in after}
    if not delta["sparse_verifies"] or delta["dense_verifies"]:
        raise SystemExit(f"counters {delta}: this was not verified sparsely; nothing is reported")
    return {**delta, "keep_ratio": delta["selected_tokens"] / delta["available_tokens"]}


def _hold_port() -> tuple[socket.socket, int]:
    """A port of ours, and the socket that keeps it: bound, but not listening.

    Whoever asks the kernel for any free port gets another one, while the server, which names this one and
    binds as servers do (SO_REUSEADDR), may have it.
    """
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return held, held.getsockname()[1]
