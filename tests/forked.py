"""Many servers in a short time: one process imports SGLang and forks them.

A server imports SGLang in each of its three processes, for most of a minute of a core. Here they are forked,
and all else is SGLang's own launch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from sts_sglang.tools.local_server import _hold_port
from tests.server import ENVIRONMENT, Server


class Forked(Server):
    """A server that the process `of` forks."""

    def __init__(self, of: Forking, model: Path, log: Path, *args: str):
        self._of = of
        super().__init__(model, log, *args)

    def _start(self) -> None:
        self._held, self.port = _hold_port()
        self.command = [*self._words, "--port", str(self.port), *self._args]
        self.log.write_text("")  # a server that ends early may have written none
        self._process = self._of.fork(self.command[3:], self.log)


class Forking:
    """`with Forking(log, **environment) as forking: Forked(forking, ...)`"""

    def __init__(self, log: Path, **environment: str):
        # The platform says so too (cpu.install_branches), to processes that import torch afterwards.
        eager = {"TORCHDYNAMO_DISABLE": "1"}
        self._environment = {**os.environ, **ENVIRONMENT, **eager, **environment}
        self._log = log

    def __enter__(self) -> Forking:
        words = [sys.executable, "-m", "tests.forked"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(words, env=self._environment, stderr=log, **pipes)
        self._answer("ready")
        return self

    def __exit__(self, *exc) -> None:
        self._process.kill()
        self._process.wait()

    def fork(self, argv: list[str], log: Path) -> Child:
        print(json.dumps({"argv": argv, "log": str(log)}), file=self._process.stdin, flush=True)
        return Child(int(self._answer("pid")))

    def _answer(self, to: str) -> str:
        """SGLang prints other lines while it is imported."""
        for line in self._process.stdout:
            name, _, value = line.strip().partition(" ")
            if name == to:
                return value
        raise RuntimeError(f"the process that forks servers ended; see {self._log}")


class Child:
    """What LocalServer asks of a process."""

    def __init__(self, pid: int):
        self.pid = pid

    def poll(self) -> int | None:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return 1
        return None

    def terminate(self) -> None:
        """Without waiting for what it would still do."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.05)


def _serve(argv: list[str], log: str) -> None:
    """What `python -m sglang.launch_server` does, in a process of its own session."""
    import multiprocessing

    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    os.setsid()
    out, nothing = os.open(log, os.O_WRONLY), os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, out, out)):
        os.dup2(file, number)
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *args, **kwargs: None  # SGLang would spawn
    load_plugins()
    run_server(prepare_server_args(argv))


def main() -> None:
    # What a server's processes import, and the weights that they draw.
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry
    import sglang.srt.speculative.eagle_worker_v2  # noqa: F401

    import tests.random_weights  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        if not (pid := os.fork()):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _serve(**json.loads(line))
            finally:
                os._exit(1)
        print("pid", pid, flush=True)


if __name__ == "__main__":
    main()
