"""A small GPT of Multi-Gate Residuals in a training loop of plain PyTorch, in one process.

Run::

    python plain.py

The other scripts of this folder are this loop under a framework, on two processes. What differs between their
``main`` and the one below is what a user of that framework changes. They take model, data and optimiser from here,
train on the same global batches in the same order, and reach the same losses, in fp32 to 1e-5 of their size: only the
order in which gradients are summed differs.
"""

import argparse
import json
from pathlib import Path

import torch

from depthmix import GPT, GPTConfig
from depthmix.config import DataConfig
from depthmix.data import Loader, open_dataset, prepare

GLOBAL_BATCH = 8
"""Sequences per optimiser step, over all processes."""
SEQ_LEN = 64
CLIP = 1.0
"""Largest global gradient norm."""


def options() -> argparse.ArgumentParser:
    """What every script takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps")
    parser.add_argument("--data", nargs="*", default=[], help="text; default: Python's standard library")
    parser.add_argument("--residual", default="mgr-competitive", help="a name of `depthmix info --list`")
    parser.add_argument("--out", help="file for the losses, as JSON")
    return parser


def make_model(residual: str) -> GPT:
    """Four blocks, 0.2 M parameters; the same weights in every process."""
    config = GPTConfig(
        vocab_size=256, n_layer=4, d_model=64, n_head=2, seq_len=SEQ_LEN, residual=residual, n_streams=4
    )
    return GPT(config, seed=0)


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def make_data(paths: list[str], rank: int = 0, world_size: int = 1) -> Loader:
    """This process's rows of every global batch, which is the same however many processes share it."""
    dataset = open_dataset(prepare(DataConfig(data=tuple(paths), tokenizer="byte")))
    return Loader(
        dataset.train, SEQ_LEN, GLOBAL_BATCH // world_size, seed=0, rank=rank, world_size=world_size
    )


def report(losses: list[float], out: str | None, processes: int = 1) -> None:
    """Print every step's loss over the global batch, in nats, and write them to ``out``."""
    for step, loss in enumerate(losses):
        print(f"step {step:2}  loss {loss:.6f}")
    if out is not None:
        text = json.dumps({"processes": processes, "losses": losses})
        Path(out).write_text(text + "\n", encoding="utf-8")


def main() -> None:
    args = options().parse_args()
    model = make_model(args.residual)
    optimizer = make_optimizer(model)
    data = make_data(args.data)
    losses = []
    for _ in range(args.steps):
        inputs, targets = data.next_batch()
        _, loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    report(losses, args.out)


if __name__ == "__main__":
    main()
