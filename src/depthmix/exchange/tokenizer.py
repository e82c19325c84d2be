"""A run's tokenizer as the ``tokenizer.json`` of the library tokenizers, and back.

tiktoken, which depthmix applies, merges the adjacent pair whose *union* has the lowest id; the library merges listed
*pairs*. So every way to put a token together from two others is listed, at the token's rank, first the one that was
learnt, which is how the way back finds it. A piece of text that is a token as a whole is that token
(``ignore_merges``), as in tiktoken.

The end token is never made from text: ``split_special_tokens`` is set, so that ``<|endoftext|>`` in a text is only
text, as in training.
"""

import json

from ..data.tokenizers import (
    END_TEXT,
    BPETokenizer,
    ByteTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    _byte_of_character,
    _MergeTokenizer,
    load_tokenizer,
)
from ..errors import UserError

_PRE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def to_json(tokenizer: Tokenizer) -> str:
    """``tokenizer.json`` of a run's tokenizer."""
    character = {byte: char for char, byte in _byte_of_character().items()}
    learnt: dict[str, tuple[str, str]] = {}
    if isinstance(tokenizer, ByteTokenizer):
        ranks = {bytes((byte,)): byte for byte in range(256)}
    else:
        assert isinstance(tokenizer, _MergeTokenizer), tokenizer
        ranks = tokenizer._encoding._mergeable_ranks
        if isinstance(tokenizer, BPETokenizer):
            for left, right in tokenizer.merges:
                learnt.setdefault(left + right, (left, right))
    spelt = {"".join(character[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(spelt.items(), key=lambda item: item[1]):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in pairs if all(spelt.get(part, rank) < rank for part in pair)]
        first = learnt.get(token)
        merges += sorted(pairs, key=lambda pair: pair != first)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": {**spelt, END_TEXT: tokenizer.end_token},
        "merges": merges,
    }
    end = {"id": tokenizer.end_token, "content": END_TEXT, "single_word": False, "lstrip": False}
    end |= {"rstrip": False, "normalized": False, "special": True}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": {**_PRE, "use_regex": not isinstance(tokenizer, ByteTokenizer)},
        "post_processor": None,
        "decoder": _PRE,
        "model": model,
    }
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


def settings(context: int) -> dict:
    """``tokenizer_config.json``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": END_TEXT,
        "eos_token": END_TEXT,
        "pad_token": END_TEXT,
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def from_json(values: dict) -> Tokenizer:
    """The tokenizer that :func:`to_json` was given.

    Raises:
        ValueError: these are not the values of one.
    """
    try:
        vocab = values["model"]["vocab"]
        end = vocab[END_TEXT]
        candidates = [ByteTokenizer()] if end == 256 else [GPT2Tokenizer()] if end == 50256 else []
        for tokenizer in candidates:
            if json.loads(to_json(tokenizer))["model"]["vocab"] == vocab:
                return tokenizer
        learnt: dict[str, list[str]] = {}
        for left, right in values["model"]["merges"]:
            learnt.setdefault(left + right, [left, right])
        tokens = sorted((token for token in vocab if token in learnt), key=vocab.get)
        found = load_tokenizer({"name": f"bpe:{end + 1}", "merges": [learnt[token] for token in tokens]})
        if json.loads(to_json(found))["model"]["vocab"] == vocab:
            return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(_foreign(repr(error))) from error
    raise UserError(_foreign("its vocabulary is another"))


def _foreign(why: str) -> str:
    return (
        f"tokenizer.json holds none of the tokenizers byte, gpt2 and bpe:N as depthmix writes them ({why}); restore "
        f"the file that `depthmix export` wrote"
    )
