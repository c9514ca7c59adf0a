"""What survives a kill: the outputs of a program's nets, written behind the engine's back and replayed on takeover.

A program is deterministic but for what its nets return, so these outputs are a checkpoint of any program whatever. They
are kept in the blob store, a page at a time: what a picture's nets returned since the last page, under a digest. The
digest is keyed with the picture's identity (request, weights, code, kind of machine), so one comparison tells a page
that is whole and fits from one that is torn, damaged, or of another program. Only the former is ever used; a call that
no page has is simply computed.
"""

import hashlib
import json
import platform
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import structlog
import torch
from obstore.exceptions import BaseError as BlobStoreError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils import _pytree as torch_pytree

from app import metrics
from app.schemas import Parameters
from app.storage import BlobStore, journal_folder, page_key
from models.catalog import ModelCard
from workers.passes import Fetched

log = structlog.get_logger()

DIGEST = 32  # bytes, in front of every page
CODE = Path(__file__).parents[1]
DRAWS = ("models/*.py", "workers/engine.py", "workers/passes.py")  # the code that decides what nets are asked
SAMPLES = 16  # values of each weight that stand for all of them

Outputs = dict[int, Any]
"""What the nets of one program returned, by the number of the call."""


class Line(NamedTuple):
    """What one call returned, no longer anybody else's; of its tensors what is on its way to the CPU."""

    number: int
    leaves: list[Any]
    structure: Any


@dataclass(eq=False)
class Record:
    """The journal of one picture, as it is written."""

    generation: str
    index: int
    attempt: int
    key: bytes  # the picture's identity
    lines: list[Line] = field(default_factory=list)
    held: int = 0  # bytes in `lines`
    written: int = 0  # bytes in pages
    closed: bool = False


class Journal:
    """Writes the journals of all pictures of this process.

    Args:
        device: where the nets' outputs are expected when they are read again.
        interval: seconds between two pages of a picture; what a kill can cost.
        limit: bytes that a picture's journal may take; what comes later is not kept.
    """

    def __init__(self, blobs: BlobStore, device: torch.device, interval: float, limit: float):
        self.blobs, self.device, self.interval, self.limit = blobs, device, interval, limit
        self.records: set[Record] = set()
        self.lock = threading.Lock()  # of `records` and their lines
        self.writing = threading.Lock()  # a page is written once, and no page after its journal was dropped
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self.thread.start()

    def note(self, record: Record, number: int, outputs: Any) -> None:
        """What the picture's call of this number returned. Copies it; the rest is the writer's work."""
        if record.closed or record.written + record.held >= self.limit:
            return
        leaves, structure = torch_pytree.tree_flatten(outputs)
        leaves = [Fetched(leaf, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Fetched))
        with self.lock:
            record.lines.append(Line(number, leaves, structure))
            record.held += size
            self.records.add(record)

    def write(self) -> None:
        """Store what has been noted since the last time."""
        with self.writing:
            with self.lock:
                taken = [(record, record.lines) for record in self.records]
                for record in self.records:
                    record.lines, record.held = [], 0
                self.records.clear()
            for record, lines in taken:
                if not record.closed:
                    self._store(record, lines)

    def _store(self, record: Record, lines: list[Line]) -> None:
        page = written(lines, record.key)
        try:
            self.blobs.save(page_key(record.generation, record.index, record.attempt, lines[0].number), page)
        except BlobStoreError as error:  # these steps would be drawn again, nothing else
            log.warning("journal_page_lost", generation=record.generation, error=str(error))
            return
        record.written += len(page)
        metrics.JOURNAL_BYTES.inc(len(page))

    def stop(self, records: list[Record]) -> None:
        """Write no more of these pictures: they are another worker's now."""
        for record in records:
            record.closed = True

    def drop(self, records: list[Record]) -> None:
        """The generation has ended: its journal has done its work."""
        self.stop(records)
        if any(record.written or record.attempt > 1 for record in records):
            with self.writing:  # a page under way would be left over
                self.blobs.delete(journal_folder(records[0].generation))

    def read(self, record: Record) -> Outputs:
        """What earlier attempts at this picture have left. Empty if there is nothing, or nothing that fits."""
        found: Outputs = {}
        pages = sorted(self.blobs.list(f"{journal_folder(record.generation)}/{record.index}"))
        for page in pages:  # by attempt: the last one's word counts
            try:
                found |= read(self.blobs.open(page), record.key, self.device)
            except Unfit as error:
                metrics.JOURNAL_DISCARDED.inc()
                log.warning("journal_discarded", generation=record.generation, page=page, reason=str(error))
        return found

    def close(self) -> None:
        self.stopped.set()
        self.thread.join()
        self.write()

    def _run(self) -> None:
        while not self.stopped.wait(self.interval):
            self.write()


class Unfit(ValueError):
    """A page is torn, damaged, or of another program."""


# -- pages


def written(lines: list[Line], key: bytes) -> bytes:
    """A page: its digest, then the tensors with a table of contents."""
    tensors, contents = dict[str, Tensor](), dict[int, Any]()
    for number, leaves, structure in lines:
        kinds = list[Any]()
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Fetched):
                kinds.append(["value", leaf])
                continue
            tensor = leaf.tensor()
            rows = repeated_rows(tensor)
            tensors[f"{number}.{i}"] = (tensor[:1] if rows else tensor).contiguous()
            kinds.append(["rows", rows])
        contents[number] = kinds, torch_pytree.treespec_dumps(structure)
    table = torch.frombuffer(bytearray(json.dumps(contents).encode()), dtype=torch.uint8)
    body = safetensors.torch.save({**tensors, "contents": table})
    return digest(body, key) + body


def read(page: bytes, key: bytes, device: torch.device) -> Outputs:
    """What a page holds.

    Raises:
        Unfit: it is not a whole page of the picture with this identity.
    """
    told, body = page[:DIGEST], page[DIGEST:]
    if told != digest(body, key):
        raise Unfit("another program's, or damaged")
    try:
        tensors = safetensors.torch.load(body)
        contents = json.loads(tensors["contents"].numpy().tobytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise Unfit(f"not a page: {error}") from None
    found: Outputs = {}
    for number, (kinds, structure) in contents.items():
        leaves = list[Any]()
        for i, (kind, value) in enumerate(kinds):
            if kind == "value":
                leaves.append(value)
            else:
                tensor = tensors[f"{number}.{i}"].to(device)
                leaves.append(tensor.repeat(value, *[1] * (tensor.ndim - 1)) if value else tensor)
        found[int(number)] = torch_pytree.tree_unflatten(leaves, torch_pytree.treespec_loads(structure))
    return found


def repeated_rows(tensor: Tensor) -> int:
    """How many rows it has, if they are all the same, bit for bit; else 0. With guidance they often are."""
    if tensor.ndim == 0 or len(tensor) < 2:
        return 0
    bits = tensor.contiguous().view(torch.uint8)
    return len(tensor) if bool((bits == bits[:1]).all()) else 0


def digest(body: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST, key=key).digest()


# -- identity


def identity(model: bytes, r: Parameters, index: int) -> bytes:
    """Of one picture. Where bytes are promised, the kind of machine belongs to it: another rounds differently."""
    machine = kind_of_machine() if r.reproducible else ""
    return hashed(model, r.model_dump_json(exclude={"metadata", "expires_in", "priority", "webhook"}), index, machine)


def model_identity(card: ModelCard, nets: Iterable[nn.Module]) -> bytes:
    """Of a resident model: its card, its weights and the code that draws with them."""
    libraries = [version(name) for name in ("torch", "diffusers", "transformers")]
    return hashed(card.model_dump_json(), weights(nets), code(), *libraries)


def weights(nets: Iterable[nn.Module]) -> bytes:
    """A few values of every weight: fine-tuning changes nearly all of them, a merged adapter whole nets."""
    samples = list[Tensor]()
    for module in nets:
        samples.append(torch.zeros(1))
        for parameter in module.parameters():
            flat = parameter.detach().reshape(-1)
            samples.append(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].to("cpu", torch.float64))
    return hashed(torch.cat([sample.double() for sample in samples]).numpy().tobytes())


@cache
def code() -> bytes:
    """Of the files that programs are made of."""
    return hashed(*(path.read_bytes() for pattern in DRAWS for path in sorted(CODE.glob(pattern))))


def kind_of_machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"


def hashed(*parts: Any) -> bytes:
    """Of parts that cannot run into each other."""
    whole = hashlib.blake2b(digest_size=DIGEST)
    for part in parts:
        text = part if isinstance(part, bytes) else str(part).encode()
        whole.update(len(text).to_bytes(8, "little") + text)
    return whole.digest()
