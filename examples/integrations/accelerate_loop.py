"""The loop of ``plain.py`` under Hugging Face Accelerate: one model, its gradients averaged over processes (DDP).

Run, on two processes of a CPU::

    torchrun --standalone --nproc-per-node=2 accelerate_loop.py

With GPUs, ``accelerate launch accelerate_loop.py`` does as well. ``accelerate launch --cpu --num_processes 2`` does
not: without an MPI it starts one process and says nothing.
"""

import torch
import torch.distributed.nn.functional  # imported later, it holds the group for good
from accelerate import Accelerator
from plain import CLIP, make_data, make_model, make_optimizer, options, report


def main() -> None:
    args = options().parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = make_model(args.residual)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    data = make_data(args.data, accelerator.process_index, accelerator.num_processes)
    losses = []
    for _ in range(args.steps):
        inputs, targets = (x.to(accelerator.device) for x in data.next_batch())
        _, loss = model(inputs, targets)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    if accelerator.is_main_process:
        report(losses, args.out, accelerator.num_processes)
    # What DDP holds of the group goes first: the group must not end in DDP's destructor, which waits for gloo's threads
    # with Python's lock taken.
    del loss
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    main()
