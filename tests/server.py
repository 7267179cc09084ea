"""A real SGLang server on the reference CPU platform, for tests."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

START_SECONDS = 180


def random_ids(count: int, seed: int) -> list[int]:
    """Byte tokens without the special ones."""
    rng = random.Random(seed)
    return [rng.randrange(0, 256) for _ in range(count)]


class Server:
    """`with Server(target, *args) as server:`; ends only the process group it started."""

    def __init__(self, model: Path, log: Path, *args: str, env: dict[str, str] | None = None):
        self.port = _free_port()
        self.log = log
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", "--dtype", "float32"]
        command += ["--sleep-on-idle", "--skip-server-warmup", "--context-length", "8192"]
        command += ["--random-seed", "0", "--constrained-json-disable-any-whitespace", *args]
        defaults = {"--max-total-tokens": "20000", "--max-running-requests": "8"}
        for flag, value in defaults.items():
            if flag not in args:
                command += [flag, value]
        environment = {
            **os.environ,
            "SGLANG_PLATFORM": "sts_cpu",
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # tiny models: threads that spin cost more than they bring
            **(env or {}),
        }
        with log.open("w") as out:
            self._process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self) -> Server:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.3)
        self.stop()
        raise RuntimeError(f"server did not start:\n{self.log_tail()}")

    def __exit__(self, *exc) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask the launcher to end (it ends its children), then end what is left of its group."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(line[:300] for line in self.log.read_text().splitlines()[-lines:])

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            return response.read()

    def post(self, path: str, body: dict, timeout: float = 300) -> dict:
        """JSON answer; an HTTP error raises urllib.error.HTTPError."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.loads(response.read() or b"null")

    def generate(self, ids: list[int], new_tokens: int, **extra) -> dict:
        """Greedy /generate of exactly `new_tokens`; keyword arguments join the body or its params."""
        params = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        params.update(extra.pop("sampling_params", {}))
        return self.post("/generate", {"input_ids": ids, "sampling_params": params, **extra})

    def generate_all(self, prompts: list[list[int]], new_tokens: int, **extra) -> list[dict]:
        """The same, all at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda ids: self.generate(ids, new_tokens, **dict(extra)), prompts))

    def sts(self) -> dict:
        """What /get_server_info says of STS."""
        return json.loads(self.get("/get_server_info"))["internal_states"][0]["sts"]

    def counters(self) -> dict:
        return self.sts()["counters"]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
