"""The platform class, apart from the entry point that names it: SGLang imports this in the middle of its own
import."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """MHA models in plain torch, no graphs."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args) -> None:
        from sglang.srt.model_executor.cuda_graph_config import Backend

        # disable_cuda_graph alone comes too late: the graph config is resolved by now.
        server_args.disable_cuda_graph = True
        if (graphs := server_args.cuda_graph_config) is not None:
            graphs.decode.backend = graphs.prefill.backend = Backend.DISABLED

    def get_default_attention_backend(self) -> str:
        # The server without speculation, against which `sts` is compared.
        return "torch_native"

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return True

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        class Pool(MHATokenToKVPool):
            def _init_kv_copy_and_warmup(self) -> None:
                """Torch moves accepted KV (cpu.install_branches): no Triton copy to warm up."""
                self._kv_copy_config = None

        return Pool

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        # 0.5.23 calls the method above by this one, with a warning.
        return self.get_mha_kv_pool_cls() if kind == "mha" else None

    def get_paged_allocator_cls(self) -> type:
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        return PagedTokenToKVPoolAllocator

    def is_pin_memory_available(self, device=None) -> bool:
        return False
