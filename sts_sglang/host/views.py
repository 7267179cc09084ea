"""SGLang's objects as this project's plain values. Whoever needs a field of one asks here.

Every class that a function below is annotated with stands in `FIELDS` of the release's table, with the fields
that are read, and a launch ends where one of them is gone: a `getattr` with a default would silently change
what is meant.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sts_kernels.layout import FP8, Contexts, KvPool
from sts_sglang.core.ranks import ALONE, Ranks
from sts_sglang.core.request import Finished, Request
from sts_sglang.headmap import HeadCounts, ModelPaths
from sts_sglang.host.architectures import OWN_LAYERS
from sts_sglang.host.releases import release

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.eagle_info import EagleDraftExtendInput, EagleDraftInput, EagleVerifyInput
    from transformers import PretrainedConfig

    from sts_sglang.config import StsConfig


# What the backends owe this release beyond the methods that every release asks for: class decorators.
offers_tree_mask = release.offers_tree_mask
reads_table_to_the_end = release.reads_table_to_the_end
captured_draft_extend = release.captured_draft_extend
# And what FA3 is told once it is made.
reads_own_kv = release.reads_own_kv


class Mode(enum.Enum):
    """What a forward is, as far as attention differs."""

    IDLE = enum.auto()
    DECODE = enum.auto()  # of the target without speculation, or a step of the draft
    VERIFY = enum.auto()
    DRAFT_EXTEND = enum.auto()  # the draft catches up with what was accepted
    PREFILL = enum.auto()


def mode(batch: ForwardBatch) -> Mode:
    """Raises RuntimeError for a kind of forward that no code here was written for."""
    of_batch: ForwardMode = batch.forward_mode
    kinds = (
        (of_batch.is_idle, Mode.IDLE),
        (of_batch.is_decode, Mode.DECODE),
        (of_batch.is_target_verify, Mode.VERIFY),
        (of_batch.is_draft_extend_v2, Mode.DRAFT_EXTEND),
        (of_batch.is_extend, Mode.PREFILL),
    )
    found = next((kind for holds, kind in kinds if holds()), None)
    if found is None:
        raise RuntimeError(f"STS: a forward of mode {of_batch!r} is not served")
    return found


class Batch(NamedTuple):
    """The requests of a forward: how many, and int [bs] each, rows in the table of slots and lengths."""

    size: int
    reqs: torch.Tensor
    lens: torch.Tensor

    def contexts(self, table: torch.Tensor) -> Contexts:
        """With the table that holds their slots."""
        return Contexts(table, self.reqs, self.lens)


def requests_of(batch: ForwardBatch) -> Batch:
    return Batch(batch.batch_size, batch.req_pool_indices, batch.seq_lens)


def committed(batch: ForwardBatch) -> Batch:
    """Of a verify or a decode step, with the lengths before its own tokens: a verify's do not count them, a
    decode step's do."""
    size, reqs, lens = requests_of(batch)
    return Batch(size, reqs, lens - 1 if mode(batch) == Mode.DECODE else lens)


class Rows(NamedTuple):
    """New tokens of each request of a prefill: int [bs] each, tokens before them and how many they are."""

    before: torch.Tensor
    number: torch.Tensor


def new_rows(batch: ForwardBatch) -> Rows:
    """Of a prefill or a draft-extend."""
    return Rows(batch.extend_prefix_lens, batch.extend_seq_lens)


class HostRows(NamedTuple):
    """`Rows` on the host, a number a request."""

    before: list[int]
    number: list[int]


def new_rows_on_host(batch: ForwardBatch) -> HostRows:
    """Of a prefill. Raises RuntimeError where SGLang has them on the device only."""
    before, number = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
    if before is None or number is None:
        raise RuntimeError("STS: SGLang runs a prefill without saying on the host how long it is")
    return HostRows(before, number)


def written(batch: ForwardBatch) -> torch.Tensor:
    """int64 [N]: slots that this forward writes."""
    return batch.out_cache_loc


class Tree(NamedTuple):
    """The tokens that a verify batch checks: T a request, in `topk` branches at most.

    mask: bool, which token sees which, in one of SGLang's two layouts; None for a chain.
    """

    tokens: int
    topk: int
    mask: torch.Tensor | None


def tree(batch: ForwardBatch) -> Tree:
    """Of a verify; a decode step checks nothing, and has one token."""
    if mode(batch) == Mode.DECODE:
        return Tree(1, 1, None)
    spec: EagleVerifyInput = batch.spec_info
    return Tree(spec.draft_token_num, spec.topk, spec.custom_mask)


class Accepted(NamedTuple):
    """What a draft-extend catches up with: all `width` tokens of a request run, of which the first `number`
    [bs] were accepted."""

    number: torch.Tensor
    width: int


def accepted(batch: ForwardBatch) -> Accepted:
    """Of a draft-extend. Raises RuntimeError where SGLang does not say how many were accepted."""
    spec: EagleDraftExtendInput = batch.spec_info
    if spec.num_accept_tokens is None:
        raise RuntimeError("STS: SGLang runs a draft-extend without saying how many tokens were accepted")
    if spec.num_tokens_per_req <= 0:  # what its base class says, where it does not say so itself
        raise RuntimeError("STS: SGLang runs a draft-extend without saying how many tokens a request has")
    return Accepted(spec.num_accept_tokens, spec.num_tokens_per_req)


class Layer(NamedTuple):
    """An attention layer: number, heads and sizes on this rank, scale of the logits."""

    number: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float


def layer(of_model: RadixAttention) -> Layer:
    return Layer(
        of_model.layer_id,
        of_model.tp_q_head_num,
        of_model.tp_k_head_num,
        of_model.qk_head_dim,
        of_model.v_head_dim,
        of_model.scaling,
    )


def attention_layers(of_model: ModelRunner) -> Iterator[RadixAttention]:
    """Every attention layer of a loaded model."""
    from sglang.srt.layers.radix_attention import RadixAttention

    model: torch.nn.Module = of_model.model
    return (module for module in model.modules() if isinstance(module, RadixAttention))


def beyond_plain(of_model: RadixAttention) -> str | None:
    """What an attention layer does beyond attending to every token before it, or None."""
    from sglang.srt.layers.radix_attention import AttentionType

    found = {
        f"a window of {of_model.sliding_window_size}": of_model.sliding_window_size != -1,
        f"a soft cap of {of_model.logit_cap}": of_model.logit_cap > 0,
        f"attention of kind {of_model.attn_type}": of_model.attn_type != AttentionType.DECODER,
        "cross attention": of_model.is_cross_attention,
        "chunks": of_model.use_irope,
        "a temperature by position": of_model.xai_temperature_len > 0,
    }
    return next((what for what, there in found.items() if there), None)


class Scales(NamedTuple):
    """By which the stored keys and values of a layer are multiplied to be those that were meant."""

    k: float
    v: float


def scales(of_model: RadixAttention) -> Scales:
    """Of a layer whose KV is FP8. Raises RuntimeError where SGLang would write by other scales than it reads
    by: it divides by tensors, and some of its backends multiply by numbers."""
    tensors = of_model.k_scale is None, of_model.v_scale is None
    numbers = of_model.k_scale_float is None, of_model.v_scale_float is None
    if tensors != numbers or numbers[0] != numbers[1]:
        raise RuntimeError(
            f"STS: layer {of_model.layer_id} has scales of keys and values that no checkpoint brought"
        )
    return Scales(1.0, 1.0) if numbers[0] else Scales(of_model.k_scale_float, of_model.v_scale_float)


class Pools:
    """The KV pools of a model (core.round.KvPools).

    of_layer: what the scales of each layer are, by its number, where its KV is FP8.
    """

    def __init__(self, pool: MHATokenToKVPool, of_layer: dict[int, Scales]):
        self._pool, self._of_layer = pool, of_layer

    def layer(self, number: int) -> KvPool:
        """[slots, H_kv, D] keys and values of a layer, and their scales: as SGLang does, KV that is not FP8
        is written without, and so it is read."""
        pool: MHATokenToKVPool = self._pool
        k, v = pool.get_key_buffer(number), pool.get_value_buffer(number)
        return KvPool(k, v, *self._of_layer[number]) if k.dtype in FP8 else KvPool(k, v)

    @property
    def scaled(self) -> bool:
        """Whether a layer has scales other than 1, if its KV is FP8 or not."""
        return any(of_layer != (1, 1) for of_layer in self._of_layer.values())

    def write(self, k, v, of_model: RadixAttention, batch: ForwardBatch) -> None:
        """Store this forward's keys and values at their slots. What becomes FP8 is divided by its scale, in
        its own place."""
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        pool: MHATokenToKVPool = self._pool
        place = KVWriteLoc(written(batch), None)
        pool.set_kv_buffer(of_model, place, k, v, of_model.k_scale, of_model.v_scale)

    @property
    def tokens(self) -> int:
        """Tokens that fit; rows of a buffer are a page more."""
        pool: MHATokenToKVPool = self._pool
        return pool.size

    @property
    def slots(self) -> int:
        return self.layer(0).k.shape[0]

    def nbytes(self) -> int:
        pool: MHATokenToKVPool = self._pool
        return sum(pool.get_kv_size_bytes())


def pools(of_model: ModelRunner) -> Pools:
    """Of a model that is loaded."""
    of_layer = {layer.layer_id: scales(layer) for layer in attention_layers(of_model)}
    return Pools(of_model.token_to_kv_pool, of_layer)


def fa3(backend: FlashAttentionBackend) -> Callable[..., torch.Tensor]:
    """Paged attention by FA3 (`flash_attn_with_kvcache` of sgl_kernel), the one that the backend calls."""
    return backend.flash_attn_with_kvcache


class Runner(NamedTuple):
    """A model that runs in this process.

    table: int32 [requests, width], the slot of every position of every request.
    """

    device: str
    dtype: torch.dtype
    model: Model
    pools: Pools
    table: torch.Tensor


def runner(of_model: ModelRunner) -> Runner:
    return Runner(
        str(of_model.device),
        of_model.dtype,
        model(of_model.model_config),
        pools(of_model),
        slots_of(of_model.req_to_token_pool),
    )


def slots_of(pool: ReqToTokenPool) -> torch.Tensor:
    """int32 [requests, width]: the slot of every position of every request."""
    return pool.req_to_token


class Model(NamedTuple):
    """A model's shape: of all ranks together, or of one."""

    counts: HeadCounts
    head_dim: int
    dtype: torch.dtype
    context_len: int

    def of_rank(self, ranks: int) -> Model:
        """Of one of so many."""
        return self._replace(counts=self.counts.of_rank(ranks))

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.counts.q_heads // self.counts.kv_heads

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Of one token in a KV pool of this dtype."""
        return self.counts.layers * self.counts.kv_heads * 2 * self.head_dim * dtype.itemsize


def own_layer(config: ModelConfig) -> bool:
    """Whether a draft is the layer that a model has for the next token but one; its configuration is that of
    the whole model."""
    own: PretrainedConfig = config.hf_config
    return own.architectures[0] in OWN_LAYERS.values()


def model(config: ModelConfig) -> Model:
    counts = HeadCounts(
        layers=1 if own_layer(config) else config.num_hidden_layers,
        q_heads=config.num_attention_heads,
        kv_heads=config.get_total_num_kv_heads(),
    )
    return Model(counts, config.head_dim, config.dtype, config.context_len)


class KvAsked(NamedTuple):
    """What a launch wants KV to be kept as: the flag or key that says so, and its value."""

    flag: str
    value: str

    @property
    def fp8(self) -> bool:
        return self.value == "fp8_e4m3"

    def dtype(self, of_model: torch.dtype) -> torch.dtype:
        """Of the KV of a model that runs in that dtype."""
        return torch.float8_e4m3fn if self.fp8 else of_model


def kv_asked(args: ServerArgs, *, of_draft: StsConfig | None = None) -> KvAsked:
    """Of the target's KV, or of the draft's under a configuration: it is kept alike unless that, or a flag
    that a release has for it, says otherwise."""
    if of_draft is not None and of_draft.draft_kv != "auto":
        return KvAsked("sts_config.draft_kv", of_draft.draft_kv)
    own = None if of_draft is None else release.draft_kv_dtype(args)
    return KvAsked(*own) if own else KvAsked("--kv-cache-dtype", args.kv_cache_dtype)


def keep_kv_as(runner: ModelRunner, asked: KvAsked) -> None:
    """Before a runner has a pool."""
    runner.kv_cache_dtype = asked.dtype(runner.dtype)


def ranks(args: ServerArgs) -> Ranks:
    """Of a launch, once its processes know each other."""
    from sglang.srt.distributed.parallel_state import get_tp_group

    if args.tp_size == 1:
        return ALONE
    group: GroupCoordinator = get_tp_group()
    return Ranks(group.rank_in_group, group.world_size, group.cpu_group)


def paths(args: ServerArgs) -> ModelPaths:
    """Where the weights of a launch are."""
    return ModelPaths(
        args.model_path,
        args.speculative_draft_model_path,
        args.revision,
        args.speculative_draft_model_revision,
    )


def requests(batch: ScheduleBatch) -> list[Request]:
    """Of a batch that the scheduler runs."""
    return [request(req) for req in batch.reqs]


def prefills(batch: ScheduleBatch) -> bool:
    of_batch: ForwardMode = batch.forward_mode
    return of_batch.is_extend()


def batch_of(batch: ScheduleBatch) -> Batch:
    """`requests_of` a batch that the scheduler runs, a prefill's new tokens counted."""
    return Batch(len(batch.reqs), batch.req_pool_indices, batch.seq_lens)


def new_rows_of(batch: ScheduleBatch) -> HostRows:
    """`new_rows_on_host` of a prefill that the scheduler runs."""
    return HostRows(batch.prefix_lens, batch.extend_lens)


def as_known(batch: ScheduleBatch) -> tuple[ScheduleBatch, torch.Tensor]:
    """A prefill before anything is sampled, to be changed without the scheduler's notice; and int64 [bs], in
    place of the tokens that follow, the last ones of each request: where a prompt goes on, SGLang goes by
    that."""
    return copy.copy(batch), batch.input_ids[_last_places(batch)]


def next_is_known(batch: ScheduleBatch) -> bool:
    """Whether nothing that is sampled counts: all of a prefill is a chunk of a prompt that goes on."""
    goes_on = batch.chunked_req if batch.chunked_req_next_prompt_token is not None else None
    return all(req is goes_on for req in batch.reqs)


def last_rows_of(batch: ScheduleBatch) -> ScheduleBatch:
    """A prefill of nothing but the last new token of each request, the others being there."""
    last, rows = copy.copy(batch), new_rows_of(batch)
    places = _last_places(batch)
    last.input_ids, last.out_cache_loc = batch.input_ids[places], batch.out_cache_loc[places]
    last.prefix_lens = [before + number - 1 for before, number in zip(*rows, strict=True)]
    last.extend_lens, last.extend_num_tokens = [1] * len(last.prefix_lens), len(last.prefix_lens)
    return last


def _last_places(batch: ScheduleBatch) -> torch.Tensor:
    """int64 [bs]: where the last new token of each request of a prefill is."""
    tokens: torch.Tensor = batch.input_ids
    ends = torch.tensor(batch.extend_lens).cumsum(0) - 1
    return ends.to(tokens.device, non_blocking=True)


def followed_by(read: EagleDraftInput, tokens: torch.Tensor) -> EagleDraftInput:
    """What a draft made of a prefill, with the tokens [bs] that the target has sampled since."""
    read.bonus_tokens = tokens
    return read


def request(req: Req) -> Request:
    params: SamplingParams = req.sampling_params
    return Request(req.rid, release.pool_row(req), req.origin_input_ids, req.output_ids, params.custom_params)


def asked_of(received: TokenizedGenerateReqInput) -> Mapping[str, object] | None:
    """The `custom_params` of a request that reaches the scheduler."""
    params: SamplingParams = received.sampling_params
    return params.custom_params


def keep_apart(received: TokenizedGenerateReqInput, mark: str) -> None:
    """Of the prefix cache: it shares prefixes with requests of the same mark alone, and among those, as ever,
    with those of the same key of their own."""
    received.extra_key = mark + (received.extra_key or "")


def finished(req: Req) -> Finished | None:
    """A request that has ended and still owns its slots, else None."""
    if release.pool_row(req) is None or not req.finished():
        return None
    return Finished(request(req), req.output_ids_through_stop, release.committed(req), req.cached_tokens)


def table_of(cache: BasePrefixCache) -> torch.Tensor:
    return slots_of(cache.req_to_token_pool)


class Phase(NamedTuple):
    """CUDA graphs of one kind of forward: whether there are any, SGLang's word for how, the largest batch."""

    captured: bool
    backend: Any
    largest: int


def resolved(args: ServerArgs) -> ServerArgs:
    """Server arguments as SGLang resolved them. What is annotated as ServerArgs elsewhere is either these or,
    before the launch resolves them, the arguments as given."""
    return release.resolved(args)


def decode_graphs(args: ServerArgs) -> Phase:
    graphs: CudaGraphConfig = args.cuda_graph_config
    return _phase(graphs.decode)


def prefill_graphs(args: ServerArgs) -> Phase:
    graphs: CudaGraphConfig = args.cuda_graph_config
    return _phase(graphs.prefill)


def _phase(phase: PhaseConfig) -> Phase:
    from sglang.srt.model_executor.cuda_graph_config import Backend

    captured = phase.backend != Backend.DISABLED
    return Phase(captured, phase.backend, max(phase.bs or [phase.max_bs or 0]) if captured else 0)
