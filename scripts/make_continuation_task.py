"""Write the task `continuation` of `depthmix eval` from a text.

    python scripts/make_continuation_task.py prose-sotu.txt.xz --out src/depthmix/evaluation/tasks

Which of four pieces of 24 to 40 bytes goes on after 60 to 80 bytes of a sentence? The other three are other
questions' right answers, of nearly the same length. The same text and seed give the same file.
"""

import argparse
import json
import lzma
import random
import re
from pathlib import Path

QUESTIONS = 200


def pieces(text: str) -> list[tuple[str, str]]:
    """``(context, continuation)``, cut between words inside of one sentence, ASCII only, one a sentence at most."""
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        words = sentence.split()
        for cut in range(1, len(words)):
            context = " ".join(words[:cut])
            if len(context) < 60:
                continue
            continuation = ""
            for word in words[cut:]:
                continuation += " " + word
                if len(continuation) >= 24:
                    break
            if len(context) <= 80 and 24 <= len(continuation) <= 40 and sentence.isascii():
                found.append((context, continuation))
            break
    return found


def questions(text: str, seed: int) -> list[dict]:
    chance = random.Random(seed)
    found = list(dict.fromkeys(pieces(text)))
    chosen = chance.sample(found, QUESTIONS)
    made = []
    for context, right in chosen:
        others = sorted(
            (one for _, one in chosen if one != right), key=lambda one: (abs(len(one) - len(right)), one)
        )[:12]
        choices = [right, *chance.sample(list(dict.fromkeys(others)), 3)]
        chance.shuffle(choices)
        made.append({"context": context, "choices": choices, "label": choices.index(right)})
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with lzma.open(given.text, "rt", encoding="utf-8") as file:
        made = questions(file.read(), given.seed)
    lines = "".join(json.dumps(one) + "\n" for one in made)
    (given.out / "continuation.jsonl").write_text(lines, encoding="utf-8")
