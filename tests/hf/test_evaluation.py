"""Tasks of lm-eval: each number is that of a computation by hand, and nothing is cut in silence."""

import json
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from depthmix import GPT, GPTConfig, cli
from depthmix.data.tokenizers import ByteTokenizer
from depthmix.errors import RunError, UserError
from depthmix.evaluation import harness
from depthmix.evaluation.harness import DepthmixLM, run_tasks
from depthmix.generation import generate

pytestmark = pytest.mark.hf
QUESTIONS = [
    json.loads(line)
    for line in (harness.TASKS / "continuation.jsonl").read_text(encoding="utf-8").splitlines()
]


def small(seq_len):
    torch.manual_seed(0)
    model = GPT(GPTConfig(320, n_layer=2, d_model=16, n_head=1, seq_len=seq_len, n_streams=2), seed=0).eval()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    return model


@pytest.fixture(scope="module")
def model():
    return small(128)


@torch.no_grad()
def log_probability(model, context, continuation):
    """In float64, from one forward pass for each text."""
    before, after = [*context.encode()] or [256], [*continuation.encode()]
    logits = model(torch.tensor([(before + after)[:-1]]))[0, len(before) - 1 :].double()
    logs = logits.log_softmax(-1)
    greedy = logits.argmax(-1).tolist() == after
    return float(logs[range(len(after)), after].sum()), greedy


def requests(kind, *arguments):
    return [Instance(kind, {}, given, place) for place, given in enumerate(arguments)]


def test_the_shipped_task(model):
    """Accuracy by hand: the choice with the largest probability, and with the largest a byte."""
    assert len(QUESTIONS) == 200 and harness.shipped_tasks() == ["continuation"]
    for one in QUESTIONS:
        assert len(set(one["choices"])) == 4 and 0 <= one["label"] < 4
        assert max(len(one["context"] + choice) for choice in one["choices"]) <= 121
    count, right, right_by_byte = 40, 0, 0
    for one in QUESTIONS[:count]:
        found = [log_probability(model, one["context"], choice)[0] for choice in one["choices"]]
        right += max(range(4), key=found.__getitem__) == one["label"]
        by_byte = [value / len(choice) for value, choice in zip(found, one["choices"], strict=True)]
        right_by_byte += max(range(4), key=by_byte.__getitem__) == one["label"]
    lm = DepthmixLM(model, ByteTokenizer(), batch_size=7)
    values = run_tasks(lm, ["continuation"], limit=count)
    row = values["results"]["continuation"]
    assert (row["acc,none"], row["acc_norm,none"]) == (right / count, right_by_byte / count)
    assert values["truncated"] == 0 and values["n-samples"]["continuation"]["effective"] == count
    # Answers are spread evenly enough that none is the trick.
    labels = [one["label"] for one in QUESTIONS]
    assert all(35 <= labels.count(label) <= 65 for label in range(4))


def test_loglikelihood(model):
    pairs = [
        ("The gate", " opens"),
        ("", "pool"),
        ("trailing ", "space"),
        ("naïve 東", "京"),
        ("a", "b" * 100),
    ]
    with torch.no_grad():
        ids = [*b"It is"]
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids]))[0, -1, :256].argmax()))
    pairs.append(("It is", bytes(ids[5:]).decode("latin1")))
    for size in (1, 4):
        found = DepthmixLM(model, ByteTokenizer(), batch_size=size).loglikelihood(
            requests("loglikelihood", *pairs)
        )
        for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
            stripped = context.rstrip()  # lm-eval moves the space to the continuation
            expected = log_probability(model, stripped, context[len(stripped) :] + continuation)
            assert value == pytest.approx(expected[0], rel=1e-5) and greedy == expected[1]


def test_rolling(model):
    text = "The gates of a network, " * 20
    lm = DepthmixLM(model, ByteTokenizer())
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("short",), ("",)))
    ids, total = [256, *text.encode()], 0.0
    for first in range(1, len(ids), 128):
        # Windows of a whole context; the first token of a later one has a context of one token, the last a full one.
        end = min(len(ids), first + 128)
        begin = max(0, end - 1 - 128)
        with torch.no_grad():
            logs = model(torch.tensor([ids[begin : end - 1]]))[0].double().log_softmax(-1)
        total += float(logs[range(first - 1 - begin, end - 1 - begin), ids[first:end]].sum())
    assert found[0] == pytest.approx(total, rel=1e-6)
    assert found[1] == pytest.approx(log_probability(model, "", "short")[0], rel=1e-5) and found[2] == 0.0


@torch.no_grad()
def greedy_text(model, prompt, count):
    ids = [*prompt.encode()] or [256]
    made = []
    for _ in range(count):
        token = int(model(torch.tensor([ids + made]))[0, -1, :257].argmax())
        if token == 256:
            break
        made.append(token)
    return bytes(made).decode("utf-8", errors="replace")


def test_generate_until(model, monkeypatch):
    prompts = ["one", "two", "a longer prompt", "", "six"]
    whole = [greedy_text(model, prompt, 20) for prompt in prompts]
    assert any(len(text) > 3 for text in whole)
    stops = [[text[3:5]] if len(text) > 5 else ["never"] for text in whole]
    given = [
        (prompt, {"until": stop, "max_gen_toks": 20, "do_sample": False})
        for prompt, stop in zip(prompts, stops, strict=True)
    ]
    found = DepthmixLM(model, ByteTokenizer(), batch_size=2).generate_until(
        requests("generate_until", *given)
    )
    assert found == [text.split(stop[0])[0] for text, stop in zip(whole, stops, strict=True)]
    # Prompts of all lengths share batches where the same is asked of them.
    plain = [(prompt, {"until": [], "max_gen_toks": 20}) for prompt in prompts]
    batches, told = [], []

    def counted(model, prompts, *args, **kwargs):
        batches.append([len(prompt) for prompt in prompts])
        return generate(model, prompts, *args, **kwargs)

    monkeypatch.setattr(harness, "generate", counted)
    lm = DepthmixLM(model, ByteTokenizer(), batch_size=3, told=lambda *done: told.append(done))
    assert lm.generate_until(requests("generate_until", *plain)) == whole
    assert batches == [[15, 3, 3], [3, 1]] and told == [(3, 5), (5, 5)]


def test_nothing_is_cut_in_silence():
    model = small(16)
    pairs = [("x" * 30, "yz"), ("short", "er"), ("x" * 15, "yz")]
    with pytest.raises(UserError, match=r"1 of 3 requests do not fit .* context of 16 tokens; --truncate"):
        DepthmixLM(model, ByteTokenizer()).loglikelihood(requests("loglikelihood", *pairs))
    lm = DepthmixLM(model, ByteTokenizer(), truncate=True)
    found = lm.loglikelihood(requests("loglikelihood", *pairs))
    assert lm.truncated == 1
    assert found[0][0] == pytest.approx(log_probability(model, "x" * 15, "yz")[0], rel=1e-5)
    assert found[0] == pytest.approx(found[2])
    with pytest.raises(UserError, match=r"a continuation of 17 tokens does not fit"):
        lm.loglikelihood(requests("loglikelihood", ("a", "b" * 17)))
    options = {"until": [], "max_gen_toks": 8}
    with pytest.raises(UserError, match=r"1 of 2 requests do not fit"):
        DepthmixLM(model, ByteTokenizer()).generate_until(
            requests("generate_until", ("x" * 10, options), ("y" * 9, options))
        )
    found = lm.generate_until(requests("generate_until", ("a" * 5 + "x" * 9, options), ("x" * 9, options)))
    assert lm.truncated == 2 and found[0] == found[1] == greedy_text(model, "x" * 9, 8)
    with pytest.raises(UserError, match=r"generates up to 256 tokens.*--max-new-tokens"):
        lm.generate_until(requests("generate_until", ("x", {"until": []})))


def test_task_files_of_ones_own(trained, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"line {i}:", "answer": str(i)} for i in range(5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, metric in (("generate_until", "exact_match"), ("loglikelihood", "acc")):
        (folder / f"{kind}.yaml").write_text(
            f"task: mine_{kind}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/rows.jsonl\n"
            f"test_split: test\noutput_type: {kind}\ndoc_to_text: '{{{{question}}}}'\n"
            f"doc_to_target: ' {{{{answer}}}}'\ntarget_delimiter: ''\n"
            f"metric_list:\n  - metric: {metric}\n    aggregation: mean\n    higher_is_better: true\n"
            + ("generation_kwargs:\n  until: ['x']\n  max_gen_toks: 4\n" if kind == "generate_until" else "")
        )
    words = (
        f"eval {trained / 'prenorm'} --tasks mine_generate_until,mine_loglikelihood --include-path {folder}"
    )
    assert cli.main([*words.split(), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "exact_match" in printed and "acc" in printed
    (path,) = (trained / "prenorm/evaluation").glob("*mine*.json")
    tasks = json.loads(path.read_text())["tasks"]
    assert tasks["n-samples"]["mine_loglikelihood"] == {"original": 5, "effective": 5}
    # The question takes all of this model's short context when it is asked with examples.
    many = [*words.split(), "--fewshot", "4", "--device", "cpu"]
    assert cli.main(many) == 2
    assert "--truncate" in capsys.readouterr().err
    assert cli.main([*many, "--truncate"]) == 0
    assert "requests were longer than the context" in capsys.readouterr().out


def test_what_is_not_there(model, monkeypatch, tmp_path):
    lm = DepthmixLM(model, ByteTokenizer())
    with pytest.raises(UserError, match=r"unknown task 'continuatoin'. Did you mean 'continuation'"):
        run_tasks(lm, ["continuatoin"])
    with pytest.raises(UserError, match="is no folder"):
        run_tasks(lm, ["continuation"], include_path=Path(tmp_path / "none"))
    import lm_eval

    def away(**options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(lm_eval, "simple_evaluate", away)
    with pytest.raises(RunError, match=r"examples of continuation cannot be fetched.*--include-path"):
        run_tasks(lm, ["continuation"])
