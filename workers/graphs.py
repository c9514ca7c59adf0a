"""Passes as CUDA graphs: a net's launches recorded once for each shape, and replayed.

A small net in eager mode costs what Python takes to launch it, whatever its rows. A graph is one launch. It reads and
writes at fixed addresses, so each shape has a buffer for every column. A buffer knows what lies in which of its rows:
what a request is told from its first step to its last (prompt, guidance, the zeros of a sampler without memory) goes
there once, and stays for as long as the request keeps its rows.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import structlog
import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree

from models.program import Net
from workers.passes import Columns, DeviceStopwatch, Eager, Placed, Stopwatch

log = structlog.get_logger()

KEPT = 64  # graphs of a net; who comes back after that is recorded anew
MIB = 2**20

Replay = Callable[[], Any]
"""Runs what was recorded; returns what it wrote, at the same place each time."""
Recorder = Callable[[Callable[[], Any]], Replay]


class Buffer:
    """One column of a shape's passes, at a fixed address: [rows, …]."""

    def __init__(self, like: Tensor, rows: int):
        self.whole = torch.zeros(rows, *like.shape[1:], dtype=like.dtype, device=like.device)
        self.lies: dict[tuple[int, int], tuple[Any, ...]] = {}  # what was copied to these rows last

    def lacks(self, parts: Sequence[tuple[int, int, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """What must be copied, and where to, for rows `at` to `end` to hold these columns and all others zeros."""
        lies = {(at, end): identity(column) for at, end, column in parts}
        for at, end in self.lies.keys() - lies.keys():
            self.whole[at:end].zero_()  # they may be nobody's now
        for at, end, column in parts:
            if not same(self.lies.get((at, end)), lies[at, end]):
                yield self.whole[at:end], column
        self.lies = lies


def with_its_own(columns: Columns) -> Columns:
    """The columns, and copies of what is the same in all calls: a graph outlives the first of them."""
    trees = {
        name: ([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        for name, (leaves, spec) in columns.trees.items()
    }
    return Columns(columns.key, columns.batched, trees)


def identity(column: Tensor) -> tuple[Any, ...]:
    """What tells a tensor that was not written to since: its storage, where in it, and how often it was written."""
    base = column._base if column._base is not None else column
    return ref(base), column.data_ptr(), column.stride(), column._version


def same(before: tuple[Any, ...] | None, now: tuple[Any, ...]) -> bool:
    """A storage that is gone may have been given to another tensor, at the same address."""
    return before is not None and before[0]() is not None and before[0]() is now[0]() and before[1:] == now[1:]


class Graph:
    """The passes of one net and shape."""

    def __init__(self, net: Net, placed: Sequence[Placed], rows: int, record: Recorder):
        columns = with_its_own(placed[0].columns)
        self.buffers = [Buffer(column, rows) for column in columns.batched]
        self._fill(placed)
        self.arguments = columns.arguments(buffer.whole for buffer in self.buffers)  # it knows but addresses
        run, arguments = net.run, self.arguments
        self.replay = record(lambda: run(**arguments))

    def run(self, placed: Sequence[Placed]) -> Any:
        self._fill(placed)
        output = self.replay()
        return torch_pytree.tree_map_only(Tensor, Tensor.clone, output)  # the next replay writes to the same place

    def _fill(self, placed: Sequence[Placed]) -> None:
        pairs = [
            pair
            for k, buffer in enumerate(self.buffers)
            for pair in buffer.lacks([(one.at, one.at + one.rows, one.columns.batched[k]) for one in placed])
        ]
        if pairs:
            there, columns = zip(*pairs, strict=True)
            torch._foreach_copy_(there, columns)  # pyright: ignore[reportPrivateUsage] - a launch, not one for each


class Graphs:
    """Runs a shape's first pass as the net is written, which also prepares its kernels, and records its second."""

    asynchronous, prepares = True, 2

    def __init__(self, record: Recorder | None = None, device: str = "cuda"):
        self.record, self.device, self.eager = record or cuda_recorder(), device, Eager()
        self.nets = WeakKeyDictionary[Net, OrderedDict[Any, Graph | None]]()

    def stopwatch(self) -> Stopwatch:
        return DeviceStopwatch()

    def run(self, net: Net, placed: Sequence[Placed], rows: int) -> Any:
        elsewhere = any(column.device.type != self.device for column in placed[0].columns.batched)
        if elsewhere or not net.recordable:
            return self.eager.run(net, placed, rows)
        shapes = self.nets.setdefault(net, OrderedDict())
        shape = (*placed[0].columns.key[1:], rows)  # without the net, which would keep itself alive
        if shape not in shapes:
            shapes[shape] = None
            if len(shapes) > KEPT:
                shapes.popitem(last=False)
            return self.eager.run(net, placed, rows)
        shapes.move_to_end(shape)
        if (graph := shapes[shape]) is None:
            graph = shapes[shape] = self._recorded(net, placed, rows)
        return graph.run(placed) if graph else self.eager.run(net, placed, rows)

    def _recorded(self, net: Net, placed: Sequence[Placed], rows: int) -> Graph | None:
        began, before = time.perf_counter(), memory()
        try:
            with torch.no_grad():
                graph = Graph(net, placed, rows, self.record)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a net does that a graph cannot hold: it is no worse off than without
            log.warning("not_recordable", net=net.name, rows=rows, error=repr(error))
            net.recordable = False
            return None
        took, grown = time.perf_counter() - began, (memory() - before) / MIB
        log.info("recorded", net=net.name, rows=rows, milliseconds=round(took * 1000, 1), mib=round(grown, 1))
        return graph


def memory() -> int:
    """Bytes that the allocator holds."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


def cuda_recorder() -> Recorder:
    """Records into one pool of memory: passes follow one another, so graphs may write where others did."""
    pool = None

    def record(run: Callable[[], Any]) -> Replay:
        nonlocal pool
        pool = pool or torch.cuda.graph_pool_handle()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run()  # what is only done once (workspaces, adapters put on) is not part of it
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # files are fetched meanwhile
            output = run()

        def replay() -> Any:
            graph.replay()
            return output

        return replay

    return record
