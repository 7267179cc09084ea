"""A real SGLang server on the reference CPU platform, for tests."""

from __future__ import annotations

import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sts_sglang.tools.local_server import LocalServer


def random_ids(count: int, seed: int) -> list[int]:
    """Byte tokens without the special ones."""
    rng = random.Random(seed)
    return [rng.randrange(0, 256) for _ in range(count)]


# Where warmup is skipped SGLang 0.5.23 asks itself to freeze its garbage collector before it listens, and
# says with a traceback that this failed.
_FROZEN = re.compile(r"post-warmup freeze_gc failed\n(?:(?!\[20).*\n)*")


def logged(log: Path) -> str:
    """What a server wrote, without a traceback of SGLang's that is none of ours."""
    return _FROZEN.sub("", log.read_text())


ENVIRONMENT = {
    "SGLANG_PLATFORM": "sts_cpu",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "HF_HUB_OFFLINE": "1",
    "TRITON_INTERPRET": "0",  # the tests' own processes interpret kernels, servers do not
    "OMP_NUM_THREADS": "1",  # tiny models: threads that spin cost more than they bring
}


class Server(LocalServer):
    """float32, small pools, SGLang's strict leak check on."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *args: str,
        env: dict[str, str] | None = None,
        module: str = "sglang.launch_server",
    ):
        fixed = ["--device", "cpu", "--dtype", "float32", "--context-length", "8192", "--random-seed", "0"]
        fixed += ["--sleep-on-idle", "--skip-server-warmup", "--constrained-json-disable-any-whitespace"]
        for flag, value in (("--max-total-tokens", "20000"), ("--max-running-requests", "8")):
            if flag not in args:
                fixed += [flag, value]
        super().__init__(model, log, *fixed, *args, env={**ENVIRONMENT, **(env or {})}, module=module)

    def generate(self, ids: list[int], new_tokens: int, **extra) -> dict:
        """Greedy /generate of exactly `new_tokens`; keyword arguments join the body or its params."""
        params = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        params.update(extra.pop("sampling_params", {}))
        return self.post("/generate", {"input_ids": ids, "sampling_params": params, **extra})

    def generate_all(self, prompts: list[list[int]], new_tokens: int, **extra) -> list[dict]:
        """The same, all at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda ids: self.generate(ids, new_tokens, **dict(extra)), prompts))
