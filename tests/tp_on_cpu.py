"""SGLang's server with tensor parallelism on the reference CPU platform: python -m tests.tp_on_cpu ARGS

SGLang makes NCCL's communicators for every platform that it does not know by name. Here ranks meet by gloo,
as its own CPU branches have it. Worker processes import this file again when they are spawned.
"""

import functools

from sglang.srt.distributed import parallel_state

from sts_sglang import headmap
from sts_sglang.host import serves

_made = parallel_state.init_model_parallel_group


@functools.wraps(_made)
def without_nccl(*args, **kwargs):
    return _made(*args, **{**kwargs, "use_pynccl": False})


parallel_state.init_model_parallel_group = without_nccl
# Without the above, ranks on a CPU end in SGLang's errors, so that a launch refuses them.
serves.RANKS["cpu"] = headmap.RANKS

if __name__ == "__main__":
    import runpy

    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
