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
from functools import cached_property
from itertools import islice

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

_NEXT_WEIGHTS = (8, 4, 2, 1)


@dataclass(frozen=True, kw_only=True)
class Words:
    """The open words of the language; its glue is the same in every vocabulary.

    `chain` seeds the Markov chain from one filler word to the next.
    """

    relations: tuple[str, ...] = tuple(RELATIONS)
    names: tuple[str, ...] = tuple(NAMES)
    values: tuple[str, ...] = tuple(VALUES)
    filler: tuple[str, ...] = tuple(FILLER)
    chain: int = 1

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        words = [PAD, BOS, UNK, *GLUE, *self.relations, *self.filler, *self.names, *self.values]
        return tuple(dict.fromkeys(words))

    @cached_property
    def next(self) -> dict[str, list[str]]:
        """What may follow each filler word, likeliest first."""
        rng = random.Random(self.chain)
        return {word: rng.sample(self.filler, 4) for word in self.filler}


WORDS = Words()


def invented_words(seed: int) -> Words:
    """A vocabulary of made-up words, as large as the first one: `banelo`, `tirusk` ..."""
    rng = random.Random(seed)
    sizes = [len(kind) for kind in (RELATIONS, NAMES, VALUES, FILLER)]
    drawn: dict[str, None] = dict.fromkeys(GLUE)
    while len(drawn) < len(GLUE) + sum(sizes):
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        drawn["".join(syllables) + rng.choice(["", "", "n", "sk", "l"])] = None
    rest = iter(list(drawn)[len(GLUE) :])
    relations, names, values, filler = (tuple(islice(rest, size)) for size in sizes)
    return Words(relations=relations, names=names, values=values, filler=filler, chain=seed)


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

    def __init__(self, rng: random.Random, mixture: Mixture, language: Words = WORDS) -> None:
        self.rng, self.mixture, self.language = rng, mixture, language
        self.words: list[str] = [BOS]
        self.answer: list[bool] = [False]
        self.facts: dict[tuple[str, str], str] = {}
        self._names = rng.sample(language.names, mixture.names)

    def __len__(self) -> int:
        return len(self.words)

    def _say(self, words: list[str], answer: bool = False) -> None:
        self.words += words
        self.answer += [answer] * len(words)

    def fact(self) -> None:
        relations = self.language.relations[: self.mixture.relations]
        key = self.rng.choice(relations), self.rng.choice(self._names)
        if key not in self.facts:
            self.facts[key] = self.rng.choice(self.language.values)
            self._say(["the", key[0], "of", key[1], "is", self.facts[key], "."])

    def question(self, key: tuple[str, str]) -> None:
        self._say(["recall", "the", key[0], "of", key[1], "is"])
        self._say([self.facts[key]], answer=True)
        self._say(["."])

    def filler(self) -> None:
        words = [self.rng.choice(self.language.filler)]
        for _ in range(self.rng.randint(3, 11)):
            words += self.rng.choices(self.language.next[words[-1]], _NEXT_WEIGHTS)
        self._say([*words, "."])

    def copy(self) -> None:
        open_words = [*self.language.names, *self.language.values, *self.language.filler]
        segment = self.rng.choices(open_words, k=self.rng.randint(4, 10))
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


def document(
    rng: random.Random, length: int, mixture: Mixture, language: Words = WORDS
) -> tuple[list[str], list[bool]]:
    """Draw a document of exactly `length` words; return its words and its answer flags."""
    doc = Document(rng, mixture, language)
    if rng.random() < mixture.copied:
        while len(doc) < length:
            size = rng.randint(8, max(8, min(48, length // 2)))
            segment = rng.choices(language.vocabulary[3:], k=size)
            doc._say(segment)
            doc._say(segment[:2])
            doc._say(segment[2:], answer=True)
    else:
        while len(doc) < length:
            doc.sentence()
    return doc.words[:length], doc.answer[:length]


def recall_prompt(
    rng: random.Random,
    context: int,
    questions: int,
    mixture: Mixture,
    language: Words = WORDS,
) -> tuple[str, str, list[tuple[int, int]]]:
    """Draw one evaluation prompt: a context, then questions on different facts of it.

    Returns the context text, the continuation text and the character span of each answer in
    the continuation.
    """
    doc = Document(rng, mixture, language)
    while len(doc) < context or len(doc.facts) < questions:
        doc.sentence()
    chosen = rng.sample(list(doc.facts), questions)
    start = len(doc)
    for key in chosen:
        doc.question(key)
        if rng.random() < 0.5:
            doc.filler()
    words = doc.words[start:]
    return " ".join(doc.words[:start]), " ".join(words), answer_spans(words, doc.answer[start:])


def answer_spans(words: list[str], flags: list[bool]) -> list[tuple[int, int]]:
    """The character span of every answered word in the words joined by blanks."""
    spans, at = [], 0
    for word, is_answer in zip(words, flags, strict=True):
        if is_answer:
            spans.append((at, at + len(word)))
        at += len(word) + 1
    return spans
