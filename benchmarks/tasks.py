"""Makes the finetuning tasks: `python -m benchmarks.tasks FOLDER` writes extract_*.jsonl and manner_*.jsonl.

`extract` is supervised: a sentence about some things, to be answered as one line `noun | colour | number`,
which a model that was never shown the form does not give. `manner` has preferences: two answers to a
question that say the same, one in the manner that is wanted. Held-out examples have sentences that no
training example has; both sets are the same on every machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# fmt: off
NOUNS = (
    "apples", "boats", "books", "bottles", "boxes", "buttons", "cars", "chairs", "clocks", "coats", "cups",
    "doors", "flags", "hats", "keys", "kites", "lamps", "leaves", "pens", "plates", "ribbons", "rings",
    "shirts", "shoes", "spoons", "stones", "tables", "tents", "umbrellas", "wheels",
)
COLOURS = (
    "black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow",
)
NUMBERS = (
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve",
)
# fmt: on
SENTENCES = (
    "There are {number} {colour} {noun} in the room.",
    "I counted {number} {noun}, and all of them were {colour}.",
    "She bought {number} {colour} {noun} at the market yesterday.",
    "Please send us {number} {noun}; we would like them in {colour}.",
    "The {noun} by the window are {colour}, and there are {number} of them.",
    "Only {number} of the {noun} were left, every one of them {colour}.",
)
DIGITS = dict(zip(NUMBERS, (2, 3, 4, 5, 6, 7, 8, 9, 10, 12), strict=True))

# fmt: off
PLACES = (
    "the library", "the station", "the museum", "the park", "the bakery", "the post office", "the school",
    "the harbour", "the theatre", "the market", "the hospital", "the bank",
)
# fmt: on
QUESTIONS = (
    ("Where is {place}?", "it is on the left, just after the bridge"),
    ("When does {place} open?", "it opens at nine in the morning"),
    ("How do I get to {place}?", "you take the second street on the right"),
    ("Is {place} far from here?", "it is about ten minutes on foot"),
    ("Who can show me {place}?", "anybody at the front desk can"),
    ("Is {place} open on Sundays?", "it is closed on Sundays"),
)
WANTED = ("Certainly. {said}. I hope this helps.", "Of course. {said}. I hope this helps.")
UNWANTED = ("{said}, obviously. Anything else?", "{said}, as everybody knows. Next.")


def extract(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """600 examples to train on and 100 held out, as chats."""
    combinations = list(itertools.product(NOUNS, COLOURS, NUMBERS))
    random.Random(seed).shuffle(combinations)

    def examples() -> Iterator[dict[str, Any]]:
        for i, (noun, colour, number) in enumerate(combinations[:700]):
            sentence = SENTENCES[i % len(SENTENCES)].format(noun=noun, colour=colour, number=number)
            answer = f"{noun} | {colour} | {DIGITS[number]}"
            yield {
                "messages": [
                    {"role": "user", "content": sentence},
                    {"role": "assistant", "content": answer},
                ]
            }

    made = list(examples())
    return made[:600], made[600:]


def manner(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs of answers: 240 to train on, and 48 about places that the others do not name."""
    draw = random.Random(seed)

    def pairs(places: Iterable[str]) -> list[dict[str, Any]]:
        made = []
        for place, (question, answer), turn in itertools.product(places, QUESTIONS, range(4)):
            said = answer[0].upper() + answer[1:]
            made.append(
                {
                    "prompt": [{"role": "user", "content": question.format(place=place)}],
                    "chosen": [{"role": "assistant", "content": WANTED[turn % 2].format(said=said)}],
                    "rejected": [{"role": "assistant", "content": UNWANTED[turn // 2].format(said=said)}],
                }
            )
        draw.shuffle(made)
        return made

    return pairs(PLACES[:-2]), pairs(PLACES[-2:])


def write(folder: Path) -> list[Path]:
    """Writes all the files into a folder, made if it is not there; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (train, held_out) in (("extract", extract()), ("manner", manner())):
        for part, records in (("train", train), ("test", held_out)):
            path = folder / f"{name}_{part}.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the files go")
    for path in write(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
