"""The loop of ``plain.py`` under DeepSpeed ZeRO: optimiser state (1), gradients too (2), parameters too (3) in shares.

Run, on two processes of a CPU::

    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node=2 deepspeed_zero.py --stage 1
    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node=2 deepspeed_zero.py --stage 2
    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node=2 deepspeed_zero.py --stage 3
    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node=2 deepspeed_zero.py --stage 3 --built-in-shares

What to know of ZeRO-3 with depthmix:

* A module that reads a parameter of another is no trouble. DeepSpeed notices in the first forward pass, gathers the
  parameter, and from then on gathers it with that module. The output layer reads the embedding like this, a block
  the first norm of the next block, Attention Residuals the queries of all sites.
* The block is the better unit (``set_z3_leaf_modules``). A site has a few vectors, and each unit is a message of its
  own. Also, norms that are units themselves carry hooks, and are then not fused with the step before them.
* A model built within ``deepspeed.zero.Init`` must be initialised again, as in :func:`built_in_shares`. Every layer
  is cut up there as soon as it exists: when ``GPT`` comes to draw its weights they are empty, nothing is filled,
  nothing is said, and matrices keep the values that torch gave them.
"""

import os
import sys
from typing import NoReturn

import deepspeed
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules
from plain import CLIP, GLOBAL_BATCH, make_data, make_model, make_optimizer, options, report

from depthmix import GPT
from depthmix.model import Block


def settings(stage: int, world_size: int) -> dict:
    """DeepSpeed's configuration. Loss scale and precision are left alone: fp32, as in ``plain.py``."""
    zero = {"stage": stage}
    if stage == 3:
        # By default whatever is small stays whole, and so would all of this model: cut it as a large one is cut.
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }
    return {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size,
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
    }


def built_in_shares(residual: str, config: dict) -> GPT:
    """The model of :func:`plain.make_model`, never whole while it is built; whole for a moment, to be initialised."""
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = make_model(residual)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        model.init_weights(seed=0)
    return model


def start() -> None:
    """Join the other processes."""
    if deepspeed.get_accelerator().device_name() == "cpu":
        # Else DeepSpeed compiles an all-reduce of its own for processes on one CPU, for most of a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()


def leave() -> NoReturn:
    """Part from the other processes, and end without Python's own teardown.

    Hooks of ZeRO-3 hold the engine, through autograd, where Python cannot see that nobody else does, and the engine
    holds its groups. So gloo's threads last longer than Python. One that has not released the last message by then
    aborts the process, though all is done.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    parser = options()
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=3, help="of ZeRO")
    parser.add_argument("--built-in-shares", action="store_true", help="stage 3: never build the whole model")
    args = parser.parse_args()
    start()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = settings(args.stage, world_size)
    model = built_in_shares(args.residual, config) if args.built_in_shares else make_model(args.residual)
    if args.stage == 3:
        set_z3_leaf_modules(model, [Block])
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)
    data = make_data(args.data, rank, world_size)
    losses = []
    for _ in range(args.steps):
        inputs, targets = (x.to(engine.device) for x in data.next_batch())
        _, loss = engine(inputs, targets)
        engine.backward(loss)
        engine.step()  # clips, steps, and zeroes the gradients
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        losses.append(mean.item())
    if rank == 0:
        report(losses, args.out, world_size)
    leave()


if __name__ == "__main__":
    main()
