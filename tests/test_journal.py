"""What a killed worker had drawn is not drawn again: journals, and what becomes of those that do not fit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from PIL import Image
from torch import Tensor

from app.schemas import Parameters
from app.storage import BlobStore, open_store
from models.catalog import Catalog, ModelCard
from models.guided import modules_of
from models.loading import load_pipeline
from models.program import Inputs
from models.samplers import SCHEDULERS
from models.stable_diffusion import StableDiffusion
from tests import test_stock
from tests.lab import until
from tests.test_stable_diffusion import asked, shipped  # noqa: F401
from workers import journal
from workers.engine import Engine
from workers.journal import Journal, Outputs, Record, Unfit
from workers.passes import Fetched

CPU = torch.device("cpu")
KEY = b"k" * 32
NOTHING = Inputs()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return open_store((tmp_path / "blobs").as_uri())


@pytest.fixture
def written(blobs: BlobStore) -> Iterator[Journal]:
    """One that writes when it is told to."""
    journal = Journal(blobs, CPU, interval=3600, limit=2**20)
    yield journal
    journal.close()


# -- a picture goes on where it was


def draw(model: Any, r: Parameters, inputs: Inputs = NOTHING, past: Outputs | None = None) -> tuple[Tensor, Outputs]:
    """The picture, and all that its denoiser returned; alone in an engine."""
    noted: Outputs = {}
    engine = Engine(note=lambda ticket, outputs: noted.update({ticket.calls: outputs}))
    ticket = engine.submit(model.draw(r, r.seed, inputs), r.seed if r.reproducible else None, past)
    while not ticket.done:
        engine.step()
    if ticket.error:
        raise ticket.error
    assert ticket.result is not None
    return ticket.result, noted


def through_a_page(outputs: Outputs) -> Outputs:
    lines = list[journal.Line]()
    for number, output in outputs.items():
        leaves, structure = journal.torch_pytree.tree_flatten(output)
        fetched = [Fetched(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        lines.append(journal.Line(number, fetched, structure))
    return journal.read(journal.written(lines, KEY), KEY, CPU)


def page_of(x: Tensor) -> bytes:
    leaves, structure = journal.torch_pytree.tree_flatten(x)
    return journal.written([journal.Line(1, [Fetched(leaf) for leaf in leaves], structure)], KEY)


def resumed_with_the_same_bytes(model: Any, r: Parameters, inputs: Inputs = NOTHING) -> None:
    whole, noted = draw(model, r, inputs)
    for kept in (1, len(noted) // 2, len(noted)):
        past = through_a_page(dict(list(noted.items())[:kept]))
        again, repeated = draw(model, r, inputs, past)
        assert torch.equal(again, whole)
        assert len(repeated) == len(noted) - kept


@pytest.mark.parametrize("scheduler", sorted(set(SCHEDULERS) - {"flow_match"}))
def test_any_sampler_goes_on_with_the_same_bytes(shipped: StableDiffusion, scheduler: str):  # noqa: F811
    r = asked(num_inference_steps=6, scheduler=scheduler, width=64, height=64, reproducible=True)
    resumed_with_the_same_bytes(shipped, r)


@pytest.mark.parametrize("task", ["image-to-image", "inpaint"])
def test_any_task_goes_on_with_the_same_bytes(shipped: StableDiffusion, task: str):  # noqa: F811
    image, mask = Image.new("RGB", (64, 64), "teal"), Image.new("L", (64, 64), 255)
    mask.paste(0, (0, 0, 32, 64))
    masked = task == "inpaint"
    given = {"image": "sha256:1", "strength": 0.8, **({"mask": "sha256:2"} if masked else {})}
    r = asked(num_inference_steps=6, scheduler="dpmpp_2m_sde", width=64, height=64, reproducible=True, **given)
    resumed_with_the_same_bytes(shipped, r, Inputs(image, mask if masked else None))


@pytest.mark.parametrize(("family", "task"), test_stock.CASES)
def test_stock_pipelines_go_on_with_the_same_bytes(family: str, task: Any):
    for r in test_stock.mixed(family, task)[:2]:
        exact = r.model_copy(update={"reproducible": True})
        resumed_with_the_same_bytes(test_stock.resident(family), exact, test_stock.inputs(r))


def test_in_a_crowd_only_the_calls_that_were_lost_are_made_again(shipped: StableDiffusion):  # noqa: F811
    requests = [asked(num_inference_steps=4 + i, seed=i, width=64, height=64) for i in range(3)]
    whole = [draw(shipped, r) for r in requests]
    engine, passes = Engine(lambda done: passes.append(done)), list[Any]()
    tickets = [
        engine.submit(shipped.draw(r, r.seed, Inputs()), None, dict(list(noted.items())[:3]))
        for r, (_, noted) in zip(requests, whole, strict=True)
    ]
    while engine:
        engine.step()
    assert [ticket.replayed for ticket in tickets] == [3, 3, 3]
    assert sum(done.calls for done in passes if done.net is shipped.denoiser) == 1 + 2 + 3
    for ticket, (picture, _) in zip(tickets, whole, strict=True):
        assert ticket.result is not None
        assert (ticket.result - picture).abs().max() < 1e-5  # the default lane's tolerance


def test_a_call_that_is_missing_from_the_journal_is_computed(shipped: StableDiffusion):  # noqa: F811
    r = asked(num_inference_steps=6, scheduler="unipc", width=64, height=64, reproducible=True)
    whole, noted = draw(shipped, r)
    middle = sorted(noted)[2]
    again, repeated = draw(shipped, r, past={number: out for number, out in noted.items() if number != middle})
    assert torch.equal(again, whole)
    assert list(repeated) == [middle]


# -- what fits, and what does not

OUTPUTS: dict[str, Any] = {
    "a tensor": torch.randn(2, 3),
    "a tuple": (torch.randn(2, 3), torch.randn(2)),
    "what a UNet of diffusers returns": UNet2DConditionOutput(sample=torch.randn(2, 4, 8, 8)),
    "half precision": torch.randn(2, 3, dtype=torch.bfloat16),
    "rows that are all the same": torch.randn(1, 3).repeat(4, 1),
    "one row": torch.randn(1, 3),
    "not contiguous": torch.randn(4, 6).T,
    "not numbers": torch.tensor([[float("nan")], [float("inf")]]),
    "zeros of both signs": torch.tensor([[0.0], [-0.0]]),
    "a list with a number in it": [torch.randn(2), 5, None],
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_page_holds_every_bit_of_what_nets_return(kind: str):
    (read,) = through_a_page({7: OUTPUTS[kind]}).values()
    flat, structure = journal.torch_pytree.tree_flatten(OUTPUTS[kind])
    again, same = journal.torch_pytree.tree_flatten(read)
    assert same == structure
    for a, b in zip(flat, again, strict=True):
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a.contiguous().view(torch.uint8), b.view(torch.uint8))
        else:
            assert a == b


def test_rows_that_are_all_the_same_are_kept_once():
    def size(x: Tensor) -> int:
        return len(page_of(x))

    assert size(torch.randn(1, 4096).repeat(2, 1)) < 0.6 * size(torch.randn(2, 4096))


def test_a_page_that_is_damaged_anywhere_or_cut_off_is_not_read():
    page = page_of(torch.randn(2, 3))
    for at in range(0, len(page), 7):
        with pytest.raises(Unfit):
            journal.read(page[:at] + bytes([page[at] ^ 1]) + page[at + 1 :], KEY, CPU)
        with pytest.raises(Unfit):
            journal.read(page[:at], KEY, CPU)


def test_a_picture_is_known_by_all_that_decides_its_bytes():
    r = asked(reproducible=True)
    others = [
        journal.identity(KEY, r, 1),
        journal.identity(b"another model", r, 0),
        *(
            journal.identity(KEY, r.model_copy(update=change), 0)
            for change in ({"seed": 1}, {"prompt": "a pear"}, {"scheduler": "ddim"}, {"image": "sha256:1"}, {"n": 2})
        ),
    ]
    own = journal.identity(KEY, r, 0)
    assert len({own, *others}) == 1 + len(others)
    assert own == journal.identity(KEY, r.model_copy(update={"metadata": {"for": "whom"}, "priority": "high"}), 0)


def test_where_bytes_are_promised_another_kind_of_machine_begins_anew():
    def seen_with(threads: int, **lane: bool) -> bytes:
        torch.set_num_threads(threads)
        return journal.identity(KEY, asked(**lane), 0)

    assert seen_with(1, reproducible=True) != seen_with(2, reproducible=True)
    assert seen_with(1) == seen_with(2)


def test_a_model_is_known_by_its_weights_its_card_and_the_code_that_draws(monkeypatch: pytest.MonkeyPatch):
    card = Catalog.read(["emoji-sd"]).default
    pipeline = load_pipeline(card, "cpu")

    def identity(card: ModelCard, pipeline: DiffusionPipeline) -> bytes:
        return journal.model_identity(card, modules_of(pipeline.components.values()))

    own = identity(card, pipeline)
    assert own == identity(card, load_pipeline(card, "cpu"))
    assert own != identity(card.model_copy(update={"reproducible_rows": 4}), pipeline)
    with torch.no_grad():
        pipeline.unet.conv_in.weight += 1e-3
    assert own != identity(card, pipeline)
    again = load_pipeline(card, "cpu")
    monkeypatch.setattr(journal, "code", lambda: b"of another version")
    assert own != identity(card, again)


# -- written behind the engine's back

RECORD: dict[str, Any] = {"generation": "a" * 32, "index": 0, "attempt": 1, "key": KEY}


def test_what_was_noted_is_read_by_the_next_attempt(written: Journal):
    record = Record(**RECORD)
    outputs = {number: torch.randn(2, 3) for number in range(2, 7)}
    for number, output in outputs.items():
        written.note(record, number, output)
        if number == 4:
            written.write()
    assert sorted(written.read(Record(**RECORD))) == [2, 3, 4]  # the rest is not stored yet
    written.write()
    read = written.read(Record(**RECORD | {"attempt": 2}))
    assert all(torch.equal(read[number], output) for number, output in outputs.items())
    assert written.read(Record(**RECORD | {"key": b"x" * 32})) == {}
    assert written.read(Record(**RECORD | {"index": 1})) == {}


def test_what_is_noted_is_a_copy(written: Journal):
    record, output = Record(**RECORD), torch.ones(2, 3)
    written.note(record, 1, output)
    output.zero_()
    written.write()
    assert torch.equal(written.read(record)[1], torch.ones(2, 3))


def test_of_two_attempts_the_later_ones_word_counts(written: Journal):
    first, second = Record(**RECORD), Record(**RECORD | {"attempt": 2})
    written.note(second, 3, torch.full((1,), 2.0))
    written.write()
    written.note(first, 3, torch.full((1,), 1.0))  # it was frozen, and does not know yet
    written.write()
    assert float(written.read(Record(**RECORD | {"attempt": 3}))[3]) == 2


def test_pages_are_written_by_themselves_every_interval(blobs: BlobStore):
    journal = Journal(blobs, CPU, interval=0.05, limit=2**20)
    record = Record(**RECORD)
    journal.note(record, 1, torch.randn(3))
    until(lambda: journal.read(record))
    journal.close()


def test_a_journal_is_no_longer_than_its_limit(blobs: BlobStore):
    journal = Journal(blobs, CPU, interval=3600, limit=10_000)
    record = Record(**RECORD)
    for number in range(100):
        journal.note(record, number, torch.randn(500))
        if number % 3 == 0:
            journal.write()
    journal.close()
    assert sorted(journal.read(record)) == list(range(5))  # the beginning, which is worth most


def test_a_store_that_is_away_costs_a_page_and_nothing_else(written: Journal, tmp_path: Path):
    record = Record(**RECORD)
    (tmp_path / "blobs" / "generations").write_text("not a folder")
    written.note(record, 1, torch.randn(3))
    written.write()
    (tmp_path / "blobs" / "generations").unlink()
    written.note(record, 2, torch.randn(3))
    written.write()
    assert list(written.read(record)) == [2]


def test_a_journal_goes_with_its_generation_and_does_not_come_back(written: Journal, blobs: BlobStore):
    record, neighbour = Record(**RECORD), Record(**RECORD | {"generation": "b" * 32})
    for one in (record, neighbour):
        written.note(one, 1, torch.randn(3))
    written.write()
    written.note(record, 2, torch.randn(3))
    written.drop([record])
    written.note(record, 3, torch.randn(3))
    written.write()
    assert written.read(record) == {}
    assert list(written.read(neighbour)) == [1]
