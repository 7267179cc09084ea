"""Build the tokenizer and the token stream from text that may be redistributed.

    apt-get download PACKAGES; for f in *.deb; do dpkg -x $f DEBIAN_DIR/${f%%_*}; done
    python benchmarks/models/corpus.py --debian DEBIAN_DIR --out .data/corpus

writes tokenizer.json (unless it is there), {train,val}.bin.xz (uint16), words.json (the name pool) and
sources.json (name, license, bytes). The validation half is every document whose hash falls into the first
hundredth.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import lzma
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
VOCAB = 2048
# A newline, a digit and a run of spaces are always tokens of their own, so a document that is
# assembled line by line from token pieces has the same tokens as its text.
SPLIT = r"\n| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+| +(?!\S)|\s"


@dataclass(frozen=True)
class Source:
    name: str
    license: str
    pattern: str  # glob below the package's folder
    megabytes: float  # taken at most


DEBIAN = [
    Source("python3.11-doc", "PSF-2.0", "**/_sources/**/*.txt", 11),
    Source("python-sqlalchemy-doc", "MIT", "**/rst/**/*.rst", 4),
    Source("python-flask-doc", "BSD-3-Clause", "**/_sources/**/*.txt", 2),
    Source("python-django-doc", "BSD-3-Clause", "**/html/**/*.html", 6),
    Source("git-doc", "GPL-2.0-only", "**/*.txt", 4),
    Source("debian-policy", "GPL-2.0-or-later", "**/_sources/**/*.txt", 2),
    Source("developers-reference", "GPL-2.0-or-later", "**/_sources/**/*.txt", 2),
    Source("debian-handbook", "CC-BY-SA-3.0 or GPL-2.0-or-later", "**/html/en-US/*.html", 3),
    Source("perl-doc", "Artistic-1.0-Perl or GPL-1.0-or-later", "**/pod/*.pod", 5),
    Source("postgresql-doc-15", "PostgreSQL", "**/html/*.html", 8),
    Source("sqlite3-doc", "public domain", "**/sqlite3/*.html", 4),
    Source("linux-doc-6.1", "GPL-2.0-only", "**/_sources/**/*.txt", 13),
    Source("erlang-doc", "Apache-2.0", "**/*.html", 4),
    Source("rust-doc", "MIT or Apache-2.0", "**/html/[bnr]*/**/*.html", 3),
    Source("dict-jargon", "public domain", "**/*.dz", 2),
]
PYTHON = [
    Source("stdlib", "PSF-2.0", "*.py", 4),
    Source("torch", "BSD-3-Clause", "**/*.py", 5),
    Source("transformers", "Apache-2.0", "**/*.py", 4),
    Source("sglang", "Apache-2.0", "**/*.py", 4),
    Source("sympy", "BSD-3-Clause", "**/*.py", 4),
    Source("scipy", "BSD-3-Clause", "**/*.py", 4),
    Source("numpy", "BSD-3-Clause", "**/*.py", 4),
    Source("pandas", "BSD-3-Clause", "**/*.py", 4),
    Source("networkx", "BSD-3-Clause", "**/*.py", 3),
]


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def strip_html(page: str) -> str:
    page = re.sub(r"(?s)<(script|style|head|nav)\b.*?</\1>", "", page)
    page = re.sub(r"(?i)</?(p|div|li|tr|h\d|pre|br|dt|dd|table|ul|ol|dl)\b[^>]*>", "\n", page)
    return html.unescape(re.sub(r"<[^>]+>", "", page))


def clean(text: str) -> str:
    text = "".join(c for c in text if c == "\n" or c.isprintable() and ord(c) < 0x2500)
    lines = [line.rstrip() for line in text.split("\n") if len(line) < 400]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def read(path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        raw = gzip.decompress(raw)
    text = raw.decode("utf-8", errors="ignore").replace("\r", "").replace("\t", "    ")
    return clean(strip_html(text) if path.suffix == ".html" else text)


def texts(source: Source, root: Path) -> Iterator[str]:
    left = int(source.megabytes * 1e6)
    for path in sorted(root.glob(source.pattern), key=lambda p: stable_hash(str(p.relative_to(root)))):
        text = read(path)[:400_000]
        if len(text) > 500:
            yield text[:left]
            left -= len(text)
        if left <= 0:
            return


def collect(debian: Path) -> tuple[list[str], list[dict]]:
    """Documents, and what each source gave. SystemExit where `debian` is none of its packages."""
    roots = [(s, debian / s.name) for s in DEBIAN]
    if not any(root.is_dir() for _, root in roots):
        raise SystemExit(f"--debian: {debian} has no folder of a package ({DEBIAN[0].name}, ...)")
    stdlib, site = (Path(sysconfig.get_path(p)) for p in ("stdlib", "purelib"))
    roots += [(s, stdlib if s.name == "stdlib" else site / s.name) for s in PYTHON]
    documents, rows = [], []
    for source, root in roots:
        found = list(texts(source, root))
        documents += found
        rows.append(
            {
                "name": source.name,
                "license": source.license,
                "files": len(found),
                "bytes": sum(map(len, found)),
            }
        )
        print(rows[-1])
    return documents, rows


def train_tokenizer(documents: list[str]) -> Tokenizer:
    tok = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tok.train_from_iterator(documents, trainer)
    tok.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIAL])
    return tok


def name_pool(documents: list[str]) -> list[str]:
    """Lower-case words that are common enough to look like words: names and word values are made of them."""
    counts = Counter(w for d in documents for w in re.findall(r"(?<![\w])[a-z]{4,9}(?![\w])", d))
    return sorted(w for w, n in counts.items() if n >= 12)


def save_tokens(path: Path, tok: Tokenizer, documents: list[str]) -> int:
    end = tok.token_to_id("<|end|>")
    ids = np.concatenate([np.array([*e.ids, end], np.uint16) for e in tok.encode_batch(documents)])
    path.write_bytes(lzma.compress(ids.tobytes(), preset=6))
    print(f"{path.name}: {len(ids):,} tokens, {path.stat().st_size / 1e6:.1f} MB")
    return len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debian", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    documents, rows = collect(args.debian)
    documents.sort(key=stable_hash)
    train, val = [], []
    for document in documents:
        (val if stable_hash(document) < 2**64 // 100 else train).append(document)
    saved = args.out / "tokenizer.json"
    tok = Tokenizer.from_file(str(saved)) if saved.exists() else train_tokenizer(train[::3])
    tok.save(str(saved))
    (args.out / "words.json").write_text(json.dumps(name_pool(train)))
    sizes = {
        name: save_tokens(args.out / f"{name}.bin.xz", tok, part)
        for name, part in (("train", train), ("val", val))
    }
    (args.out / "sources.json").write_text(json.dumps({**sizes, "sources": rows}, indent=1))


if __name__ == "__main__":
    main()
