"""Pieces of tensors: boxes of whole ones, as a process holds them, and the safetensors files that hold them.

A file says in its metadata where each of its boxes begins, as ``torch.distributed.checkpoint`` writes it; one without
such metadata holds whole tensors. Whatever boxes were written, any others of the same tensors can be read.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

# --- pieces ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """The box of a whole tensor that this process holds."""

    tensor: Tensor
    """The live values, of the box's shape."""
    offsets: tuple[int, ...]
    """Where the box begins in the whole tensor, for each dimension."""
    shape: tuple[int, ...]
    """Of the whole tensor."""

    @property
    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.offsets, tuple(self.tensor.shape)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.shape)


def piece_of(name: str, tensor: Tensor) -> Piece | None:
    """What this process holds of ``tensor``; None when it holds nothing of it.

    Raises ``ValueError`` for a placement whose local values are no box of the whole tensor.
    """
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), (0,) * tensor.ndim, tuple(tensor.shape))
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    shape, local = tuple(tensor.shape), tensor.to_local().detach()
    offsets, size = _box(name, tensor, coordinate)
    if local.numel() == math.prod(size) == 0 < math.prod(shape):
        return None  # an empty share of an uneven split
    if tuple(local.shape) != size:
        raise ValueError(
            f"{name} {list(shape)}, placed {tensor.placements}, is {list(local.shape)} here, not {list(size)}"
        )
    return Piece(local, offsets, shape)


def _box(name: str, tensor: DTensor, coordinate: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the values at ``coordinate`` of its mesh begin in the whole tensor, and their shape.

    Several dimensions of the mesh may split one dimension of the tensor: from left to right, save that FSDP2
    splits what tensor parallelism, to its right, has left it, and says so by a strided placement. Either way
    a split is ``torch.chunk``'s, of a box into boxes. What torch's own formula makes of such a placement is
    another thing where the splits are uneven, and not where FSDP2 has put the values.
    """
    mesh = tensor.device_mesh
    placements = {i: found for i, found in enumerate(tensor.placements) if not found.is_replicate()}
    split = {i: found for i, found in placements.items() if isinstance(found, Shard | _StridedShard)}
    strided = {i: found for i, found in split.items() if isinstance(found, _StridedShard)}
    plain = {i: found for i, found in split.items() if i not in strided}
    usual = len(split) == len(placements)
    for i, own in strided.items():
        others = {j: mesh.size(j) for j in split if j != i and split[j].dim == own.dim}
        usual &= own.split_factor == math.prod(others.values())
        usual &= all(j in plain and j > i for j in others)
    if not usual:
        raise ValueError(f"{name} is placed {tensor.placements}, which no checkpoint can hold")
    offsets, size = [0] * tensor.ndim, list(tensor.shape)
    for i, found in (plain | strided).items():
        chunk = -(-size[found.dim] // mesh.size(i))
        begin = min(size[found.dim], chunk * coordinate[i])
        offsets[found.dim] += begin
        size[found.dim] = min(size[found.dim] - begin, chunk)
    return tuple(offsets), tuple(size)


def pieces_of(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """What this process holds of each tensor of which it holds anything (:func:`piece_of`)."""
    found = {name: piece_of(name, tensor) for name, tensor in tensors.items()}
    return {name: piece for name, piece in found.items() if piece is not None}


# --- reading -------------------------------------------------------------------------------------


class _Only(FileSystem):
    """A file system that lists the given files: what else lies beside them is not read."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [str(file) for file in self.paths]


class Reader(HuggingFaceStorageReader):
    """Reads files of one folder, and nothing that lies beside them."""

    def __init__(self, folder: Path, names: Sequence[str]):
        super().__init__(str(folder))
        self.fs = _Only([folder / name for name in names])


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Plans the reading of a dictionary of :class:`Piece`."""

    def set_up_planner(
        self, state_dict: dict[str, Piece], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items, saved = [], stored(self.metadata)
        for name, piece in self.state_dict.items():
            found = create_read_items_for_chunk_list(name, saved[name], [piece.chunk])
            if sum(math.prod(item.lengths) for item in found) != piece.tensor.numel():
                raise ValueError(f"{name}: the files do not hold all of it")
            items += found
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor


def stored(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """What is saved of each tensor; such files hold nothing else."""
    return {
        name: found
        for name, found in metadata.state_dict_metadata.items()
        if isinstance(found, TensorStorageMetadata)
    }


@torch.no_grad()
def fill_pieces(reader: Reader, metadata: Metadata, pieces: dict[str, Piece]) -> None:
    """Copy what the checkpoint holds into ``pieces``. A process reads for itself: nothing is coordinated."""
    planner = _LoadPlanner()
    planner.set_up_planner(pieces, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()


def read_whole(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """All tensors of these files of ``folder``, whole, on the CPU; for one process."""
    reader = Reader(folder, names)
    metadata = reader.read_metadata()
    tensors = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in sorted(stored(metadata).items())
    }
    fill_pieces(reader, metadata, pieces_of(tensors))
    return tensors
