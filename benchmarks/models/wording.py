"""Names, values and wording of the generated tasks, in a training and a test half that share nothing.

Words and values fall into a half by a checksum, templates and attributes by the lists below.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

ATTRIBUTES: dict[Split, list[str]] = {
    "train": (
        "access code|badge number|port|budget|room|password|serial number|locker|frequency|ticket|deadline code|"
        "account|batch number|checksum|phone extension|weight|altitude|speed limit|seed|version|gate|license key|"
        "timeout|quota|temperature|postal code|queue depth|shelf|flight number|score|token|pin|cabinet|order number|"
        "magic number|channel|offset|revision|meeting room|backup code|invoice|threshold"
    ).split("|"),
    "test": "secret number|passcode|dock|reference number|call sign|vault code|platform|retry limit|parcel number|label".split("|"),
}
STATEMENTS: dict[Split, list[str]] = {
    "train": [
        "The {attr} of {key} is {val}.",
        "The {attr} for {key} is {val}.",
        "{key} has {attr} {val}.",
        "{key} has the {attr} {val}.",
        "For {key}, the {attr} was set to {val}.",
        "Note: the {attr} of {key} equals {val}.",
        "{attr} ({key}): {val}",
        "{key} | {attr} | {val}",
        "[{key}] {attr}={val}",
        "- {key}: {attr} {val}",
        "{key}.{attr} = {val}",
        "Remember that the {attr} of {key} is {val}.",
        "Remember: {key} uses {val} as its {attr}.",
        "According to the record, {key} got the {attr} {val}.",
        "Everyone at {key} knows that the {attr} is {val}.",
        "{key}'s {attr} is {val}.",
        "It is written that {key} keeps {attr} {val}.",
        "INFO {key}: {attr} changed to {val}",
        "WARNING: {attr} of {key} now {val}",
        "* {attr} for {key} -- {val}",
        "{key}: {val} ({attr})",
        "Please keep in mind: {attr} of {key} = {val}",
        "When asked for the {attr} of {key}, answer {val}.",
        "# {key} {attr} {val}",
        '"{key}": "{val}"  // {attr}',
        "The team of {key} chose {val} for the {attr}.",
    ],
    "test": [
        "Memo about {key}: its {attr} reads {val}.",
        "The registered {attr} that belongs to {key} is {val}.",
        "One of the special facts: {key} carries {attr} {val}.",
        "> {key} / {attr} / {val}",
        "In the end {key} received the {attr} {val}.",
        "DEBUG set {attr} of {key} to {val}",
    ],
}
QUESTIONS: dict[Split, list[str]] = {
    "train": [
        "What is the {attr} of {key}?",
        "What is the {attr} for {key}?",
        "Tell me the {attr} of {key}.",
        "Which {attr} does {key} have?",
        "I need the {attr} of {key}.",
        "Question: {attr} of {key}?",
        "{key}: {attr}?",
        "Find the {attr} for {key}.",
        "Please look up the {attr} that belongs to {key}.",
        "Can you give me {key}'s {attr}?",
        "What {attr} was given for {key}?",
        "According to the text, what is the {attr} of {key}?",
        "Do you remember the {attr} of {key}?",
        "Now the {attr} of {key}, please.",
    ],
    "test": [
        "Could you say what the {attr} of {key} was?",
        "Look through the text above: which {attr} goes with {key}?",
        "I forgot the {attr} of {key}, what is it?",
        "Report the {attr} of {key}.",
    ],
}
LIST_QUESTIONS: dict[Split, list[str]] = {
    "train": [
        "List every {attr} of {key}.",
        "What are all the values of {attr} for {key}?",
        "Give me each {attr} that {key} has.",
        "Name all {attr} entries of {key}.",
    ],
    "test": ["Which are all of the {attr} values of {key}?", "Collect every {attr} for {key}."],
}
GROUP_QUESTIONS: dict[Split, list[str]] = {
    "train": [
        "What is the {attr} of {key}, one after the other?",
        "For each of {key}: what is the {attr}?",
        "I need the {attr} of {key}.",
        "Tell me the {attr} of {key}.",
    ],
    "test": ["Report the {attr} of each of {key}.", "Go through {key} and say the {attr}."],
}
ASSIGNMENTS: dict[Split, list[str]] = {
    "train": ["{a} = {b}", "let {a} = {b}", "set {a} to {b}", "{a} := {b}", "VAR {a} = {b}", "assign {b} to {a}"],
    "test": ["store {b} in {a}", "define {a} as {b}", "{a} gets {b}"],
}
VARIABLE_QUESTIONS: dict[Split, list[str]] = {
    "train": ["What is the value of {a}?", "Trace {a}.", "Which value does {a} hold?", "{a} = ?"],
    "test": ["Work out the value of {a}.", "What does {a} hold in the end?"],
}
SNIPPETS: dict[Split, list[str]] = {
    "train": [
        "def {name}():\n    return {val}",
        "def {name}(x, y):\n    return {val}",
        "{name} = {val}",
        "class {name}:\n    default = {val}",
        "{name}: int = {val}",
        "#define {name} {val}",
        "const {name} = {val};",
        "function {name}(a) {{\n    return {val};\n}}",
        "export {name}={val}",
        "    self.{name} = {val}",
    ],
    "test": ["def {name}(self):\n    return {val}", "static int {name} = {val};", "{name} = int({val})"],
}
CODE_QUESTIONS: dict[Split, list[str]] = {
    "train": [
        "How is {name} defined?",
        "What does the code say about {name}?",
        "What is {name} in the code?",
        "Which value does the definition of {name} use?",
        "Find the definition of {name}.",
    ],
    "test": ["Look up {name} in the source.", "Which value belongs to {name} in the code above?"],
}
TOOLS: dict[Split, list[str]] = {
    "train": ["read_file", "open_log", "fetch_page", "run_query", "list_records", "search_notes"],
    "test": ["load_report", "get_document"],
}
INSTRUCTIONS: dict[Split, list[str]] = {
    "train": [
        "Please go through these one by one: {paths}",
        "Read {paths} and then answer my questions.",
        "Have a look at {paths}.",
        "Open {paths}, I will ask about them later.",
    ],
    "test": ["Work through {paths} first.", "Check {paths}, questions follow."],
}
PREAMBLES: dict[Split, list[str]] = {
    "train": ["", "", "Read this text.\n", "Answer from the document below.\n", "Context:\n", "Here is a long document.\n"],
    "test": ["", "Some material to read first.\n"],
}
SYSTEM = ["You are a helpful assistant.", "Answer from the text.", "You answer questions about long documents."]
SYLLABLES = "ba be bo da di do fa fi ga go ha hi jo ka ke ko la le li lo ma me mi mo na ne no pa pe ra ri ro sa se so ta te ti to va ve vi vo za zo".split()


def half(text: str) -> Split:
    return "test" if zlib.crc32(text.encode()) % 8 == 0 else "train"


@dataclass
class Pool:
    """Draws names, values and templates of one half."""

    split: Split
    words: list[str]
    rng: random.Random

    def own(self, draw) -> str:
        while True:
            text = draw()
            if half(text) == self.split:
                return text

    def word(self) -> str:
        return self.rng.choice(self.words)

    def made_up(self) -> str:
        return self.own(lambda: "".join(self.rng.choices(SYLLABLES, k=self.rng.randint(2, 4))).capitalize())

    def key(self) -> str:
        a, b, r = self.word(), self.word(), self.rng.random()
        if r < 0.4:
            return f"{a} {b}"
        if r < 0.55:
            return f"{a}-{b}"
        if r < 0.65:
            return f"{a}_{b}"
        if r < 0.75:
            return self.own(lambda: f"{self.word()} {self.rng.randint(2, 99)}")
        if r < 0.85:
            return self.made_up()
        if r < 0.92:
            return self.path()
        return f"{a} {b} {self.word()}"

    def path(self) -> str:
        return f"{self.word()}/{self.word()}.{self.rng.choice(['log', 'txt', 'md', 'json'])}"

    def identifier(self) -> str:
        a, b, r = self.word(), self.word(), self.rng.random()
        if r < 0.6:
            return f"{a}_{b}"
        if r < 0.75:
            return f"{a.capitalize()}{b.capitalize()}"
        if r < 0.85:
            return f"{a}_{b}_{self.word()}"
        return self.own(lambda: f"{self.word()}{self.rng.randint(1, 99)}")

    def number(self) -> str:
        return self.own(lambda: str(self.rng.randint(100, 10 ** self.rng.randint(4, 7))))

    def value(self) -> str:
        r = self.rng.random()
        if r < 0.65:
            return self.number()
        if r < 0.8:
            return f"{self.word()} {self.word()}"
        if r < 0.9:
            return self.own(lambda: "".join(self.rng.choices("ABCDEFGHKLMNPQRSTUVWXYZ", k=2)) + f"-{self.rng.randint(100, 999)}")
        return self.own(lambda: f"{self.rng.getrandbits(24):06x}")

    def attribute(self) -> str:
        if self.split == "train" and self.rng.random() < 0.3:
            return f"{self.word()} {self.word()}" if self.rng.random() < 0.5 else self.word()
        return self.rng.choice(ATTRIBUTES[self.split])

    def pick(self, templates: dict[Split, list[str]]) -> str:
        return self.rng.choice(templates[self.split])

    def distinct(self, draw, n: int) -> list[str]:
        seen: dict[str, None] = {}
        for _ in range(20 * n):
            seen[draw()] = None
            if len(seen) == n:
                break
        return list(seen)
