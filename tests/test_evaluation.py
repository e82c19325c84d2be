"""Loss of a text under a sliding window, against one token after the other in float64."""

import copy
import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthmix import GPT, GPTConfig, cli
from depthmix.data.tokenizers import ByteTokenizer
from depthmix.errors import UserError
from depthmix.evaluation import perplexity, progress, score
from depthmix.evaluation.command import Documents
from depthmix.evaluation.score import windows

CONTEXT = 12
TEXT = "It was the best of times,\tit was the wörst\n of times 東京."


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPTConfig(320, n_layer=3, d_model=16, n_head=1, seq_len=CONTEXT, n_streams=2)
    model = GPT(config, seed=0).eval()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    return model


@torch.no_grad()
def logs(model, ids, first):
    """``log p(ids[i] | ids[:i])`` for i from ``first``, each from a forward pass of its own, in float64."""
    found = []
    for place in range(first, len(ids)):
        logits = model(torch.tensor([ids[:place]]))[0, -1].double()
        found.append(float(logits.log_softmax(-1)[ids[place]]))
    return found


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_windows_score_every_token_once(length, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for place, (begin, first, end) in enumerate(windows(length, context, stride)):
        assert 0 <= begin < first < end <= length and end - 1 - begin <= context
        # As much before it as there is, or as the window holds.
        assert first - begin >= min(first, context - stride + 1)
        assert place == 0 or end - first <= stride
        scored += range(first, end)
    assert scored == [*range(1, length)]


@pytest.mark.parametrize(
    ("context", "stride"), [(None, None), (CONTEXT, 1), (CONTEXT, CONTEXT), (7, 3), (1, 1)]
)
def test_perplexity_is_that_of_single_tokens(model, context, stride):
    texts, tokenizer = [TEXT, "", "ab", "x"], ByteTokenizer()
    found = perplexity(model, tokenizer, texts, context=context, stride=stride, batch_size=3)
    most = context or CONTEXT
    step = stride or most // 2
    total = 0.0
    for text in filter(None, texts):
        ids = [256, *text.encode()]
        # A token at place i is in the first window, or in one that ends at most `step` - 1 tokens later.
        for i in range(1, len(ids)):
            end = most + 1 if i <= most else most + 1 + -(-(i - most) // step) * step
            begin = max(0, min(end, len(ids)) - 1 - most)
            total -= logs(model, ids[begin : i + 1], i - begin)[0]
    assert found.nats == pytest.approx(total, rel=1e-6)
    size = sum(len(text.encode()) for text in texts)
    assert (found.documents, found.tokens, found.bytes, found.words) == (3, size, size, 15)
    values = found.to_dict()
    assert values["bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-6)
    assert values["word_perplexity"] == pytest.approx(math.exp(total / 15), rel=1e-5)
    assert values["loss"] == pytest.approx(total / size, rel=1e-6)


def test_the_first_tokens_are_a_text_of_their_own(model):
    """Also where the cut goes through a character; what is behind it is not even read."""
    tokenizer, raw = ByteTokenizer(), TEXT.encode()
    cut = TEXT.encode().index("ö".encode()) + 1

    def texts():
        yield "ab"
        yield TEXT
        raise AssertionError("read too far")

    told = []
    found = perplexity(
        model, tokenizer, texts(), tokens=cut + 2, batch_size=3, told=lambda *done: told.append(done)
    )

    class Raw(ByteTokenizer):
        def encode_array(self, text):
            return np.frombuffer(text.encode("latin1"), np.uint8)

    whole = perplexity(model, Raw(), ["ab", raw[:cut].decode("latin1")], batch_size=3)
    assert found.nats == pytest.approx(whole.nats, rel=1e-12)
    assert (found.documents, found.tokens, found.bytes, found.limit) == (2, cut + 2, cut + 2, cut + 2)
    assert found.words == 1 + len(raw[:cut].split())
    assert [tokens for tokens, _ in told] == sorted({tokens for tokens, _ in told})
    assert told[-1] == (cut + 2, pytest.approx(cut + 2))
    short = perplexity(model, tokenizer, ["ab", "c"], tokens=100)
    assert (short.tokens, short.nats) == (3, perplexity(model, tokenizer, ["ab", "c"]).nats)


def test_logits_in_parts(model, monkeypatch):
    expected = perplexity(model, ByteTokenizer(), [TEXT])
    monkeypatch.setattr(sys.modules[windows.__module__], "LOGITS_AT_ONCE", 320 * 5)
    assert perplexity(model, ByteTokenizer(), [TEXT]).nats == pytest.approx(expected.nats, rel=1e-6)


def test_bits_per_byte_compare_tokenizers():
    """A model of pairs of letters and one of letters that give the text the same probability: the same bits a byte."""

    class Uniform(torch.nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.embed = torch.nn.Embedding(rows, 1)
            self.config = GPTConfig(rows, 1, 8, 1, 4, residual="prenorm")

        def hidden(self, ids):
            return torch.zeros(*ids.shape, 1)

    class Pairs(ByteTokenizer):
        def encode_array(self, text):
            raw = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
            return raw[::2] * 256 + raw[1::2]

    letters = perplexity(Uniform(257), ByteTokenizer(), ["abcdefgh"])
    pairs = perplexity(Uniform(257**2), Pairs(), ["abcdefgh"])
    assert letters.tokens == 2 * pairs.tokens
    assert letters.bits_per_byte == pytest.approx(math.log2(257), rel=1e-6)
    assert pairs.bits_per_byte == pytest.approx(letters.bits_per_byte, rel=1e-6)
    assert pairs.word_perplexity == pytest.approx(letters.word_perplexity, rel=1e-6)
    assert pairs.loss == pytest.approx(2 * letters.loss, rel=1e-6)


def test_scores_do_not_depend_on_the_batch(model):
    chance = np.random.default_rng(0)
    pairs = [
        (chance.integers(0, 300, size=a).tolist(), chance.integers(0, 300, size=b).tolist())
        for a, b in [(1, 1), (5, 8), (12, 1), (3, 2), (1, 12), (4, 0), (6, 3)]
    ]
    for size in (1, 3, 16):
        for (before, after), (found, greedy) in zip(pairs, score(model, pairs, batch_size=size), strict=True):
            expected = logs(model, before + after, len(before))
            assert found.dtype == np.float64 and found == pytest.approx(expected, rel=1e-5, abs=1e-5)
            with torch.no_grad():
                best = [
                    int(model(torch.tensor([[*before, *after[:i]]]))[0, -1].argmax())
                    for i in range(len(after))
                ]
            assert greedy == (best == after)


def test_a_greedy_continuation_is_seen(model):
    ids = [256, 5]
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    ((_, greedy),) = score(model, [(ids[:2], ids[2:])])
    assert greedy


def test_refusals(model):
    with pytest.raises(UserError, match=r"pair 1 has 8 \+ 6 tokens.*context of 12"):
        score(model, [([1], [2]), ([1] * 8, [2] * 6)])
    with pytest.raises(UserError, match="pair 0 has no context"):
        score(model, [([], [2])])
    for options, message in (
        ({"context": 13}, "context must be from 1 to the model's 12 tokens, got 13"),
        ({"context": 6, "stride": 7}, "stride must be from 1 to the window's 6 tokens, got 7"),
        ({"stride": 0}, "stride must be from 1"),
    ):
        with pytest.raises(UserError, match=message):
            perplexity(model, ByteTokenizer(), [TEXT], **options)
    with pytest.raises(UserError, match="no text to score"):
        perplexity(model, ByteTokenizer(), ["", ""])


def test_half_precision_is_scored_in_single(model):
    low = copy.deepcopy(model).bfloat16()
    ((found, _),) = score(low, [([256], [3, 4, 5])])
    with torch.no_grad():
        expected = low(torch.tensor([[256, 3, 4]]))[0].float().log_softmax(-1)[[0, 1, 2], [3, 4, 5]]
    assert found.tolist() == expected.double().tolist()


def test_share_of_the_text(tmp_path):
    """Of files of which one is read in pieces; the end is the whole."""
    (tmp_path / "a.txt").write_text("x" * 3_000_000)
    lines = [f'{{"text": "{letter * 600_000}"}}\n' for letter in "abcdef"]
    (tmp_path / "b.jsonl").write_text("".join(lines))
    texts = Documents((str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")), "text")
    assert texts.share(0) == 0
    shares, done = [], 0
    for text in texts:
        done += len(text)
        shares.append(texts.share(done))
    assert len(shares) == 7
    expected = [(3e6 + 6e5 * i) / 6.6e6 for i in range(7)]
    # What is behind the piece that is read is guessed.
    assert shares == pytest.approx(expected, abs=0.2) and shares == sorted(shares)
    assert shares[-1] == pytest.approx(1, abs=1e-3)


# ---- command line -------------------------------------------------------------------------------


def test_command(trained, tmp_path, capsys):
    from depthmix.runs import open_run, run_tokenizer

    (tmp_path / "a.md").write_text(TEXT * 5)
    (tmp_path / "b.jsonl").write_text('{"body": "one two"}\n{"body": "three"}\n')
    run = trained / "mgr-competitive"
    words = [
        "eval",
        str(run),
        "--text",
        str(tmp_path / "a.md"),
        str(tmp_path / "b.jsonl"),
        "--text-field",
        "body",
    ]
    assert cli.main([*words, "--stride", "5", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    (path,) = (run / "evaluation").iterdir()
    assert str(path) in printed and "bits a byte" in printed and path.name == "step-00000004-a-b.json"
    values = json.loads(path.read_text())
    opened = open_run(run, "cpu")
    texts = [TEXT * 5, "one two", "three"]
    found = perplexity(opened.model, run_tokenizer(run), texts, stride=5).to_dict()
    assert values["text"] == {"files": words[3:5], **found}
    assert values["checkpoint"] == "step-00000004" and values["tokenizer"] == "bpe:300"
    assert cli.main([*words, "--out", str(tmp_path / "made/here.json"), "--device", "cpu"]) == 0
    assert (tmp_path / "made/here.json").exists()


def test_progress_and_the_first_tokens(trained, tmp_path, capsys, monkeypatch):
    """A line now and then on standard error; standard output is the same with and without."""
    (tmp_path / "a.txt").write_text(TEXT * 50)
    words = ["eval", str(trained / "prenorm"), "--text", str(tmp_path / "a.txt"), "--device", "cpu"]
    words += ["--out", str(tmp_path / "out.json"), "--tokens", "1000"]
    assert cli.main(words) == 0
    quiet = capsys.readouterr()
    assert quiet.err == "" and json.loads((tmp_path / "out.json").read_text())["text"]["tokens"] == 1000
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert cli.main(words) == 0
    told = capsys.readouterr()
    assert told.out == quiet.out
    lines = told.err.splitlines()
    assert len(lines) > 1 and lines[-1].startswith("text: 100.0%, 1,000 tokens, ")
    assert lines[-1].endswith("tokens/s, 0:00:00 left")


def test_wrong_requests(trained, tmp_path, capsys, monkeypatch):
    run = str(trained / "prenorm")
    (tmp_path / "bad.md").write_bytes(b"caf\xe9")
    (tmp_path / "good.md").write_text("text")
    for words, message in (
        ([], "nothing to do: name --tasks"),
        (["--text", str(tmp_path / "none.txt")], "does not exist"),
        (["--text", str(tmp_path / "bad.md")], "is not UTF-8: byte 3"),
        (
            ["--text", str(tmp_path / "good.md"), "--context", "33"],
            "context must be from 1 to the model's 32",
        ),
        (["--tasks", "continuation", "--limit", "0"], "--limit must not be that small"),
        (["--text", str(tmp_path / "good.md"), "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--text", str(tmp_path / "good.md"), "--tokens", "0"], "--tokens must not be that small: 0"),
    ):
        assert cli.main(["eval", run, *words, "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.api.model", raising=False)
    monkeypatch.delitem(sys.modules, "depthmix.evaluation.harness", raising=False)
    assert cli.main(["eval", run, "--tasks", "continuation", "--device", "cpu"]) == 2
    assert 'pip install "depthmix[eval]"' in capsys.readouterr().err
