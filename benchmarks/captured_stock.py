"""Stock SGLang with one change: its FA3 draft-extend is captured into a CUDA graph, as that of sts is.

python -m benchmarks.captured_stock ARGS OF sglang.launch_server

The draft worker captures draft-extend for a closed list of backends that leaves FA3 out, although FA3
can be captured. This launcher lets it in, so that a benchmark can tell what the graph brings from what
sparse attention brings. Worker processes import this file again when they are spawned.
"""

from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

FlashInferAttnBackend.register(FlashAttentionBackend)

if __name__ == "__main__":
    import runpy

    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
