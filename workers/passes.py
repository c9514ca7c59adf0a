"""One forward pass: the rows of several calls put together, run, and taken apart again.

On a GPU nothing here waits for the device. A pass is launched and told apart by row; whoever needs its numbers on this
side of the bus fetches them (`Fetched`), and whoever wants to know when it was over asks its stopwatch.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree  # knows tuples, dicts, and the outputs of diffusers and transformers
from torch.utils.weak import WeakTensorKeyDictionary

from models.program import Call, Net

CPU = torch.device("cpu")
BATCHED = object()
ONE_LEAF = torch_pytree.tree_structure(torch.empty(0))


@dataclass(slots=True)
class Columns:
    """A call's arguments, taken apart: what is batched row by row, and what must be equal to share a pass."""

    key: tuple[Any, ...]  # the net, then all that must be equal
    batched: list[Tensor]
    trees: dict[str, tuple[list[Any], Any]]  # of each argument: leaves and structure; `BATCHED` where a column goes

    def arguments(self, columns: Iterable[Tensor]) -> dict[str, Any]:
        """The call's arguments with other columns in the places of its own."""
        fresh = iter(columns)
        return {
            name: torch_pytree.tree_unflatten([next(fresh) if leaf is BATCHED else leaf for leaf in leaves], spec)
            for name, (leaves, spec) in self.trees.items()
        }


@dataclass(slots=True)
class Placed:
    """A call's columns, and which rows of the pass they are."""

    columns: Columns
    at: int
    rows: int


class Runner(Protocol):
    asynchronous: bool  # whether `run` returns before the device is done
    prepares: int  # this many of a shape's first passes are not like those after

    def stopwatch(self) -> "Stopwatch": ...
    def run(self, net: Net, placed: Sequence[Placed], rows: int) -> Any:
        """What the net returns for so many rows, those that are nobody's being zeros.

        Whatever a net is told about other rows (an index, a mask), zero is a safe thing to be told.

        Args:
            placed: in the order of their rows.
        """
        ...


class Eager:
    """Runs each pass as the net is written."""

    prepares = 1

    def __init__(self, device: torch.device = CPU):
        self.asynchronous = device.type == "cuda"

    def stopwatch(self) -> "Stopwatch":
        return DeviceStopwatch() if self.asynchronous else Stopwatch()

    def run(self, net: Net, placed: Sequence[Placed], rows: int) -> Any:
        columns = [column_of(placed, k, rows) for k in range(len(placed[0].columns.batched))]
        with torch.no_grad():
            return net.run(**placed[0].columns.arguments(columns))


def take_apart(call: Call) -> Columns:
    """Sort a call's arguments into batched columns and what must be equal by content.

    Raises:
        TypeError: an argument can be neither batched nor compared.
    """
    rows, shared = call.rows, call.net.shared
    key, batched, trees = list[Any]([call.net]), list[Tensor](), dict[str, Any]()
    for name, value in call.args.items():
        leaves: list[Any] = [value]
        spec = ONE_LEAF
        if not isinstance(value, Tensor):
            leaves, spec = torch_pytree.tree_flatten(value)
        key += name, spec
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and name not in shared and (leaf.ndim == 0 or leaf.shape[0] == rows):
                column = leaf if leaf.ndim else leaf.expand(rows)
                batched.append(column)
                leaves[i] = BATCHED
                key.append((column.shape[1:], column.dtype, column.device))
            else:
                key.append(content(name, leaf))
        trees[name] = leaves, spec
    return Columns(tuple(key), batched, trees)


CONTENTS = WeakTensorKeyDictionary()  # by version and tensor; to read one is to wait for the device


def content(name: str, leaf: Any) -> Any:
    """Something hashable that is equal just when the argument is; a shortened repr would merge strangers."""
    if isinstance(leaf, Tensor):
        version, known = CONTENTS.get(leaf) or (-1, None)
        if version != leaf._version:
            flat = leaf.detach().cpu().contiguous().reshape(-1)
            known = leaf.dtype, leaf.shape, leaf.device, flat.view(torch.uint8).numpy().tobytes()
            CONTENTS[leaf] = leaf._version, known
        return known
    if isinstance(leaf, float):
        return float, leaf.hex()  # 0.0 == -0.0, and not a number is not even equal to itself
    if leaf is None or isinstance(leaf, bool | int | str | torch.dtype | torch.device):
        return type(leaf), leaf
    raise TypeError(f"argument {name!r} is a {type(leaf).__name__}: neither rows nor something to compare")


def column_of(placed: Sequence[Placed], k: int, rows: int) -> Tensor:
    """The k-th batched argument of all calls, in one tensor of so many rows."""
    parts, at = list[Tensor](), 0
    for one in placed:
        column = one.columns.batched[k]
        if one.at > at:
            parts.append(column.new_zeros(one.at - at, *column.shape[1:]))
        parts.append(column)
        at = one.at + one.rows
    if rows > at:
        parts.append(parts[-1].new_zeros(rows - at, *parts[-1].shape[1:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def scatter(output: Any, rows: int, parts: Sequence[slice]) -> list[Any]:
    """Each part's rows of every tensor in `output`."""
    leaves, spec = torch_pytree.tree_flatten(output)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.shape[0] != rows):
            raise TypeError(f"a net returned a tensor of shape {tuple(leaf.shape)} for {rows} rows")
    return [
        torch_pytree.tree_unflatten([leaf[part] if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        for part in parts
    ]


# -- time, and what crosses the bus


class Stopwatch:
    """Seconds from its making to `stop`, on a device that is done when it returns."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.took = 0.0

    def stop(self) -> None:
        self.took = time.perf_counter() - self.began

    def seconds(self) -> float:
        """Waits for the end, if that is still to come."""
        return self.took


class DeviceStopwatch(Stopwatch):
    """The same by the GPU's clock: from when it got there to when it was through with what was launched in between."""

    def __init__(self) -> None:
        self.first, self.last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.first.record()

    def stop(self) -> None:
        self.last.record()

    def seconds(self) -> float:
        self.last.synchronize()
        return self.first.elapsed_time(self.last) / 1000


class Fetched:
    """A tensor on its way to the CPU. The device goes on meanwhile: the copy is pinned, and waits for its turn.

    Args:
        copy: also where there is no bus to cross, as somebody else may go on writing there.
    """

    def __init__(self, tensor: Tensor, copy: bool = False):
        self.nbytes = tensor.nbytes
        if tensor.is_cuda:
            self.here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.here.copy_(tensor, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        else:
            self.here, self.arrived = tensor.clone() if copy else tensor, None

    def tensor(self) -> Tensor:
        """Waits for it to arrive."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.here
