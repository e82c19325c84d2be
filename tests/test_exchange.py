"""Folders for transformers, written and read without it: the way back is exact, and a bad folder harms nobody."""

import ast
import builtins
import json
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from depthmix import GPTConfig, available_residuals, cli
from depthmix.checkpoint import checkpoint_at, load_checkpoint, load_model
from depthmix.data.tokenizers import load_tokenizer, train_bpe
from depthmix.errors import UserError
from depthmix.exchange import tokenizer as tokenizers
from depthmix.exchange.folder import export, import_folder, read
from depthmix.exchange.standalone import model_code


@pytest.fixture(scope="module")
def folder(trained):
    export(trained / "mgr-competitive", trained / "hf")
    return trained / "hf"


@pytest.fixture
def copy(folder, tmp_path):
    """A folder to spoil."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_the_way_back_is_exact(trained, folder, tmp_path):
    run, back = trained / "mgr-competitive", tmp_path / "back"
    import_folder(folder, back)
    assert (back / "tokenizer.json").read_text() == (run / "tokenizer.json").read_text()
    config = json.loads((run / "config.json").read_text())
    config["data"]["cache_dir"] = None  # a place on the machine that trained
    assert json.loads((back / "config.json").read_text()) == config
    before, after = (load_checkpoint(checkpoint_at(r), training=False) for r in (run, back))
    assert before.step == after.step and before.config.model == after.config.model
    assert before.model.keys() == after.model.keys()
    assert all(torch.equal(before.model[k], after.model[k]) for k in before.model)
    export(back, tmp_path / "again")
    for name in "config.json", "model.safetensors", "tokenizer.json", "depthmix.json":
        first, second = ((f / name).read_bytes() for f in (folder, tmp_path / "again"))
        assert first == second or (name == "depthmix.json" and json.loads(first) == json.loads(second))


def test_without_the_runs_own_file(folder, copy, tmp_path):
    """As save_pretrained leaves it: model and tokenizer are found, the history is not."""
    (copy / "depthmix.json").unlink()
    whole, found = read(folder), read(copy)
    assert found.config.model == whole.config.model and found.step == 0
    assert found.tokenizer.to_dict() == whole.tokenizer.to_dict()


@pytest.mark.parametrize("name", ["byte", "gpt2", "bpe:300"])
def test_tokenizers_come_back(name):
    text = ["".join(f"{i * i} aaaa abab " for i in range(200))]
    ours = train_bpe(300, text) if name.startswith("bpe") else load_tokenizer(name)
    back = tokenizers.from_json(json.loads(tokenizers.to_json(ours)))
    assert type(back) is type(ours) and back.encode(text[0]) == ours.encode(text[0])
    if name == "bpe:300":
        assert back.to_dict() == ours.to_dict()


def test_card_has_the_runs_numbers(trained, folder):
    card = (folder / "README.md").read_text()
    config = json.loads((trained / "mgr-competitive/config.json").read_text())
    result = json.loads((trained / "mgr-competitive/result.json").read_text())
    assert f"| parameters | {result['parameters']:,} |" in card
    assert f"| validation loss | {result['best_val_loss']:.4f} |" in card
    tokens = result["best_step"] * config["batch_size"] * config["model"]["seq_len"]
    assert f"| tokens seen | {tokens:,} |" in card
    assert "`mgr-competitive`" in card and "`text.txt`" in card and str(trained) not in card


def test_commands(trained, tmp_path, capsys):
    run = str(trained / "prenorm")
    out, back = str(tmp_path / "hf"), str(tmp_path / "back")
    assert cli.main(["export", run, "--to", "hf", "--out", out, "--standalone"]) == 0
    assert (tmp_path / "hf/modeling_depthmix.py").exists()
    assert cli.main(["export", run, "--to", "hf", "--out", out]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["export", run, "--to", "hf", "--out", out, "--overwrite"]) == 0
    assert not (tmp_path / "hf/modeling_depthmix.py").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]  # nothing is left beside it
    assert cli.main(["import", out, "--out", back]) == 0
    assert cli.main(["import", out, "--out", back]) == 2
    capsys.readouterr()
    said = []
    for one in run, back:
        assert cli.main(["generate", one, "--prompt", "line 1", "--tokens", "20", "--seed", "1"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert cli.main(["map", back, "--out", str(tmp_path / "map.png")]) == 0
    # Nothing to go on from, but something to begin with.
    assert cli.main(["train", "--out", back, "--resume", "--quiet"]) == 2
    assert "--init-from" in capsys.readouterr().err
    assert cli.main(["export", run, "--to", "safetensors", "--out", out + ".st", "--standalone"]) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert cli.main(["export", run, "--to", "hf", "--out", str(tmp_path / "mine"), "--overwrite"]) == 2
    assert (tmp_path / "mine/notes.txt").exists()


def test_train_from_weights(trained, folder, tmp_path, capsys):
    """With learning rates of nothing, the weights after training are those it began with."""
    import_folder(folder, tmp_path / "start")
    common = [
        "train",
        "--config",
        str(tmp_path / "start/config.json"),
        "--init-from",
        str(tmp_path / "start"),
    ]
    common += [
        "--cache-dir",
        str(trained / "cache"),
        "--steps",
        "1",
        "--quiet",
        "--no-report",
        "--warmup-steps",
        "0",
    ]
    tiny = ["--lr", "1e-30", "--muon-lr", "1e-30", "--out", str(tmp_path / "same")]
    assert cli.main([*common, *tiny]) == 0
    before, _ = load_model(tmp_path / "start")
    after, _ = load_model(tmp_path / "same")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert cli.main([*common, "--tokenizer", "byte", "--out", str(tmp_path / "other")]) == 2
    assert "tokenizer is another" in capsys.readouterr().err
    assert cli.main([*common, "--d-model", "32", "--out", str(tmp_path / "wider")]) != 0
    assert "does not fit the model" in capsys.readouterr().err


# --- bad input ------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def refused(folder, *, match):
    """Refused on the command line with status 2, and nothing is left."""
    out = folder.parent / "run-of-a-bad-folder"
    with pytest.raises(UserError, match=match):
        import_folder(folder, out)
    assert not out.exists()


def test_pickles_are_not_opened(copy, monkeypatch):
    monkeypatch.chdir(copy)
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(copy, match=r"as a pickle \(pytorch_model.bin\)")
    # As a file of weights by its name alone.
    (copy / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused(copy, match="cannot be read as safetensors")
    assert not (copy / "exploded").exists()


@pytest.mark.parametrize(
    "change, match",
    [
        ({"model_type": "llama"}, "of a 'llama' model"),
        ({"n_layer": 10**12}, "n_layer must be at most"),
        ({"d_model": 10**9}, "d_model must be at most"),
        ({"vocab_size": 1 << 23}, "config.json says 3 blocks and an embedding"),
        ({"n_layer": 4000}, "config.json says 4000 blocks"),
        ({"n_layer": -1}, "n_layer must be a whole number"),
        ({"n_layer": "3"}, "n_layer must be a whole number"),
        ({"norm_eps": "x"}, "config.json"),
        ({"n_streams": 2}, "tensors do not fit config.json|two different models"),
        ({"residual": "prenorm"}, "tensors do not fit config.json"),
        ({"residual": "../../evil"}, "unknown residual"),
        ({"residual": ["mgr"]}, "unknown residual"),
        ({"residual_options": []}, "residual_options must be an object"),
        ({"residual_options": {"__class__": 1}}, "has no option"),
        ({"seq_len": 99}, "two different models"),
    ],
)
def test_bad_configurations(copy, change, match):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    refused(copy, match=match)


def test_code_in_a_folder_is_not_run(copy, tmp_path_factory, monkeypatch):
    """Neither by auto_map nor by the names of classes; what does not matter is not looked at."""
    monkeypatch.chdir(copy)
    (copy / "evil.py").write_text("open('exploded', 'w')\n")
    config = json.loads((copy / "config.json").read_text())
    config |= {
        "auto_map": {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"},
        "architectures": ["evil.C"],
    }
    (copy / "config.json").write_text(json.dumps(config))
    import_folder(copy, tmp_path_factory.mktemp("safe") / "run")
    assert not (copy / "exploded").exists()


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", None, 3]
)
def test_weights_outside_of_the_folder_are_not_read(copy, name):
    (copy.parent / "secret.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.embed.weight": name}})
    )
    refused(copy, match="only .safetensors files in the folder itself")


def test_weights_in_parts(folder, copy):
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: weights[n] for n in names if files[n] == file}, copy / file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    whole, parts = read(folder), read(copy)
    assert all(torch.equal(whole.weights[n], parts.weights[n]) for n in whole.weights)


@pytest.mark.parametrize("file", ["config.json", "depthmix.json", "tokenizer.json", "model.safetensors"])
def test_damage(copy, file):
    if file == "tokenizer.json":
        (copy / "depthmix.json").unlink()
    good = (copy / file).read_bytes()
    for bad in b"", good[: len(good) // 2], b"[1]", b"[" * 100_000:
        (copy / file).write_bytes(bad)
        refused(copy, match=file)


def test_untied_and_strange_weights(copy):
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed.weight"] * 2}, copy / "model.safetensors")
    refused(copy, match="lm_head.weight is not the embedding")
    save_file(weights | {"lm_head.weight": weights["model.embed.weight"].clone()}, copy / "model.safetensors")
    read(copy)
    save_file({n: w.double() for n, w in weights.items()}, copy / "model.safetensors")
    refused(copy, match="is torch.float64; a run has weights in")
    save_file(weights | {"model.extra": torch.zeros(2)}, copy / "model.safetensors")
    refused(copy, match="1 tensors do not fit config.json, extra")


def test_no_place_to_write_comes_in(copy, tmp_path_factory):
    values = json.loads((copy / "depthmix.json").read_text())
    assert values["config"]["data"]["cache_dir"] is None
    values["config"]["data"]["cache_dir"] = "/somewhere/else"
    (copy / "depthmix.json").write_text(json.dumps(values))
    assert read(copy).config.data.cache_dir is None


# --- code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "residual",
    [
        *available_residuals(),
        "mgr-review:separate_streams=true:n_streams=2",
        "mgr-competitive:stream_dtype=bf16:last_read=mean",
    ],
)
def test_one_file_of_code(residual):
    """It compiles, every name in it is bound, and nothing of it is the package's."""
    code = model_code(GPTConfig(320, 4, 16, 2, 32, residual=residual))
    tree = ast.parse(code)
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name | ast.arg)]
    bound = {n.id for n in names if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    bound |= {n.arg for n in names if isinstance(n, ast.arg)} | set(dir(builtins)) | {"__class__"}
    bound |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    bound |= {(a.asname or a.name).partition(".")[0] for n in imports for a in n.names}
    annotations = {
        id(inner)
        for n in ast.walk(tree)
        for part in (getattr(n, "annotation", None), getattr(n, "returns", None))
        if part is not None
        for inner in ast.walk(part)
    }
    used = {n.id for n in names if isinstance(n, ast.Name) and id(n) not in annotations}
    assert used <= bound, used - bound
    assert not any(getattr(n, "level", 0) for n in imports)
    modules = {n.module.partition(".")[0] for n in imports if isinstance(n, ast.ImportFrom)}
    assert modules - set(sys.stdlib_module_names) == {"torch", "transformers"}
