"""The server of tests/random_weights.py, which serves what the table refuses as not seen running, so that it
is: python -m tests.unseen_architectures ARGS

Worker processes import this file again when they are spawned.
"""

from sts_sglang.host import serves
from tests import random_weights, tiny_architectures  # noqa: F401

serves.TARGETS |= frozenset(tiny_architectures.UNSEEN)

if __name__ == "__main__":
    import runpy

    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
