"""The language of the embedded recall model: facts, questions, copies and filler.

A document is a stream of sentences over a closed vocabulary of whole words::

    <bos> the code of alice is amber . the river was calm full of people .
    copy : lamp stone crow again : lamp stone crow .
    recall the code of alice is amber .

A *fact* binds a (relation, name) pair to a value, so several facts share a name and
recalling one needs both keys.  A *question* repeats the wording of a fact stated earlier,
usually far back; its value is an *answer*.  *Filler* is a first-order Markov chain that needs
only local context.  *Copies* repeat a segment once.  Evicting the wrong keys breaks answers
and copies and leaves filler alone, which is what separates cache-compression methods.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

PAD, BOS, UNK = "<pad>", "<bos>", "<unk>"

GLUE = "the of is . : recall copy again".split()
RELATIONS = "code colour city song tool pet".split()
NAMES = (
    "alice bob carol david emma frank grace henry irene jack karen liam maria noah olive peter "
    "queenie robert sara thomas ursula victor wendy xavier yvonne zach adam beth chris diana "
    "edgar fiona george hannah ivan julia kevin laura martin nina oscar paula quentin rachel "
    "simon tina umberto vera walter ximena yusuf zoe anton bella cyrus dora elias flora gustav "
    "helga igor jasmin konrad lucia"
).split()
VALUES = (
    "amber basil cedar dune ember fern garnet hazel iris jade kelp lotus maple nickel onyx pearl "
    "quartz ruby saffron tulip umber violet willow yarrow zinc acorn bronze cobalt daisy ebony "
    "flint ginger heron indigo jasper kiwi lamp marble nettle opal pine quill raven slate topaz "
    "urchin velvet walnut yucca zebra anchor badger candle dagger eagle falcon goblet hammer "
    "island jungle kettle ladder magnet needle otter pebble quiver ribbon saddle temple umbrella "
    "valley wagon yogurt zephyr arrow barrel castle desert engine forest garden harbor icicle "
    "jacket kernel lantern meadow napkin orchid palace quarry rocket summit tunnel"
).split()
FILLER = (
    "a river market bell rain cart roof street was calm full people that day nobody spoke for "
    "while went by on road rang twice fell and then again slowly wind turned over old hills some "
    "children sang near bridge before evening came light grew thin boats left without sound snow"
).split()

VOCABULARY = tuple(dict.fromkeys([PAD, BOS, UNK, *GLUE, *RELATIONS, *FILLER, *NAMES, *VALUES]))

_chain = random.Random(1)
_NEXT = {word: _chain.sample(FILLER, 4) for word in FILLER}
_NEXT_WEIGHTS = (8, 4, 2, 1)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How often each kind of sentence is drawn, and from how many keys.

    `copied` is the probability that a whole document is random segments, each repeated once:
    the drill from which recall grows; without it models of this size stay at chance.
    """

    names: int = 24
    relations: int = len(RELATIONS)
    fact: float = 0.2
    question: float = 0.2
    copy: float = 0.04
    copied: float = 0.0


class Document:
    """Words of one document, and for each word whether it can be answered from the text."""

    def __init__(self, rng: random.Random, mixture: Mixture) -> None:
        self.rng, self.mixture = rng, mixture
        self.words: list[str] = [BOS]
        self.answer: list[bool] = [False]
        self.facts: dict[tuple[str, str], str] = {}
        self._names = rng.sample(NAMES, mixture.names)

    def __len__(self) -> int:
        return len(self.words)

    def _say(self, words: list[str], answer: bool = False) -> None:
        self.words += words
        self.answer += [answer] * len(words)

    def fact(self) -> None:
        key = self.rng.choice(RELATIONS[: self.mixture.relations]), self.rng.choice(self._names)
        if key not in self.facts:
            self.facts[key] = self.rng.choice(VALUES)
            self._say(["the", key[0], "of", key[1], "is", self.facts[key], "."])

    def question(self, key: tuple[str, str]) -> None:
        self._say(["recall", "the", key[0], "of", key[1], "is"])
        self._say([self.facts[key]], answer=True)
        self._say(["."])

    def filler(self) -> None:
        words = [self.rng.choice(FILLER)]
        for _ in range(self.rng.randint(3, 11)):
            words += self.rng.choices(_NEXT[words[-1]], _NEXT_WEIGHTS)
        self._say([*words, "."])

    def copy(self) -> None:
        segment = self.rng.choices([*NAMES, *VALUES, *FILLER], k=self.rng.randint(4, 10))
        self._say(["copy", ":", *segment, "again", ":"])
        self._say(segment[:1])  # the first word cannot be known from its left neighbour alone
        self._say(segment[1:], answer=True)
        self._say(["."])

    def sentence(self) -> None:
        draw, mix = self.rng.random(), self.mixture
        if draw < mix.fact or not self.facts:
            self.fact()
        elif draw < mix.fact + mix.question:
            self.question(self.rng.choice(list(self.facts)))
        elif draw < mix.fact + mix.question + mix.copy:
            self.copy()
        else:
            self.filler()


def document(rng: random.Random, length: int, mixture: Mixture) -> tuple[list[str], list[bool]]:
    """Draw a document of exactly `length` words; return its words and its answer flags."""
    doc = Document(rng, mixture)
    if rng.random() < mixture.copied:
        while len(doc) < length:
            segment = rng.choices(VOCABULARY[3:], k=rng.randint(8, max(8, min(48, length // 2))))
            doc._say(segment)
            doc._say(segment[:2])
            doc._say(segment[2:], answer=True)
    else:
        while len(doc) < length:
            doc.sentence()
    return doc.words[:length], doc.answer[:length]


def recall_prompt(
    rng: random.Random, context: int, questions: int, mixture: Mixture
) -> tuple[str, str, list[tuple[int, int]]]:
    """Draw one evaluation prompt: a context, then questions on different facts of it.

    Returns the context text, the continuation text and the character span of each answer in
    the continuation.
    """
    doc = Document(rng, mixture)
    while len(doc) < context or len(doc.facts) < questions:
        doc.sentence()
    chosen = rng.sample(list(doc.facts), questions)
    start = len(doc)
    for key in chosen:
        doc.question(key)
        if rng.random() < 0.5:
            doc.filler()
    words, flags = doc.words[start:], doc.answer[start:]
    spans, at = [], 0
    for word, is_answer in zip(words, flags, strict=True):
        if is_answer:
            spans.append((at, at + len(word)))
        at += len(word) + 1
    return " ".join(doc.words[:start]), " ".join(words), spans
