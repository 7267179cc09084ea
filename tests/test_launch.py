"""How the configuration arrives: command lines, `sgl.Engine`, environment; and how a bad one ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.server


def run(command: list[str], folder=None, **env: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "SGLANG_PLATFORM": "sts_cpu",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
        **env,
    }
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)


def flags(pair) -> list[str]:
    return [
        *("--model-path", str(pair["target"]), "--device", "cpu", "--dtype", "float32"),
        *("--attention-backend", "sts", "--speculative-algorithm", "STANDALONE"),
        *("--speculative-draft-model-path", str(pair["draft"]), "--host", "127.0.0.1"),
    ]


TREE = [
    "--speculative-eagle-topk",
    "4",
    "--speculative-num-steps",
    "3",
    "--speculative-num-draft-tokens",
    "8",
]
LAUNCH_SERVER = ["-m", "sglang.launch_server"]
SGLANG_SERVE = ["-c", "from sglang.cli.main import main; main()", "serve"]


@pytest.mark.parametrize(
    ("launcher", "extra", "env", "needle"),
    [
        (LAUNCH_SERVER, ["--sts-config", '{"kep": 0.1}'], {}, "sts_config: unknown key 'kep'"),
        (SGLANG_SERVE, [], {"STS_CONFIG": '{"keep": 2}'}, "sts_config.keep"),
        (LAUNCH_SERVER, ["--page-size", "16", *TREE], {}, "--speculative-eagle-topk 1"),
    ],
    ids=["flag", "serve-env", "refusal"],
)
def test_command_line_ends_in_one_line_and_code_2(pair, launcher, extra, env, needle):
    done = run([sys.executable, *launcher, *flags(pair), *extra], **env)
    assert done.returncode == 2, done.stderr[-2000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert needle in errors[0]
    assert "Traceback" not in done.stderr


ENGINE = """
import json, os, sys
import sglang as sgl

def options(**extra):
    return dict(model_path={target!r}, device="cpu", dtype="float32", attention_backend="sts",
        speculative_algorithm="STANDALONE", speculative_draft_model_path={draft!r},
        speculative_num_steps=3, speculative_eagle_topk=4, speculative_num_draft_tokens=8,
        max_total_tokens=4096, max_running_requests=4, context_length=2048, skip_server_warmup=True, **extra)

found = {{}}
for name, kwargs in (
    ("bad", dict(sts_config={{"keep": 0}})),
    ("without", dict(sts_config={{}}, attention_backend="torch_native")),
):
    try:
        sgl.Engine(**{{**options(), **kwargs}})
    except ValueError as error:
        found[name] = str(error)
engine = sgl.Engine(**options(sts_config={{"policy": "top_p", "top_p": 0.9, "budget": 64, "recent": 8}}))
found["env"] = json.loads(os.environ["STS_CONFIG"])
for name, kwargs in (("other", dict(sts_config={{"keep": 0.5}})), ("default", {{}})):
    try:
        sgl.Engine(**options(**kwargs))
    except ValueError as error:
        found[name] = str(error)
answer = engine.generate(input_ids=[i % 250 for i in range(600)],
                         sampling_params=dict(max_new_tokens=24, temperature=0, ignore_eos=True))
found["tokens"] = len(answer["output_ids"])
found["sts"] = engine.get_server_info()["internal_states"][0]["sts"]
engine.shutdown()
print("FOUND " + json.dumps(found))
"""


def test_engine_takes_a_dict_and_refuses_a_second_config(pair):
    script = (
        f'if __name__ == "__main__":\n    exec({ENGINE.format(**{k: str(v) for k, v in pair.items()})!r})'
    )
    done = run([sys.executable, "-c", script], STS_CONFIG='{"keep": 0.7}')
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert "sts_config.keep" in found["bad"]
    assert "--attention-backend sts" in found["without"]
    # The argument won over the environment, which now holds the canonical form for the children.
    assert (found["env"]["policy"], found["env"]["keep"]) == ("top_p", 0.1)
    assert "another config" in found["other"]
    assert "another config" in found["default"]  # the user's environment still says keep 0.7
    assert found["tokens"] == 24
    counters = found["sts"]["counters"]
    assert counters["sparse_verifies"] > 0
    assert counters["dense_verifies"] == 0
    assert 12 / 624 < counters["keep_ratio"] <= 64 / 600 + 0.001
    assert found["sts"]["config"]["policy"] == "top_p"


PREBUILT = """
import gc, json, os, sys
from sglang.srt.server_args import ServerArgs

def build(**extra):
    return ServerArgs(model_path={target!r}, device="cpu", dtype="float32", attention_backend="sts",
        speculative_algorithm="STANDALONE", speculative_draft_model_path={draft!r}, page_size=1,
        speculative_num_steps=3, speculative_eagle_topk=1, speculative_num_draft_tokens=4,
        max_total_tokens=4096, max_running_requests=4, context_length=2048, skip_server_warmup=True,
        log_level="error", **extra)

# Before any plugin is loaded.
plain = build()
refused = build(enable_custom_logit_processor=True)

import sglang as sgl
from sglang.srt.entrypoints.engine import Engine
found = {{}}

class Unchecked(Engine):
    @classmethod
    def _launch_scheduler_processes(cls, *args):
        if "map" in sys.argv:  # another one, and valid, when the launch has checked the first
            with open("head_map.json", "a") as file:
                file.write(" ")
        else:
            os.environ.pop("STS_CHECKED")
        return super(Unchecked, cls)._launch_scheduler_processes(*args)

def refusal(name, engine, args):
    try:
        engine(server_args=args)
    except (ValueError, RuntimeError) as error:
        found[name] = str(error)

if len(sys.argv) > 1:
    # SGLang leaves messages to the scheduler that is not there: whoever collects its zmq context, at any time
    # or at exit, may wait for ever for them to be read.
    gc.disable()
config = dict(keep=0.5, budget=64)
if "map" in sys.argv:
    config["head_map"] = "head_map.json"
os.environ["STS_CONFIG"] = json.dumps(config)
refusal("refused", sgl.Engine, refused)
if len(sys.argv) > 1:
    refusal("unchecked", Unchecked, plain)
else:
    engine = sgl.Engine(server_args=plain)
    greedy = dict(max_new_tokens=8, temperature=0, ignore_eos=True)
    for name, keep in (("keep", 7), ("served", 0.25)):
        params = {{**greedy, "custom_params": {{"sts": {{"keep": keep}}}}}}
        try:
            answer = engine.generate(input_ids=list(range(200)), sampling_params=params)
            found[name] = len(answer["output_ids"])
        except ValueError as error:
            found[name] = str(error)
    found["sts"] = engine.get_server_info()["internal_states"][0]["sts"]
    engine.shutdown()
print("FOUND " + json.dumps(found), flush=True)
if len(sys.argv) > 1:
    os._exit(0)
"""


def prebuilt(pair, *argv: str, folder=None) -> tuple[dict, str]:
    """What was found, and stderr."""
    script = PREBUILT.format(**{k: str(v) for k, v in pair.items()})
    done = run([sys.executable, "-c", f'if __name__ == "__main__":\n    exec({script!r})', *argv], folder)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("FOUND ")), done.stderr


def test_arguments_built_before_plugins_load_are_checked_all_the_same(pair):
    found, _ = prebuilt(pair)
    assert found["refused"].startswith("--enable-custom-logit-processor: ")
    assert found["keep"].startswith("custom_params.sts.keep: got 7")
    assert found["served"] == 8
    assert found["sts"]["config"]["keep"] == 0.5
    assert found["sts"]["counters"]["sparse_verifies"] > 0


def test_a_scheduler_that_nobody_checked_ends_in_one_line(pair):
    found, err = prebuilt(pair, "scheduler")
    assert "died during initialization" in found["unchecked"]
    ours = [line for line in err.splitlines() if "was not checked" in line]
    assert len(ours) == 1 and ours[0].startswith("sts_sglang: --attention-backend sts: ")
    assert "Traceback" not in err, err[-3000:]


def test_a_head_map_that_changed_since_the_launch_ends_its_scheduler_in_one_line(pair, tmp_path):
    shapes = {}
    for name in ("target", "draft"):
        read = json.loads((pair[name] / "config.json").read_text())
        keys = {
            "layers": "num_hidden_layers",
            "q_heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
        }
        shapes[name] = {key: read[field] for key, field in keys.items()}
    sources = [[[[0, 0]]] * shapes["target"]["kv_heads"]] * shapes["target"]["layers"]
    head_map = {"version": 1, "shift": 1, "tp": 1, **shapes, "sources": sources}
    (tmp_path / "head_map.json").write_text(json.dumps(head_map))
    found, err = prebuilt(pair, "map", folder=tmp_path)
    assert "died during initialization" in found["unchecked"]
    ours = [line for line in err.splitlines() if "sts_config.head_map_sha256" in line]
    assert len(ours) == 1 and ours[0].startswith("sts_sglang: ")
    assert "Traceback" not in err, err[-3000:]
