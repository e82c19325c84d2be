"""One run of a study as a process: train, then read the test split once.

    python -m depthmix.study.cell CELL.json RUN

``CELL.json`` holds ``config`` (of the training), ``test_tokens`` and ``processes``; a run folder that is there already
is gone on with. ``RUN/test.json`` is the last file to be written. Exit statuses are those of ``depthmix train``.
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..config import TrainConfig, from_dict
from ..errors import EXIT_FAILED, RunError, UserError


def main(argv: list[str]) -> int:
    file, folder = map(Path, argv)
    values = json.loads(file.read_text(encoding="utf-8"))
    config = from_dict(values["config"])
    if not (folder / "result.json").exists():
        status = _train(config, file.with_suffix(".train.json"), folder, values["processes"])
        if status:
            return status
    from ..report.write import write_atomically

    try:
        found = test_loss(folder, values["test_tokens"])
    except (UserError, RunError) as error:
        print(f"depthmix: {error}", file=sys.stderr)
        return EXIT_FAILED
    write_atomically(folder / "test.json", (json.dumps(found, indent=1) + "\n").encode())
    return 0


def _train(config: TrainConfig, file: Path, folder: Path, processes: int) -> int:
    from ..report.write import write_atomically

    write_atomically(file, (json.dumps(config.to_dict(), indent=1) + "\n").encode())
    words = ["train", "--config", str(file), "--out", str(folder), "--quiet", "--no-report"]
    words += ["--resume"] if folder.exists() else []
    if processes == 1:
        from ..cli import main as depthmix

        return depthmix(words)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    process = subprocess.Popen([*command, "-m", "depthmix", *words])

    def forward(number, frame):
        if process.poll() is None:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    status = process.wait()
    if status:
        print(f"depthmix: {shlex.join(command)} ended with status {status}", file=sys.stderr)
    return status


def test_loss(folder: Path, tokens: int) -> dict:
    """Loss in nats a token of the last weights over windows spread evenly over the test split.

    ``test_loss``, ``test_tokens`` (targets that were read), ``seconds``, the ``data`` that was read, by the
    fingerprints of its splits, ``flops_per_token`` of training, and on a GPU ``peak_flops``: what a large product
    of bf16 matrices reaches on it, a second.
    """
    import torch

    from ..bench.machine import matrix_flops
    from ..checkpoint import latest_checkpoint, load_model
    from ..data import eval_batches, open_dataset, prepare
    from ..device import find_device
    from ..info import forward_flops

    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise RunError(f"{folder} has a result but no checkpoint; remove the folder to train it again")
    config = from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    device = find_device(config.device)
    model, _ = load_model(checkpoint, device, exact_gradients=False)
    dataset = open_dataset(prepare(config.data))
    assert dataset.test is not None  # the command has looked
    began, total, count = time.monotonic(), torch.zeros((), dtype=torch.float64), 0
    rows = config.micro_batch or config.batch_size
    half = config.precision == "autocast"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        for inputs, targets in eval_batches(dataset.test, config.model.seq_len, rows, tokens, spread=True):
            _, loss = model(inputs.to(device), targets.to(device))
            total += loss.double().cpu() * targets.numel()
            count += targets.numel()
    peak = matrix_flops(device, torch.bfloat16, 8192) if device.type == "cuda" else None
    return {
        "test_loss": total.item() / count,
        "test_tokens": count,
        "seconds": time.monotonic() - began,
        "data": {split: getattr(dataset, split).fingerprint for split in ("train", "val", "test")},
        "flops_per_token": 3 * forward_flops(model),
        "peak_flops": peak,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
