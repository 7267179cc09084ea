"""How long `sts-sglang calibrate` takes for an 8B target with a 1B draft, and what memory it needs.

    python -m benchmarks.time_calibrate --models DIR --device cuda --dtype bfloat16 --out FILE

Writes models with the shapes of Llama-3.1-8B and 3.2-1B and random weights to DIR (18 GB in bfloat16; kept,
and used again), with the shipped pair's tokenizer, and calibrates them with its defaults. The map says
nothing; the work is that of a real pair. Further options are those of calibrate. `host_mb` is memory of its
own, mapped weights not counted; `device_mb` whatever the device gave meanwhile.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import dummy_models
from benchmarks.bench_serving import origin
from benchmarks.harness import commit
from sts_sglang.tools.demo import MODELS


def make(name: str, folder: Path, device: str, dtype: torch.dtype) -> Path:
    """A model folder with random weights."""
    path = dummy_models.write(name, folder)
    if any(path.glob("*.safetensors")):
        return path
    shape = json.loads((path / "config.json").read_text())
    config = LlamaConfig(**{k: v for k, v in shape.items() if k not in ("architectures", "model_type")})
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS / "target" / file, path / file)
    return path


def own_memory(pid: int) -> int:
    """Bytes of private memory of a process; 0 when it has ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def device_memory() -> int:
    if not torch.cuda.is_available():
        return 0
    free, there = torch.cuda.mem_get_info()
    return there - free


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", type=Path, required=True, metavar="DIR", help="where to write the models")
    p.add_argument("--device", default="cpu", help="as for calibrate (%(default)s)")
    p.add_argument("--dtype", default="bfloat16", help="as for calibrate (%(default)s)")
    p.add_argument("--out", type=Path, help="append the result to this JSONL file")
    options, further = p.parse_known_args(argv)  # what is not known here is for calibrate
    dtype = getattr(torch, options.dtype)
    target, draft = (make(name, options.models, options.device, dtype) for name in ("llama-8b", "llama-1b"))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    words = ["calibrate", "--model", str(target), "--draft", str(draft)]
    words += ["--out", str(options.models / "map.json"), "--device", options.device]
    words += ["--dtype", options.dtype, *further]
    before, started, host, device = device_memory(), time.monotonic(), 0, 0
    with subprocess.Popen([sys.executable, "-m", "sts_sglang.cli", *words]) as process:
        while process.poll() is None:
            host = max(host, own_memory(process.pid))
            device = max(device, device_memory() - before)
            time.sleep(0.2)
    if process.returncode:
        sys.exit(process.returncode)
    row = {"seconds": round(time.monotonic() - started, 1), "host_mb": host >> 20, "device_mb": device >> 20}
    tell(row, words, options.out)


def tell(row: dict[str, Any], words: list[str], out: Path | None) -> None:
    """Print a result and where it comes from, and append it to a file. words: of the `sts-sglang` command,
    shown without this machine's folders."""
    shown = ["sts-sglang", *(Path(word).name if "/" in word else word for word in words)]
    row = {**row, "command": " ".join(shown), **origin(), "commit": commit()}
    print(json.dumps(row))
    if out:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
