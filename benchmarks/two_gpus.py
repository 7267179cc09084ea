"""What two GPUs have to show, in one command: python -m benchmarks.two_gpus --work DIR --out FILE.jsonl

First tests/test_gpu_tensor_parallel.py: the shipped pair on two GPUs says what it says on one, but for near
ties. Then `bench_serving --tp 2` of models with the shapes of Llama-3.1-8B and Qwen3-32B, each with an
EAGLE-3 head, dummy weights: stock without a draft, stock with the draft and all of its passes in CUDA graphs,
and sts. Exit code 1 where a test failed; the times are taken all the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import bench_serving, dummy_models

TESTS = "tests/test_gpu_tensor_parallel.py"
PAIRS = {"llama-8b": "llama-8b-eagle3", "qwen3-32b": "qwen3-32b-eagle3"}
ARMS = "stock,stock-spec-captured,sts"
SERVER = (
    "--load-format dummy --skip-tokenizer-init --context-length 131072 --cuda-graph-max-bs 8 "
    "--max-running-requests 8 --mem-fraction-static 0.85 --cuda-graph-backend-prefill disabled "
    "--skip-server-warmup"
)


def arguments(target: str, options: argparse.Namespace) -> list[str]:
    """Of bench_serving, for one pair, whose configurations are written first."""
    models = {
        "--target": dummy_models.write(target, options.work),
        "--draft": dummy_models.write(PAIRS[target], options.work),
    }
    logs = options.work / target / "logs"
    logs.mkdir(exist_ok=True)
    argv = [str(word) for pair in models.items() for word in pair]
    argv += ["--algorithm", "EAGLE3", "--tp", "2", "--arms", options.arms, "--shapes", options.shapes]
    argv += ["--accept-length", "3", "--vocab", "128000", "--repeats", str(options.repeats)]
    return [*argv, "--server-args", SERVER, "--logs", str(logs), "--out", str(options.out)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, required=True, help="folder for configurations and logs")
    p.add_argument("--out", type=Path, required=True, help="append raw results to this JSONL file")
    p.add_argument("--models", nargs="+", choices=PAIRS, default=list(PAIRS), help="(all)")
    p.add_argument("--shapes", default="128000x1,32000x8,8000x8", help="longest first (%(default)s)")
    p.add_argument("--arms", default=ARMS, help="of bench_serving (%(default)s)")
    p.add_argument("--repeats", type=int, default=1, help="servers per arm (%(default)s)")
    p.add_argument("--no-tests", action="store_true", help="times alone")
    options = p.parse_args(argv)
    # Servers, their logs and git are asked from the repository root.
    options.work, options.out = options.work.resolve(), options.out.resolve()
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    failed = False
    if not options.no_tests:
        failed = subprocess.call([sys.executable, "-m", "pytest", "-q", "-m", "gpu", TESTS]) != 0
    for target in options.models:
        bench_serving.main(arguments(target, options))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
