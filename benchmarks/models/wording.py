"""Names, values and wording of the generated tasks, in a training and a test half that share nothing.

Words and values fall into a half by a checksum, wording by the lists below. Training wording is composed of fragments and
random words (a model of this size learns whole templates by heart and then fails on new ones); test wording is fixed sentences.
Slots: {a} attribute, {k} name, {v} value, {x} a random word, {n} a random number.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
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
IS = (
    "is|is|is|equals|was set to|is now|became|remains|was fixed at|was|will be|should be|=|must stay|was recorded as|comes to|"
    "is given as|changed to|is known to be|stands at|is still|is always|has to be|would be|may be|are|shows|says|went to|used to be|"
    "is officially|is exactly|is just|gets|appears as|is written as"
).split("|")
HAS = (
    "has|has|uses|keeps|holds|owns|got|needs|shows|lists|takes|was assigned|comes with|goes by|must use|works with|reports|chose|"
    "requires|is using|is under|is known by|relies on|was registered with|bears|provides|runs with|will have|had|prints|sets|gave"
).split("|")
SEPARATORS = [": ", " = ", "=", " | ", " -- ", " -> ", " => ", ", ", "; ", " ~ ", "::", " - ", "\t", " : ", " := ", " . ", " // ", "//", " \\ ", " <> ", " ... ", " to "]
LEADS = (
    "|||||||Note: |Remember that |INFO |WARNING: |* |- |# |// |Please keep in mind: |According to the record, |By the way, |"
    "As agreed, |It is written that |Update: |TODO: |We confirmed that |{x} said that |Since {n}, |On {x}, |{n}. |In {x} {x}, |Fact: |"
    "Reminder: |Entry {n}: |[{n}] |Everyone knows that |When asked, say that |Our records show: |{x}: |({x}) |Today |Here |"
    "As of {n}, |{x} {x} |Important! |For the {x}: |Somebody wrote that |log {n} |NOTICE |ok, |!! |/* |<li>|>>> |After {x}, |"
    "Never forget: |It is a fact that |You should know that |The {x} says: |See also: |Among the {x}, |Nobody knew that "
).split("|")
STATEMENTS = (
    "the {a} of {k} {is} {v}|the {a} of {k} {is} {v}|the {a} for {k} {is} {v}|{k} {has} {a} {v}|{k} {has} the {a} {v}|"
    "for {k}, the {a} {is} {v}|{k}'s {a} {is} {v}|{a} of {k}{sep}{v}|{k}{sep}{a}{sep}{v}|[{k}] {a}{sep}{v}|{a} ({k}){sep}{v}|"
    "at {k} the {a} {is} {v}|the {a} that {x} gave to {k} {is} {v}|{k} {has} {v} as its {a}|as for {k}, {a} {v}|"
    "regarding {k}, its {a} {is} {v}|the {x} {a} belonging to {k} {is} {v}|{k} ({x}) {has} {a} {v}|with {k} comes {a} {v}|"
    "{k}{sep}{v} ({a})|{k}.{a}{sep}{v}|{a}[{k}]{sep}{v}|the {a} {is} {v} for {k} only, which for {k} means {v}|"
    '"{k}"{sep}"{v}" // {a}|{k} and its {a} {v}|{k} {x} {x} {a} {v}|{x} {a} of {k} {x} {v}|{k} {a} {v}|{a} for {k}{sep}{v}|'
    "to {k} we gave the {a} {v}|{k} {has} the {x} {a} {v}|the {a} {has} {v} at {k}, so {k} {has} {v}"
).split("|")
TAILS = "....|||.|, as far as we know.| (checked).|;|!|, says {x}.| # {x}|, for now.| (since {n})|, {x}.|,| <br>| -- {x}| */|...| [{x}]|, not {n}.".split("|")
QUESTION_LEADS = (
    "|||Tell me |Please look up |Find |Can you give me |I need |What is |What is |What was |What is |Do you know |Do you remember |"
    "Question: |Now |Next, |And |According to the text, what is |Hello, what was |Let me know |Give me |Show me |Search for |"
    "I would like to have |Check |Remind me of |Quick: |Could anyone tell me |{x}, tell me |Answer: what is |Then what is |Get |Print |"
    "Say |From the text above, say |Please |In short: |Return |State |I am looking for |Try to recall |Write down |So what are |Read out |"
    "Help me find |We need |Would you repeat |Who knows |{x} {x} |Ok, |Thanks. Now |I wonder about |Somewhere it says |Extract |Name |List "
).split("|")
QUESTIONS = (
    "the {a} of {k}|the {a} of {k}|the {a} for {k}|{k}'s {a}|the {a} that belongs to {k}|the {a} given to {k}|{a} of {k}|{k} and its {a}|"
    "the {a} at {k}|the {a} listed under {k}|the value of {a} for {k}|the exact {a} of {k}|which {a} does {k} have|which {a} did {k} get|"
    "what {a} was given for {k}|which {a} goes to {k}|{k}: {a}|{k}, {a}|for {k}, what is the {a}|about {k}: which {a}|"
    "what does {k} use as {a}|which {a} there is for {k}|{a} {k}|{k} {a}|how about the {a} of {k}|what the {a} of {k} is|"
    "which {a} {has} {k}|what {k} {has} as its {a}|the {a} which {k} {has}|the {a} from {k}|the {x} {a} of {k}|what the {a} for {k} is"
).split("|")
QUESTION_TAILS = (
    "????|?|?|?|...|.|.|, please.| again?| now.| in the text?| in the document above.| for me.|!| exactly?|, thanks.| if you can.| then?|"
    ", do you know?|, please?| according to the text.| is.| has.| {x}?||, ok?| (from above)| above?| today?| once more.|, tell me.| is?"
).split("|")
ALL = "every {a} of {k}|all values of {a} for {k}|each {a} that {k} has|all {a} entries of {k}|all the {a} of {k}|the complete {a} list of {k}|every single {a} for {k}|{k} with all its {a}".split("|")
GROUP = "the {a} of {k}|the {a} for each of {k}|for each of {k}: the {a}|{a} of {k}|{k}: {a}|the {a} of all of {k}|which {a} do {k} have|the {a} of {k}, one after the other|for {k}, the {a} in turn|{k} and the {a} of each".split("|")
ASSIGNMENTS = (
    "{a} = {b}|{a} = {b}|let {a} = {b}|set {a} to {b}|{a} := {b}|VAR {a} = {b}|assign {b} to {a}|put {b} into {a}|copy {b} to {a}|let {a} equal {b}|"
    "{a} <- {b}|{a} takes {b}|{a} becomes {b}|{a} is {b}|{a}: {b}|move {b} over to {a}|initialise {a} with {b}|{b} -> {a}|write {b} to {a}|"
    "{a} == {b}|{a} holds {b}|make {a} {b}|give {a} the value {b}|load {b} into {a}|set {a} = {b}|var {a} = {b};|int {a} = {b};|{x} {a} {b}|"
    "{x} {b} {x} {a}|{a} {x} {b}|({a}, {b})|{a} equals {b}|now {a} is {b}|mov {a}, {b}|{b} goes to {a}|save {b} as {a}|bind {a} to {b}|{a} {has} {b}|"
    "use {b} for {a}|keep {b} under {a}|call {b} by {a}|hide {b} in {a}|{x} {b} in {a}|{x} {b} into {a}|{x} {b} to {a}|declare {a} as {b}|{x} {a} as {b}|"
    "{x} {a} to {b}|{x} {a} with {b}|{a} {is} {b}|{a} {has} {b}|{a} accepts {b}|{a}{sep}{b}|{x} {a}{sep}{b}|in {a} put {b}|{b} is in {a}"
).split("|")
VARIABLES = "the value of {k}|{k}|which value does {k} hold|{k} = |the final value of {k}|how {k} comes about|{k} step by step|where {k} comes from|what {k} is|what {k} {has}|variable {k}|the trace of {k}".split("|")
SNIPPETS = (
    "def {k}():\n    return {v}|def {k}(x, y):\n    return {v}|{k} = {v}|class {k}:\n    default = {v}|{k}: int = {v}|#define {k} {v}|const {k} = {v};|"
    "function {k}(a) {{\n    return {v};\n}}|export {k}={v}|    self.{k} = {v}|def {k}(x):\n    {x} = {n}\n    return {v}|let {k} = {v};|{k}({v})|"
    "def {k}(*args):\n    # {x} {x}\n    return {v}|    {k}={v},|var {k} int = {v}|@{x}\ndef {k}({x}):\n    return {v}|{x}.{k} = {v}|    '{k}': {v},|"
    "{k} = {x}({v})|int {k}() {{ return {v}; }}|lambda {k}: {v}|{x} {k} = {v};|{x} {x} {k} = {v}|{k} = ({v}, {n})|fn {k}() -> {x} {{ {v} }}|SET {k} = {v};"
).split("|")
CODE = "{k}|the definition of {k}|the value of {k}|{k} in the code|how is {k} defined|what does the code say about {k}|which value does {k} have|where is {k} set|what {k} returns|{k} in the {x}|which value the code gives {k}|the line with {k}|the source of {k}|what is behind {k}".split("|")
TOOLS: dict[Split, list[str]] = {
    "train": ["read_file", "open_log", "fetch_page", "run_query", "list_records", "search_notes", "cat", "view", "grep"],
    "test": ["load_report", "get_document"],
}
INSTRUCTIONS = "go through these one by one: {k}|read {k} and then answer my questions|have a look at {k}|open {k}, I will ask about them later|{k}|load {k}|first {k}|see {k} for what comes|take {k} and remember the content|view {k}, more to come|inspect {k}".split("|")
PREAMBLES = "||Read this text.\n|Answer from the document below.\n|Context:\n|Here is a long document.\n|{x} {x}\n|Text:\n\n|Document {n}\n|# {x}\n|The following is from {x}.\n|Attached:\n".split("|")
SYSTEM = ["You are a helpful assistant.", "Answer from the text.", "You answer questions about long documents.", "You are an agent. Use the tools."]
FUNCTION_WORDS = (
    "what is it you me the a of in on at this that was were be do does did can could would should will i we they he she if or and "
    "not so then when where who why how which one all some any more most for to from with by as its his her there here just only very"
).split()
SYLLABLES = "ba be bo da di do fa fi ga go ha hi jo ka ke ko la le li lo ma me mi mo na ne no pa pe ra ri ro sa se so ta te ti to va ve vi vo za zo".split()

TEST: dict[str, list[str]] = {
    "statement": [
        "Memo about {k}: its {a} reads {v}.",
        "The registered {a} that pertains to {k} is {v}.",
        "One of the special facts: {k} carries {a} {v}.",
        "> {k} / {a} / {v}",
        "In the end {k} received the {a} {v}.",
        "DEBUG {a} of {k} turned into {v}",
    ],
    "question": [
        "Could you say what the {a} of {k} was?",
        "Look through all of this: which {a} goes with {k}?",
        "I forgot the {a} of {k}, what is it?",
        "Report the {a} of {k}.",
    ],
    "all": ["Which are all of the {a} values of {k}?", "Collect every {a} that exists for {k}."],
    "group": ["Report the {a} of each of {k}.", "Go through {k} and say the {a}."],
    "assignment": ["store {b} in {a}", "define {a} as {b}", "{a} receives {b}"],
    "variable": ["Work out the value of {k}.", "What does {k} hold in the end?"],
    "snippet": ["def {k}(self):\n    return {v}", "static long {k} = {v};", "{k} = float({v})"],
    "code": ["Look up {k} in the source.", "Which value belongs to {k} in the program?"],
    "instruction": ["Work through {k} before we talk.", "Fetch {k}, questions follow."],
    "preamble": ["", "Some material to study first.\n"],
}
# lead, core and tail of the training wording
TRAIN: dict[str, tuple[list[str], list[str], list[str]]] = {
    "statement": (LEADS, STATEMENTS, TAILS),
    "question": (QUESTION_LEADS, QUESTIONS, QUESTION_TAILS),
    "all": (QUESTION_LEADS, ALL, QUESTION_TAILS),
    "group": (QUESTION_LEADS, GROUP, QUESTION_TAILS),
    "assignment": (["", "", "", "", "    ", "{n}. ", "then ", "# ", "* ", "{x} "], ASSIGNMENTS, ["", "", "", ";", "."]),
    "variable": (QUESTION_LEADS, VARIABLES, QUESTION_TAILS),
    "snippet": ([""], SNIPPETS, ["", "", "", "  # {x}"]),
    "code": (QUESTION_LEADS, CODE, QUESTION_TAILS),
    "instruction": (QUESTION_LEADS, INSTRUCTIONS, QUESTION_TAILS),
    "preamble": ([""], PREAMBLES, [""]),
}


def half(text: str) -> Split:
    return "test" if zlib.crc32(text.encode()) % 8 == 0 else "train"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass
class Pool:
    """Draws names, values and wording of one half."""

    split: Split
    words: list[str]
    rng: random.Random

    def own(self, draw: Callable[[], str]) -> str:
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
        if r < 0.6:
            return self.number()
        if r < 0.72:
            return self.own(lambda: "".join(self.rng.choices("ABCDEFGHKLMNPQRSTUVWXYZ", k=2)) + f"-{self.rng.randint(100, 999)}")
        if r < 0.84:
            return self.own(lambda: f"{self.rng.getrandbits(24):06x}")
        if r < 0.92:
            return self.own(lambda: f"{self.word()}{self.rng.randint(10, 99)}")
        return f"{self.word().capitalize()}{self.word().capitalize()}"

    def attribute(self) -> str:
        if self.split == "train" and self.rng.random() < 0.6:
            return " ".join(self.word() for _ in range(self.rng.choice([1, 1, 2, 2, 2, 3])))
        return self.rng.choice(ATTRIBUTES[self.split])

    def noise(self, most: int) -> str:
        return " ".join(self.rng.choice(FUNCTION_WORDS) if self.rng.random() < 0.5 else self.word() for _ in range(self.rng.randint(1, most)))

    def lead(self, fragments: list[str]) -> str:
        if len(fragments) < 10 or self.rng.random() < 0.7:
            return self.rng.choice(fragments)
        return self.noise(5) + self.rng.choice([" ", " ", ": ", ", ", "; ", ". ", " - "])

    def tail(self, fragments: list[str]) -> str:
        if len(fragments) < 10 or self.rng.random() < 0.7:
            return self.rng.choice(fragments)
        return self.rng.choice([", ", ", ", "; ", " - ", ". ", " ("]) + self.noise(5) + self.rng.choice(["?", ".", "", "!", ")"])

    def verb(self, fragments: list[str]) -> str:
        return self.rng.choice(fragments) if self.rng.random() < 0.65 else self.noise(2)

    def separator(self) -> str:
        if self.rng.random() < 0.5:
            return self.rng.choice(SEPARATORS)
        marks = "".join(self.rng.choices("!#$%&*+-.:;<=>?@^_|~,", k=self.rng.randint(1, 2)))
        return self.rng.choice([f" {marks} ", f"{marks} ", f" {marks}", marks])

    def connector(self) -> str:
        mark, r = self.separator(), self.rng.random()
        if r < 0.4:
            return mark
        if r < 0.6:
            return f" {self.noise(3)} "
        return f"{mark.rstrip()} {self.noise(2)} " if r < 0.8 else f" {self.noise(2)}{mark}"

    def shape(self, parts: list[str]) -> str:
        """A sentence of no known form: the parts in any order, with anything between."""
        body = parts[0]
        for part in parts[1:]:
            body += self.connector() + part
        return body

    def core(self, what: str) -> str:
        """A known form or, where the reader can still tell what is meant, any form."""
        parts = {"statement": ["{a}", "{k}"], "question": ["{a}", "{k}"], "code": ["{k}", "{x}"], "variable": ["{k}", "{x}"]}.get(what)
        if not parts or self.rng.random() < 0.6:
            return self.rng.choice(TRAIN[what][1])
        self.rng.shuffle(parts)
        if what == "statement":
            parts.insert(2 if self.rng.random() < 0.85 else 1, "{v}")
        return self.shape(parts)

    def compose(self, what: str) -> str:
        leads, _, tails = TRAIN[what]
        text = self.lead(leads) + self.core(what) + self.tail(tails)
        while "{x}" in text:
            text = text.replace("{x}", self.noise(1), 1)
        return text

    def say(self, what: str, **slots: str) -> str:
        """A sentence with the slots filled."""
        text = self.rng.choice(TEST[what]) if self.split == "test" else self.compose(what)
        number = str(self.rng.randint(1, 9999))
        text = text.format(**slots, sep=self.separator(), n=number, **{"is": self.verb(IS), "has": self.verb(HAS)})
        plain = what in ("snippet", "assignment") or self.rng.random() < 0.3
        return text if plain else capital(text)

    def distinct(self, draw: Callable[[], str], n: int) -> list[str]:
        seen: dict[str, None] = {}
        for _ in range(20 * n):
            seen[draw()] = None
            if len(seen) == n:
                break
        return list(seen)
