"""Files that commands write: what may stand at their place, and that nothing is lost on the way."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from sts_sglang import cli, files
from sts_sglang.config import ConfigError
from sts_sglang.core import dumps
from tests.test_inspect import make_dump


def refused(path) -> str:
    with pytest.raises(ConfigError) as caught:
        files.check_output("--out", path)
    message = str(caught.value)
    assert message.startswith("--out ") and "; allowed: " in message and message.isprintable()
    return message


def test_only_regular_files_may_be_replaced(tmp_path):
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    for path in ("/dev/null", "/dev/stdout", fifo, link):
        assert "not a regular file" in refused(path)
    assert "not a regular file" in refused(tmp_path)
    for path in (tmp_path / "none" / "x", fifo / "x"):
        assert "no such folder" in refused(path) or "Not a directory" in refused(path)
    refused(tmp_path / ("x" * 300))
    refused("a\0b")
    refused(tmp_path / "line\nbreak\x1b[2J" / "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and stat.S_ISFIFO(os.stat(fifo).st_mode)
    files.check_output("--out", tmp_path / "new.json")
    files.check_output("--out", tmp_path / ("x" * 250))  # what is written beside it has a name of its own


def test_what_was_there_stays_until_all_is_written(tmp_path):
    path = tmp_path / "map.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replacing("--out", path) as partial:
        partial.write_text("half")
        raise RuntimeError
    with pytest.raises(ConfigError, match=r"^--out .*cannot be written \(No space left"):  # noqa: SIM117
        with files.replacing("--out", path):
            raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.replacing("--out", path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    link, real = tmp_path / "link.json", tmp_path / "real" / "map.json"
    link.symlink_to(real)
    with files.replacing("--out", link) as partial:
        partial.write_text("new")
    assert link.is_symlink() and real.read_text() == "new"


@pytest.mark.parametrize("flag", ["--out", "--report", "--plot"])
def test_calibrate_leaves_special_files_alone_before_it_works(flag, tmp_path, capsys):
    fifo = tmp_path / "fifo.png"
    os.mkfifo(fifo)
    words = {"--model": "no-such-model", "--draft": "no-such-model", "--out": str(tmp_path / "m.json")}
    words[flag] = str(fifo)
    assert cli.main(["calibrate", *(word for pair in words.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flag} ") and "not a regular file" in error and error.count("\n") == 1
    assert stat.S_ISFIFO(fifo.lstat().st_mode)


def test_calibrate_writes_no_file_twice_and_none_of_its_texts(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "map.json"
    text.write_text("words")
    models = ["--model", "no-such-model", "--draft", "no-such-model"]
    for more in (["--out", str(out), "--report", str(out)], ["--out", str(text), "--text", str(text)]):
        assert cli.main(["calibrate", *models, *more]) == 2
        assert "as well; allowed: a file of its own" in capsys.readouterr().err
    assert text.read_text() == "words" and not out.exists()


def test_inspect_plots_into_regular_files_only(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = dumps.write(tmp_path, make_dump())
    picture = path.with_suffix(".png")
    os.mkfifo(picture)
    # A writer of a pipe waits for a reader: without the check this reads a picture.
    reader = threading.Thread(target=lambda: picture.read_bytes(), daemon=True)
    reader.start()
    assert cli.main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert "inspect: " in error and "not a regular file" in error and error.count("\n") == 1
    os.close(os.open(picture, os.O_WRONLY))  # lets the reader go
    picture.unlink()
    assert cli.main(["inspect", str(path)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".npz", ".png"]
