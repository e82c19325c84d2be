"""Every connection under ZeRO-3, with blocks as units and with every module as one, beside the plain run.

Started by ``test_examples.py`` on two processes, with examples/integrations on the path. Writes a list of cases to
the file named on the command line.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import set_z3_leaf_modules
from deepspeed_zero import leave, settings, start
from plain import CLIP, GLOBAL_BATCH, make_optimizer

from depthmix import GPT, GPTConfig, available_residuals
from depthmix.model import Block

STEPS = 3
V, T = 64, 16


def cases():
    for residual in available_residuals():
        yield residual, "block", {}
    # Those whose sites read parameters of others, each module gathered and let go by itself; and the ways to get
    # the streams back.
    for residual in ("prenorm", "mgr-competitive", "attnres", "attnres-block", "moda"):
        yield residual, "module", {}
    for memory in ("store", "inversion"):
        yield "mgr-competitive", "block", {"stream_memory": memory}


def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(0, V, (GLOBAL_BATCH, T + 1), generator=generator)
        yield ids[:, :-1], ids[:, 1:]


def plain(model):
    optimizer = make_optimizer(model)
    for inputs, targets in batches():
        _, loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def sharded(model, unit):
    """Losses, and whether every parameter was in shares again behind each forward pass but the first two."""
    if unit == "block":
        set_z3_leaf_modules(model, [Block])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = settings(3, world_size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)
    losses, let_go = [], True
    for step, (inputs, targets) in enumerate(batches()):
        _, loss = engine(inputs.chunk(world_size)[rank], targets.chunk(world_size)[rank])
        if step > 1:
            let_go &= all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in model.parameters())
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses, let_go


def main() -> None:
    start()
    found = []
    for residual, unit, options in cases():
        config = GPTConfig(V, 3, 16, 2, T, residual=residual, n_streams=3, **options)
        want = list(plain(GPT(config, seed=0)))
        got, let_go = sharded(GPT(config, seed=0), unit)
        found.append({"case": [residual, unit, options], "want": want, "got": got, "let_go": let_go})
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main()
