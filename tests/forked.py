"""Many servers in a short time: one process imports SGLang and forks them.

A server imports SGLang in each of its three processes, for most of a minute of a core. Here they are forked,
and all else is the launch itself. That a server's processes find the plugin by themselves is for those
that are spawned to show (tests/server.py).
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from sts_sglang.tools.local_server import _hold_port
from tests.server import ENVIRONMENT, Server


class Forked(Server):
    """A Server whose processes are forked: by the first of them a process is started that forks them all."""

    def _start(self) -> None:
        self._held, self.port = _hold_port()
        self.command = [*self._words, "--port", str(self.port), *self._args]
        self.log.write_text("")  # a server that ends early may have written none
        _, _, module, *argv = self.command
        self._process = _forking(self._env["TRITON_INTERPRET"]).fork(argv, module, self._env, self.log)

    def stop(self) -> None:
        """When its scheduler has had nothing to do, which is when SGLang looks for leaks: the second of two
        questions is answered after that."""
        with suppress(OSError):
            self.state()
            self.state()
        super().stop()


class Forking:
    """The process that forks servers, until this one ends; `interpret` is what triton reads as it is
    imported."""

    def __init__(self, interpret: str):
        self._folder = tempfile.TemporaryDirectory(prefix="sts-forking-")
        self._log, modules = (Path(self._folder.name, name) for name in ("log", "modules"))
        # Classes that checkpoints bring along are copied to `modules`. Dynamo the platform turns off as well
        # (cpu.install_branches), for processes that import torch afterwards.
        own = {"HF_MODULES_CACHE": str(modules), "TORCHDYNAMO_DISABLE": "1"}
        own["TRITON_INTERPRET"] = interpret
        words = [sys.executable, "-m", "tests.forked"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with self._log.open("w") as log:
            env = {**os.environ, **ENVIRONMENT, **own}
            self._process = subprocess.Popen(words, env=env, stderr=log, **pipes)
        self._answer("ready")

    def fork(self, argv: list[str], module: str, env: dict[str, str], log: Path) -> Child:
        """`python -m module argv` in this environment, but for what was read when SGLang was imported."""
        asked = {"argv": argv, "module": module, "env": env, "log": str(log)}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return Child(int(self._answer("pid")))

    def _answer(self, to: str) -> str:
        """SGLang prints other lines while it is imported."""
        for line in self._process.stdout:
            name, _, value = line.strip().partition(" ")
            if name == to:
                return value
        raise RuntimeError(f"the process that forks servers ended:\n{self._log.read_text()[-3000:]}")


_forking = functools.cache(Forking)


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


def _serve(argv: list[str], module: str, env: dict[str, str], log: str) -> None:
    """`python -m module argv`, in a process of its own session."""
    import multiprocessing

    from sglang.srt.environ import envs
    from sglang.srt.managers import scheduler

    os.setsid()
    out, nothing = os.open(log, os.O_WRONLY), os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, out, out)):
        os.dup2(file, number)
    os.environ.update(env)
    # SGLang read these when it was imported.
    scheduler.TEST_RETRACT = envs.SGLANG_TEST_RETRACT.get()
    scheduler.TEST_RETRACT_INTERVAL = envs.SGLANG_TEST_RETRACT_INTERVAL.get()
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *args, **kwargs: None  # SGLang would spawn
    sys.argv[1:] = argv
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    # What a server's processes import.
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry
    import sglang.srt.speculative.eagle_worker_v2  # noqa: F401

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
