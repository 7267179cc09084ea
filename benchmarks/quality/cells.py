"""How a result file has the cells of an arm."""

from __future__ import annotations


def packed(row: dict) -> dict:
    """A cell as its file has it, which is a third shorter: ints where there is nothing behind the point, the
    number of groups where each item is one, and one number of tokens where all answers have as many."""
    short = {what: [int(v) if v == int(v) else v for v in row[what]] for what in ("depth", "score")}
    if row["group"] == list(range(len(row["group"]))):
        short["group"] = len(row["group"])
    if len(set(row["tokens"])) == 1:
        short["tokens"] = row["tokens"][0]
    return row | short


def unpacked(row: dict) -> dict:
    """What `packed` was made of, ints for floats aside."""
    group, tokens = row["group"], row["tokens"]
    long = {"group": list(range(group))} if isinstance(group, int) else {}
    long |= {"tokens": [tokens] * len(row["score"])} if isinstance(tokens, int) else {}
    return row | long
