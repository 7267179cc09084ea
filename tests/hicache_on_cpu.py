"""SGLang's server with HiCache on the reference CPU platform: python -m tests.hicache_on_cpu ARGS

SGLang moves KV between device and host by CUDA ops that its CPU wheel lacks, and pins host memory. Here
both are plain memory. Everything else is SGLang's own: the radix tree, the cache controller, its queues
and their order. Worker processes import this file again when they are spawned.
"""

import torch
from sglang.srt.mem_cache.pool_host import common, mha


def allocate(dims, dtype, device, pin_memory, allocator, **placement):
    return torch.empty(dims, dtype=dtype, device=device)


def transfer(src_layers, dst_layers, src_indices, dst_indices, page_size):
    for src, dst in zip(src_layers, dst_layers, strict=True):
        dst[dst_indices] = src[src_indices]


common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
mha.transfer_kv_direct = transfer

if __name__ == "__main__":
    import runpy

    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
