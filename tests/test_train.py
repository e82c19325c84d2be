"""Runs on a tiny model and real text: what they leave, and that stopping them changes no bit."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import depthmix.parallel.engine as engine_module
import depthmix.train as train_module
from depthmix import GPT
from depthmix.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint, load_model, problem
from depthmix.config import DataConfig, GPTConfig, OptimConfig, TrainConfig
from depthmix.data import Loader, eval_batches, open_dataset, prepare
from depthmix.errors import Interrupted, RunError, UserError
from depthmix.train import train

STEPS = 40
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> DataConfig:
    """Thirty documents of made-up sentences."""
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(0)
    for number in range(30):
        sentences = [
            " ".join(
                words.choice("the gate opens and a stream of tokens is mixed over depth".split())
                for _ in range(8)
            )
            for _ in range(40)
        ]
        (folder / f"{number:02}.txt").write_text(".\n".join(sentences))
    return DataConfig(data=(str(folder),), val_fraction=0.2, cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def config(text) -> TrainConfig:
    return TrainConfig(
        model=GPTConfig(vocab_size=64, n_layer=2, d_model=16, n_head=2, seq_len=16, n_streams=2),
        data=text,
        optim=OptimConfig(lr=0.01, muon_lr=0.02, warmup_steps=5),
        steps=STEPS,
        batch_size=8,
        eval_interval=10,
        eval_tokens=512,
        checkpoint_interval=15,
        device="cpu",
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, as tiny tensors only wait for a second one on a busy machine; and no reports, which
    take seconds (the one test about them undoes this)."""
    monkeypatch.setattr(train_module, "_report", lambda run_dir: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def changed(config: TrainConfig, **values) -> TrainConfig:
    return dataclasses.replace(config, **values)


def signal_at_batch(monkeypatch, number: int, which=signal.SIGTERM) -> None:
    """This process gets a real signal while the step with that number is in progress."""

    class Signalling(Loader):
        served = 0

        def next_batch(self):
            type(self).served += 1
            if self.served == number:
                os.kill(os.getpid(), which)
            return super().next_batch()

    monkeypatch.setattr(train_module, "Loader", Signalling)


def assert_same_run(one: Path, other: Path) -> None:
    """Byte-identical metrics, depth records and final tensors; every step timed once."""
    for name in ("metrics.jsonl", "depth.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    last = [latest_checkpoint(run / "checkpoints") for run in (one, other)]
    assert last[0].name == last[1].name
    for name in TENSOR_FILES:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    states = [load_checkpoint(path).state for path in last]
    for key in ("step", "loader", "random", "best", "evaluated", "data", "config"):
        assert states[0][key] == states[1][key], key
    for run in (one, other):
        steps = [line["step"] for line in lines(run, "timing.jsonl")]
        assert steps == list(range(1, len(steps) + 1))


class Forker:
    """Starts runs in processes of their own, from a warm one (see faults/forker.py)."""

    def __init__(self):
        source = str(Path(train_module.__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "faults" / "forker.py"],
            env={**os.environ, "PYTHONPATH": source},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, command: dict) -> int:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(
        self, config: TrainConfig, run_dir: Path, *, resume: bool = False, file_limit=None, hold_at=None
    ) -> int:
        values = {
            "config": config.to_dict(),
            "run_dir": str(run_dir),
            "resume": resume,
            "file_limit": file_limit,
            "hold_at": hold_at,
        }
        return self._ask({"start": values})

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})

    def run(self, *args, **kwargs) -> int:
        return self.wait(self.start(*args, **kwargs))

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def forker():
    forker = Forker()
    yield forker
    forker.close()


@pytest.fixture(scope="module")
def whole(forker, config, tmp_path_factory) -> Path:
    """The run of ``config`` that was never stopped, from a process of its own."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert forker.run(config, run) == 0
    return run


# --- what a run is --------------------------------------------------------------------------------


def test_a_run_folder(config, tmp_path):
    run = tmp_path / "run"
    result = train(config, run, quiet=True)
    assert result == json.loads((run / "result.json").read_text())
    dataset = open_dataset(prepare(config.data))

    saved = json.loads((run / "config.json").read_text())
    assert saved["model"]["vocab_size"] == 320  # 257 tokens, up to a multiple of 64
    assert json.loads((run / "tokenizer.json").read_text()) == dataset.tokenizer.to_dict()
    assert json.loads((run / "environment.json").read_text())["torch"] == torch.__version__

    train_lines = [line for line in lines(run) if line["split"] == "train"]
    val_lines = [line for line in lines(run) if line["split"] == "val"]
    assert [line["step"] for line in train_lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in val_lines] == [10, 20, 30, 40]
    assert list(train_lines[0]) == [
        *("split", "step", "tokens", "loss", "grad_norm", "grad_norm_first", "lr", "muon_lr")
    ]
    assert list(val_lines[0]) == ["split", "step", "tokens", "loss"]
    assert [line["tokens"] for line in train_lines] == [128 * k for k in range(1, STEPS + 1)]
    # Warm-up over five steps, then a cosine to a tenth.
    assert train_lines[0]["lr"] == pytest.approx(0.002) and train_lines[4]["lr"] == pytest.approx(0.01)
    assert train_lines[-1]["muon_lr"] == pytest.approx(0.002)
    assert train_lines[-1]["loss"] < train_lines[0]["loss"] - 1

    timing = lines(run, "timing.jsonl")
    assert [sorted(line) for line in timing] == [["seconds", "step", "time", "tokens_per_s"]] * STEPS
    assert result["status"] == "finished" and result["residual"] == "mgr-competitive"
    assert result["tokens"] == 128 * STEPS and result["steps"] == STEPS and result["seed"] == 0
    assert result["train_loss"] == pytest.approx(statistics.fmean(line["loss"] for line in train_lines[-4:]))
    assert result["val_loss"] == val_lines[-1]["loss"]
    assert result["best_val_loss"] == min(line["loss"] for line in val_lines)
    assert result["tokens_per_s"] == pytest.approx(statistics.median(t["tokens_per_s"] for t in timing[4:]))
    for key in ("parameters", "peak_memory_bytes", "saved_bytes_per_token", "wall_seconds", "best_step"):
        assert result[key] > 0, key

    # The numbers are those of the saved model: its loss over the validation windows, recomputed.
    model, loaded = load_model(latest_checkpoint(run / "checkpoints"))
    assert loaded.to_dict() == from_json(saved)
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(inputs).double().flatten(0, 1), targets.flatten(), reduction="none")
            for inputs, targets in eval_batches(dataset.val, 16, 100, 512)
        ]
    assert torch.cat(losses).numel() == 512
    assert torch.cat(losses).mean().item() == pytest.approx(result["val_loss"], abs=1e-6)
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]


def from_json(values: dict) -> dict:
    """JSON has lists where a configuration has tuples."""
    return {**values, "data": {**values["data"], "data": tuple(values["data"]["data"])}}


def test_the_first_steps_from_their_definition(config, tmp_path):
    """Loss and gradient norm of three steps, from the model, autograd and the optimiser directly."""
    from depthmix.optim import build_optimizer

    config = changed(config, steps=3, seed=7)
    train(config, tmp_path / "run", quiet=True)
    dataset = open_dataset(prepare(config.data))
    model = GPT(dataclasses.replace(config.model, vocab_size=320), seed=7)
    optimizer = build_optimizer(model, config.optim)
    loader = Loader(dataset.train, 16, 8, 7)
    for step in range(3):
        inputs, targets = loader.next_batch()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        line = lines(tmp_path / "run")[step]
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
        attention = model.blocks[0].attn
        gradients = [attention.norm.weight.grad, attention.qkv.weight.grad, attention.proj.weight.grad]
        first = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
        assert 0 < line["grad_norm_first"] == pytest.approx(first, rel=1e-4)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.set_lr_fraction((step + 1) / 5)
        optimizer.step()


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_add_up_to_the_batch(config, tmp_path, micro_batch):
    config = changed(config, steps=6)
    train(config, tmp_path / "whole", quiet=True)
    train(changed(config, micro_batch=micro_batch), tmp_path / "parts", quiet=True)
    for whole, parts in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=2e-4)
        if whole["split"] == "train":
            assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=2e-3)
            assert parts["grad_norm_first"] == pytest.approx(whole["grad_norm_first"], rel=2e-3)


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_low_precision_follows_fp32(config, tmp_path, precision):
    train(config, tmp_path / "fp32", quiet=True)
    train(changed(config, precision=precision), tmp_path / precision, quiet=True)
    first, other = lines(tmp_path / "fp32"), lines(tmp_path / precision)
    assert first != other
    for a, b in zip(first, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    model, _ = load_model(tmp_path / precision)
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.rope_cos.dtype == torch.float32


@pytest.mark.slow
def test_compiled_follows_eager(config, tmp_path):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    model = dataclasses.replace(config.model, n_layer=1, residual="prenorm")
    config = changed(config, model=model, steps=5, eval_interval=0)
    train(config, tmp_path / "eager", quiet=True)
    train(changed(config, compile=True), tmp_path / "compiled", quiet=True)
    for a, b in zip(lines(tmp_path / "eager"), lines(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    load_model(tmp_path / "compiled")  # names in the checkpoint are the plain model's


def test_a_rate_of_the_connections_own_is_on_record_and_survives_a_resume(config, tmp_path):
    optim = dataclasses.replace(config.optim, connection_lr=0.25)
    config = changed(config, optim=optim, steps=6, eval_interval=0, checkpoint_interval=3)
    train(config, tmp_path / "run", quiet=True)
    whole = lines(tmp_path / "run")
    assert all(line["connection_lr"] == 0.25 * line["lr"] for line in whole if line["split"] == "train")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    (tmp_path / "run" / "result.json").unlink()
    train(config, tmp_path / "run", quiet=True, resume=True)
    assert lines(tmp_path / "run") == whole
    with pytest.raises(ValueError, match=r"connection_lr: 0.25 there, 1.0 asked for"):
        train(
            changed(config, optim=dataclasses.replace(optim, connection_lr=1.0)),
            tmp_path / "run",
            resume=True,
        )


def test_best_and_last_checkpoints_are_kept(config, tmp_path):
    config = changed(config, optim=OptimConfig(lr=0.05, muon_lr=0.3, warmup_steps=5, min_lr_fraction=1.0))
    train(config, tmp_path / "run", quiet=True)
    val = {line["step"]: line["loss"] for line in lines(tmp_path / "run") if line["split"] == "val"}
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert best["val_loss"] == min(val.values()) == val[best["step"]]
    names = {path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")}
    assert names == {f"step-{step:08d}" for step in (30, 40, best["step"])}


def test_two_threads_repeat_bit_for_bit(config, tmp_path):
    """The backward pass of the embedding adds rows up in parallel; on a CPU its order is fixed."""
    model = dataclasses.replace(config.model, d_model=64, seq_len=64)
    config = changed(config, model=model, steps=4, batch_size=32, eval_interval=0)
    torch.set_num_threads(2)
    for name in ("one", "two"):
        train(config, tmp_path / name, quiet=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")


# --- stopping and going on ------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_17_steps_and_23_are_40(config, tmp_path, monkeypatch, precision, micro_batch):
    config = changed(config, precision=precision, micro_batch=micro_batch)
    train(config, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        signal_at_batch(patch, 17)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM after step 17; saved .*step-00000017"):
            train(config, tmp_path / "parts", quiet=True)
    assert lines(tmp_path / "parts")[-1]["step"] == 17
    assert not (tmp_path / "parts" / "result.json").exists()
    torch.manual_seed(99)  # nothing may hang on what this process drew since
    result = train(config, tmp_path / "parts", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    same = (
        "train_loss",
        "val_loss",
        "best_val_loss",
        "best_step",
        "tokens",
        "parameters",
        "saved_bytes_per_token",
    )
    assert {key: result[key] for key in same} == {key: whole[key] for key in same}


def test_a_signal_during_evaluation(config, whole, tmp_path, monkeypatch):
    """The evaluation is given up and done again at resume; also the one after the last step."""

    def signalling(*args):
        for number, batch in enumerate(eval_batches(*args)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    run = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "eval_batches", signalling)
        for step in (10, 10):  # the second time at once
            with pytest.raises(Interrupted, match=f"SIGINT after step {step}"):
                train(config, run, resume=run.exists(), quiet=True)
            assert lines(run)[-1] == {**lines(run)[-1], "split": "train", "step": step}
    signal_at_batch(monkeypatch, 20)  # the batch of step 30, an evaluation due after it
    with pytest.raises(Interrupted, match="SIGTERM after step 30"):
        train(config, run, resume=True, quiet=True)
    monkeypatch.setattr(train_module, "Loader", Loader)
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "eval_batches", lambda *args: (yield from signalling(*args)))
        with pytest.raises(Interrupted):
            train(config, run, resume=True, quiet=True)
    train(config, run, resume=True, quiet=True)
    assert_same_run(whole, run)


def test_a_signal_in_the_last_step(config, tmp_path, monkeypatch):
    config = changed(config, steps=10)
    train(config, tmp_path / "whole", quiet=True)
    signal_at_batch(monkeypatch, 10)
    with pytest.raises(Interrupted, match="after step 10"):
        train(config, tmp_path / "run", quiet=True)
    result = train(config, tmp_path / "run", resume=True, quiet=True)
    assert result["val_loss"] == lines(tmp_path / "whole")[-1]["loss"] == lines(tmp_path / "run")[-1]["loss"]
    assert lines(tmp_path / "whole") == lines(tmp_path / "run")


def test_a_finished_run_is_returned_as_it_is(config, tmp_path):
    config = changed(config, steps=3)
    result = train(config, tmp_path / "run", quiet=True)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "lock"}
    assert train(config, tmp_path / "run", resume=True, quiet=True) == result
    assert {p: p.read_bytes() for p in before} == before
    (tmp_path / "run" / "result.json").unlink()  # as if killed just before it was written
    again = train(config, tmp_path / "run", resume=True, quiet=True)
    assert {**again, "wall_seconds": 0, "peak_memory_bytes": 0} == {
        **result,
        "wall_seconds": 0,
        "peak_memory_bytes": 0,
    }


def test_signal_handlers_are_put_back(config, tmp_path, monkeypatch):
    received = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        signal_at_batch(monkeypatch, 2)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run", quiet=True)
        assert received == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, old)


def test_a_terminal_that_hangs_up(config, tmp_path, monkeypatch):
    """SIGHUP saves too, unless nohup has had it ignored."""
    config = changed(config, steps=6)
    signal_at_batch(monkeypatch, 3, signal.SIGHUP)
    with pytest.raises(Interrupted, match="SIGHUP after step 3"):
        train(config, tmp_path / "run", quiet=True)
    signal_at_batch(monkeypatch, 3, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(config, tmp_path / "nohup", quiet=True)["steps"] == 6
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_changes_nothing(config, tmp_path, monkeypatch):
    signal_at_batch(monkeypatch, 3, signal.SIGINT)
    real = train_module.save_checkpoint

    def save(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(train_module, "save_checkpoint", save)
    with pytest.raises(Interrupted, match="SIGINT after step 3"):
        train(config, tmp_path / "run", quiet=True)
    assert load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints")).step == 3


def test_training_outside_the_main_thread(config, tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(changed(config, steps=2), tmp_path / "run", quiet=True))
    )
    thread.start()
    thread.join()
    assert results[0]["steps"] == 2


# --- real deaths ----------------------------------------------------------------------------------


def wait_for(path: Path) -> None:
    until = time.monotonic() + 150  # nothing takes so long, on however busy a machine
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.002)


def kill_storm(forker, config, tmp_path, which, deaths, statuses) -> list[bool]:
    """Stop runs ``deaths`` times at random moments, resuming each; every run that gets through must
    equal the one that was never stopped. Returns for each death whether a checkpoint was being
    written; every other SIGKILL holds the run at one of the first files that it saves."""
    config = changed(config, checkpoint_interval=1, steps=30)
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert forker.run(config, whole) == 0
    duration = time.monotonic() - began
    moments = random.Random(1)
    while_saving: list[bool] = []
    number = 0
    while len(while_saving) < deaths:
        number += 1
        run, finished, reached = tmp_path / f"run-{number}", False, 0
        while not finished:
            held, hold_at = Path(f"{run}.held"), None
            if which == signal.SIGKILL and len(while_saving) < deaths and len(while_saving) % 2:
                hold_at = ["save", moments.randint(1, 6)]
            pid = forker.start(config, run, resume=run.exists(), hold_at=hold_at)
            if len(while_saving) < deaths:
                moment = time.monotonic() + moments.uniform(0, min(0.5 * duration, 0.8))
                while not (run / "result.json").exists():
                    if held.exists() or (hold_at is None and time.monotonic() > moment):
                        break
                    time.sleep(0.001)
                os.kill(pid, which)
                held.unlink(missing_ok=True)
            status = forker.wait(pid)
            assert status in (0, *statuses), Path(f"{run}.message").read_text()
            finished = status == 0
            if not finished:
                while_saving.append(any((run / "checkpoints").glob(".saving-*")))
                found = list_checkpoints(run / "checkpoints")
                assert [problem(path) for path in found] == [None] * len(found)
                newest = load_checkpoint(found[-1]).step if found else 0
                assert newest >= reached  # a death never costs what was saved
                reached = newest
        assert_same_run(whole, run)
    return while_saving


@pytest.mark.slow
def test_killed_at_random_moments(forker, config, tmp_path):
    while_saving = kill_storm(forker, config, tmp_path, signal.SIGKILL, 24, [-signal.SIGKILL])
    assert sum(while_saving) >= 8


@pytest.mark.slow
def test_terminated_at_random_moments(forker, config, tmp_path):
    """A signal that comes before training proper has begun ends the process as it would any other."""
    kill_storm(forker, config, tmp_path, signal.SIGTERM, 8, [75, -signal.SIGTERM])


@pytest.mark.parametrize(
    ("limit", "file"),
    [(1500, "tensorboard/events.out.tfevents."), (40_000, "checkpoints/step-00000010"), (300, "config.json")],
)
def test_no_room(forker, config, whole, tmp_path, limit, file):
    """The kernel lets no file grow past ``limit`` bytes, as a full disk does. With room again, the run
    goes on, and nothing is missing or twice."""
    run = tmp_path / "run"
    assert forker.run(config, run, file_limit=limit) == 1
    message = Path(f"{run}.message").read_text()
    assert message.startswith("RunError: ") and str(run / file) in message and "File too large" in message
    assert forker.run(config, run, resume=True) == 0
    assert_same_run(whole, run)


def test_no_room_for_metrics_after_a_checkpoint(forker, config, whole, tmp_path, monkeypatch):
    """What was saved before the disk filled up is named, stays, and is where the run goes on."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at_batch(patch, 21)  # when step 20 has been evaluated
        with pytest.raises(Interrupted):
            train(config, run, quiet=True)
    room = (run / "metrics.jsonl").stat().st_size + 300
    # The limit holds for every file; checkpoints are larger, but the next is due in nine steps.
    assert forker.run(config, run, resume=True, file_limit=room) == 1
    message = Path(f"{run}.message").read_text()
    assert f"{run / 'metrics.jsonl'}: File too large. The last checkpoint is " in message
    assert "step-00000021; once that is mended, go on with --resume" in message
    assert forker.run(config, run, resume=True) == 0
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


# --- refusals -------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"run is not empty; go on with it by --resume, or choose another"):
        train(config, run, quiet=True)
    with pytest.raises(UserError, match=r"run is not a run folder: it has no config\.json"):
        train(config, run, resume=True, quiet=True)
    assert os.listdir(run) == ["thesis.txt"]
    with pytest.raises(UserError, match=r"thesis\.txt is a file"):
        train(config, run / "thesis.txt", quiet=True)


def test_resume_where_there_is_nothing_begins(config, tmp_path):
    config = changed(config, steps=2)
    train(config, tmp_path / "new", resume=True, quiet=True)
    train(config, tmp_path / "plain", quiet=True)
    assert_same_run(tmp_path / "new", tmp_path / "plain")


def test_resume_before_the_first_checkpoint_begins_again(forker, config, tmp_path):
    config = changed(config, checkpoint_interval=0, eval_interval=0, steps=30)
    run = tmp_path / "run"
    pid = forker.start(config, run, hold_at=["step", 20])
    wait_for(tmp_path / "run.held")
    os.kill(pid, signal.SIGKILL)
    assert forker.wait(pid) == -signal.SIGKILL
    assert list_checkpoints(run / "checkpoints") == []
    train(config, run, resume=True, quiet=True)
    assert [line["step"] for line in lines(run)] == [*range(1, 31), 30]
    assert [line["step"] for line in lines(run, "timing.jsonl")] == [*range(1, 31)]


def test_resume_with_another_configuration(config, tmp_path, monkeypatch):
    signal_at_batch(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", quiet=True)
    other = changed(
        config,
        steps=50,
        optim=dataclasses.replace(config.optim, muon_lr=0.5),
        model=dataclasses.replace(config.model, n_layer=3),
    )
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError) as caught:
        train(other, tmp_path / "run", resume=True, quiet=True)
    message = str(caught.value)
    for difference in (
        "steps: 40 there, 50 asked for",
        "optim.muon_lr: 0.02 there, 0.5 asked for",
        "model.n_layer: 2 there, 3 asked for",
    ):
        assert difference in message
    assert "vocab_size" not in message and message.count("asked for") == 3
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    train(changed(config, keep_last=5, checkpoint_interval=7), tmp_path / "run", resume=True, quiet=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["keep_last"] == 5


def test_two_processes_on_one_folder(forker, config, tmp_path):
    run = tmp_path / "run"
    pid = forker.start(changed(config, steps=100_000), run)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_bytes():
        time.sleep(0.002)
    with pytest.raises(UserError, match=f"run is in use by process {pid}; wait for it"):
        train(changed(config, steps=100_000), run, resume=True, quiet=True)
    os.kill(pid, signal.SIGTERM)
    assert forker.wait(pid) == 75
    assert (run / "lock").read_text() == f"{pid}\n"


def test_a_damaged_checkpoint_at_resume(config, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at_batch(patch, 17)
        with pytest.raises(Interrupted):
            train(config, run, quiet=True)
    damaged = latest_checkpoint(run / "checkpoints")
    os.truncate(damaged / "optimizer.safetensors", 1000)
    with pytest.raises(RunError, match=r"optimizer\.safetensors has 1000 bytes.*remove step-00000017"):
        train(config, run, resume=True, quiet=True)
    shutil.rmtree(damaged)  # as the message says
    train(config, run, resume=True, quiet=True)
    assert_same_run(whole, run)


def test_a_damaged_config_at_resume(config, tmp_path):
    train(changed(config, steps=1), tmp_path / "run", quiet=True)
    (tmp_path / "run" / "config.json").write_bytes(b'{"model": \xff')
    with pytest.raises(RunError, match=r"config\.json is damaged .*restore it from a copy"):
        train(config, tmp_path / "run", resume=True, quiet=True)


def test_metrics_that_were_lost(config, tmp_path, monkeypatch):
    signal_at_batch(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", quiet=True)
    os.truncate(tmp_path / "run" / "metrics.jsonl", 10)
    with pytest.raises(RunError, match=r"metrics\.jsonl has 10 bytes where the checkpoint recorded \d+"):
        train(config, tmp_path / "run", resume=True, quiet=True)


def test_other_data_at_resume(config, tmp_path, monkeypatch):
    folder = tmp_path / "text"
    shutil.copytree(config.data.data[0], folder)
    config = changed(config, data=dataclasses.replace(config.data, data=(str(folder),)))
    signal_at_batch(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", quiet=True)
    (folder / "00.txt").write_text("Something else altogether.")
    with pytest.raises(UserError, match=r"the data are not those that .*step-00000005 was trained on"):
        train(config, tmp_path / "run", resume=True, quiet=True)


def test_a_loss_that_is_not_finite(config, tmp_path):
    """Learning rates beyond sense: a message with the step, and everything saved stays."""
    config = changed(
        config,
        optim=OptimConfig(lr=1e30, muon_lr=1e30, warmup_steps=0, grad_clip=0, weight_decay=0),
        checkpoint_interval=1,
        eval_interval=0,
    )
    run = tmp_path / "run"
    with pytest.raises(RunError) as caught:
        train(config, run, quiet=True)
    message = str(caught.value)
    done = lines(run)[-1]["step"]
    assert f"step {done + 1} has loss" in message and "was not applied" in message and "--lr" in message
    assert f"the last checkpoint is {run / 'checkpoints'}/step-{done:08d}" in message
    found = list_checkpoints(run / "checkpoints")
    assert [problem(path) for path in found] == [None] * len(found)
    assert load_checkpoint(found[-1]).step == done


def test_a_validation_loss_that_is_not_finite(config, tmp_path, monkeypatch):
    def without_targets(*args):
        for inputs, targets in eval_batches(*args):
            yield inputs, torch.full_like(targets, -100)  # the mean over no token at all

    monkeypatch.setattr(engine_module, "eval_batches", without_targets)
    with pytest.raises(
        RunError, match="the validation loss after step 10 is nan; no checkpoint was saved yet"
    ):
        train(config, tmp_path / "run", quiet=True)
    assert [line["split"] for line in lines(tmp_path / "run")] == ["train"] * 10


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "unknown device 'gpu'. .*Valid: auto, cpu"),
        ("cuda:99", "device 'cuda:99' does not exist here"),
    ],
)
def test_a_device_that_does_not_exist(config, tmp_path, device, message):
    with pytest.raises(UserError, match=message):
        train(changed(config, device=device), tmp_path / "run", quiet=True)


# --- what is shown --------------------------------------------------------------------------------


def test_tensorboard_shows_every_step_once(config, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at_batch(patch, 27)
        with pytest.raises(Interrupted):
            train(config, run, quiet=True)
    shutil.rmtree(run / "checkpoints" / "step-00000027")  # so that steps after 20 are repeated
    train(config, run, resume=True, quiet=True)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for split, key, tag in (
        ("train", "loss", "train/loss"),
        ("train", "muon_lr", "train/muon_lr"),
        ("val", "loss", "val/loss"),
    ):
        expected = [(line["step"], line[key]) for line in lines(run) if line["split"] == split]
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in shown] == [step for step, _ in expected]
        assert [value for _, value in shown] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_weights_and_biases_when_asked_for(config, tmp_path, monkeypatch, capsys):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: calls.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = changed(config, steps=2)
    train(config, tmp_path / "silent", quiet=True)
    assert calls == []
    monkeypatch.setenv("WANDB_PROJECT", "depth")
    train(config, tmp_path / "run", quiet=True)
    options, *logged, last = calls
    assert options["project"] == "depth" and options["name"] == "run" and options["resume"] == "allow"
    assert options["config"]["steps"] == 2 and last == "finished"
    assert [values["train/loss"] for _, values in logged if "train/loss" in values] == [
        line["loss"] for line in lines(tmp_path / "run") if line["split"] == "train"
    ]
    assert [step for step, _ in logged] == sorted(step for step, _ in logged)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    train(config, tmp_path / "without", quiet=True)
    assert 'pip install "depthmix[wandb]"' in capsys.readouterr().err


def test_progress_as_lines_and_live(config, tmp_path, monkeypatch, capsys):
    train(config, tmp_path / "quiet", quiet=True)
    assert capsys.readouterr() == ("", "")
    train(config, tmp_path / "lines")
    out = capsys.readouterr().out
    assert "mgr-competitive: " in out and "40 steps of 128 tokens on cpu" in out
    val = [line for line in lines(tmp_path / "lines") if line["split"] == "val"]
    for line in val:
        assert f"step {line['step']}/40  validation loss {line['loss']:.4f}" in out
    assert "\x1b" not in out and "tokens/s" in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    train(config, tmp_path / "live")
    out = capsys.readouterr().out
    assert "\x1b" in out and "step 40/40" in out and f"val {val[-1]['loss']:.4f}" in out and "left" in out


def test_a_report_that_fails_does_not_fail_the_run(config, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    broken = types.ModuleType("depthmix.report")

    def write_run_report(run_dir):
        raise RuntimeError("no ink")

    broken.write_run_report = write_run_report
    monkeypatch.setitem(sys.modules, "depthmix.report", broken)
    result = train(changed(config, steps=2), tmp_path / "run", quiet=True)
    assert result["status"] == "finished"
    assert "warning: no report for" in capsys.readouterr().err
