"""The trained pair and the code that made it: disjoint halves, causal students, a served needle."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "models"))

import accept  # noqa: E402
import exam  # noqa: E402
import tasks  # noqa: E402
import train  # noqa: E402
import wording  # noqa: E402
from model import DRAFT, TARGET, Config, Llama, Trace  # noqa: E402
from students import EagleHead, Students, tail_loss  # noqa: E402

MODELS = exam.SHIPPED
WORDS = json.loads((ROOT / "benchmarks" / "models" / "words.json").read_text())


@pytest.fixture(scope="module")
def heldout() -> tasks.Writer:
    return exam.heldout(None)


@pytest.fixture(scope="module")
def training(heldout: tasks.Writer) -> tasks.Writer:
    return tasks.Writer(heldout.tok, WORDS, "train", heldout.text)


def pools() -> list[wording.Pool]:
    return [
        wording.Pool(half, [w for w in WORDS if wording.half(w) == half], random.Random(0))
        for half in ("train", "test")
    ]


def test_words_names_values_and_attributes_are_disjoint():
    drawn = []
    for pool in pools():
        texts = [draw() for _ in range(3000) for draw in (pool.number, pool.value, pool.made_up)]
        names = [draw() for _ in range(3000) for draw in (pool.key, pool.identifier, pool.path)]
        attributes = wording.DATA["attributes"][pool.split] + [pool.attribute() for _ in range(3000)]
        drawn.append((set(pool.words), set(texts), set(names), set(attributes)))
    for of_training, of_test in zip(*drawn, strict=True):
        assert of_training and of_test
        assert not of_training & of_test


def test_wording_is_disjoint():
    slots = {"a": "port", "k": "amber", "v": "481", "b": "481"}
    for what, sentences in wording.TEST.items():
        if what == "preamble":  # the empty one is in both
            continue
        pool = pools()[0]
        said = {pool.say(what, **slots).lower() for _ in range(3000)}
        assert not said & {s.format(**slots).lower() for s in sentences}


@pytest.mark.parametrize("length", [128, 700, 4096])
def test_a_row_has_its_length(training: tasks.Writer, length: int):
    rng = random.Random(length)
    for _ in range(20):
        row = training.row(length, rng)
        assert len(row.ids) == len(row.kinds) == length


def test_hidden_lines_keep_their_tokens_when_the_text_is_tokenised_as_a_whole(training: tasks.Writer):
    rng = random.Random(3)
    for _ in range(20):
        task = tasks.retrieval(training.pool(rng), 8)
        row = training.conversation(task, 1500, rng)
        whole = training.encode(training.tok.decode(row.ids, skip_special_tokens=False))
        joined = " ".join(map(str, whole))
        for line in task.lines:
            assert " ".join(map(str, training.encode(line + "\n"))) in joined


@pytest.mark.parametrize("name", tasks.EXAM)
def test_an_examination_holds_what_it_asks_for(heldout: tasks.Writer, name: str):
    row, question = heldout.examination(name, 2048, random.Random(1))
    text = heldout.tok.decode(row.ids, skip_special_tokens=False)
    assert len(row.ids) == 2048 - tasks.ROOM
    assert text.endswith(f"{question.ask}<|end|><|assistant|>")
    assert all(value in text for value in question.values)
    assert exam.score(question.answer, question) == 1


def test_batches_depend_on_seed_and_step_only(training: tasks.Writer):
    plan = train.PLANS["curriculum"]
    one, other = (train.Batches(training, plan, 10, 1024, 512, seed) for seed in (0, 1))
    assert torch.equal(one[3][0], one[3][0])
    assert not torch.equal(one[3][0], other[3][0])
    assert one.length(0) == 128 and one.length(9) == 512


def small_llama() -> Llama:
    return Llama(Config(64, 2, 2, 1, 64)).eval()


def test_the_eagle_chain_sees_no_token_before_it_is_drafted():
    target, head, roots = Llama(TARGET), EagleHead(), torch.tensor([[5, 20]])
    ids = torch.randint(0, 2048, (1, 40))

    def chain(of: torch.Tensor) -> list[torch.Tensor]:
        trace = Trace([], [], [])
        target(of, trace)
        return head.chains(target, of, trace.states, roots)

    with torch.no_grad():
        before = chain(ids)
        for ahead in (1, 2, 3, 4):
            changed = ids.clone()
            changed[0, 20 + ahead] = (changed[0, 20 + ahead] + 1) % 2048
            moved = [not torch.equal(a[1], b[1]) for a, b in zip(before, chain(changed), strict=True)]
            # Step s reads up to the root's s + 1st next token.
            assert moved == [ahead <= step + 1 for step in range(3)]


def test_students_leave_the_target_alone():
    target, students = Llama(TARGET), Students()
    ids = torch.randint(0, 2048, (1, 512))
    kinds = torch.randint(0, 3, (1, 512)).to(torch.int8)
    trace = Trace([], [], [])
    target(ids, trace)
    loss, _ = students.losses(target, ids, kinds, trace)
    loss.backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None for p in students.parameters())


def test_tail_loss_is_the_mass_no_few_tokens_hold():
    L, D = 512, 64
    rows = torch.tensor([[400]])
    keys = torch.zeros(L, 1, D)
    uniform = tail_loss(Trace([], [torch.zeros(L, 1, D)], [keys]), rows)
    far = 400 - 64 - 4 + 1
    assert uniform == pytest.approx((far - int(0.03 * L)) / 401, rel=1e-4)
    keys[100] = 100.0
    assert tail_loss(Trace([], [torch.ones(L, 1, D)], [keys]), rows) < 1e-4


def test_generation_with_a_cache_equals_generation_without():
    model, ids = small_llama(), torch.randint(0, 2048, (2, 30))
    with torch.no_grad():
        out, longer = model.generate(ids, 8), ids
        for _ in range(8):
            last = model.logits(model(longer).unflatten(0, (2, -1))[:, -1])
            longer = torch.cat([longer, last.argmax(-1)[:, None]], 1)
    assert torch.equal(out, longer[:, 30:])


def test_training_saves_and_resumes(tmp_path: Path, heldout: tasks.Writer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        tasks.Writer, "of_corpus", lambda *_: tasks.Writer(heldout.tok, WORDS, "train", heldout.text)
    )
    fixed = f"train --corpus . --out {tmp_path} --steps 4 --tokens 128 --longest 128 --workers 0".split()
    fixed += ["--device", "cpu", "--no-compile", "--students", "--every", "1"]
    for more, steps in (["--stop", "2"], 2), (["--resume", str(tmp_path)], 4):
        monkeypatch.setattr(sys, "argv", [*fixed, *more])
        train.main()
        assert json.loads((tmp_path / "eagle.json").read_text())["step"] == steps
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(("name", "config"), [("target", TARGET), ("draft", DRAFT)])
def test_shipped_weights_are_those_of_hugging_face(name: str, config: Config):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    ids = torch.randint(10, 2048, (1, 300))
    model = exam.load(MODELS, name, "cpu")
    with torch.no_grad():
        assert torch.allclose(model.logits(model(ids)).float(), theirs(ids).logits[0], atol=1e-3)
    assert theirs.config.max_position_embeddings >= 32768 and model.config == config


def test_shipped_files_are_small_and_hold_no_code():
    files = [p for p in MODELS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 20e6
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md"}


def test_the_chat_template_is_the_format_of_training(heldout: tasks.Writer):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(MODELS / "target")
    said = [
        {"role": "user", "content": "x is 4"},
        {"role": "assistant", "content": "ok"},
        {"role": "tool", "content": "7"},
    ]
    text = tok.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|user|>x is 4<|end|><|assistant|>ok<|end|><|tool|>7<|end|><|assistant|>"
    assert tok(text, add_special_tokens=False)["input_ids"] == heldout.encode(text)


@pytest.mark.server
def test_a_served_needle_at_4k(tmp_path: Path, heldout: tasks.Writer, monkeypatch: pytest.MonkeyPatch):
    """With a tenth of the context the pair answers from far back, and the draft is mostly right."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    row, question = heldout.examination("single", 4096, random.Random(2), depth=0.1)
    with accept.server(MODELS, "STANDALONE", '{"keep": 0.1, "budget": 0}', tmp_path / "log", []) as running:
        answer = accept.generate(running, row.ids, 48)
    assert exam.score(answer["text"], question) == 1
    meta = answer["meta_info"]
    assert meta["completion_tokens"] / meta["spec_verify_ct"] > 2.5
