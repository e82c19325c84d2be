"""What training records of the network's depth, and how a terminal and TensorBoard show it."""

import contextlib
import dataclasses
import io
import json
import math
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import depthmix.parallel.engine as engine_module
import depthmix.train as train_module
from depthmix import GPT, GPTConfig, available_residuals, cli, health, watch
from depthmix.checkpoint import latest_checkpoint, load_checkpoint
from depthmix.config import DataConfig, OptimConfig, TrainConfig
from depthmix.data import Loader, eval_batches, open_dataset, prepare
from depthmix.errors import Interrupted, RunError
from depthmix.optim import build_optimizer
from depthmix.train import train

STEPS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    for number in range(10):
        words = draw.choices("the gate opens and a stream of tokens is mixed over depth".split(), k=300)
        (folder / f"{number}.txt").write_text(" ".join(words))
    data = DataConfig(data=(str(folder),), val_fraction=0.2, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return TrainConfig(
        model=GPTConfig(vocab_size=320, n_layer=2, d_model=16, n_head=2, seq_len=16, n_streams=2),
        data=data,
        optim=OptimConfig(lr=0.01, muon_lr=0.02, warmup_steps=2),
        steps=STEPS,
        batch_size=8,
        eval_interval=4,
        eval_tokens=256,
        checkpoint_interval=5,
        device="cpu",
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(train_module, "_report", lambda run_dir: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def changed(config, model=None, **values):
    model = dataclasses.replace(config.model, **(model or {}))
    return dataclasses.replace(config, model=model, **values)


def lines(run, name="depth.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def perturbed(residual, seed=0, **changes):
    """A model in float64 whose every parameter is away from its initial value."""
    options = dict(vocab_size=32, n_layer=3, d_model=16, n_head=2, seq_len=12, n_streams=3) | changes
    model = GPT(GPTConfig(residual=residual, **options), seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return model.double()


def rms(x):
    return math.sqrt(x.detach().double().square().mean().item())


def close(found, expected):
    """Equal to six digits; ``None`` stands where there is nothing."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, list):
            close(a, b)
        else:
            assert a == (None if b is None else pytest.approx(b, rel=1e-5))


# --- what is recorded -----------------------------------------------------------------------------


IDS = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(5))


def sublayers(model):
    """Each as a function of what it reads, with the site behind it."""
    cos, sin = model.rotary(IDS)
    for block in model.blocks:
        yield lambda x, f=block.attn: f(f.norm(x), cos, sin), block.attn_site
        yield lambda x, f=block.mlp: f(f.norm(x)), block.mlp_site


@torch.no_grad()
def test_prenorm_from_its_definition():
    model = perturbed("prenorm")
    record = health.measure(model, IDS, contextlib.nullcontext()).record
    x, read, output = model.embed(IDS), [], []
    for f, _ in sublayers(model):
        read.append(rms(x))
        output.append(rms(f(x)))
        x = x + f(x)
    assert sorted(record) == ["hidden_rms", "output_rms", "text_tokens"]
    close(record["hidden_rms"], read)
    close(record["output_rms"], output)
    assert record["text_tokens"] == 48


@pytest.mark.parametrize("gate", ["competitive", "independent"])
@torch.no_grad()
def test_multi_gate_residuals_from_their_equations(gate):
    model = perturbed(f"mgr-{gate}")
    found = health.measure(model, IDS, contextlib.nullcontext())
    record = found.record

    def score(x, w):  # c w . rms(x)
        return (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w).sum(-1) / 16**0.5

    streams = [model.embed(IDS)]
    h, expected = streams[0], {key: [] for key in record if key not in ("text_tokens", "gate_range")}
    for f, site in sublayers(model):
        expected["hidden_rms"].append(rms(h))
        y = f(h)
        expected["output_rms"].append(rms(y))
        beta = None
        if len(streams) < 3:
            streams = [*streams, y]
        else:
            g = torch.stack([score(s, site.gate_weight) for s in streams], -1)
            if gate == "competitive":
                b0, b = site.gate_bias[0], site.gate_bias[1:]
                e = torch.exp(g + b)
                beta = e / (e.sum(-1, keepdim=True) + torch.exp(b0))
            else:
                beta = 1 / (1 + torch.exp(-g - site.gate_bias))
            streams = [s + beta[..., i, None] * (y - s) for i, s in enumerate(streams)]
        e = torch.stack([torch.exp(score(s, site.pool_weight)) for s in streams], -1)
        alpha = e / e.sum(-1, keepdim=True)
        h = sum(alpha[..., i, None] * s for i, s in enumerate(streams))
        expected["stream_rms"].append([rms(s) for s in streams])
        expected["pool_mean"].append([a.mean().item() for a in alpha.unbind(-1)])
        expected["gate_mean"].append(None if beta is None else beta.mean().item())
        expected["gate_max"].append(None if beta is None else beta.max().item())
        by_stream = None if beta is None else [b.mean().item() for b in beta.unbind(-1)]
        expected["gate_mean_stream"].append(by_stream)
    close_lists = ("stream_rms", "pool_mean", "gate_mean_stream")
    assert {*expected} == {"hidden_rms", "output_rms", "gate_mean", "gate_max", *close_lists}
    for key, values in expected.items():
        close(record[key], values)
    assert record["gate_range"] == [0.0, 1.0] and sorted(found.gates) == [2, 3, 4, 5]
    # The last sublayer's gates, all 4 x 12 x 3 of them.
    assert np.sort(found.gates[5]) == pytest.approx(np.sort(beta.flatten().numpy()), rel=1e-5)


@pytest.mark.parametrize("residual", available_residuals())
def test_every_connection_and_nothing_is_disturbed(residual):
    model = perturbed(residual, n_layer=4).float()
    ids, state = IDS, torch.get_rng_state()
    before, weights = model(ids, ids)[1], {k: v.clone() for k, v in model.state_dict().items()}
    found = health.measure(model, ids, contextlib.nullcontext())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(ids, ids)[1], before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    record = found.record
    for key in ("hidden_rms", "output_rms"):
        assert len(record[key]) == 8 and all(x > 0 for x in record[key])
    gates = any("gate" in site.gate_names for b in model.blocks for site in (b.attn_site, b.mlp_site))
    assert ("gate_mean" in record) == gates
    if gates:
        low, high = record["gate_range"]
        for mean, largest in zip(record["gate_mean"], record["gate_max"], strict=True):
            assert (mean is None) == (largest is None)
            assert mean is None or low <= mean <= largest
        assert max(x for x in record["gate_max"] if x is not None) <= high or residual.startswith(
            ("hc", "mhc")
        )
    line = {"step": 4, "tokens": 1, **record, "gradient_rms": [1.0] * 4}
    json.dumps(line, allow_nan=False)
    health.histograms(found, None)
    assert "depth/hidden_rms over time" in health.images([line])
    assert watch_text(fabricated(record=line), 80)


def test_what_is_not_finite_is_null():
    model = perturbed("mgr-competitive")
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[0, 0] = math.nan
    found = health.measure(model, IDS, contextlib.nullcontext())
    line = {"step": 1, "tokens": 1, **found.record, "gradient_rms": None}
    text = json.dumps(line, allow_nan=False)
    assert json.loads(text)["output_rms"][:2] == found.record["output_rms"][:2] != [None, None]
    assert found.record["output_rms"][2:] == [None] * 4 and found.record["gate_mean"][3:] == [None] * 3
    assert all(math.isfinite(x) for x in health.scalars(line).values())
    for fields in health.histograms(found, None).values():
        assert math.isfinite(fields["sum"])
    assert health.images([line])["depth/gate_mean over time"].png.startswith(b"\x89PNG")
    said = watch_text(fabricated(record=line), 120)
    assert "warning: not finite: what 1 mlp, 2 attn, 2 mlp reads" in said
    assert "warning: not finite: what 1 attn, 1 mlp, 2 attn and 1 more sublayers returns" in said


@pytest.mark.parametrize(("precision", "digits"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_gradients_are_those_before_clipping(config, tmp_path, precision, digits):
    """Of the second step, from micro-batches, against one backward pass by hand."""
    config = changed(config, steps=2, eval_interval=1, micro_batch=4, precision=precision)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, grad_clip=0.01))
    train(config, tmp_path / "run", quiet=True)
    model = GPT(config.model, seed=0)
    optimizer, dataset = build_optimizer(model, config.optim), open_dataset(prepare(config.data))
    loader = Loader(dataset.train, 16, 8, 0)
    for step, line in enumerate(lines(tmp_path / "run")):
        inputs, targets = loader.next_batch()
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        expected = [rms(torch.cat([p.grad.flatten() for p in block.parameters()])) for block in model.blocks]
        assert line["step"] == step + 1 and line["gradient_rms"] == pytest.approx(expected, rel=digits)
        optimizer.clip_grad_norm(0.01)
        optimizer.set_lr_fraction((step + 1) / 2)
        optimizer.step()


def test_the_lines_of_a_run(config, tmp_path):
    run = tmp_path / "run"
    train(config, run, quiet=True)
    found = lines(run)
    assert [line["step"] for line in found] == [4, 8, 12]
    assert [line["tokens"] for line in found] == [4 * 128, 8 * 128, 12 * 128]
    # 512 tokens of the validation data, or all there are, from the beginning, through the last weights.
    val = open_dataset(prepare(config.data)).val
    ids = torch.from_numpy(np.stack([val.read(16 * i, 16) for i in range(min(32, (len(val) - 1) // 16))]))
    assert found[-1]["text_tokens"] == ids.numel()
    model = GPT(config.model, seed=3)
    model.load_state_dict(load_checkpoint(latest_checkpoint(run / "checkpoints")).model, strict=False)
    record = health.measure(model, ids.long(), contextlib.nullcontext()).record
    assert found[-1] == {**found[-1], **record}


# --- training is what it was ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"stream_memory": "inversion"},
        {"residual": "attnres"},
        {"residual": "mhc"},
        {"residual": "moda"},
    ],
    ids=str,
)
def test_the_same_bits_without_the_record(config, tmp_path, model):
    for name, on in (("on", True), ("off", False)):
        train(changed(config, model, record_depth=on, precision="autocast"), tmp_path / name, quiet=True)
    on, off = tmp_path / "on", tmp_path / "off"
    assert (on / "depth.jsonl").exists() and not (off / "depth.jsonl").exists()
    assert (on / "metrics.jsonl").read_bytes() == (off / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        one, other = (latest_checkpoint(run / "checkpoints") / name for run in (on, off))
        assert one.read_bytes() == other.read_bytes()


def test_compiled_code_stays_as_it_is(config, tmp_path, monkeypatch):
    """Nothing is compiled again because of the record, and the losses are the same."""
    from torch._dynamo.testing import CompileCounter

    compile_, counts = torch.compile, {}
    for on in (True, False):
        counter = counts[on] = CompileCounter()
        torch._dynamo.reset()
        monkeypatch.setattr(
            train_module.torch, "compile", lambda model, c=counter: compile_(model, backend=c)
        )
        run = tmp_path / str(on)
        options = dict(steps=6, eval_interval=2, compile=True, record_depth=on)
        train(changed(config, {"n_layer": 1}, **options), run, quiet=True)
    assert counts[True].frame_count == counts[False].frame_count > 0
    assert (tmp_path / "True/metrics.jsonl").read_bytes() == (tmp_path / "False/metrics.jsonl").read_bytes()
    assert len(lines(tmp_path / "True")) == 3


def stop_at_batch(monkeypatch, number):
    class Signalling(Loader):
        served = 0

        def next_batch(self):
            type(self).served += 1
            if self.served == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().next_batch()

    monkeypatch.setattr(train_module, "Loader", Signalling)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_resumed_gives_the_same_bytes(config, tmp_path, monkeypatch, precision):
    config = changed(config, precision=precision)
    train(config, tmp_path / "whole", quiet=True)
    run = tmp_path / "parts"
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 10)
        with pytest.raises(Interrupted, match="after step 10"):
            train(config, run, quiet=True)
    shutil.rmtree(
        latest_checkpoint(run / "checkpoints")
    )  # as if killed: the evaluation at 8 was after the last
    assert latest_checkpoint(run / "checkpoints").name == "step-00000008"
    shutil.rmtree(latest_checkpoint(run / "checkpoints"))
    assert [line["step"] for line in lines(run)] == [4, 8]
    train(config, run, resume=True, quiet=True)
    assert (run / "depth.jsonl").read_bytes() == (tmp_path / "whole/depth.jsonl").read_bytes()


def test_an_evaluation_that_is_made_up_for_after_resuming(config, tmp_path, monkeypatch):
    """The gradient of the step before it is no longer there: it is in the checkpoint."""
    train(config, tmp_path / "whole", quiet=True)
    run = tmp_path / "parts"
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 8)
        with pytest.raises(Interrupted, match="after step 8"):
            train(config, run, quiet=True)
    assert [line["step"] for line in lines(run)] == [4]
    train(config, run, resume=True, quiet=True)
    assert (run / "depth.jsonl").read_bytes() == (tmp_path / "whole/depth.jsonl").read_bytes()


def test_a_run_from_before_there_was_a_record(config, tmp_path, monkeypatch):
    """It goes on, and is recorded from there."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 6)
        with pytest.raises(Interrupted):
            train(changed(config, record_depth=False), run, quiet=True)
    saved = json.loads((run / "config.json").read_text())
    del saved["record_depth"]
    (run / "config.json").write_text(json.dumps(saved))
    assert "depth" not in load_checkpoint(latest_checkpoint(run / "checkpoints")).state["offsets"]
    said = watch_text(watch.Followed(run), 80)
    assert "no record of the depth: the run was made without one" in said and "step 6/12" in said
    train(config, run, resume=True, quiet=True)
    assert [line["step"] for line in lines(run)] == [8, 12]
    assert "gate mean" in watch_text(watch.Followed(run), 80)


def test_a_loss_that_is_not_finite_leaves_a_record(config, tmp_path, monkeypatch):
    def without_targets(*args):
        for inputs, targets in eval_batches(*args):
            yield inputs, torch.full_like(targets, -100)

    monkeypatch.setattr(engine_module, "eval_batches", without_targets)
    with pytest.raises(RunError, match="the validation loss after step 4 is nan"):
        train(config, tmp_path / "run", quiet=True)
    assert [line["step"] for line in lines(tmp_path / "run")] == [4]
    assert "stopped: " in watch_text(watch.Followed(tmp_path / "run"), 120)


# --- TensorBoard ----------------------------------------------------------------------------------


def test_tensorboard_shows_curves_histograms_and_pictures(config, tmp_path, monkeypatch):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, kept = tmp_path / "run", []
    measure = health.measure
    monkeypatch.setattr(health, "measure", lambda *args: kept.append(measure(*args)) or kept[-1])
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 10)
        with pytest.raises(Interrupted):
            train(config, run, quiet=True)
    train(config, run, resume=True, quiet=True)
    everything = dict.fromkeys(("scalars", "histograms", "images"), 0)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance=everything)
    events.Reload()
    found = lines(run)
    for tag, pick in (
        ("gate_mean/1 mlp", lambda line: line["gate_mean"][3]),
        ("gate_max/1 attn", lambda line: line["gate_max"][2]),
        ("stream_rms/1 attn stream 1", lambda line: line["stream_rms"][2][1]),
        ("pool_mean/0 attn source 0", lambda line: line["pool_mean"][0][0]),
        ("hidden_rms/0 mlp", lambda line: line["hidden_rms"][1]),
        ("output_rms/1 mlp", lambda line: line["output_rms"][3]),
        ("gradient_rms/block 1", lambda line: line["gradient_rms"][1]),
    ):
        shown = events.Scalars(tag)
        assert [event.step for event in shown] == [4, 8, 12]
        assert [event.value for event in shown] == pytest.approx([pick(line) for line in found], rel=1e-6)
    assert "gate_mean/0 attn" not in events.Tags()["scalars"]  # it appends and has no gate

    *_, last = events.Histograms("gates/1 mlp")
    values, shown = kept[-1].gates[3], last.histogram_value
    assert last.step == 12 and shown.num == values.size and shown.sum == pytest.approx(values.sum())
    assert (shown.min, shown.max) == pytest.approx((values.min(), values.max()))
    for edge, below in zip(shown.bucket_limit, np.cumsum(shown.bucket), strict=True):
        assert (values < edge * (1 - 1e-6)).sum() <= below <= (values <= edge * (1 + 1e-6)).sum()
    assert sum(shown.bucket) == values.size
    assert events.Histograms("gradients/block 0")[-1].histogram_value.num > 100

    assert {*events.Tags()["images"]} == {
        "depth/gates by stream", "depth/pools by source", "depth/gate_mean over time",
        "depth/hidden_rms over time", "depth/gradient_rms over time",
    }  # fmt: skip
    assert [event.step for event in events.Images("depth/gates by stream")] == [4, 8, 12]
    *_, last = events.Images("depth/pools by source")
    image = Image.open(io.BytesIO(last.encoded_image_string)).convert("RGB")
    assert image.size == (last.width, last.height)
    # One row of 80 pixels a sublayer, one column of 240 a stream, from (28, 30) on.
    weights = np.array(found[-1]["pool_mean"])
    for sublayer in range(4):
        for stream in range(2):
            seen = image.getpixel((28 + 240 * stream + 120, 30 + 80 * sublayer + 40))
            expected = health.colours(weights[sublayer, stream] / weights.max())
            assert np.abs(np.array(seen) - expected).max() <= 3


def test_weights_and_biases_gets_the_curves(config, tmp_path, monkeypatch):
    import sys
    import types

    logged = {}

    class Run:
        def log(self, values, step):
            logged.setdefault(step, {}).update(values)

        def finish(self):
            pass

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: Run()))
    monkeypatch.setenv("WANDB_PROJECT", "depth")
    train(changed(config, steps=4), tmp_path / "run", quiet=True)
    (line,) = lines(tmp_path / "run")
    assert logged[4]["gate_mean/1 attn"] == line["gate_mean"][2] and "val/loss" in logged[4]


def test_many_evaluations_are_thinned_out():
    lines_ = [{"step": i, "hidden_rms": [float(i), 1.0], "gradient_rms": [1.0]} for i in range(1, 1001)]
    picture = health.images(lines_)["depth/hidden_rms over time"]
    assert picture.width < 600 and picture.png.startswith(b"\x89PNG")
    assert health.scalars({"gradient_rms": None, "pool_mean": [[0.1] * 17]}) == {}


# --- the terminal ---------------------------------------------------------------------------------


def watch_text(run, width, *, encoding="utf-8", numbers=False, runs=None):
    view = watch.View(runs or [run], numbers=numbers)
    view.look()
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    Console(file=file, width=width, highlight=False, color_system=None, legacy_windows=False).print(view)
    file.flush()
    text = file.buffer.getvalue().decode(encoding)
    assert all(len(line) <= width for line in text.splitlines())
    return text


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "a-run"


def base(n_layer=4, steps=20):
    model = GPTConfig(vocab_size=64, n_layer=n_layer, d_model=16, n_head=2, seq_len=16, n_streams=2)
    return TrainConfig(model=model, steps=steps, batch_size=8).to_dict()


class Recorded:
    """A run folder that this test writes."""

    def __init__(self, folder, **options):
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(base(**options)))

    def add(self, name, **line):
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(line) + "\n")

    def step(self, step, loss, seconds=2.0, ago=0.0):
        rates = {"lr": 0.003, "muon_lr": 0.01, "grad_norm": 0.75, "grad_norm_first": 0.1}
        self.add("metrics.jsonl", split="train", step=step, tokens=128 * step, loss=loss, **rates)
        self.add(
            "timing.jsonl", step=step, seconds=seconds, tokens_per_s=128 / seconds, time=time.time() - ago
        )

    def val(self, step, loss):
        self.add("metrics.jsonl", split="val", step=step, tokens=128 * step, loss=loss)

    def depth(self, step, gates, **values):
        line = {
            "hidden_rms": [1.0 + i for i in range(8)],
            "output_rms": [0.5] * 8,
            "stream_rms": [[0.25, 0.125 * (i + 1)] for i in range(8)],
            "gate_mean": gates,
            "gate_max": [None if g is None else min(1.0, g + 0.1) for g in gates],
            "gate_range": [0.0, 1.0],
            "gradient_rms": [4e-4, 2e-4, 1e-4, 1e-4],
        }
        self.add("depth.jsonl", step=step, tokens=1, text_tokens=16, **(line | values))


class fabricated(watch.Followed):
    """A run of which a line of ``depth.jsonl`` alone is known."""

    def __init__(self, record):
        from pathlib import Path

        super().__init__(Path("nowhere"))
        self.config = base(len(record["hidden_rms"]) // 2)
        self.depth = {record["step"]: record}

    def look(self):
        pass


@pytest.fixture
def recorded(folder):
    made = Recorded(folder)
    for step in range(1, 11):
        made.step(step, 5.0 - 0.3 * step)
    made.val(5, 3.9)
    made.val(10, 2.5)
    made.depth(5, [None, 0.10, 0.10, 0.10, 0.10, 0.10, 0.10, 0.10])
    made.depth(10, [None, 0.10, 0.20, 0.40, 0.08, 0.10, 0.10, 0.40])
    return made


@pytest.mark.parametrize("width", [60, 120])
def test_the_numbers_are_those_of_the_files(recorded, width):
    text = watch_text(watch.Followed(recorded.folder), width)
    for part in (
        "a-run", "mgr-competitive, 4 blocks, D = 16", "step 10/20", "0:00:20 left", "loss 2.0000",
        "validation 2.5000 at 10", "best 2.5000 at 10", "tokens/s 64", "lr 3.00e-03", "muon lr 1.00e-02",
        "gradient norm 0.75", "depth at step 10", "change since step 5",
    ):  # fmt: skip
        assert part in text, part
    (gates, change, largest, one, two, read, output, gradient) = (
        next(line for line in text.splitlines() if line.startswith(label))
        for label in ("gate mean", "  change", "gate largest", "stream 0", "stream 1", "read", "output", "gradient RMS")
    )  # fmt: skip
    assert gates.endswith(" 0.08 to 0.4") and change.endswith(" -0.02 to +0.3")
    assert largest.endswith(" 0.18 to 0.5") and one.endswith(" 0.25 to 0.25") and two.endswith(" 0.125 to 1")
    assert (
        read.endswith(" 1 to 8") and output.endswith(" 0.5 to 0.5") and gradient.endswith(" 0.0001 to 0.0004")
    )
    each = min(4, (width - 13 - 19) // 8)
    # Eighths of the largest: no gate, a quarter, a half, the largest, a fifth, ...
    heights = [None, 2, 4, 7, 1, 2, 2, 7]
    bars = gates[13 : 13 + 8 * each]
    assert bars == "".join((" " if h is None else "▁▂▃▄▅▆▇█"[h]) * each for h in heights)
    assert change[13 : 13 + 8 * each] == "".join(c * each for c in " .++....")[:-each] + "+" * each
    assert gradient[13 : 13 + 8 * each] == "█" * 2 * each + "▅" * 2 * each + "▃" * 4 * each
    axis = text.splitlines()[-1]
    assert [axis.index(str(block)) for block in range(4)] == [13 + 2 * each * block for block in range(4)]


def test_the_curve_goes_through_the_losses(recorded):
    """In characters, one dot each: the loss falls evenly from 4.7 at the first step to 2.0 halfway."""
    text = watch_text(watch.Followed(recorded.folder), 60, encoding="ascii")
    rows = text.splitlines()[5:15]
    assert rows[0].startswith("4.70 ") and rows[-1].startswith("2.00 ")
    columns = 60 - 5
    for row in range(10):
        for at in (i for i, c in enumerate(rows[row][5:]) if c == "*"):
            step = 1 + at * 19 / (columns - 1)
            assert abs((4.7 - 0.3 * (step - 1) - 2.0) / 2.7 - (1 - row / 9)) < 0.12
    assert (
        all("*" in row[5:] for row in rows) and max(len(row.rstrip()) for row in rows) <= 5 + columns / 2 + 1
    )
    points = [(row, line.index("o", 5) - 5) for row, line in enumerate(rows) if "o" in line[5:]]
    assert points == [
        (round((4.7 - 3.9) / 2.7 * 9), 4 * 54 // 19),
        (round((4.7 - 2.5) / 2.7 * 9), 9 * 54 // 19),
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_without_utf_8(recorded, width):
    text = watch_text(watch.Followed(recorded.folder), width, encoding="ascii", numbers=True)
    assert text.isascii() and "step 10/20" in text


@pytest.mark.parametrize("n_layer", [1, 24, 48])
def test_any_depth_fits(folder, n_layer):
    made = Recorded(folder, n_layer=n_layer)
    made.step(1, 5.0)
    gates = [(i + 1) / (2 * n_layer) * 0.5 for i in range(2 * n_layer)]
    streams = [[1.0] * 9] * 2 * n_layer
    rest = dict(hidden_rms=gates, output_rms=gates, stream_rms=streams, gradient_rms=gates[::2])
    made.depth(1, gates, **rest)
    text = watch_text(watch.Followed(folder), 80)
    assert f"{gates[0]:.3g} to 0.5" in text and "streams least" in text and "stream 9" not in text


def test_the_table_of_numbers(recorded):
    text = watch_text(watch.Followed(recorded.folder), 120, numbers=True)
    title, *rows = text.splitlines()[-9:]
    assert title.split() == "sublayer gate change gradient read output streams largest gate".split()
    assert rows[3].split() == "1 mlp 0.4 +0.3 2.00e-04 4 0.5 0.25 to 0.5 0.5".split()
    assert rows[0].split() == "0 attn 4.00e-04 1 0.5 0.125 to 0.25".split()
    narrow = watch_text(watch.Followed(recorded.folder), 60, numbers=True).splitlines()[-9:]
    assert narrow[0].split() == "sublayer gate change gradient read output".split()


def test_a_file_that_grows_and_is_cut_back(folder):
    made = Recorded(folder)
    run = watch.Followed(folder)
    assert "nothing recorded yet" in watch_text(run, 80)
    made.step(1, 5.0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"split": "train", "step": 2, "lo')
        file.flush()
        assert "step 1/20" in watch_text(run, 80)
        file.write('ss": 4.5, "lr": 0.1, "grad_norm": 1.0}\n')
    text = watch_text(run, 80)
    assert "step 2/20" in text and "loss 4.5000" in text and "warning" not in text
    made.step(3, 4.25)
    assert "step 3/20" in watch_text(run, 80)
    # Resumed from step 1: shorter, or already longer than it was.
    for steps in (2, 8):
        (folder / "metrics.jsonl").unlink()
        for step in range(1, steps + 1):
            made.step(step, 3.0 + step / 100)
        text = watch_text(run, 80)
        assert f"step {steps}/20" in text and f"loss {3 + steps / 100:.4f}" in text
        assert sorted(run.train) == [*range(1, steps + 1)] and run.files["metrics"].unreadable == 0


def test_lines_that_cannot_be_read(recorded):
    with open(recorded.folder / "depth.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n[1, 2]\n{"step": 11}\n')
    text = watch_text(watch.Followed(recorded.folder), 80)
    assert "warning: depth.jsonl: 3 lines cannot be read and left out" in text and "depth at step 10" in text


def test_states(recorded):
    run = watch.Followed(recorded.folder)
    assert "left" in watch_text(run, 80) and not run.ended
    recorded.step(11, 1.9, ago=3700)
    assert "no step for 1:01:40" in watch_text(run, 80)
    (recorded.folder / "diverged.json").write_text('{"step": 11, "message": "step 12 has loss nan"}')
    text = watch_text(run, 80)
    assert "stopped at step 11" in text and "stopped: step 12 has loss nan" in text and run.ended
    (recorded.folder / "diverged.json").unlink()  # gone on with
    assert "stopped" not in watch_text(run, 80) and not run.ended
    (recorded.folder / "result.json").write_text('{"wall_seconds": 100}')
    text = watch_text(run, 80)
    assert "finished in 0:01:40" in text and "left" not in text and "no step for" not in text and run.ended


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"gate_mean": [0.99] + [0.5] * 7}, ["gates stand open at 0 attn: mean 0.99"]),
        (
            {"gate_mean": [0.5] * 3 + [1e-5] * 5},
            ["gates stand shut at 1 mlp, 2 attn, 2 mlp and 2 more sublayers: mean 1e-05"],
        ),
        ({"gate_mean": [2.0] * 8, "gate_range": [-1.0, 3.0]}, []),
        (
            {"gate_mean_stream": [None] + [[0.5, 1e-5, 0.5]] * 7},
            ["stream 1 takes nothing in: its mean gates are all below 0.001"],
        ),
        ({"gate_mean_stream": [None] + [[0.5, 1e-5]] * 6 + [[0.5, 0.5]]}, []),
        ({"gradient_rms": [1e-9, 1e-3, 2e-3, 1e-3]}, ["gradients hardly reach block 0: RMS 1e-09, in block 2 0.002"]),
        ({"gradient_rms": None}, []),
    ],
)  # fmt: skip
def test_warnings(values, expected):
    line = {"step": 1, "hidden_rms": [1.0] * 8, "output_rms": [1.0] * 8, "gate_mean": [0.5] * 8,
            "gate_max": [0.5] * 8, "gate_range": [0.0, 1.0], "gradient_rms": [1.0] * 4}  # fmt: skip
    run = fabricated(line | values)
    assert watch.warnings(run) == expected
    text = " ".join(watch_text(run, 120).split())
    assert text.count("warning: ") == len(expected) and all(f"warning: {e}" in text for e in expected)


def test_several_runs_and_a_comparison(recorded, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "runs" / "compare.json").write_text('{"cells": [{"name": "a-run"}, {"name": "b-run"}]}')
    assert cli.main(["watch", str(tmp_path / "runs"), str(recorded.folder)]) == 0
    out = capsys.readouterr().out
    assert out.count("step 10/20") == 2 and "b-run: not begun yet" in out and "\x1b" not in out


def test_live_until_the_run_is_finished(recorded, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "40")

    steps = iter(range(11, 21))

    def grow(seconds):
        assert seconds == 0.5
        if (step := next(steps, None)) is not None:
            recorded.step(step, 2.0)
        else:
            (recorded.folder / "result.json").write_text('{"wall_seconds": 60}')

    monkeypatch.setattr(watch.time, "sleep", grow)
    assert cli.main(["watch", str(recorded.folder), "--interval", "0.5"]) == 0
    out = capsys.readouterr().out
    assert (
        "\x1b[" in out and all(f"step {i}/20" in out for i in range(10, 21)) and "finished in 0:01:00" in out
    )
    assert cli.main(["watch", str(recorded.folder)]) == 0  # finished: ends at once


def test_a_low_terminal_gets_the_numbers_and_no_curve(recorded):
    run = watch.Followed(recorded.folder)
    run.look()
    for height in (17, 24, 40):
        shown = watch.view_of(run, 80, height, watch.UNICODE)
        assert len(shown) <= height
        assert any("gate mean" in line.plain for line in shown)
        assert any("in training" in line.plain for line in shown) == (height > 20)


def test_no_color(recorded, monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.main(["watch", str(recorded.folder), "--once"]) == 0
    assert "38;" not in capsys.readouterr().out


def test_ctrl_c_ends_quietly(recorded, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    assert cli.main(["watch", str(recorded.folder)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "give the folder of a run"),
        (["not/there"], "not/there is no folder"),
        (["."], "is not a run folder: it has no config.json"),
        ([".", "--interval", "0"], "--interval must be positive, got 0"),
    ],
)
def test_wrong_requests(arguments, hint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["watch", *arguments]) == 2
    said = capsys.readouterr()
    assert hint in said.err and said.out == ""


def test_a_run_that_prepares_its_data_is_waited_for(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").write_text("1\n")
    assert cli.main(["watch", str(run)]) == 0
    assert "run: not begun yet" in capsys.readouterr().out


def test_a_damaged_configuration(recorded, capsys):
    (recorded.folder / "config.json").write_text("{")
    assert cli.main(["watch", str(recorded.folder)]) == 1
    assert "config.json is damaged" in capsys.readouterr().err
