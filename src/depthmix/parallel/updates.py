r"""Muon's matrices on their way to one process each, whole, and their updates on the way back.

The polar factor of a matrix needs all of it. The processes of a stage divide the matrices among themselves
(:func:`owners`), so that each is computed once whatever the plan. With dp every process has a part of each matrix
already and takes what its copy is responsible for; along fsdp, then tp, the parts of a matrix travel to its owner (an
all-to-all along each axis, of a process's parts and not of whole matrices); back they travel the other way round, and
one all-gather over dp hands the updates to the other copies. Matrices of all shapes travel together.
"""

import functools
import heapq
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import ParallelPlan

AXES = ("dp", "fsdp", "tp")
"""In the order in which matrices are divided."""
Shape = tuple[int, ...]
"""Rows and columns of a matrix."""


def owners(shapes: Sequence[Shape], plan: ParallelPlan) -> tuple[dict[str, int], ...]:
    """For each matrix, where on dp, fsdp and tp the process stands that computes it.

    The largest first, each to the process with the least to do; among equals, dp changes fastest. It depends on the
    shapes alone, and among matrices of one shape on their order.
    """
    return _owners(tuple(shapes), tuple(getattr(plan, axis) for axis in AXES))


@functools.lru_cache(maxsize=256)  # every step asks for the same
def _owners(shapes: tuple[Shape, ...], ways: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    free = [(0, number) for number in range(ways[0] * ways[1] * ways[2])]
    found: list[dict[str, int]] = [{} for _ in shapes]
    for i in sorted(range(len(shapes)), key=lambda i: (-_operations(*shapes[i]), shapes[i])):
        load, number = heapq.heappop(free)
        heapq.heappush(free, (load + _operations(*shapes[i]), number))
        for axis, size in zip(AXES, ways, strict=True):
            number, found[i][axis] = divmod(number, size)
    return tuple(found)


def batch_elements(plan: ParallelPlan, most: int) -> int:
    """How many numbers of whole matrices travel at once, where a process shall compute ``most`` of them.

    At most ``4 * most`` are then held of the updates that come from other copies.
    """
    shards = plan.fsdp * plan.tp
    return most * min(plan.dp * shards, 4 * shards)


def _operations(rows: int, cols: int) -> int:
    """To which the time of a polar factor is proportional."""
    small, large = min(rows, cols), max(rows, cols)
    return small**2 * (2 * large + small)


def part(size: int, ways: int, place: int) -> int:
    """How many of ``size`` rows or columns the process at ``place`` has of ``ways``: as FSDP and DTensor divide."""
    each = -(-size // ways)
    return max(0, min(each, size - place * each))


def local_shape(shape: Shape, dims: dict[str, int], plan: ParallelPlan, place: dict[str, int]) -> Shape:
    """The shape of the part of a matrix at ``place``; ``dims``: axis -> the dimension it divides."""
    sizes = list(shape)
    for axis in ("tp", "fsdp"):  # FSDP divides what tp has left
        if axis in dims:
            sizes[dims[axis]] = part(sizes[dims[axis]], getattr(plan, axis), place[axis])
    return tuple(sizes)


class Exchange:
    """One batch of matrices among the processes of a stage.

    Args:
        world: the processes.
        shapes: ``(rows, cols)`` of each whole matrix, in the same order everywhere.
        dims: of each, the axis of the plan (``fsdp``, ``tp``) -> the dimension that is divided over it.
    """

    def __init__(self, world, shapes: Sequence[Shape], dims: Sequence[dict[str, int]]):
        self._world, self._plan, self._place = world, world.plan, world.place
        self._shapes, self._dims = shapes, dims
        self._owners = owners(shapes, world.plan)

    def apply(
        self, parts: list[Tensor], function: Callable[[list[Tensor]], list[Tensor]], dtype: torch.dtype
    ) -> list[Tensor]:
        """This process's parts of ``function`` of the whole matrices, of which ``parts`` are its parts.

        ``function`` gets the matrices that this process owns, whole (perhaps none), and returns as many of the same
        shapes in ``dtype``. All processes call it at once.
        """
        held = {i: x for i, x in enumerate(parts) if self._owners[i]["dp"] == self._place["dp"]}
        for axis in ("fsdp", "tp"):
            held = self._to_owners(held, axis)
        owned = dict(zip(held, function(list(held.values())), strict=True))
        for axis in ("tp", "fsdp"):
            owned = self._from_owners(owned, axis, dtype, parts[0].device)
        return self._to_copies(owned, dtype, parts[0].device)

    def _local_shape(self, i: int, axis: str, place: int) -> Shape:
        """Of matrix i on the process at ``place`` on ``axis``, where what is inside of that axis is whole."""
        dims = {name: dim for name, dim in self._dims[i].items() if name == axis or axis == "fsdp"}
        return local_shape(self._shapes[i], dims, self._plan, {**self._place, axis: place})

    def _mine(self, axis: str) -> list[int]:
        """The matrices that travel along ``axis`` to this process and those beside it."""
        inside = AXES[: AXES.index(axis)]
        return [
            i
            for i, owner in enumerate(self._owners)
            if all(owner[name] == self._place[name] for name in inside)
        ]

    def _owned_by(self, axis: str) -> list[list[int]]:
        """Of those, the ones of each place on ``axis``."""
        found: list[list[int]] = [[] for _ in range(getattr(self._plan, axis))]
        for i in self._mine(axis):
            found[self._owners[i][axis]].append(i)
        return found

    def _to_owners(self, held: dict[int, Tensor], axis: str) -> dict[int, Tensor]:
        ways, here = getattr(self._plan, axis), self._place[axis]
        if ways == 1:
            return held
        owned_by = self._owned_by(axis)
        travels = [[i for i in owned if axis in self._dims[i]] for owned in owned_by]
        shapes = [[self._local_shape(i, axis, j) for i in travels[here]] for j in range(ways)]
        if not any(travels):
            return {i: held[i] for i in owned_by[here]}
        like = next(iter(held.values()))
        got = _all_to_all(
            [[held[i] for i in to] for to in travels],
            shapes,
            self._world.group(axis),
            like.dtype,
            like.device,
        )
        found = {i: held[i] for i in owned_by[here] if axis not in self._dims[i]}
        for number, i in enumerate(travels[here]):
            found[i] = torch.cat([of_one[number] for of_one in got], self._dims[i][axis])
        return {i: found[i] for i in owned_by[here]}

    def _from_owners(
        self, owned: dict[int, Tensor], axis: str, dtype: torch.dtype, device: torch.device
    ) -> dict[int, Tensor]:
        ways, here = getattr(self._plan, axis), self._place[axis]
        if ways == 1:
            return owned
        owned_by = self._owned_by(axis)
        if not any(owned_by):
            return {}
        heights = {
            i: [self._local_shape(i, axis, j)[self._dims[i][axis]] for j in range(ways)]
            for i in owned
            if axis in self._dims[i]
        }
        pieces = {i: owned[i].split(heights[i], self._dims[i][axis]) for i in heights}
        sent = [[pieces[i][j] if i in pieces else owned[i] for i in owned_by[here]] for j in range(ways)]
        shapes = [[self._local_shape(i, axis, here) for i in owned] for owned in owned_by]
        got = _all_to_all(sent, shapes, self._world.group(axis), dtype, device)
        return {
            i: x
            for of_one, parts in zip(owned_by, got, strict=True)
            for i, x in zip(of_one, parts, strict=True)
        }

    def _to_copies(
        self, updates: dict[int, Tensor], dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        """All updates, of which this process has those of its place on dp."""
        if self._plan.dp == 1:
            return [updates[i] for i in range(len(self._shapes))]
        owned_by = self._owned_by("dp")
        shapes = [[self._local_shape(i, "fsdp", self._place["fsdp"]) for i in owned] for owned in owned_by]
        most = max(sum(rows * cols for rows, cols in of_one) for of_one in shapes)
        own = torch.zeros(most, dtype=dtype, device=device)
        _flatten_into(own, [updates[i] for i in owned_by[self._place["dp"]]])
        everything = torch.empty(self._plan.dp * most, dtype=dtype, device=device)
        _all_gather(everything, own, group=self._world.group("dp"))
        found: dict[int, Tensor] = {}
        for owned, part_of_one, of_one in zip(owned_by, everything.split(most), shapes, strict=True):
            found.update(zip(owned, _unflatten(part_of_one, of_one), strict=True))
        return [found[i] for i in range(len(self._shapes))]


# Its name since torch 2.13, which warns of the other.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def _all_to_all(
    sent: list[list[Tensor]], shapes: list[list[Shape]], group, dtype, device
) -> list[list[Tensor]]:
    """What the others sent to this process; ``sent`` and ``shapes`` by place in the group."""
    to = [sum(x.numel() for x in tensors) for tensors in sent]
    of = [sum(rows * cols for rows, cols in of_one) for of_one in shapes]
    outgoing = torch.empty(sum(to), dtype=dtype, device=device)
    _flatten_into(outgoing, [x for tensors in sent for x in tensors])
    incoming = torch.empty(sum(of), dtype=dtype, device=device)
    dist.all_to_all_single(incoming, outgoing, of, to, group=group)
    return [_unflatten(x, of_one) for x, of_one in zip(incoming.split(of), shapes, strict=True)]


def _flatten_into(flat: Tensor, tensors: list[Tensor]) -> None:
    sizes = [x.numel() for x in tensors]
    if tensors:
        places = flat[: sum(sizes)].split(sizes)
        torch._foreach_copy_([place.view_as(x) for place, x in zip(places, tensors, strict=True)], tensors)


def _unflatten(flat: Tensor, shapes: list[Shape]) -> list[Tensor]:
    sizes = [rows * cols for rows, cols in shapes]
    places = flat[: sum(sizes)].split(sizes) if sizes else ()
    return [place.view(shape) for place, shape in zip(places, shapes, strict=True)]
