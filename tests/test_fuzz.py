"""Seeded fuzzing of everything that comes from outside: accepted and valid, or one line that names the field.

Bounded: some thousand inputs, under a minute on one slow core. A seed that fails is named in the message;
`FUZZ_SEED=7 FUZZ_TIMES=100` tries others, and more of them.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sts_sglang import checkpoints, fingerprint, headmap
from sts_sglang.config import (
    ConfigError,
    StsConfig,
    check_request,
    request_inspect,
    request_keep,
    request_prefill,
)
from sts_sglang.core import dumps
from sts_sglang.tools import inspection
from sts_sglang.tools.tiny_pair import make_pair
from tests.test_config import BAD_VALUES, EVERY_KEY, Rude, nested
from tests.test_headmap import DRAFT, TARGET, full
from tests.test_inspect import make_dump, replaced

SEED = int(os.environ.get("FUZZ_SEED", "0"))
TIMES = int(os.environ.get("FUZZ_TIMES", "1"))

ATOMS = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**70,
    10**4000,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    math.nan,
    math.inf,
]
ATOMS += [
    "",
    " ",
    "x",
    "keep",
    "ratio",
    "latest",
    "\0",
    "\n\x1b[2J",
    "\ud800",
    "é",
    "💡" * 90,
    "9" * 400,
    "NaN",
]
STRANGE = [b"bytes", (), object(), Rude(), np.float32(0.5), np.zeros(3), {1: 2}, {("a",): 1}, 3j, range(3)]
STRANGE += [10**5000, nested(3000), nested(3000, dict), int, {1, 2}]


def value(rng: random.Random, depth: int = 3, strange: bool = False) -> object:
    """Anything: of JSON, or with `strange` of Python."""
    kind = rng.random()
    if depth and kind < 0.12:
        return [value(rng, depth - 1, strange) for _ in range(rng.randrange(4))]
    if depth and kind < 0.24:
        keys = [*EVERY_KEY, "sts", "keep", "inspect", "x", "\n"]
        return {rng.choice(keys): value(rng, depth - 1, strange) for _ in range(rng.randrange(4))}
    if strange and kind < 0.4:
        return rng.choice(STRANGE)
    return rng.choice(ATOMS)


def misspelled(rng: random.Random, word: str) -> str:
    at = rng.randrange(len(word) + 1)
    return word[:at] + rng.choice([*string.ascii_lowercase, "_", "\n", ""]) + word[at + rng.randrange(2) :]


def garbled(rng: random.Random, content: bytes, first: int = 0, last: int | None = None) -> bytes:
    """A few bytes between these places flipped, taken out, doubled, or all after one cut off."""
    data = bytearray(content)
    last = len(data) if last is None else last
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, many = rng.randrange(first, max(first + 1, min(last, len(data)))), rng.choice((1, 1, 4, 40))
        how = rng.randrange(6)
        if how == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            del data[at : at + many]
        elif how == 2:
            data[at:at] = data[at : at + many]
        elif how == 3:
            data[at:at] = bytes(rng.choices(b'0123456789,:[]{}"-.eE \n\\u', k=many))
        elif how == 4:
            data[at : at + 8] = rng.choice((bytes(8), b"\xff" * 8, (2**40).to_bytes(8, "little")))
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def changed(rng: random.Random, data: object) -> object:
    """JSON with one or two places replaced, taken out or doubled."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.choice((1, 1, 2))):
        holder = data
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.8:
                holder = holder[key]
                continue
            how = rng.randrange(5)
            if how == 0:
                del holder[key]
            elif how == 1 and isinstance(holder, list):
                holder.append(holder[key])
            elif how == 2 and isinstance(holder[key], (int, float)) and abs(holder[key]) < 1e9:
                holder[key] = holder[key] + rng.choice((1, -1, 0.5, 2**40))
            else:
                holder[key] = value(rng)
            break
    return data


class Outcomes:
    """What became of the inputs; every refusal is one line that starts with the field."""

    def __init__(self):
        self.counts = Counter()

    def of(self, seed: int, fields: tuple[str, ...], call):
        """The call's result, None if it is refused."""
        try:
            found = call()
        except ConfigError as error:
            line = str(error)
            assert line.isprintable() and len(line) < 1200, (seed, line)
            assert line.startswith(fields) and ": " in line, (seed, line)
            self.counts["refused"] += 1
            return None
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}") from error
        self.counts["accepted"] += 1
        return found

    def both(self, least: int) -> None:
        """That the inputs reached both ends, so that the fuzzer says something."""
        assert min(self.counts["accepted"], self.counts["refused"]) >= least, self.counts


def seeds(count: int):
    return ((seed, random.Random(seed)) for seed in range(SEED * 10**6, SEED * 10**6 + count * TIMES))


def test_configurations_of_python_objects():
    outcomes = Outcomes()
    for seed, rng in seeds(15000):
        given = {}
        for key in rng.sample(sorted(EVERY_KEY), rng.choice((1, 1, 2, 4))):
            key = misspelled(rng, key) if rng.random() < 0.05 else key
            good = rng.choice((EVERY_KEY.get(key), getattr(StsConfig, key, None)))
            bad = rng.choice(BAD_VALUES[key][0]) if key in BAD_VALUES else None
            given[key] = rng.choice((good, good, good, bad, value(rng, strange=True)))
        if rng.random() < 0.02:
            given = value(rng, strange=True)
        config = outcomes.of(seed, ("sts_config",), lambda given=given: StsConfig.parse(given))
        if config is not None:
            assert StsConfig.parse(config.to_json()) == config, seed
            assert all(0 <= config.budget_for(n, k) <= n for n in (0, 7, 4096) for k in (None, 0.3, 1)), seed
    outcomes.both(300)


def test_configurations_as_text():
    outcomes = Outcomes()
    for seed, rng in seeds(15000):
        some = {key: EVERY_KEY[key] for key in rng.sample(sorted(EVERY_KEY), 5)}
        text = garbled(rng, json.dumps(some).encode()).decode(
            "utf-8", rng.choice(("replace", "surrogateescape"))
        )
        if rng.random() < 0.2:
            text = "{" + "".join(rng.choices(string.printable + '{}[]":,', k=rng.randrange(60)))
        config = outcomes.of(seed, ("sts_config",), lambda text=text: StsConfig.parse(text))
        if config is not None:
            assert StsConfig.parse(config.to_json()) == config, seed
    outcomes.both(100)


def test_request_parameters():
    outcomes = Outcomes()
    servers = [StsConfig(), StsConfig(inspect_dir="d"), StsConfig(request_keep="at_most", keep=0.5)]
    servers += [StsConfig(prefill="sparse"), StsConfig(prefill="sparse", request_keep="at_most")]
    servers += [StsConfig(request_keep="off", inspect_dir="d", request_inspect=False)]
    for seed, rng in seeds(15000):
        own = {"keep": rng.choice((0.5, 1, 0.9, value(rng, strange=True)))} if rng.random() < 0.7 else {}
        if rng.random() < 0.5:
            own["inspect"] = rng.choice((True, False, value(rng, strange=True)))
        if rng.random() < 0.3:
            own["prefill"] = rng.choice(("dense", "sparse", value(rng, strange=True)))
        if rng.random() < 0.3:
            own["prefill_keep"] = rng.choice((0.1, 0.5, value(rng, strange=True)))
        if rng.random() < 0.1:
            own[misspelled(rng, "keep")] = 0.5
        given = {"sts": own, "others": value(rng, strange=True)}
        if rng.random() < 0.1:
            given = rng.choice((None, value(rng, strange=True), {"sts": value(rng, strange=True)}))
        config = rng.choice(servers)
        if outcomes.of(seed, ("custom_params",), lambda: check_request(given, config) or True):  # noqa: B023
            keep = request_keep(given)
            assert keep is None or (0 < keep <= 1 and config.request_keep != "off"), seed
            assert keep is None or config.request_keep == "any" or keep <= config.share, seed
            prompt = request_prefill(given, config)
            assert prompt is None or (0 < prompt <= 1 and config.prefill == "sparse"), seed
            assert not request_inspect(given) or (config.inspect_dir and config.request_inspect), seed
    outcomes.both(300)


def test_head_maps(tmp_path):
    outcomes, path = Outcomes(), tmp_path / "map.json"
    for seed, rng in seeds(2500):
        content = json.dumps(changed(rng, full())).encode()
        path.write_bytes(garbled(rng, content) if rng.random() < 0.3 else content)
        found = outcomes.of(seed, ("head_map.",), lambda: headmap.load(str(path), TARGET, DRAFT))
        if found is not None:
            assert len(found.sources) == TARGET.layers, seed
            heads = {source for channel in found.channels for source in channel}
            assert all(0 <= i < DRAFT.layers and 0 <= h < DRAFT.q_heads for i, h in heads), seed
            channels = [c for layer in range(TARGET.layers) for c in found.head_channels(layer)]
            assert set(channels) == set(range(len(found.channels))), seed
            for row in found.split() or ():
                assert all(0 <= part <= 1 for part in row), seed
            headmap.served(StsConfig(), found)
    outcomes.both(100)


@pytest.fixture(scope="module")
def dump_bytes(tmp_path_factory):
    return dumps.write(tmp_path_factory.mktemp("dump"), make_dump()).read_bytes()


def test_dumps(tmp_path, dump_bytes):
    outcomes, path = Outcomes(), tmp_path / "x.npz"
    for seed, rng in seeds(1200):
        if rng.random() < 0.5:
            path.write_bytes(garbled(rng, dump_bytes))
        else:
            name = rng.choice(("importance", "channels", "tokens", "meta", "meta", "meta"))
            array = replaced()[name]
            if name == "meta":
                array = np.array(json.dumps(changed(rng, make_dump().meta)))
            else:
                array = rng.choice(
                    (array[:-1], array.astype(rng.choice("fdih?")), array.T, array * -3, array[:0])
                )
            np.savez(path, **replaced(**{name: array}))
        dump = outcomes.of(seed, (f"{path}: ",), lambda: dumps.read(path))
        if dump is not None:
            shown = [inspection.describe(dump), inspection.table(dump), inspection.top(dump, 3, None)]
            assert all(line.isprintable() for text in shown for line in text.splitlines()), seed
    outcomes.both(100)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"))["draft"]


def test_checkpoints(tmp_path, model):
    """The weights' header, the index and the configuration; whatever is accepted has a fingerprint."""
    outcomes, folder = Outcomes(), tmp_path / "copy"
    shutil.copytree(model, folder)
    config, weights = (folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(weights[:8], "little")
    names = json.loads(weights[8:start])
    index = {"weight_map": {name: "model.safetensors" for name in names if name != "__metadata__"}}

    def checked():
        found = checkpoints.read_config("--model-path m", folder)
        checkpoints.check_numbers("--model-path m", found, checkpoints.NEEDED)
        tensors = checkpoints.check_folder("--model-path m", folder)
        checkpoints.check_tensors("--model-path m", found, tensors, strict=True)
        return fingerprint.of_model(str(folder))

    for seed, rng in seeds(1500):
        files = {
            "config.json": config,
            "model.safetensors": weights,
            checkpoints.INDEX: json.dumps(index).encode(),
        }
        what = rng.choice(list(files))
        if what == "model.safetensors" and rng.random() < 0.5:
            header = json.dumps(changed(rng, names)).encode()
            files[what] = len(header).to_bytes(8, "little") + header + weights[start:]
        elif what == "model.safetensors":
            files[what] = garbled(rng, weights, last=start + 9)
        else:
            data = changed(rng, json.loads(files[what]))
            files[what] = rng.choice((garbled(rng, files[what]), json.dumps(data).encode()))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        found = outcomes.of(seed, ("--model-path m: ", f"model {folder}: "), checked)
        assert found is None or set(found) == {"config", "weights"}, seed
    outcomes.both(30)
