r"""One stage's model on the processes that share it: tensor and sequence parallel, FSDP2, DDP.

**Tensor and sequence parallel** (Megatron-LM; Korthikanti et al. 2022), by DTensor's parallel styles. Between sublayers
each of tp processes holds its part of every sequence, ``[B, T / tp, D]``, and everything that works on one token works
there: norms, gates, pools, lerps, mixing matrices, embedding, head and loss. An attention or MLP gathers the whole
sequence in front of its first matrix and computes its share of heads or hidden features; behind its last matrix the
shares are summed and divided into parts again. That is an all-gather and a reduce-scatter of ``[B, T, D]`` for each
sublayer and pass, *whatever the residual connection*: its streams, sources and states are never communicated.

Parameters that tokens share but no matrix is split for (embedding, norms, all of a connection's) are whole on every
process, with a gradient that is the sum over the parts; one all-reduce a step adds them up
(:func:`sum_over_sequence`).

**FSDP2** (``fully_shard``): each block is a unit, or several small ones are
(:func:`~depthmix.parallel.plan.units`: every unit costs a millisecond or two of a processor's time a step), what is
left of the stage another; with dp too, parameters are
sharded over fsdp and copied over dp (HSDP). A block's parameters exist while it runs, so nobody may read them from
outside: the norm of a block's attention is not fused into the block before, nor are Attention Residuals' queries
foreseen (:attr:`depthmix.GPT.blocks_apart`). **DDP** otherwise.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from .plan import units
from .updates import Exchange, batch_elements
from .world import ManyProcesses

if TYPE_CHECKING:
    from ..model import GPT
    from .pipeline import GPTStage


def tensor_parallel(blocks: Iterable[nn.Module], world: ManyProcesses) -> None:
    """Split the matrices of ``blocks`` over tp, in place."""
    mesh = world.mesh["tp"]
    into = ColwiseParallel(input_layouts=Shard(1))
    for block in blocks:
        out = RowwiseParallel(output_layouts=Shard(1))
        plan = {"attn.qkv": into, "attn.proj": out, "mlp.fc": into, "mlp.proj": out}
        if hasattr(
            block.mlp_site, "kv"
        ):  # of a depth memory, by heads as the attentions' keys and values are
            plan["mlp_site.kv"] = into
        matrices = [(block.get_submodule(name), style is into) for name, style in plan.items()]
        for matrix, enters in matrices:
            if enters:
                matrix.register_forward_pre_hook(lambda _, inputs: (_Arrived.apply(inputs[0]),))
        # The same weights everywhere already: nothing is sent.
        parallelize_module(block, mesh, plan, src_data_rank=None)
        for matrix, enters in matrices:
            if not enters:
                matrix.register_forward_hook(lambda _, inputs, output: _Arrived.apply(output))


class _Arrived(torch.autograd.Function):
    """A tensor of [B, T / tp, D], and its gradient, no sooner than a collective has delivered it: as a plain tensor."""

    @staticmethod
    def forward(ctx, x):
        return x.wait() if isinstance(x, AsyncCollectiveTensor) else x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.wait() if isinstance(gradient, AsyncCollectiveTensor) else gradient


def data_parallel(part: "GPT | GPTStage", world: ManyProcesses, *, always_shard: bool = False) -> nn.Module:
    """``part`` over dp and fsdp; returns what is to be called."""
    plan = world.plan
    if plan.sharded or always_shard:
        mesh = world.mesh["dp", "fsdp"] if plan.dp > 1 else world.mesh["fsdp"]
        # Our blocks return views, of results that nobody changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        blocks = part.whole_blocks()
        sizes = [sum(local(p).nbytes for p in block.parameters()) for block in blocks]
        for unit in units(sizes, plan):
            fully_shard([blocks[i] for i in unit], mesh=mesh)
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
        part.blocks_apart = True
        return part
    if plan.dp > 1:
        # DDP arranges gradients anew after its first step, unless it looks for unused parameters. Where in a bucket a
        # gradient is decides the order of its sum over three or more processes: arranged anew, a step would have other
        # bits when it is the first after a restart.
        return nn.parallel.DistributedDataParallel(
            part,
            process_group=world.group("dp"),
            gradient_as_bucket_view=True,
            # A first bucket of 1 MiB, DDP's default, is sent early; where cores do the sending, that gains nothing.
            bucket_cap_mb=25 if world.mesh.device_type == "cpu" else None,
            broadcast_buffers=False,  # tables of constants
            find_unused_parameters=world.plan.dp > 2,
        )
    return part


def sharded_axes(x: Tensor) -> dict[str, int]:
    """Axis of the mesh -> the dimension of ``x`` that is divided over it."""
    if not isinstance(x, DTensor):
        return {}
    axes = zip(x.device_mesh.mesh_dim_names or (), x.placements, strict=True)
    return {axis: placement.dim for axis, placement in axes if hasattr(placement, "dim")}


def local(x: Tensor) -> Tensor:
    """The part of ``x`` that this process holds; shares its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def sum_over_sequence(gradients: list[Tensor], world: ManyProcesses) -> None:
    """Add up, over tp and in place, the ``gradients`` of parameters that tp does not split."""
    _all_reduce([local(g) for g in gradients], world.group("tp"))


@torch.no_grad()
def sum_over_tied(gradients: list[Tensor], world: ManyProcesses) -> None:
    """Add up, over the first and the last stage and in place, the ``gradients`` of what both hold."""
    _all_reduce([local(g) for g in gradients], world.tied_group)


def _all_reduce(tensors: list[Tensor], group) -> None:
    """One all-reduce for all tensors of a dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for alike in by_dtype.values():
        flat = torch.cat([tensor.flatten() for tensor in alike])
        dist.all_reduce(flat, group=group)
        parts = flat.split([tensor.numel() for tensor in alike])
        torch._foreach_copy_(alike, [part.view_as(x) for part, x in zip(parts, alike, strict=True)])


class Layout:
    """What an optimiser needs to know of parameters that are spread over processes.

    ``once``: parameters that another process holds too, in another stage, and counts.
    """

    def __init__(self, world: ManyProcesses, once: Iterable[nn.Parameter] = ()):
        self.world, self._counted_elsewhere = world, set(once)

    def norm(self, parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> Tensor:
        """The 2-norm of the gradient over all processes, the same on all; called by all at once.

        fp32; fp64 where the first parameter is. Not finite where any process's copy of any gradient is not.
        """
        plan, groups = self.world.plan, [(), ("fsdp",), ("tp",), ("fsdp", "tp")]
        parts: dict[tuple[str, ...], list[Tensor]] = {axes: [] for axes in groups}
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and parameter not in self._counted_elsewhere:
                axes = tuple(axis for axis in ("fsdp", "tp") if axis in sharded_axes(gradient))
                parts[axes].append(local(gradient))
        device = self.world.mesh.device_type
        squares = torch.stack(
            [
                torch.stack(torch._foreach_norm(tensors)).double().square().sum()
                if tensors
                else torch.zeros((), dtype=torch.float64, device=device)
                for tensors in (parts[axes] for axes in groups)
            ]
        )
        for axis in ("fsdp", "tp"):
            if getattr(plan, axis) > 1:
                summed = squares.clone()
                dist.all_reduce(summed, group=self.world.group(axis))
                mine = torch.tensor([axis in axes for axes in groups], device=squares.device)
                squares = torch.where(mine, summed, squares)
        total = squares.sum()
        again = [
            local(gradient)
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None and parameter in self._counted_elsewhere
        ]
        if again:
            total += 0 * torch.stack(torch._foreach_norm(again)).sum()
        if plan.pp > 1:
            dist.all_reduce(total, group=self.world.group("pp"))
        precise = bool(parameters) and parameters[0].dtype == torch.float64
        # The first process's, as sums in another order differ in the last bit: plus nought of the others', or NaN.
        norm = total.sqrt() if self.world.first else 0 * total.sqrt()
        return self.world.sum(norm).to(torch.float64 if precise else torch.float32)

    def batch_elements(self, most: int) -> int:
        """How many numbers of whole matrices to take at once, where a process shall compute ``most`` of them."""
        return batch_elements(self.world.plan, most)

    def whole_matrices(
        self,
        parts: list[Tensor],
        like: list[nn.Parameter],
        function: Callable[[list[Tensor]], list[Tensor]],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """This process's parts of ``function`` of whole matrices, of which ``parts`` are its parts.

        Args:
            parts: of each of the parameters ``like``, ``[rows, cols]`` here.
            like: matrices of one stage, all processes' the same in the same order.
            function: of some of the matrices, whole; returns as many of the same shapes in ``dtype``. It is called with
                those that fall to this process, none perhaps: whatever the sharding, a matrix is computed once.
        """
        shapes = [tuple(parameter.shape) for parameter in like]
        dims = [sharded_axes(parameter) for parameter in like]
        return Exchange(self.world, shapes, dims).apply(parts, function, dtype)
