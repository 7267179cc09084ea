"""Runs the target, and its draft, over a text and keeps the attention of a few verify windows.

A *window* is one round as the server sees it: `t` committed tokens, target rows t..t+3, and the draft rows
of tokens t, t+1, t+2 (the last draft token never runs through the draft). It is teacher-forced: the
text's own tokens stand for the draft's proposals.

Memory, beside the models and their own activations: attention is computed for the windows' rows only, one
window of one layer at a time, and what it gives goes to a temporary file (TMPDIR) at once; searching reads
back one target layer, or one window of the draft. `search.working_bytes` is the bound: 108 MB for
Llama-3.1-8B with a 1B draft, four texts of 4,096 tokens and 16 windows each (63 MB measured), whatever the
number of target layers. What keys are summed up in (`directions.Keys`) comes to it, 34 MB. The files of that
pair, `disk_bytes`, are 1.1 GB for four texts.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import linear, pad, rms_norm

from sts_kernels.layout import PAGE, SHIFT
from sts_sglang import checkpoints
from sts_sglang.calibrate.directions import Keys
from sts_sglang.config import ConfigError, quoted, shown
from sts_sglang.headmap import POOLS, HeadCounts, directions_of

VERIFY_ROWS = 4
DRAFT_ROWS = 3
ATTENTION = "sts_calibrate"


class Seen(NamedTuple):
    """Attention of one layer over one text: q [H_q, T, D], k and v [H_kv, T, D], after positions.

    states: [T, hidden], what the layer reads, None of a head. output: [hidden, H_q * D], of the output
    projection, None of a head or of a model that names it otherwise.
    """

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scaling: float
    states: torch.Tensor | None = None
    output: torch.Tensor | None = None


Collector = Callable[[Seen], None]
Kept = Callable[[int, Seen], torch.Tensor]


class Table:
    """float32 [rows, t] of every window t in a temporary file; only what is read comes into memory.

    What was not written reads as zero.
    """

    def __init__(self, rows: int, windows: Sequence[int]):
        self.rows, self.windows = rows, list(windows)
        self._starts = np.cumsum([0, *(4 * rows * t for t in windows)]).tolist()
        self._file = tempfile.TemporaryFile(prefix="sts-calibrate-")  # noqa: SIM115 (lives as long as this)
        self._file.truncate(self._starts[-1])

    @classmethod
    def of(cls, values: Sequence[torch.Tensor]) -> Table:
        """Of one tensor [rows, t] a window."""
        table = cls(len(values[0]), [v.shape[1] for v in values])
        for i, value in enumerate(values):
            table.write(i, 0, value)
        return table

    def write(self, i: int, first: int, values: torch.Tensor) -> None:
        """Rows `first`.. of window i: values [n, t].

        Raises:
            ConfigError: the disk is full.
        """
        data = memoryview(values.float().cpu().contiguous().numpy()).cast("B")
        at = self._starts[i] + 4 * first * self.windows[i]
        try:
            while data:
                done = os.pwrite(self._file.fileno(), data, at)
                data, at = data[done:], at + done
        except OSError as error:
            raise ConfigError(
                f"TMPDIR {tempfile.gettempdir()}: cannot write attention there ({error.strerror}); "
                "allowed: a folder with more space, or fewer --windows or --tokens"
            ) from None

    def read(self, i: int, rows: Sequence[int] | None = None) -> torch.Tensor:
        """[n, t] of window i; None for all rows."""
        rows = range(self.rows) if rows is None else rows
        t, found = self.windows[i], np.empty((len(rows), self.windows[i]), np.float32)
        n = 0
        while n < len(rows):  # one read for each run of neighbours
            count = 1
            while n + count < len(rows) and rows[n + count] == rows[n] + count:
                count += 1
            into = memoryview(found[n : n + count]).cast("B")
            at = self._starts[i] + 4 * rows[n] * t
            while into:
                done = os.preadv(self._file.fileno(), [into], at)
                into, at = into[done:], at + done
            n += count
        return torch.from_numpy(found)


@dataclass
class Record:
    """Attention of one text's windows.

    Attributes:
        domain: what the text is a sample of.
        windows: committed lengths t.
        tokens: length of the text.
        mass: [layers * KV heads, t], the target's attention to committed positions, mean over the verify
            rows and the query heads of the group.
        change: as mass, what leaving that token out changes: the squared distance of what a query head then
            adds to the residual, over the squared norm of the residual; None unless asked for.
        scores: [draft layers * query heads, t] by how the draft rows are pooled, importance by target
            position.
    """

    domain: str
    windows: list[int]
    tokens: int
    mass: Table
    scores: dict[str, Table]
    change: Table | None = None


def disk_bytes(target: HeadCounts, draft: HeadCounts, lengths: Sequence[int], change: bool = False) -> int:
    """Of the temporary files of windows of these lengths."""
    rows = (1 + change) * target.layers * target.kv_heads + len(POOLS) * draft.layers * draft.q_heads
    return 4 * rows * sum(lengths)


def choose_windows(tokens: int, count: int, least: int, seed: int, flag: str = "--text") -> list[int]:
    """`count` different committed lengths from max(least, tokens / 4), one at random in each equal part.

    Raises:
        ConfigError: the text is too short for that.
    """
    low, high = max(least, tokens // 4), tokens - VERIFY_ROWS
    if high - low < count:
        raise ConfigError(
            f"{flag}: a text of {tokens} tokens is too short for {count} windows beyond {least} tokens; "
            f"allowed: {'more' if flag == '--tokens' else 'a longer text'}, or fewer --windows"
        )
    part = (high - low) / count
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [int(low + (i + share) * part) for i, share in enumerate(draw)]


class Target:
    """A target: folder or hub name.

    Raises:
        ConfigError: a model that cannot be read.
    """

    def __init__(self, target: str, device: str = "cpu", dtype: str = "float32"):
        self.device, self.dtype = device, getattr(torch, dtype)
        _check("--model", target)
        self.target = _load("--model", target, device, self.dtype)
        self.target_counts = head_counts(self.target.config)
        # Most tokens that there are positions for, by the config.
        self.positions: int | None = getattr(self.target.config, "max_position_embeddings", None)

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return head_dim(self.target.config)

    def check_pages(self) -> None:
        """Raises ConfigError: heads whose keys have no sketches, so that no server selects by them."""
        if self.head_dim % PAGE:
            raise ConfigError(
                f"--model: heads of {self.head_dim} dimensions; allowed: a multiple of {PAGE}, or --draft"
            )

    def keys(self) -> Keys | None:
        """What takes up its keys, None where they are to have no directions."""
        return Keys(self.target_counts, self.head_dim, self.device) if directions_of(self.head_dim) else None

    @torch.no_grad()
    def run(self, tokens: list[int], collect: Collector) -> None:
        """Over `tokens`, for what its attention shows to `collect`."""
        _run(self.target, torch.tensor([tokens], device=self.device), collect)

    def output_errors(
        self, tokens: list[int], windows: list[int], kept: Kept, ways: int, rows_each: int = VERIFY_ROWS
    ) -> torch.Tensor:
        """float32 [windows, layers, KV heads, ways]: how far what a KV head's query heads add to the residual
        is from what they add over the whole context, in squares, over the squared norm of the residual; mean
        over the rows of a window.

        Args:
            kept: of a window's number and a layer's attention, bool [KV heads, ways, t], the tokens attended
                to. rows_each: of a window, from t on.

        Raises:
            ConfigError: a target without an output projection that is known.
        """
        target = self.target_counts
        found = torch.zeros(len(windows), target.layers, target.kv_heads, ways)

        def weigh(seen: Seen) -> None:
            _check_output(seen)
            for i, t in enumerate(windows):
                rows = range(t, t + rows_each)
                probs = _attention(seen.q, seen.k, rows, seen.scaling)
                found[i, seen.layer] = _errors(seen, rows, probs, kept(i, seen).to(probs.device)).cpu()

        self.run(tokens, weigh)
        return found


class Pair(Target):
    """A target and its draft, a whole model (STANDALONE) or an EAGLE or EAGLE-3 head: folders or hub names.

    Raises:
        ConfigError: a model that cannot be read or that calibration does not know.
    """

    def __init__(self, target: str, draft: str, device: str = "cpu", dtype: str = "float32"):
        architecture = (read_config("--draft", draft).get("architectures") or [""])[0]
        if architecture in checkpoints.OWN_LAYERS:
            raise ConfigError(
                f"--draft {draft}: SGLang drafts with the layer that {architecture} has for the next token "
                "but one, which is not run here; allowed: a whole model or a head (evaluate: --no-recall)"
            )
        config = _check("--draft", draft)
        super().__init__(target, device, dtype)
        if config.get("vocab_size") != self.target.config.vocab_size:
            raise ConfigError(
                f"--draft {draft}: vocabulary of {config.get('vocab_size')}, the target's is "
                f"{self.target.config.vocab_size}; allowed: a draft with the target's tokenizer"
            )
        self.head = None
        if architecture.endswith(("Eagle", "Eagle3")):
            self.head = EagleHead(draft, config, self.target)
            self.draft_counts = self.head.counts
        else:
            self.draft_model = _load("--draft", draft, device, self.dtype)
            self.draft_counts = head_counts(self.draft_model.config)
        both = (self.positions, config.get("max_position_embeddings"))
        self.positions = min((n for n in both if n), default=None)

    @torch.no_grad()
    def record(
        self,
        domain: str,
        tokens: list[int],
        windows: list[int],
        change: bool = False,
        keys: Keys | None = None,
    ) -> Record:
        """Run both models over `tokens` and keep what the windows need; see Record.

        Args:
            keys: takes up the target's.

        Raises:
            ConfigError: `change` of a target without an output projection that is known.
        """
        draft, target = self.draft_counts, self.target_counts
        scores = {pool: Table(draft.layers * draft.q_heads, windows) for pool in POOLS}
        mass = Table(target.layers * target.kv_heads, windows)

        changed = Table(target.layers * target.kv_heads, windows) if change else None

        def score(seen: Seen) -> None:
            for i, t in enumerate(windows):
                rows = range(t - SHIFT, t - SHIFT + DRAFT_ROWS)
                probs = _attention(seen.q, seen.k, rows, seen.scaling)[..., : t - SHIFT]
                for pool, pooled in (("max", probs.amax(1)), ("mean", probs.mean(1))):
                    scores[pool].write(i, seen.layer * draft.q_heads, pad(pooled, (SHIFT, 0)))

        def weigh(seen: Seen) -> None:
            if change:
                _check_output(seen)
            if keys is not None:
                keys.add(seen)
            for i, t in enumerate(windows):
                rows = range(t, t + VERIFY_ROWS)
                probs = _attention(seen.q, seen.k, rows, seen.scaling)
                own = probs[:, :, :t].mean(1)
                mass.write(i, seen.layer * target.kv_heads, own.view(target.kv_heads, -1, t).mean(1))
                if change:
                    changed.write(i, seen.layer * target.kv_heads, _changes(seen, rows, probs)[:, :t])

        ids = torch.tensor([tokens], device=self.device)
        wanted = self.head.reads if self.head else ()
        hidden = _run(self.target, ids, weigh, wanted)
        if self.head is None:
            _run(self.draft_model, ids[:, SHIFT:], score)
        else:
            q, k, scaling = self.head(ids[0, SHIFT:], [h[0, :-SHIFT] for h in hidden])
            score(Seen(0, q, k, k, scaling))
        return Record(domain, windows, len(tokens), mass, scores, changed)


class EagleHead:
    """Queries and keys of a one-layer EAGLE or EAGLE-3 head over (token embedding, target hidden state).

    As SGLang's models/llama_eagle.py and llama_eagle3.py compute them.
    """

    def __init__(self, path: str, config: dict[str, Any], target: Any):
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        given = {key: value for key, value in config.items() if value is not None}
        config = {"num_key_value_heads": config["num_attention_heads"], "rms_norm_eps": 1e-6, **given}
        _check_head(config)
        self.config, self.target = config, target
        self.eagle3 = config["architectures"][0].endswith("Eagle3")
        like = target.get_input_embeddings().weight
        self.w = {
            name: w.to(like)
            for name, w in _weights(path).items()
            if w.is_floating_point() and not name.startswith("lm_head")
        }
        _check_finite(f"--draft {path}", self.w.items())
        self.dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        try:
            self.rotary = LlamaRotaryEmbedding(LlamaConfig(**config)).to(like.device)
        except Exception as error:  # transformers raises of everything for values of another type
            raise ConfigError(f"--draft {path}: config.json: {_line(error)}; allowed: a head's") from None
        self.counts = HeadCounts(1, config["num_attention_heads"], config["num_key_value_heads"])
        layers = target.config.num_hidden_layers
        # What it reads of the target, as indices into hidden states with the embeddings first.
        self.reads = head_reads(f"--draft {path}", config, layers) if self.eagle3 else [layers]
        # EAGLE's fc reads the token's embedding beside the target's last state.
        width = target.config.hidden_size * (len(self.reads) if self.eagle3 else 2)
        if self.w["fc.weight"].shape != (config["hidden_size"], width):
            found = list(self.w["fc.weight"].shape)
            raise ConfigError(
                f"--draft {path}: tensor 'fc.weight' has shape {found}; allowed: "
                f"{[config['hidden_size'], width]} for this target"
            )

    def __call__(self, tokens: torch.Tensor, hidden: list[torch.Tensor]):
        """(q, k, scaling) from tokens [T] and the target's hidden states `reads`, [T, H] each."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        embed = self.target.get_input_embeddings()(tokens)
        if (own := self.w.get("embed_tokens.weight")) is not None:
            embed = own[tokens]
        if self.eagle3:
            prefix = "midlayer" if "midlayer.self_attn.q_proj.weight" in self.w else "layers.0"
            state = self._linear("fc", torch.cat(hidden, -1))
            x = torch.cat(
                [
                    self._norm(f"{prefix}.input_layernorm", embed),
                    self._norm(f"{prefix}.hidden_norm", state),
                ],
                -1,
            )
        else:
            prefix = "layers.0"
            x = self._linear("fc", torch.cat([embed, hidden[-1]], -1))
        q, k = (
            self._linear(f"{prefix}.self_attn.{n}_proj", x).view(len(tokens), -1, self.dim).transpose(0, 1)
            for n in "qk"
        )
        cos, sin = self.rotary(x, torch.arange(len(tokens), device=x.device)[None])
        q, k = apply_rotary_pos_emb(q[None], k[None], cos, sin)
        return q[0], k[0], self.dim**-0.5

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.config["rms_norm_eps"])


def _check_output(seen: Seen) -> None:
    if seen.output is None:
        raise ConfigError(
            "--measure output: this target's attention has no o_proj; allowed: --measure mass, with a draft"
        )


def _check_head(config: dict[str, Any]) -> None:
    eps, aux = config["rms_norm_eps"], config.get("eagle_config", {})
    if type(eps) is not float or not 0 < eps < 1:
        raise ConfigError(f"--draft: rms_norm_eps: got {shown(eps)}; allowed: a number between 0 and 1")
    if not isinstance(aux, dict):
        raise ConfigError(f"--draft: eagle_config: got {shown(aux)}; allowed: an object")
    if config["num_hidden_layers"] != 1:
        raise ConfigError(f"--draft: the head has {config['num_hidden_layers']} layers; allowed: 1")
    if config.get("fc_norm") or config.get("use_aux_norm"):
        raise ConfigError("--draft: the head norms its hidden states (fc_norm); allowed: heads without")


def head_reads(what: str, config: Mapping[str, Any], layers: int) -> list[int]:
    """What an EAGLE-3 head reads of a target with so many layers, as indices into its hidden states with the
    embeddings first: SGLang captures before layers [2, n / 2, n - 3] by default.

    Raises:
        ConfigError: one line that starts with `what`; it was made for another target.
    """
    aux = config.get("eagle_config") or {}
    ids = aux.get("eagle_aux_hidden_state_layer_ids") if isinstance(aux, dict) else aux
    if ids and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise ConfigError(f"{what}: reads the target after layers {shown(ids)}; allowed: numbers of them")
    chosen = [i + 1 for i in ids] if ids else [2, layers // 2, layers - 3]
    # Nothing is captured behind the last layer.
    if not all(0 <= i < layers for i in chosen):
        read = [i - 1 for i in chosen]
        raise ConfigError(f"{what}: reads the target after layers {shown(read)}; allowed: 0..{layers - 2}")
    return chosen


def known_config(path: str) -> Any | None:
    """transformers' reading of a config.json, None for a type of model that it does not know itself."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception:  # it raises of everything, also for a class that the model brings along
        return None


def head_counts(config: Any) -> HeadCounts:
    """Attention shape of a transformers config."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return HeadCounts(config.num_hidden_layers, config.num_attention_heads, kv_heads)


def head_dim(config: Any) -> int:
    """Dimensions of a head by a transformers config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _attention(q: torch.Tensor, k: torch.Tensor, rows: range, scaling: float) -> torch.Tensor:
    """Causal attention probabilities float32 [H_q, rows, last row + 1] of q [H_q, T, D], k [H_kv, T, D]."""
    keys = k[:, : rows[-1] + 1].float().transpose(1, 2)
    queries = q[:, rows[0] : rows[-1] + 1].float() * scaling
    # The query heads of a group side by side as rows: keys are not repeated.
    logits = (queries.reshape(k.shape[0], -1, q.shape[2]) @ keys).view(q.shape[0], len(rows), -1)
    later = torch.arange(rows[-1] + 1, device=q.device) > torch.tensor(list(rows), device=q.device)[:, None]
    return logits.masked_fill_(later, -torch.inf).softmax(-1)


def attention_at(seen: Seen, t: int) -> torch.Tensor:
    """float32 [H_kv, t]: attention of the row at position t to those before it, the most of the group's."""
    probs = _attention(seen.q, seen.k, range(t, t + 1), seen.scaling)[:, 0, :t]
    return probs.unflatten(0, (seen.k.shape[0], -1)).amax(1)


def page_scores(seen: Seen, t: int) -> torch.Tensor:
    """float32 [H_kv, pages] of the complete pages before position t, by the row there: what
    `sts_kernels.torch_ops.score_pages` gives it, without a pool of slots."""
    pages = seen.k[:, : t // PAGE * PAGE].float().unflatten(1, (-1, PAGE))
    rows = seen.q[:, t].float().unflatten(0, (seen.k.shape[0], -1))  # [H_kv, G, D]
    logits = rows @ pages.mean(2).mT + rows.abs() @ pages.std(2, correction=0).mT
    return (logits * seen.scaling).softmax(-1).amax(1)


def _changes(seen: Seen, rows: range, probs: torch.Tensor) -> torch.Tensor:
    """float32 [H_kv, L] of probabilities [H_q, rows, L]: see `Record.change`; mean over rows and heads.

    Without token i a head adds p_i / (1 - p_i) times the distance of its value from the head's output; what
    many tokens change is taken as the sum of what each does, and the divisor as 1.
    """
    (q_heads, number, length), kv_heads = probs.shape, seen.k.shape[0]
    group, (heads, outs, residual) = q_heads // kv_heads, _added(seen, rows, probs)
    found = torch.zeros(kv_heads, length, device=probs.device)
    for h, (out, own) in enumerate(zip(outs, heads, strict=True)):
        values, metric = seen.v[h // group, :length].float(), own.float().T @ own.float()
        squares = ((values @ metric) * values).sum(-1)  # [L]
        apart = squares - 2 * (out @ metric) @ values.T + ((out @ metric) * out).sum(-1, keepdim=True)
        found[h // group] += (probs[h].square() * apart.clamp(min=0) / residual[:, None]).sum(0)
    return found / (group * number)


def _added(
    seen: Seen, rows: range, probs: torch.Tensor
) -> tuple[Sequence[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Of probabilities [H_q, rows, L], by query head: its part of the output projection [hidden, D] and its
    output [rows, D]; and [rows], the squared norm of the residual after this attention."""
    (q_heads, _, length), group = probs.shape, seen.q.shape[0] // seen.k.shape[0]
    heads = seen.output.split(seen.v.shape[2], 1)
    outs = [probs[h] @ seen.v[h // group, :length].float() for h in range(q_heads)]
    added = sum(out @ own.float().T for out, own in zip(outs, heads, strict=True))
    return heads, outs, (seen.states[rows[0] : rows[-1] + 1].float() + added).square().sum(-1)


def _errors(seen: Seen, rows: range, probs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """float32 [H_kv, ways], see `Pair.output_errors`; kept: bool [H_kv, ways, t]."""
    kv_heads, ways, t = kept.shape
    group, (heads, outs, residual) = probs.shape[0] // kv_heads, _added(seen, rows, probs)
    found = torch.zeros(kv_heads, ways, device=probs.device)
    for kv in range(kv_heads):
        seen_too = pad(kept[kv], (0, probs.shape[2] - t), value=True)[:, None]  # [ways, 1, L]: the tail is
        values, apart = seen.v[kv, : probs.shape[2]].float(), 0.0
        for h in range(kv * group, (kv + 1) * group):
            left = probs[h] * seen_too  # [ways, rows, L]
            # Where nothing is left that float32 can tell from zero, the output is as good as lost.
            out = (left / left.sum(-1, keepdim=True).clamp(min=1e-30)) @ values
            apart = apart + (out - outs[h]) @ heads[h].float().T
        found[kv] = (apart.square().sum(-1) / residual).mean(-1)
    return found


def _run(model: Any, ids: torch.Tensor, collect: Collector, hidden: Sequence[int] = ()) -> list[torch.Tensor]:
    """The decoder without its output matrix, whose logits would be the largest tensor of all.

    Returns the hidden states of these indices (embeddings first, the last one normed); no others are kept.
    """
    decoder, found = model.base_model, {}
    running = model.sts_running
    running["collect"] = collect

    def keep(i):
        def hook(module, args, kwargs):
            running["states"] = args[0] if args else kwargs["hidden_states"]
            if i in hidden:
                found[i] = running["states"]

        return hook

    layers = enumerate(decoder.layers)
    hooks = [layer.register_forward_pre_hook(keep(i), with_kwargs=True) for i, layer in layers]
    try:
        found[len(decoder.layers)] = decoder(ids, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return [found[i] for i in hidden]


def _load(flag: str, path: str, device: str, dtype: torch.dtype):
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, _collecting_attention)
    given = {"dtype": dtype, "attn_implementation": ATTENTION, "output_loading_info": True}
    # Weights in pickles and code from the hub would run whatever they like.
    given |= {"use_safetensors": True, "trust_remote_code": False}
    try:
        with _quiet_transformers():
            model, found = AutoModelForCausalLM.from_pretrained(path, **given)
    except Exception as error:  # transformers raises of everything for what is no model
        raise ConfigError(
            f"{flag} {path}: {_line(error)}; allowed: a folder or hub name that transformers loads"
        ) from None
    # transformers draws at random what is missing: a map of that would say nothing.
    for kind in ("missing", "unexpected", "mismatched"):
        if names := sorted(str(name) for name in found.get(f"{kind}_keys") or ()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(
                f"{flag} {path}: {kind} tensor {quoted(names[0])}{more}; allowed: a checkpoint of its "
                f"architecture, {type(model).__name__}"
            )
    _check_finite(f"{flag} {path}", model.named_parameters())
    model.sts_running = {}  # of `_run`: who collects, and what the running layer reads
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.sts_running = model.sts_running
    return model.eval().to(device)


def _check_finite(what: str, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Attention of anything else is not a number, and so would be the map's recall."""
    for name, weight in weights:
        if not weight.isfinite().all():
            raise ConfigError(f"{what}: tensor {quoted(name)} holds inf or nan; allowed: finite weights")


def _check(flag: str, path: str) -> dict[str, Any]:
    """A folder's files, before anything of the size that they claim is loaded. Returns the config.json."""
    config = read_config(flag, path)
    checkpoints.check_numbers(f"{flag} {path}", config, checkpoints.NEEDED)
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or 1
    if heads % kv_heads:
        raise ConfigError(
            f"{flag} {path}: config.json: num_key_value_heads: got {kv_heads}; allowed: a divisor of "
            f"num_attention_heads, {heads}"
        )
    if os.path.isdir(path):
        tensors = checkpoints.check_folder(f"{flag} {path}", Path(path))
        if not tensors:
            raise ConfigError(f"{flag} {path}: holds no safetensors files; allowed: a safetensors model")
        checkpoints.check_tensors(f"{flag} {path}", config, tensors, strict=True)
    return config


def tokenizer_of(path: str, flag: str = "--model") -> Any:
    """Of a folder or a hub name. Raises ConfigError, one line that starts with the flag."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises of everything for a file that is no tokenizer
        raise ConfigError(f"{flag} {path}: {_line(error)}; allowed: a model with its tokenizer") from None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its own report of what it loaded, which ours would follow."""
    from transformers.utils import logging

    before, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if shown:
            logging.enable_progress_bar()


def _collecting_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' attention function: plain causal attention of one sequence, shown to the collector."""
    output = getattr(getattr(module, "o_proj", None), "weight", None)
    states = module.sts_running["states"][0]
    module.sts_running["collect"](Seen(module.layer_idx, query[0], key[0], value[0], scaling, states, output))
    group = query.shape[1] // key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(group, 1),
        value.repeat_interleave(group, 1),
        scale=scaling,
        is_causal=True,
    )
    return out.transpose(1, 2).contiguous(), None


def read_config(flag: str, path: str) -> dict[str, Any]:
    """config.json of a folder or of a model in the hub's cache, fetched if need be."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id
    from transformers.utils import cached_file

    if os.sep in path and not os.path.isdir(path):
        try:
            validate_repo_id(path)
        except HFValidationError:  # a path, of which the hub's words would make no sense
            problem = "not a folder" if os.path.exists(path) else "no such folder"
            raise ConfigError(f"{flag} {path}: {problem}; allowed: a model folder or hub name") from None
    try:
        file = Path(path) / "config.json" if os.path.isdir(path) else Path(cached_file(path, "config.json"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {path}: {_line(error)}; allowed: a model folder or hub name") from None
    return checkpoints.read_config(f"{flag} {path}", file.parent)


def _weights(path: str) -> dict[str, torch.Tensor]:
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file

    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(path))
    if not checkpoints.check_folder(f"--draft {path}", folder):
        raise ConfigError(f"--draft {path}: holds no safetensors files; allowed: a head saved as safetensors")
    files = checkpoints.safetensors(folder)
    weights = {name: w for file in files for name, w in load_file(file).items()}
    return {name.removeprefix("model."): w for name, w in weights.items()}


def _line(error: Exception) -> str:
    return quoted(str(error) or type(error).__name__, 160)
