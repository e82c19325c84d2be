"""The exported tokenizer gives the run's ids."""

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from transformers import AutoTokenizer

from depthmix.data.tokenizers import load_tokenizer

pytestmark = pytest.mark.hf

NASTY = [
    "",
    " ",
    "\n\n  \t\n",
    "a",
    "it's  they'll\u00a0we'd 'S 'T",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    " - - ----- =====\n\n\n\n====",
    "12345 67 ٣٤٥ ½",
    "naïve Ünïcödé \u0301 \u200d 👩‍👩‍👧‍👦 漢字かな",
    "<|endoftext|> is text <|endoftext|>",
    "\x00\x01\x7f\r\r\n",
]


@pytest.mark.parametrize("name", ["byte", "gpt2", "bpe:700"])
def test_ids_are_the_runs(exported, name):
    run, folder = exported("prenorm", tokenizer=name)
    import json

    ours = load_tokenizer(json.loads((run / "tokenizer.json").read_text()))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.is_fast and theirs.model_max_length == 48 and theirs.padding_side == "left"
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.end_token
    texts = [*NASTY, Path(random.__file__).read_text()]
    draw = random.Random(0)
    alphabet = "ab lin:0123456789e\n" + "".join(chr(draw.randrange(32, 1200)) for _ in range(20))
    texts += ["".join(draw.choice(alphabet) for _ in range(draw.randrange(60))) for _ in range(2000)]
    texts += [Path(sys.modules[m].__file__).read_text() for m in ("subprocess", "os")]
    for text in texts:
        ids = theirs(text, verbose=False)["input_ids"]
        assert ids == ours.encode(text), text[:100]
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert theirs.decode([ours.end_token], skip_special_tokens=False) == "<|endoftext|>"
    batch = theirs(["abc", "a"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [len(ours.encode("abc")), 1]
    assert batch["attention_mask"][1, -1] == 1
