"""benchmarks/time_evaluate.py: what is timed, without a server, and the head that it writes."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import dummy_models, time_evaluate
from sts_sglang import checkpoints
from sts_sglang.evaluate import asking, command, items, pair, recall
from sts_sglang.evaluate.asking import Reply
from sts_sglang.tools.tiny_pair import make_pair

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 16, "draft_vocab_size": 96}


def answered(client, make, count, cells, concurrency, progress) -> None:
    """In place of a server's answers: nothing is right, and a round brings two tokens."""
    for cell in cells:
        cell.seconds += 0.5
        for group in range(count):
            cell.add(Reply(0.0 if cell.task != items.LOSS else -9.0, 9, 4, "0"), group)


def test_no_task_is_left_out_of_the_time(tmp_path, monkeypatch, capsys):
    models = make_pair(tmp_path)
    server = contextlib.nullcontext(SimpleNamespace())
    monkeypatch.setattr(pair, "start", lambda *args, **given: server)
    monkeypatch.setattr(recall, "measure", lambda *args: {})
    monkeypatch.setattr(command, "_origin", lambda *args: {})
    monkeypatch.setattr(asking, "Client", lambda server: None)
    monkeypatch.setattr(asking, "dense_score", lambda *args: 0.0)
    monkeypatch.setattr(asking, "measure", answered)
    monkeypatch.setattr(asking, "verified_as_said", lambda *args, **given: True)
    words = ["--target", str(models["target"]), "--draft", str(models["eagle3"]), "--device", "cpu"]
    words += ["--lengths", "4096", "--items", "3", "--keeps", "0.1", "0.2"]
    found = time_evaluate.timed(words)
    tasks = {*items.TASKS, *items.CHATS, items.LOSS}
    assert found["seconds_by_task"] == dict.fromkeys(tasks, 1.5)
    assert found["requests"] == len(tasks) * 3 * 3 and found["keeps"] == [0.1, 0.2, 1.0]
    assert found["tokens_a_round"] == 2.0 and found["lengths"] == [4096]
    assert found["seconds"].keys() == {"recall", "serving", "asking", "starting", "whole"}
    assert items.GOOD_ENOUGH == 0.6, "as the product has it"
    with pytest.raises(SystemExit):
        time_evaluate.timed([*words, "--keeps", "2"])
    assert "--keeps" in capsys.readouterr().err


def test_the_head_has_the_tensors_of_its_configuration(tmp_path, monkeypatch):
    shape = {**dummy_models.SHAPES["llama-8b-eagle3"], **TINY}
    monkeypatch.setitem(dummy_models.SHAPES, "llama-8b-eagle3", shape)
    path = time_evaluate.make_head("llama-8b-eagle3", tmp_path, torch.bfloat16)
    config, tensors = json.loads((path / "config.json").read_text()), checkpoints.check_folder("", path)
    checkpoints.check_tensors("", config, tensors, strict=True)
    assert tensors["fc.weight"].shape == (64, 192) and tensors["d2t"].shape == (96,)
    assert tensors["lm_head.weight"].dtype == "BF16"
