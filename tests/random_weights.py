"""SGLang's server with dummy weights of a useful size: python -m tests.random_weights ARGS

SGLang's own dummy weights are so small that attention is the mean of its values, and a selection would change
next to nothing. Worker processes import this file again when they are spawned.
"""

import zlib

import torch
from sglang.srt.model_loader import loader


def draw(model: torch.nn.Module) -> None:
    """By the parameter's name, so that two servers of one model hold the same. What a matrix makes of normed
    states is 1.6 large in a tiny model, and 0.8 in a wide one: where attention is sharper, rounding to half
    precision grows from layer to layer."""
    # Not all keep their configuration; the embedding comes first.
    width = model.config.hidden_size if hasattr(model, "config") else next(model.parameters()).shape[-1]
    size = 12.8 / width
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = parameter.dim() == 1 and name.endswith("weight")  # of a norm
            parameter.data.copy_(1 + 0.3 * drawn if scale else size * drawn)


_load = loader.DefaultModelLoader.load_weights_and_postprocess
SHARED = ("embed_tokens.weight", "lm_head.weight")  # a head has the target's


def load(model: torch.nn.Module, *args) -> None:
    """From a checkpoint. Ends the server where a parameter would be left as it was allocated."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(torch.nan)
    _load(model, *args)
    left = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    if left := [name for name in left if not name.endswith(SHARED)]:
        raise SystemExit(f"left as they were allocated: {left}")


loader.initialize_dummy_weights = draw
loader.DefaultModelLoader.load_weights_and_postprocess = staticmethod(load)

if __name__ == "__main__":
    import runpy

    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
