"""Generates the tasks: `python -m benchmarks.tasks FOLDER` writes extract_*, manner_*, sums_* and
judged_*.jsonl.

`extract` is supervised: a sentence about some objects, to be answered with one line `noun | color | number`,
a format that the model has never seen. `manner` has preference pairs: two answers with the same content, one
of them in the preferred style. `sums` has prompts for reinforcement learning, two numbers to add, and their
answers: the number and a period. `judged` has pairs for a reward model of them: the right answer, and one
that is wrong or in another form. Validation examples have sentences or numbers that no training example has.
All are deterministic.
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
COLORS = (
    "black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow",
)
NUMBERS = (
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve",
)
# fmt: on
SENTENCES = (
    "There are {number} {color} {noun} in the room.",
    "I counted {number} {noun}, and all of them were {color}.",
    "She bought {number} {color} {noun} at the market yesterday.",
    "Please send us {number} {noun}; we would like them in {color}.",
    "The {noun} by the window are {color}, and there are {number} of them.",
    "Only {number} of the {noun} were left, every one of them {color}.",
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
PREFERRED = ("Certainly. {answer_text}. I hope this helps.", "Of course. {answer_text}. I hope this helps.")
REJECTED = ("{answer_text}, obviously. Anything else?", "{answer_text}, as everybody knows. Next.")


def extract(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """600 training and 100 validation examples, as chats."""
    combinations = list(itertools.product(NOUNS, COLORS, NUMBERS))
    random.Random(seed).shuffle(combinations)

    def examples() -> Iterator[dict[str, Any]]:
        for i, (noun, color, number) in enumerate(combinations[:700]):
            sentence = SENTENCES[i % len(SENTENCES)].format(noun=noun, color=color, number=number)
            answer = f"{noun} | {color} | {DIGITS[number]}"
            yield {
                "messages": [
                    {"role": "user", "content": sentence},
                    {"role": "assistant", "content": answer},
                ]
            }

    records = list(examples())
    return records[:600], records[600:]


def manner(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Preference pairs: 240 for training, and 48 for validation, about other places."""
    rng = random.Random(seed)

    def pairs(places: Iterable[str]) -> list[dict[str, Any]]:
        records = []
        for place, (question, answer), turn in itertools.product(places, QUESTIONS, range(4)):
            answer_text = answer[0].upper() + answer[1:]
            records.append(
                {
                    "prompt": [{"role": "user", "content": question.format(place=place)}],
                    "chosen": [
                        {"role": "assistant", "content": PREFERRED[turn % 2].format(answer_text=answer_text)}
                    ],
                    "rejected": [
                        {"role": "assistant", "content": REJECTED[turn // 2].format(answer_text=answer_text)}
                    ],
                }
            )
        rng.shuffle(records)
        return records

    return pairs(PLACES[:-2]), pairs(PLACES[-2:])


def sums(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sums of two numbers from 1 to 9: 65 for training, 16 for validation; the answer ends with a period.

    The prompt shows a sum, and no period: what is to be learned is the form, and to be right more often.
    """
    pairs = list(itertools.product(range(1, 10), repeat=2))
    random.Random(seed).shuffle(pairs)
    records = [{"prompt": f"7 + 9 = 16\n{a} + {b} =", "answer": f"{a + b}."} for a, b in pairs]
    return records[:65], records[65:]


def judged() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Preference pairs of completions of `sums`, six for each: 390 for training, 96 for validation."""

    def pairs(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for number, record in enumerate(records):
            right = int(record["answer"].removesuffix("."))
            wrong = 2 + (right - 1 + number % 16) % 17  # another of 2 to 18
            endings = (
                f"{right}\n",
                f"{wrong}.\n",
                f"{wrong}\n",
                f"{right} is",
                f"{right}, so",
                f"the {right}",
            )
            same = {"prompt": record["prompt"], "chosen": f" {right}.\n"}
            found += [{**same, "rejected": f" {ending}"} for ending in endings]
        return found

    train, validation = sums()
    return pairs(train), pairs(validation)


def write(folder: Path) -> list[Path]:
    """Writes all files into a folder, which is created if needed; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    tasks = {"extract": extract(), "manner": manner(), "sums": sums(), "judged": judged()}
    for name, (train, validation) in tasks.items():
        for part, records in (("train", train), ("test", validation)):
            path = folder / f"{name}_{part}.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="output folder")
    for path in write(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
