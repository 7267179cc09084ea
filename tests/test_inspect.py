"""Dumps of importance: what a served request leaves, what is refused, and what `inspect` makes of them."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import tracemalloc
import urllib.error
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sts_kernels.layout import UNKNOWN
from sts_sglang import cli
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.core import dumps
from sts_sglang.core.dumps import Dump
from sts_sglang.core.request import Finished, Request
from sts_sglang.core.round import RoundState
from sts_sglang.core.runtime import Runtime
from sts_sglang.host.serves import Refusal, check_inspect
from sts_sglang.tools import inspection
from tests.forked import Forked
from tests.oracle import Oracle, Rule
from tests.server import logged, random_ids

CHAIN = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1")
CHAIN += ("--speculative-num-draft-tokens", "4")
WANTED = {"custom_params": {"sts": {"inspect": True}}}


def make_dump(length: int = 100) -> Dump:
    """Two channels over four layers; position 42 stands out in the last ones."""
    importance = np.full((2, length), 0.001, dtype=np.float32)
    importance[:, 0] = UNKNOWN
    importance[1, 42] = 0.5
    meta = {"version": 1, "prompt_tokens": 60, "cached_tokens": 0, "signal": "history", "head_map": "x"}
    meta["config"] = json.loads(StsConfig(history="warm").to_json())
    channels = np.array([[0, 0], [0, 0], [0, 0], [0, 1]], dtype=np.int32)
    return Dump(importance, channels, np.arange(length, dtype=np.int32), meta)


def test_a_dump_is_read_as_it_was_written(tmp_path):
    dump = make_dump()
    path = dumps.write(tmp_path, dump)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    again = dumps.read(path)
    assert again.meta == dump.meta
    for found, expected in zip(again[:3], dump[:3], strict=True):
        assert found.dtype == expected.dtype and (found == expected).all()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, OSError, ValueError])
def test_a_dump_that_fails_ends_neither_request_nor_server(monkeypatch, caplog, tmp_path, error):
    def fails(*args):
        raise error("no room")

    monkeypatch.setattr(dumps, "of_request", fails)
    ended = Finished(Request("r", 1, [], [], WANTED["custom_params"]), [], 0, 0)
    runtime = SimpleNamespace(config=StsConfig(inspect_dir=str(tmp_path)))
    dumps.finished(runtime, ended, torch.empty(0))
    assert "request 'r' was not dumped: no room" in caplog.text


RID = "r\n2026-01-01 STS: all is well\x1b[2J"


def asking(rid: str, row: int, **params) -> Request:
    return Request(rid, row, [], [], {"sts": params})


def admitting(config: StsConfig, rows: int) -> SimpleNamespace:
    """As much of a runtime as `admit` touches."""
    state = SimpleNamespace(keeps=torch.zeros(rows, dtype=torch.float64))
    ignored = SimpleNamespace(admit=lambda *_: None)
    parts = dict.fromkeys(("verifier", "selector", "aside"), ignored)
    parts |= {"prefill": None, "draft_prefill": None}
    return SimpleNamespace(config=config, state=state, device="cpu", **parts)


def test_request_ids_are_quoted_in_the_log(monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO")
    runtime = SimpleNamespace(config=StsConfig(inspect_dir=str(tmp_path)))
    wants = Finished(asking(RID, 0, inspect=True), [], 0, 0)
    monkeypatch.setattr(dumps, "of_request", lambda *args: make_dump())
    dumps.finished(runtime, wants, torch.empty(0))
    monkeypatch.setattr(dumps, "MAX_FILES", 1)
    dumps.finished(runtime, wants, torch.empty(0))
    Runtime.admit(admitting(StsConfig(), 1), [asking(RID, 0, keep=7)])
    assert len(caplog.messages) == 3
    for message in caplog.messages:
        assert message.isprintable() and "request 'r\\n2026" in message, message


def test_what_the_operator_closed_stays_closed_to_requests_that_come_by_another_road(tmp_path, caplog):
    """Those are not answered with a 400: they get no dump, and the server's keep."""
    config = StsConfig(inspect_dir=str(tmp_path), request_inspect=False, request_keep="at_most")
    request, runtime = asking("r", 0, inspect=True, keep=0.5), admitting(config, 2)
    dumps.finished(runtime, Finished(request, [], 0, 0), torch.empty(0))
    assert not list(tmp_path.iterdir()) and "sts_config.request_inspect is false" in caplog.text
    Runtime.admit(runtime, [request, asking("r", 1, keep=0.05)])
    assert runtime.state.keeps[0].isnan() and runtime.state.keeps[1] == 0.05


def broken(folder: Path, **members) -> Path:
    """A dump with some members changed; None leaves one out."""
    dump = make_dump()
    arrays = dict(zip(dumps.ARRAYS, dump[:3], strict=True)) | {"meta": np.array(json.dumps(dump.meta))}
    path = folder / "broken.npz"
    np.savez(path, **{k: v for k, v in (arrays | members).items() if v is not None})
    return path


def meta(**changes) -> np.ndarray:
    return np.array(json.dumps(make_dump().meta | changes))


@pytest.mark.parametrize(
    "members",
    [
        {"tokens": None},
        {"tokens": np.full(100, -1, dtype=np.int32)},
        {"tokens": np.full(100, 2**33)},
        {"tokens": np.arange(99, dtype=np.int32)},
        {"importance": np.full((2, 100), np.inf, dtype=np.float32)},
        {"importance": np.array("x")},
        {"channels": np.array([[0, 9]], dtype=np.int32)},
        {"meta": np.array("[" * 100_000)},
        {"meta": np.array('{"version": 1}')},
        {"meta": meta(config=3)},
        {"meta": meta(prompt_tokens="x")},
        {"meta": meta(signal="\x1b[31m")},
        {"meta": meta(version=2)},
    ],
    ids=lambda members: str(members)[:40],
)
def test_a_broken_dump_is_refused_in_one_line(tmp_path, capsys, members):
    path = broken(tmp_path, **members)
    assert cli.main(["inspect", str(path), "--no-plot"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and str(path) in error and error.replace("\n", "").isprintable()


def test_what_is_no_dump_file_is_refused_in_one_line(tmp_path, capsys):
    array, text = tmp_path / "array.npz", tmp_path / "text.npz"
    with array.open("wb") as file:
        np.save(file, np.zeros(3))
    text.write_text("PK no archive")
    pipe = tmp_path / "pipe.npz"
    os.mkfifo(pipe)
    picture = tmp_path / "x.png"  # its plot would be written over it
    picture.write_bytes(dumps.write(tmp_path, make_dump()).read_bytes())
    for path in (array, text, pipe, picture, tmp_path, tmp_path / "none.npz"):
        assert cli.main(["inspect", str(path)]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and str(path) in error


def test_a_broken_tokenizer_is_refused_in_one_line(tmp_path, capsys):
    path = dumps.write(tmp_path, make_dump())
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    assert cli.main(["inspect", str(path), "--no-plot", "--tokenizer", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "--tokenizer" in error


def test_the_folder_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(dumps, "MAX_FILES", 2)
    first = [dumps.write(tmp_path, make_dump()) for _ in range(2)]
    with pytest.raises(ValueError, match="2 dumps of"):
        dumps.write(tmp_path, make_dump())
    monkeypatch.setattr(dumps, "MAX_FILES", 100)
    monkeypatch.setattr(dumps, "MAX_BYTES", 2 * first[0].stat().st_size + 10)
    with pytest.raises(ValueError, match="move some"):
        dumps.write(tmp_path, make_dump())
    assert sorted(tmp_path.iterdir()) == sorted(first)


def test_a_dump_is_for_the_servers_user_alone(tmp_path):
    before = os.umask(0)
    try:
        path = dumps.write(tmp_path, make_dump())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_dump_that_is_moved_away_or_a_dead_link_does_not_stop_the_next(tmp_path, monkeypatch):
    (tmp_path / "sts-dead.npz").symlink_to(tmp_path / "none")
    gone = SimpleNamespace(name="sts-gone.npz", stat=lambda **_: os.stat(tmp_path / "none"))
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: [*listed(folder), gone])
    assert dumps.read(dumps.write(tmp_path, make_dump())).meta["version"] == 1


def peak_of_refusal(path: Path) -> int:
    """Most bytes allocated while `read` refuses this file."""
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as caught:
            dumps.read(path)
        assert len(str(caught.value).splitlines()) == 1
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def archive(path: Path, **members: bytes) -> Path:
    """An archive of raw members, those of a dump where none is given."""
    plain = {}
    for name, array in replaced().items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        plain[name] = buffer.getvalue()
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (plain | members).items():
            file.writestr(f"{name}.npy", content)
    return path


def claims(shape: str, kind: str = "<f4") -> bytes:
    """A .npy whose header says this shape and that holds next to nothing."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + chr(10)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64)


def test_archives_as_a_server_writes_them_are_read(tmp_path):
    assert dumps.read(archive(tmp_path / "x.npz")).meta == make_dump().meta


def test_what_grows_when_unpacked_is_refused_before_it_does(tmp_path):
    bomb = tmp_path / "bomb.npz"
    wide = {"importance": np.zeros((64, 2**18), np.float32), "tokens": np.zeros(2**18, np.int32)}
    np.savez_compressed(bomb, **replaced(**wide))
    assert bomb.stat().st_size < 2**18
    assert peak_of_refusal(bomb) < 2**21


@pytest.mark.parametrize(
    "member",
    [
        claims("(2, 100000000)"),
        claims("(2, -1)"),
        claims("(10**9, 10**9)"),
        claims("()", "|O"),
        claims("((2,),)"),
    ]
    + [claims("(4, 4)", "<f8"), claims("(" + "1, " * 3000 + ")"), b"", b"\x93NUMPY\x03\x00" + bytes(100)],
    ids=lambda member: str(member[60:90]),
)
@pytest.mark.parametrize("name", ["importance", "meta"])
def test_headers_that_say_more_than_there_is_are_refused(tmp_path, name, member):
    assert peak_of_refusal(archive(tmp_path / "x.npz", **{name: member})) < 2**22


def test_long_directories_and_metas_are_refused_unread(tmp_path):
    many, long = tmp_path / "many.npz", tmp_path / "long.npz"
    with zipfile.ZipFile(many, "w") as file:
        for i in range(20_000):
            file.writestr(f"{i}.npy", b"")
    assert peak_of_refusal(many) < 2**20
    np.savez(long, **replaced(meta=np.array(" " * 2**22 + json.dumps(make_dump().meta))))
    assert peak_of_refusal(long) < 2**21
    # A locator of a 64-bit directory before the end would send zipfile elsewhere.
    plain = archive(tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(plain[:-22] + b"PK\6\7" + bytes(16) + plain[-22:])
    with pytest.raises(ConfigError, match="no archive that a server wrote"):
        dumps.read(tmp_path / "x.npz")
    huge = tmp_path / "huge.npz"
    with huge.open("wb") as file:
        file.truncate(dumps.MAX_FILE + 1)
    assert peak_of_refusal(huge) < 2**20


def test_inspecting_takes_little_more_than_the_dump(tmp_path, capsys):
    wide = {"importance": np.full((64, 2**16), 0.25, np.float32), "tokens": np.zeros(2**16, np.int32)}
    np.savez(tmp_path / "wide.npz", **replaced(**wide))
    tracemalloc.start()
    try:
        assert cli.main(["inspect", "--no-plot", str(tmp_path / "wide.npz")]) == 0
        assert tracemalloc.get_traced_memory()[1] < 1.5 * wide["importance"].nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "changes",
    [{"signal": "$x$"}, {"prompt_tokens": -1}, {"prompt_tokens": 10**400}, {"config": {"history": []}}],
)
def test_a_meta_that_could_not_be_drawn_is_refused(tmp_path, changes):
    np.savez(tmp_path / "x.npz", **replaced(meta=meta(**changes)))
    with pytest.raises(ConfigError, match="of this version"):
        dumps.read(tmp_path / "x.npz")


def replaced(**arrays) -> dict:
    dump = make_dump()
    plain = {"importance": dump.importance, "channels": dump.channels, "tokens": dump.tokens}
    return {**plain, "meta": np.array(json.dumps(dump.meta)), **arrays}


@pytest.mark.parametrize(
    "arrays",
    [
        {"meta": np.array({"version": 1}, dtype=object)},  # would be unpickled
        {"meta": np.array("[]")},
        {"meta": np.array("{")},
        {"tokens": np.zeros(3, dtype=np.int32)},
        {"importance": np.zeros((2, 100), dtype=np.int32)},
        {"channels": np.full((4, 2), 2, dtype=np.int32)},
        {"channels": np.zeros((0, 2), dtype=np.int32)},
    ],
    ids=lambda arrays: next(iter(arrays)),
)
def test_other_files_are_refused_in_one_line(arrays, tmp_path):
    np.savez(tmp_path / "bad.npz", **replaced(**arrays))
    with pytest.raises(ConfigError) as caught:
        dumps.read(tmp_path / "bad.npz")
    assert "bad.npz: " in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no archive", b"text"])
def test_what_is_no_archive_is_refused(content, tmp_path):
    path = tmp_path / "x.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a dump"):
        dumps.read(path)


def test_inspect_prints_and_plots(tmp_path, capsys):
    path = dumps.write(tmp_path, make_dump())
    assert cli.main(["inspect", str(path), "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "100 tokens, 60 of them prompt; signal: history (history warm, decay 0.9); 2 channels" in out
    first = out.partition("highest positions\n")[2].splitlines()[0].split()
    assert first == ["42", "0.5000", "layer", "3", "token", "42"]
    shares = [line for line in out.splitlines() if line.startswith("  layer 3")][0].split()[2:]
    assert float(shares[4].rstrip("%")) > 80 and len(shares) == 10
    assert path.with_suffix(".png").stat().st_size > 1000


def test_without_matplotlib_there_is_one_clear_line(tmp_path, capsys, monkeypatch):
    path = dumps.write(tmp_path, make_dump())
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert cli.main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err == (
        "error: inspect: matplotlib is not installed; allowed: pip install sts-sglang[plots], or --no-plot\n"
    )
    assert cli.main(["inspect", "--no-plot", str(path)]) == 0


def test_tokens_are_shown_between_their_neighbours_and_harmless(tmp_path):
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(f"\x1b{i} " for i in ids))
    line = inspection.top(make_dump(), 1, tokenizer).splitlines()[1]
    assert "[·42 ]" in line and "\x1b" not in line


def test_a_tokenizer_that_is_none_is_named(tmp_path, capsys):
    path = dumps.write(tmp_path, make_dump())
    assert cli.main(["inspect", "--no-plot", "--tokenizer", str(tmp_path), str(path)]) == 2
    assert f"error: --tokenizer {tmp_path}: " in capsys.readouterr().err


def test_the_folder_must_be_there(tmp_path):
    check_inspect(StsConfig(inspect_dir=str(tmp_path)))
    check_inspect(StsConfig())
    with pytest.raises(Refusal, match="inspect_dir: .* create it first"):
        check_inspect(StsConfig(inspect_dir=str(tmp_path / "none")))
    tmp_path.chmod(0o777)
    with pytest.raises(Refusal, match="inspect_dir: everybody may write .*; chmod o-w it"):
        check_inspect(StsConfig(inspect_dir=str(tmp_path)))
    for mode in (0o1777, 0o770, 0o700):
        tmp_path.chmod(mode)
        check_inspect(StsConfig(inspect_dir=str(tmp_path)))


def test_without_history_only_the_latest_round_is_shown():
    state = RoundState.__new__(RoundState)
    state.importance = torch.rand(2, 256)
    state.scored = torch.tensor([[-1, 64, 0], [-1, 40, 40], [-1, 3, 2]])
    state.scored_round, state.room = torch.tensor([3]), SimpleNamespace(columns=64)
    assert state.last_round(1) == (1, 64, 40)
    shown = state.last_scores(1, 44)
    assert (shown[:, 1:40] == state.importance[:, 65:104]).all()
    assert (shown[:, 0] == UNKNOWN).all() and (shown[:, 40:] == UNKNOWN).all()
    assert (state.last_scores(2, 44) == UNKNOWN).all()  # its columns hold others' scores
    assert (state.last_scores(0, 44) == UNKNOWN).all()


@pytest.mark.server
@pytest.mark.parametrize("history", ["off", "blend"])
def test_a_served_request_leaves_what_the_oracle_knows(history, pair, tmp_path):
    folder = tmp_path / "dumps"
    folder.mkdir()
    rule = Rule(keep=0.1, sink=2, recent=8, history=history)
    config = {"keep": 0.1, "budget": 0, "sink": 2, "recent": 8, "history": history, "draft": "dense"}
    args = ["--attention-backend", "sts", "--speculative-algorithm", "STANDALONE", *CHAIN]
    args += ["--speculative-draft-model-path", str(pair["draft"])]
    args += ["--sts-config", json.dumps({**config, "inspect_dir": str(folder)})]
    prompt = random_ids(200, 7)
    with Forked(pair["target"], tmp_path / "inspect.log", *args) as server:
        server.generate(random_ids(50, 8), 8)
        assert not list(folder.iterdir())  # nobody asked
        answer = server.generate(prompt, 24, sampling_params=WANTED)
        (path,) = folder.iterdir()
        short = server.generate(prompt, 1, sampling_params=WANTED)  # finished by its prefill
    assert "Traceback" not in logged(tmp_path / "inspect.log")
    dump = dumps.read(path)
    output = [*prompt, *answer["output_ids"]]
    assert dump.tokens.tolist() == output[: len(dump.tokens)] and len(dump.tokens) >= len(output) - 1
    assert dump.meta["prompt_tokens"] == 200
    _compare(dump, history, Oracle(pair["target"], pair["draft"]).agree(answer["output_ids"], prompt, rule))
    other = dumps.read(next(p for p in folder.iterdir() if p != path))
    assert other.tokens.tolist() == prompt and short["meta_info"]["completion_tokens"] == 1
    assert ((other.importance == UNKNOWN).all()) == (history == "off")


@pytest.mark.server
def test_a_target_alone_leaves_what_its_pages_were_worth(pair, tmp_path):
    folder = tmp_path / "dumps"
    folder.mkdir()
    config = {"keep": 0.3, "budget": 0, "sink": 2, "recent": 8, "inspect_dir": str(folder)}
    args = ["--attention-backend", "sts", "--sts-config", json.dumps(config)]
    with Forked(pair["target"], tmp_path / "alone.log", *args) as server:
        server.generate(random_ids(200, 7), 24, sampling_params=WANTED)
    assert "Traceback" not in logged(tmp_path / "alone.log")
    dump = dumps.read(next(folder.iterdir()))
    assert dump.meta["signal"] == "page scores" and dump.channels.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    pages = dump.importance[:, :208].reshape(8, 13, 16)
    assert (pages > 0).all() and (pages == pages[:, :, :1]).all()  # every page of the prompt, in equal parts
    assert (dump.importance[:, 224:] == UNKNOWN).all()


def _compare(dump: Dump, history: str, trace) -> None:
    """Every position of the prompt is known; memory is the oracle's, but for rounds that ran past the end."""
    known = dump.importance[:, 1:200]
    assert (known != UNKNOWN).all() and known.max() > 0.01
    if history == "off":
        return
    spots = [key for key in trace.memory if 0 < key[2] < 200]
    expected = np.array([trace.memory[key] for key in spots])
    found = np.array([dump.importance[dump.channels[layer, head], p] for layer, head, p in spots])
    assert (found >= 0.9**2 * expected - 1e-6).all()
    assert (found <= 1.001 * expected).mean() > 0.8


@pytest.mark.server
def test_a_server_without_a_folder_answers_400(pair, tmp_path):
    args = ["--attention-backend", "sts", "--speculative-algorithm", "STANDALONE", *CHAIN]
    args += ["--speculative-draft-model-path", str(pair["draft"])]
    with (
        Forked(pair["target"], tmp_path / "none.log", *args) as server,
        pytest.raises(urllib.error.HTTPError) as error,
    ):
        server.generate([1, 2, 3], 4, sampling_params=WANTED)
    assert error.value.code == 400
    assert "set to a folder" in error.value.read().decode()
    assert not list(Path(tmp_path).glob("*.npz"))
