"""Run folders in the trainer's format without any training, for tests of report and comparison.

``fabricate`` writes one at once. As a program it stands in for ``depthmix train``: it takes
``--config``, ``--out`` and ``--resume``, writes line by line, saves on SIGINT and SIGTERM and leaves
with status 75. The environment steers it: FAKE_HOLD (a file with names of run folders; while it is there,
they wait after their second step), FAKE_FAIL (name of the run folder that fails halfway), FAKE_DIVERGE (the
one whose loss is not finite there), FAKE_KILL (the one that is killed).
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

OFFSETS = {"prenorm": 0.0, "mgr-independent": -0.01, "mgr-competitive": -0.02}


def train_loss(residual, seed, step):
    wave = ((step * 7919 + seed * 104729) % 101) / 1000
    return 2.0 + 3.0 / step + wave + OFFSETS.get(residual, 0.0) * (1 + 0.1 * seed)


def val_loss(residual, seed, step):
    return train_loss(residual, seed, step) + 0.05 + 0.001 * seed * (residual != "prenorm")


def metric_lines(config, step):
    residual, seed = config["model"]["residual"], config["seed"]
    tokens = step * config["batch_size"] * config["model"]["seq_len"]
    lr = 1e-3 * min(1, step / 5)
    yield {
        "split": "train", "step": step, "tokens": tokens, "loss": train_loss(residual, seed, step),
        "grad_norm": 1 / step, "grad_norm_first": 0.1 / step, "lr": lr, "muon_lr": 3 * lr,
    }  # fmt: skip
    interval = config["eval_interval"]
    if step == config["steps"] or (interval and step % interval == 0):
        yield {"split": "val", "step": step, "tokens": tokens, "loss": val_loss(residual, seed, step)}


def timing_line(config, step):
    seconds = 0.02 if config["model"]["residual"] == "prenorm" else 0.03
    tokens = config["batch_size"] * config["model"]["seq_len"]
    return {"step": step, "seconds": seconds, "tokens_per_s": tokens / seconds, "time": 1.7e9 + step}


def result(config):
    residual, seed, steps = config["model"]["residual"], config["seed"], config["steps"]
    tail = range(steps - min(200, max(1, steps // 10)) + 1, steps + 1)
    return {
        "status": "finished",
        "residual": residual,
        "n_streams": config["model"]["n_streams"],
        "seed": seed,
        "steps": steps,
        "tokens": steps * config["batch_size"] * config["model"]["seq_len"],
        "parameters": 1000 if residual == "prenorm" else 1100,
        "connection_parameters": 0 if residual == "prenorm" else 11,
        "train_loss": sum(train_loss(residual, seed, step) for step in tail) / len(tail),
        "val_loss": val_loss(residual, seed, steps),
        "best_val_loss": val_loss(residual, seed, steps),
        "best_step": steps,
        "tokens_per_s": timing_line(config, 1)["tokens_per_s"],
        "peak_memory_bytes": 300 * 2**20,
        "saved_bytes_per_token": 5000,
        "wall_seconds": 0.03 * steps,
    }


def fabricate(folder, config, upto=None, environment=None):
    """The run folder of ``config`` after ``upto`` steps (default: finished); returns the path."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    begin(folder, config, environment)
    steps = config["steps"] if upto is None else upto
    for step in range(1, steps + 1):
        append(folder, config, step)
    if upto is None:
        (folder / "result.json").write_text(json.dumps(result(config)))
    return folder


def begin(folder, config, environment=None):
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"name": "byte"}))
    (folder / "environment.json").write_text(json.dumps(environment or {"torch": "2.13.0", "device": "cpu"}))


def append(folder, config, step):
    with open(folder / "metrics.jsonl", "a") as file:
        for line in metric_lines(config, step):
            file.write(json.dumps(line) + "\n")
    with open(folder / "timing.jsonl", "a") as file:
        file.write(json.dumps(timing_line(config, step)) + "\n")


def held(name):
    try:
        return name in Path(os.environ["FAKE_HOLD"]).read_text().split()
    except (KeyError, FileNotFoundError):
        return False


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--no-report", action="store_true")
    args = parser.parse_args()
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.append(True))
    config = json.loads(Path(args.config).read_text())
    if args.out.exists() != args.resume:
        sys.exit(f"--resume is {args.resume} but the folder's existence is {args.out.exists()}")
    args.out.mkdir(exist_ok=True)
    begin(args.out, config, {"torch": "2.13.0", "threads": os.environ.get("OMP_NUM_THREADS", "all")})
    metrics = args.out / "metrics.jsonl"
    done = 0
    if metrics.exists():
        done = max(json.loads(line)["step"] for line in metrics.read_text().splitlines())
    for step in range(done + 1, config["steps"] + 1):
        append(args.out, config, step)
        if args.out.name == os.environ.get("FAKE_FAIL") and step >= config["steps"] // 2:
            print("depthmix: loss is not finite\nat step 7 of <this> run", file=sys.stderr)
            sys.exit(1)
        if args.out.name == os.environ.get("FAKE_DIVERGE") and step >= config["steps"] // 2:
            (args.out / "diverged.json").write_text(
                json.dumps({"step": step, "message": f"step {step} is nan"})
            )
            sys.exit(1)
        if args.out.name == os.environ.get("FAKE_KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        while step == 2 and not stopped and held(args.out.name):
            time.sleep(0.01)
        if stopped:
            sys.exit(75)
    (args.out / "result.json").write_text(json.dumps(result(config)))


if __name__ == "__main__":
    main()
