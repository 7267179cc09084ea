"""SGLang's serving client with one change: the same seed draws the same prompts in every process.

python -m benchmarks.load_client ARGS OF sglang.benchmark.serving

The client draws tokens of a prompt from the tokenizer's vocabulary in the order of a hash table, which is
another one in every process. What one client had prefilled would not be what the next one asks for, and two
servers would not be asked the same. Here the vocabulary is in order.
"""

from functools import lru_cache

from sglang.benchmark.datasets import common

in_any_order = common.get_available_tokens


@lru_cache(maxsize=1)
def in_order(tokenizer) -> list[int]:
    return sorted(in_any_order(tokenizer))


common.get_available_tokens = in_order

if __name__ == "__main__":
    import runpy

    runpy.run_module("sglang.benchmark.serving", run_name="__main__", alter_sys=False)
