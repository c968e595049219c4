"""What a unit saw and gave, row by row, in bounded memory: on a device up to a budget, then in temporary files."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from qk.errors import QkError


class Room:
    """Memory for tensors: `memory_mb` on the device, then mapped files that vanish with the process or the tensor."""

    def __init__(self, memory_mb: float, device: torch.device | str = "cpu") -> None:
        self.left, self.device = int(memory_mb * 2**20), device
        self.in_files = 0  # bytes

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Raises QkError when the disk has no room either."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size <= self.left or size == 0:
            self.left -= size
            return torch.empty(shape, dtype=dtype, device=self.device)
        handle, path = tempfile.mkstemp(prefix="qk-")
        try:
            # Reserved now: a full disk would otherwise kill the process at the first write to the mapping.
            os.posix_fallocate(handle, 0, size) if hasattr(os, "posix_fallocate") else os.truncate(handle, size)
            mapped = torch.from_file(path, shared=True, size=count, dtype=dtype)
        except OSError as error:
            raise QkError(
                f"qk.reconstruct: {tempfile.gettempdir()} must have {size / 2**20:.0f} MB free for cached activations, "
                f"got: {error}. Raise memory_mb, pass fewer batches, or set TMPDIR to a larger disk."
            ) from error
        finally:
            os.close(handle)
            os.unlink(path)  # the mapping keeps the data; nothing is left behind, however the process ends
        self.in_files += size
        return mapped.view(shape)

    def hold(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor in this room."""
        held = self.empty(tuple(tensor.shape), tensor.dtype)
        return held.copy_(tensor.detach())


@dataclass
class Call:
    """Arguments of one call of a unit, flat: tensors and whatever else it was given."""

    leaves: list[Any]
    spec: TreeSpec

    @staticmethod
    def of(args: tuple, kwargs: dict) -> Call:
        """The call with copies of its tensors: the unit, or what follows it, may work in place."""
        leaves, spec = tree_flatten((args, kwargs))
        return Call([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def again(self, device: torch.device) -> tuple[tuple, dict]:
        """Arguments for the same call, copies as well."""
        leaves = [x.to(device, copy=True) if isinstance(x, Tensor) else x for x in self.leaves]
        return tree_unflatten(leaves, self.spec)


@dataclass
class Sample:
    """Rows of the cache, ready to run: module(*args, **kwargs) should give target."""

    args: tuple
    kwargs: dict
    target: Tensor
    weight: Tensor | None  # squared gradients, mean 1 over the cache
    part: int = 0  # of the cache; all of one have the same shapes

    @property
    def rows(self) -> int:
        return self.target.shape[0]


class Cache:
    """Inputs of a unit from the quantized and from the float prefix, its float outputs, and weights of the errors.

    Tensors whose first dimension is the batch are kept row by row; everything else (a mask with batch 1, a flag) as the
    call had it. Calls of another shape, such as another sequence length, make another part; a sample comes from one.
    """

    def __init__(self, room: Room, device: torch.device) -> None:
        self.room, self.device = room, device
        self.parts: list[_Part] = []

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    def add(self, quantized: Call, plain: Call, target: Tensor, weight: Tensor | None, more: int = 0) -> None:
        """quantized, plain: the same call with either prefix. more: how many calls of this size will follow."""
        for part in self.parts:
            if part.takes(quantized, plain, target):
                break
        else:
            part = _Part(self.room, quantized, plain, target, weight, target.shape[0] * (more + 1))
            self.parts.append(part)
        part.append(quantized, plain, target, weight)

    def normalize(self) -> None:
        """Scales the weights to mean 1. All zero (a unit without influence) becomes all one."""
        weights = [part.weight[: part.rows] for part in self.parts if part.weight is not None]
        if not weights:
            return
        mean = sum(part.weight_sum for part in self.parts) / sum(w.numel() for w in weights)
        for w in weights:
            w.div_(mean) if mean > 0 else w.fill_(1.0)

    def sample(self, rows: int, drop: float, generator: torch.Generator) -> Sample:
        """`rows` different rows (fewer if the part has fewer), each value from the quantized prefix with probability
        drop and otherwise from the float one."""
        at = 0
        if len(self.parts) > 1:
            shares = torch.tensor([float(part.rows) for part in self.parts])
            at = int(torch.multinomial(shares, 1, generator=generator))
        part = self.parts[at]
        chosen = torch.randperm(part.rows, generator=generator)[:rows]
        return replace(part.pick(chosen, drop, generator, self.device), part=at)

    def chunks(self, rows: int) -> Iterator[Sample]:
        """Everything in order, from the quantized prefix."""
        for part in self.parts:
            for chosen in torch.arange(part.rows).split(rows):
                yield part.pick(chosen, 1.0, None, self.device)


class _Part:
    """Calls that fit together. `same`: leaves that the prefix does not change, kept once."""

    def __init__(
        self, room: Room, quantized: Call, plain: Call, target: Tensor, weight: Tensor | None, capacity: int
    ) -> None:
        def store(like: Tensor) -> Tensor:
            return room.empty((capacity, *like.shape[1:]), like.dtype)

        self.rows, self.capacity, self.spec = 0, capacity, quantized.spec
        self.fixed = quantized.leaves
        self.kind = [_by_row(leaf, target) for leaf in quantized.leaves]
        self.same = [_equal(q, f) for q, f in zip(quantized.leaves, plain.leaves, strict=True)]
        self.quantized = [store(q) if by_row else None for q, by_row in zip(quantized.leaves, self.kind, strict=True)]
        self.plain = [
            store(q) if by_row and not same else None
            for q, by_row, same in zip(quantized.leaves, self.kind, self.same, strict=True)
        ]
        self.target = store(target)
        self.weight_sum = 0.0  # gathered call by call: a sum in float64 over all would convert all of them first
        self.weight = None if weight is None else store(weight)

    def takes(self, quantized: Call, plain: Call, target: Tensor) -> bool:
        rows = target.shape[0]
        if self.rows + rows > self.capacity or target.shape[1:] != self.target.shape[1:]:
            return False
        if len(quantized.leaves) != len(self.fixed):
            return False
        for q, f, mine, by_row, same in zip(
            quantized.leaves, plain.leaves, self.fixed, self.kind, self.same, strict=True
        ):
            if _by_row(q, target) != by_row or _equal(q, f) != same:
                return False
            if by_row and (q.shape[1:] != mine.shape[1:] or q.dtype != mine.dtype):
                return False
            if not by_row and isinstance(q, Tensor) and not _equal(q, mine):
                return False
        return True

    def append(self, quantized: Call, plain: Call, target: Tensor, weight: Tensor | None) -> None:
        end = self.rows + target.shape[0]
        for stores, leaves in ((self.quantized, quantized.leaves), (self.plain, plain.leaves)):
            for store, leaf in zip(stores, leaves, strict=True):
                if store is not None:
                    store[self.rows : end].copy_(leaf)
        self.target[self.rows : end].copy_(target)
        if self.weight is not None:
            self.weight[self.rows : end].copy_(weight)
            self.weight_sum += float(weight.sum(dtype=torch.float64))
        self.rows = end

    def pick(self, chosen: Tensor, drop: float, generator: torch.Generator | None, device: torch.device) -> Sample:
        leaves = list(self.fixed)
        for i, (store, plain) in enumerate(zip(self.quantized, self.plain, strict=True)):
            if store is None:
                continue
            if plain is None or drop == 1 or not store.is_floating_point():
                leaves[i] = _rows(store, chosen)
            elif drop == 0:
                leaves[i] = _rows(plain, chosen)
            else:
                rows = _rows(store, chosen)
                # lerp is exact at 0 and 1, and seven times as fast as where.
                leaves[i] = torch.lerp(_rows(plain, chosen).to(rows.device), rows, drop_mask(rows, drop, generator))
            leaves[i] = leaves[i].to(device)
        args, kwargs = tree_unflatten(leaves, self.spec)
        weight = None if self.weight is None else _rows(self.weight, chosen).to(device)
        return Sample(args, kwargs, _rows(self.target, chosen).to(device), weight)


def _rows(store: Tensor, chosen: Tensor) -> Tensor:
    return store.index_select(0, chosen.to(store.device))


def drop_mask(like: Tensor, drop: float, generator: torch.Generator | None) -> Tensor:
    """Like a tensor, 1 with probability drop and else 0, in steps of 1 / 256: eight bytes cost one draw, by the CPU."""
    count = like.numel()
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    mask = torch.empty(count, dtype=like.dtype)
    return torch.lt(words.view(torch.uint8)[:count], round(drop * 256), out=mask).view(like.shape).to(like.device)


def _by_row(leaf: Any, target: Tensor) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == target.shape[0]


def _equal(a: Any, b: Any) -> bool:
    return not isinstance(a, Tensor) or (a.shape == b.shape and torch.equal(a, b))
