"""The loop of ``plain.py`` under Lightning Fabric: one model, its gradients averaged over processes (DDP).

Run, on two processes of a CPU::

    fabric run --accelerator=cpu --devices=2 --strategy=ddp fabric_loop.py

``lightning-fabric`` is Fabric alone. Who has the whole of Lightning writes ``from lightning.fabric import Fabric``.
"""

import gc

import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  (imported later, it holds the group for good)
from lightning_fabric import Fabric
from plain import CLIP, make_data, make_model, make_optimizer, options, report


def main() -> None:
    args = options().parse_args()
    fabric = Fabric()  # accelerator, devices and strategy are the command line's
    model = make_model(args.residual)
    model, optimizer = fabric.setup(model, make_optimizer(model))
    data = make_data(args.data, fabric.global_rank, fabric.world_size)
    losses = []
    for _ in range(args.steps):
        inputs, targets = fabric.to_device(data.next_batch())
        _, loss = model(inputs, targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach(), reduce_op="mean").item())
    if fabric.is_global_zero:
        report(losses, args.out, fabric.world_size)
    if dist.is_initialized():
        # Fabric leaves its group to the interpreter's end, which gloo's threads may outlive. What DDP holds of it goes
        # first: the group must not end in DDP's destructor, which waits for those threads with Python's lock taken.
        del model, optimizer, loss
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
