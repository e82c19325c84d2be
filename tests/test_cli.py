import json
import os
import subprocess
import sys
import types

import pytest
import torch

from depthmix import cli
from depthmix.errors import Interrupted, RunError, UserError
from depthmix.presets import PRESETS


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "depthmix", *arguments], capture_output=True, text=True, timeout=60, **options
    )


def flat(text):
    """Without boxes and line breaks."""
    return " ".join(text.replace("│", " ").replace("╭", " ").replace("╰", " ").split())


@pytest.fixture
def fake_train(monkeypatch):
    """``depthmix.train`` replaced: remembers how it was called, raises what it is told to."""
    calls = types.SimpleNamespace(error=None, config=None, run_dir=None, options=None)

    def train(config, run_dir, **options):
        calls.config, calls.run_dir, calls.options = config, run_dir, options
        if calls.error is not None:
            raise calls.error
        return {"val_loss": 1.5, "best_val_loss": 1.25, "best_step": 30, "tokens_per_s": 12345.6}

    monkeypatch.setitem(sys.modules, "depthmix.train", types.SimpleNamespace(train=train))
    return calls


def test_process_help_version_and_error():
    helped = run("--help")
    assert helped.returncode == 0 and helped.stderr == ""
    for verb in cli.VERBS:
        assert f"\n  {verb} " in helped.stdout
    version = run("--version")
    assert version.returncode == 0 and version.stdout.startswith("depthmix 0.")
    wrong = run("trian")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == (
        "depthmix: unknown verb 'trian'. Did you mean 'train'? "
        "Valid: train, watch, compare, study, depth-sweep, generate, eval, map, diagnose, bench, plan, comm, data, "
        "export, import, "
        "info\n"
    )


def test_no_arguments_show_help(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out == cli.HELP


HELPS = {
    "train": ["tokens", "in features", "Optimiser steps", "depthmix train --preset quick"],
    "compare": ["tokens", "Optimiser steps", "depthmix compare --recipe quick"],
    "study": ["CPU threads of a run", "depthmix study studies/tiny.toml"],
    "depth-sweep": ["tokens", "Depths, in sublayers", "depthmix depth-sweep --residuals all"],
    "generate": ["New tokens at most", "depthmix generate runs/mgr"],
    "bench": ["Numbers of streams", "depthmix bench mgr-step"],
    "watch": ["Seconds between two looks", "depthmix watch runs/mgr"],
    "plan": ["Tokens of an optimiser step", "depthmix plan --params 100B"],
    "map": ["Tokens that a map is the mean over", "depthmix map runs/prenorm"],
    "info": ["tokens", "depthmix info --preset M"],
}


@pytest.mark.parametrize("verb", HELPS)
def test_help_has_units_defaults_and_an_example(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    text = flat(capsys.readouterr().out)
    assert "Example:" in text and "default" in text
    for expected in HELPS[verb]:
        assert expected in text
    assert "vocab-size" not in text


@pytest.mark.parametrize("verb, flag", [("train", "--preset"), ("info", "--preset"), ("compare", "--recipe")])
@pytest.mark.parametrize("name", PRESETS)
def test_help_shows_the_presets_own_values_and_all_names(verb, flag, name, capsys):
    assert cli.main([verb, f"{flag}={name}", "--help"]) == 0
    text = flat(capsys.readouterr().out)
    assert f"--steps INT Optimiser steps. (default: {PRESETS[name].steps})" in text
    assert f"(default: {PRESETS[name].model.n_layer})" in text
    assert all(other in text for other in PRESETS)


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["--hlep"], "Did you mean '--help'?"),
        (["comprae"], "Did you mean 'compare'?"),
        (["train", "--n-layr", "3"], "--n-layer"),
        (["train", "--presett", "quick"], "--preset"),
        (["train", "--preset", "quik"], "Did you mean 'quick'?"),
        (["train", "--residual", "prenrom"], "Did you mean 'prenorm'?"),
        (["train", "--precision", "autocst"], "Did you mean 'autocast'?"),
        (["train", "--stream-memory=repaly"], "Did you mean 'replay'?"),
        (["train", "--n-layer", "many"], "'many'"),
        (["train", "--d-model", "63"], "must be an even whole number"),
        (["train", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "--vocab-size", "9"], "--vocab-size"),
        (["train", "--preset", "quick", "--config", "a.json"], "two starting points"),
        (["train", "--config", "not/there.json"], "cannot read configuration not/there.json"),
        (["generate"], "RUN"),
        (["generate", "x", "--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["map"], "give run folders, or --residual NAME"),
        (["info", "--presett", "M"], "--preset"),
    ],
)
def test_wrong_requests(arguments, hint, capsys):
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert hint in flat(said.err) and said.out == ""
    assert "Traceback" not in said.err


def test_train_passes_what_was_asked(fake_train, tmp_path):
    out = str(tmp_path / "run")
    options = ["--n-layer", "3", "--lr", "1e-4", "--data", "a", "b", "--compile", "--residual", "prenorm"]
    assert cli.main(["train", "--preset", "S", "--out", out, "--quiet", *options]) == 0
    config = fake_train.config
    assert (config.model.n_layer, config.optim.lr, config.data.data) == (3, 1e-4, ("a", "b"))
    assert config.compile and config.model.residual == "prenorm"
    assert type(config) is type(PRESETS["S"]) and type(config.model) is type(PRESETS["S"].model)
    assert config.model.d_model == PRESETS["S"].model.d_model and config.steps == PRESETS["S"].steps
    assert str(fake_train.run_dir) == out
    assert fake_train.options == {
        "resume": False,
        "init_from": None,
        "quiet": True,
        "report": True,
        "timeout_s": 600.0,
    }


@pytest.mark.parametrize("drawn", [True, False])
def test_train_prints_how_it_ended(fake_train, capsys, tmp_path, drawn):
    """The report is named where there is one: drawing it may have failed."""
    if drawn:
        (tmp_path / "report.html").write_text("")
    assert cli.main(["train", "--out", str(tmp_path)]) == 0
    said = "validation loss 1.5000 nats (best 1.2500 at step 30), 12,346 tokens/s\n"
    assert capsys.readouterr().out == said + (f"report: {tmp_path / 'report.html'}\n" if drawn else "")


def test_train_default_folder(fake_train, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--seed", "4", "--quiet"]) == 0
    assert str(fake_train.run_dir) == "runs/quick-mgr-competitive-s4"


def test_train_from_a_file_and_from_the_folder_that_goes_on(fake_train, tmp_path):
    from dataclasses import replace

    saved = replace(PRESETS["xs"], steps=77)
    (tmp_path / "config.json").write_text(json.dumps(saved.to_dict()))
    assert cli.main(["train", "--config", str(tmp_path / "config.json"), "--out", "x", "--quiet"]) == 0
    assert fake_train.config == saved
    assert cli.main(["train", "--out", str(tmp_path), "--resume", "--quiet"]) == 0
    assert fake_train.config == saved and fake_train.options["resume"]
    assert cli.main(["train", "--out", str(tmp_path), "--resume", "--quiet", "--steps", "99"]) == 0
    assert fake_train.config == replace(saved, steps=99)


@pytest.mark.parametrize(
    "text, message", [("{", "not valid JSON"), ("[]", "no JSON object"), ('{"stepz": 1}', "stepz")]
)
def test_damaged_configuration(tmp_path, capsys, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert cli.main(["train", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def os_error(number, filename=None):
    return OSError(number, os.strerror(number), filename)


@pytest.mark.parametrize(
    "error, status, message",
    [
        (UserError("bad request"), 2, "bad request"),
        (RunError("loss is nan at step 3"), 1, "loss is nan at step 3"),
        (KeyboardInterrupt(), 130, "stopped"),
        (os_error(2, "data.txt"), 2, "data.txt: No such file or directory"),
        (os_error(13, "/srv/private/x"), 2, "/srv/private/x: Permission denied"),
        (os_error(28), 1, "No space left on device; free space"),
        (os_error(5, "disk"), 1, "disk: Input/output error"),
        (MemoryError(), 1, "out of memory; lower --micro-batch"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "out of memory; lower --micro-batch"),
    ],
)
def test_errors_become_one_message_and_a_status(fake_train, capsys, error, status, message):
    fake_train.error = error
    assert cli.main(["train", "--out", "x"]) == status
    said = capsys.readouterr().err
    assert said.startswith("depthmix: ") and message in said and said.count("\n") == 1


def test_defects_keep_their_traceback(fake_train):
    fake_train.error = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["train", "--out", "x"])


def test_interrupted_train_says_how_to_go_on(fake_train, capsys):
    fake_train.error = Interrupted("stopped after step 17, saved")
    assert cli.main(["train", "--out", "my runs/a"]) == 75
    assert "go on with: depthmix train --out 'my runs/a' --resume" in capsys.readouterr().err


def test_closed_pipe_is_quiet():
    command = f"{sys.executable} -m depthmix info --list --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_info_list(capsys):
    from depthmix import available_residuals

    assert cli.main(["info", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in available_residuals():
        assert sum(line.split()[:1] == [name] and len(line.split()) > 2 for line in lines) == 1
    assert cli.main(["info", "--list", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["residuals"]) == available_residuals()


def test_info_values(capsys):
    assert cli.main(["info", "--n-layer", "12", "--residual", "mgr-competitive", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    # The specification's table: 12 blocks, n = 4.
    assert values["gate"]["bias"] == pytest.approx(2.8382, abs=5e-5)
    assert values["gate"]["initial_beta"] == pytest.approx(0.0474, abs=5e-5)
    assert cli.main(["info", "--n-layer", "12", "--residual", "mgr-competitive"]) == 0
    printed = capsys.readouterr().out
    assert "2.8382" in printed and f"{values['parameters']['total']:,}" in printed


# --- generate -----------------------------------------------------------------------------------------


class ByteTokenizer:
    vocab_size, end_token = 257, 256

    def encode(self, text):
        return list(text.encode())

    def decode_bytes(self, ids):
        return bytes(ids)


@pytest.fixture
def fake_generation(monkeypatch, tmp_path):
    """A model with a context of 16 that says what ``reply`` holds; remembers the prompts it was given."""
    state = types.SimpleNamespace(reply=[], prompts=[], options=[], run=str(tmp_path))

    class Model:
        config = types.SimpleNamespace(seq_len=16)

    def generate(model, ids, count, **options):
        assert ids.shape[1] + count <= 17
        state.prompts.append(ids[0].tolist())
        state.options.append(options)
        for _ in range(count):
            if not state.reply:
                yield torch.tensor([options["end_token"]])
                return
            yield torch.tensor([state.reply.pop(0)])

    modules = {
        "depthmix.checkpoint": types.SimpleNamespace(load_model=lambda path, device: (Model(), None)),
        "depthmix.data": types.SimpleNamespace(load_tokenizer=lambda values: ByteTokenizer()),
        "depthmix.generation": types.SimpleNamespace(generate=generate),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "tokenizer.json").write_text('{"name": "byte"}')
    return state


def test_generate_prints_whole_characters(fake_generation, capsys):
    fake_generation.reply = [*"é→b".encode(), 0xE2]
    options = ["--top-k", "5", "--top-p", "0.9", "--seed", "3", "--temperature", "0"]
    assert cli.main(["generate", fake_generation.run, "--prompt", "aß", *options]) == 0
    assert capsys.readouterr().out == "aßé→b\ufffd\n"
    assert fake_generation.prompts == [list("aß".encode())]
    expected = {"top_k": 5, "top_p": 0.9, "seed": 3, "temperature": 0.0, "vocab_size": 257}
    assert expected.items() <= fake_generation.options[0].items()


@pytest.mark.parametrize(
    "device, message",
    [
        ("cuda:99", "device 'cuda:99' does not exist here"),
        ("gpu", "unknown device 'gpu'"),
        ("cuda:x", "unknown device"),
    ],
)
def test_generate_on_a_device_that_is_not_there(fake_generation, capsys, device, message):
    assert cli.main(["generate", fake_generation.run, "--prompt", "a", "--device", device]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == ""


def test_generate_from_nothing_starts_a_document(fake_generation):
    assert cli.main(["generate", fake_generation.run]) == 0
    assert fake_generation.prompts == [[256]]


def test_generate_from_standard_input(fake_generation, monkeypatch, capsys):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert cli.main(["generate", fake_generation.run, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == "from a pipe\n"


def test_generate_finds_the_tokenizer_above_a_checkpoint(fake_generation, tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-00000040"
    checkpoint.mkdir(parents=True)
    assert cli.main(["generate", str(checkpoint)]) == 0


@pytest.mark.parametrize("options", [["--prompt", "x" * 17], ["--prompt", "abc", "--tokens", "15"]])
def test_text_beyond_the_context(fake_generation, capsys, options):
    assert cli.main(["generate", fake_generation.run, *options]) == 2
    said = capsys.readouterr().err
    assert "context of 16" in said and "--truncate" in said
    fake_generation.reply = list(b"0123456789" * 10)
    assert cli.main(["generate", fake_generation.run, *options, "--truncate"]) == 0
    assert "0123456789" in capsys.readouterr().out


def test_truncate_goes_on_past_the_context(fake_generation, capsys):
    fake_generation.reply = list(range(65, 65 + 40))
    assert cli.main(["generate", fake_generation.run, "--prompt", "ab", "--tokens", "40", "--truncate"]) == 0
    text = "ab" + "".join(map(chr, range(65, 65 + 40)))
    assert capsys.readouterr().out == text + "\n"
    # Every later window is the newest half of the context, as it was printed.
    seen = text.encode()
    for prompt in fake_generation.prompts[1:]:
        assert len(prompt) >= 8 and bytes(prompt) in seen
    assert bytes(fake_generation.prompts[0]) == b"ab"


def test_generate_fills_the_context_by_default(fake_generation, capsys):
    fake_generation.reply = list(b"x" * 100)
    assert cli.main(["generate", fake_generation.run, "--prompt", "abc"]) == 0
    assert capsys.readouterr().out == "abc" + "x" * 14 + "\n"
