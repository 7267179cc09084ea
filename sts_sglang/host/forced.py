"""SGLang's server, able to be told which tokens to emit: `ebnf` takes token ids, "17 4 900".

    python -m sts_sglang.host.forced --grammar-backend forced ...     # further arguments as for SGLang

Prefill is dense under STS, so the loss of held-out text has to be measured where verify is sparse: while
decoding. A grammar backend (SGLang's public registry) is what reaches the logits of verify, and those of a
decode step where nothing drafts. The one here allows the next token of the given text and nothing else, so
drafts are accepted and refused by the true text and the KV cache grows as in serving. The logprob that the
target gave the token before it was forced rides along as the logit of a second token: it is
top_logprobs[mark] - top_logprobs[forced] + 1.
"""

from __future__ import annotations

import os
import sys

import torch
from sglang.srt.constrained.base_grammar_backend import (
    BaseGrammarBackend,
    BaseGrammarObject,
    register_grammar_backend,
)
from sglang.srt.managers.scheduler import run_scheduler_process

NAME = "forced"
NEVER = -1e4


class ForcedText(BaseGrammarObject):
    """Tokens to be emitted in this order; after them anything goes."""

    def __init__(self, tokens: list[int]):
        super().__init__()
        self.tokens, self.at = tokens, 0

    def accept_token(self, token: int) -> None:
        if self.at < len(self.tokens) and token != self.tokens[self.at]:
            raise ValueError(f"token {token} where {self.tokens[self.at]} was forced")
        self.at += 1

    def rollback(self, k: int) -> None:
        self.at -= k

    def copy(self) -> ForcedText:
        return ForcedText(self.tokens)

    def allocate_vocab_mask(self, vocab_size: int, batch_size: int, device) -> torch.Tensor:
        """int32 bits as SGLang reads them, every token allowed."""
        return torch.full((batch_size, -(-vocab_size // 32)), -1, dtype=torch.int32)

    def fill_vocab_mask(self, vocab_mask: torch.Tensor, idx: int) -> None:
        if self.at < len(self.tokens):
            token = self.tokens[self.at]
            vocab_mask[idx] = 0
            bit = 1 << token % 32
            vocab_mask[idx, token // 32] = bit - (1 << 32) if bit == 1 << 31 else bit

    @staticmethod
    def move_vocab_mask(vocab_mask: torch.Tensor, device) -> torch.Tensor:
        return vocab_mask.to(device, non_blocking=True)

    @staticmethod
    def apply_vocab_mask(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
        """In rows with one allowed token: it becomes the argmax, and the mark carries its logprob."""
        forced = ~(vocab_mask == -1).all(1)
        bits = vocab_mask[:, :, None] >> torch.arange(32, device=vocab_mask.device) & 1
        token = bits.flatten(1).argmax(1, keepdim=True)
        logprob = logits.float().log_softmax(-1).gather(1, token)
        mark = (token == 0).long()
        row = torch.full_like(logits, NEVER)
        row.scatter_(1, mark, (logprob - 1).to(logits.dtype)).scatter_(1, token, 0)
        logits.copy_(torch.where(forced[:, None], row, logits))


class ForcedBackend(BaseGrammarBackend):
    def dispatch_ebnf(self, key_string: str) -> ForcedText:
        return ForcedText([int(token) for token in key_string.split()])


def run_scheduler(*args, **kwargs):
    """The scheduler process: grammars live there."""
    register_grammar_backend(NAME, lambda *_: ForcedBackend())
    return run_scheduler_process(*args, **kwargs)


def main() -> None:
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import add_grammar_backend_choices, prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    add_grammar_backend_choices([NAME])
    try:
        launch_server(prepare_server_args(sys.argv[1:]), run_scheduler_process_func=run_scheduler)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
