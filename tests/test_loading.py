"""Weights from a folder, a single file and the hub, as pipelines that draw; never from a pickle."""

import hashlib
import json
import multiprocessing
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.catalog import Catalog, Dtype, Folder, Hub, ModelCard, SingleFile
from models.guided import modules_of
from models.loading import ModelUnavailable, UnsafeWeights, adapter_file, load_parts, load_pipeline, resident_bytes
from tests import tiny


def test_the_shipped_model_draws_a_picture():
    pipeline: Any = load_pipeline(Catalog.read(["emoji-sd"])["emoji-sd"], "cpu")
    picture = pipeline("a red apple on a blue background", num_inference_steps=4, width=128, height=128).images[0]
    assert picture.size == (128, 128)
    assert np.asarray(picture).std() > 20


@pytest.mark.parametrize(
    "make", [tiny.stable_diffusion, tiny.sdxl, tiny.sd3, tiny.flux], ids=lambda make: make.__name__
)
def test_a_folder_draws_as_the_pipeline_that_was_saved(make: Callable[[], Any], tmp_path: Path):
    original = make()
    loaded = load_pipeline(folder_card(tiny.save(original, tmp_path)), "cpu")
    assert type(loaded) is type(original)
    np.testing.assert_allclose(draw(loaded), draw(original), atol=1e-5)


def test_a_single_file_draws_as_the_folder_it_was_made_of(saved: Path, tmp_path: Path):
    original: Any = load_pipeline(folder_card(saved), "cpu")
    save_file(original_format(original), tmp_path / "tiny.safetensors")
    config = without_weights(saved, tmp_path / "config")
    loaded = load_pipeline(file_card(tmp_path / "tiny.safetensors", config), "cpu")
    np.testing.assert_allclose(draw(loaded), draw(original), atol=1e-5)


def test_a_loaded_pipeline_is_for_inference_only(saved: Path):
    for module in modules_of(load_pipeline(folder_card(saved), "cpu").components.values()):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_weights_take_the_dtype_of_the_card(saved: Path):
    half = folder_card(saved).model_copy(update={"dtype": Dtype(cpu="bfloat16")})
    dtypes = {
        tensor.dtype
        for module in modules_of(load_pipeline(half, "cpu").components.values())
        for tensor in module.parameters()
    }
    assert dtypes == {torch.bfloat16}


def test_resident_bytes_are_those_of_all_modules_with_shared_tensors_once():
    pipeline: Any = tiny.stable_diffusion()
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    parts = [tensor.nbytes for module in (unet, vae, text_encoder) for tensor in module.state_dict().values()]
    parts += [tensor.nbytes for tensor in text_encoder.buffers()]  # position ids, which are not saved
    assert resident_bytes(modules_of(pipeline.components.values())) == sum(parts)
    unet.conv_out.weight = vae.encoder.conv_in.weight = unet.conv_in.weight
    pipeline.register_modules(image_encoder=text_encoder)
    freed = 4 * (4 * 32 + 3 * 32) * 9  # float32, channels in and out, 3 x 3 pixels
    assert resident_bytes(modules_of(pipeline.components.values())) == sum(parts) - freed


def test_the_safety_checker_is_not_loaded(saved: Path, tmp_path: Path):
    folder = shutil.copytree(saved, tmp_path / "model")
    edit_index(
        folder, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], requires_safety_checker=True
    )
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"a pickle")
    pipeline: Any = load_pipeline(folder_card(folder), "cpu")
    assert pipeline.safety_checker is None


# -- what is refused


def test_a_folder_with_a_component_only_as_a_pickle_is_refused(saved: Path, tmp_path: Path):
    folder = shutil.copytree(saved, tmp_path / "model")
    pickled(folder / "text_encoder")
    with pytest.raises(UnsafeWeights, match=r"model/text_encoder/model\.bin"):
        load_pipeline(folder_card(folder), "cpu")


def test_a_folder_that_holds_nothing_but_a_checkpoint_is_refused(tmp_path: Path):
    (tmp_path / "v1-5.ckpt").write_bytes(b"a pickle")
    with pytest.raises(UnsafeWeights, match=r"v1-5\.ckpt"):
        load_pipeline(folder_card(tmp_path), "cpu")


def test_pickles_beside_safetensors_do_no_harm(saved: Path, tmp_path: Path):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "v1-5.ckpt").write_bytes(b"a pickle")
    assert draw(load_pipeline(folder_card(folder), "cpu")).std() > 0


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_a_single_file_that_is_a_pickle_is_refused(suffix: str, saved: Path, tmp_path: Path):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"a pickle")
    with pytest.raises(UnsafeWeights, match=re.escape(file.name)):
        load_pipeline(file_card(file, saved), "cpu")


def test_a_single_file_is_not_completed_from_pickles(saved: Path, tmp_path: Path):
    save_file({"something": torch.zeros(1)}, tmp_path / "tiny.safetensors")
    config = without_weights(saved, tmp_path / "config")
    (config / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UnsafeWeights, match=r"unet/diffusion_pytorch_model\.bin"):
        load_pipeline(file_card(tmp_path / "tiny.safetensors", config), "cpu")


@pytest.mark.parametrize("name", ["pipeline.py", "None.py", "unet/mine.py"])
def test_code_that_comes_with_weights_is_never_run(name: str, saved: Path, tmp_path: Path):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / name).write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')")
    if name == "pipeline.py":
        edit_index(folder, _class_name=["pipeline", "Mine"])
    if name == "unet/mine.py":
        edit_index(folder, unet=["mine", "Mine"])
    with pytest.raises(ModelUnavailable):
        load_pipeline(folder_card(folder), "cpu")
    assert not (tmp_path / "it ran").exists()


def test_what_is_missing_is_named_with_its_card(tmp_path: Path):
    missing = tmp_path / "missing"
    for card in (folder_card(missing), file_card(missing, tmp_path)):
        with pytest.raises(ModelUnavailable, match=f"tiny: .*{missing}"):
            load_pipeline(card, "cpu")


def test_a_folder_without_an_index_is_no_model(tmp_path: Path):
    with pytest.raises(ModelUnavailable, match=r"tiny: .*model_index\.json"):
        load_pipeline(folder_card(tmp_path), "cpu")


def test_damaged_weights_are_unavailable(saved: Path, tmp_path: Path):
    folder = shutil.copytree(saved, tmp_path / "model")
    for weights in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        whole = (folder / weights).read_bytes()
        (folder / weights).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ModelUnavailable):
            load_pipeline(folder_card(folder), "cpu")
        (folder / weights).write_bytes(whole)


# -- the hub: a real HTTP server, and a process for each test, since its address and the cache's are read on import


def test_the_hub_gives_the_revision_and_variant_of_the_card(
    hub: "FakeHub", process: ProcessPoolExecutor, saved: Path, tmp_path: Path
):
    half = tiny.stable_diffusion().to(dtype=torch.float16)
    repository = without_weights(saved, tmp_path / "repository")
    half.save_pretrained(repository, safe_serialization=True, variant="fp16")
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        (repository / f"{name}.safetensors").write_bytes(b"the full weights")
        (repository / f"{name}.bin").write_bytes(b"a pickle")
    hub.publish("someone/tiny", "main", tmp_path / "nothing")
    hub.publish("someone/tiny", "v1", repository)

    picture = process.submit(load_and_draw, hub_card("someone/tiny", "v1", variant="fp16")).result()

    np.testing.assert_allclose(picture, draw(half.to(dtype=torch.float32)), atol=1e-5)
    weights = {name for name in hub.files_asked_for() if name.endswith((".safetensors", ".bin"))}
    assert weights == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}


def test_a_repository_that_was_loaded_once_loads_while_the_hub_is_away(
    hub: "FakeHub", process: ProcessPoolExecutor, saved: Path
):
    hub.publish("someone/tiny", "main", saved)
    first = process.submit(load_and_draw, hub_card("someone/tiny", "main")).result()
    hub.stop()
    again = process.submit(load_and_draw, hub_card("someone/tiny", "main")).result()
    np.testing.assert_array_equal(again, first)


def test_a_hub_that_cannot_be_reached_makes_the_model_unavailable(hub: "FakeHub", process: ProcessPoolExecutor):
    card = hub_card("someone/tiny", "v1")
    with pytest.raises(ModelUnavailable, match=r"tiny: .*someone/tiny.*v1"):
        process.submit(load_and_draw, card).result()  # there, but without such a repository
    hub.stop()
    with pytest.raises(ModelUnavailable, match=r"tiny: .*someone/tiny.*v1"):
        process.submit(load_and_draw, card).result()


def test_a_gated_repository_says_which_licence_is_to_be_accepted(
    hub: "FakeHub", process: ProcessPoolExecutor, saved: Path
):
    hub.publish("someone/tiny", "main", saved)
    hub.gated = True
    with pytest.raises(
        ModelUnavailable, match=r"tiny: .*someone/tiny.* is gated: accept CC-BY-4.0 .*, and set HF_TOKEN"
    ):
        process.submit(load_and_draw, hub_card("someone/tiny", "main")).result()


def test_a_part_may_be_a_pipeline_of_the_hub(hub: "FakeHub", process: ProcessPoolExecutor, saved: Path):
    hub.publish("someone/tiny", "main", saved)
    card = hub_card("someone/other", "main").model_copy(update={"parts": {"prior": "hub:someone/tiny@main"}})
    assert process.submit(names_of_parts, card).result() == {"prior": "StableDiffusionPipeline"}


def test_a_part_may_be_a_single_model_of_the_hub(hub: "FakeHub", process: ProcessPoolExecutor, saved: Path):
    hub.publish("someone/words", "main", saved / "text_encoder")
    card = hub_card("someone/other", "main").model_copy(update={"parts": {"words": "hub:someone/words@main"}})
    assert process.submit(names_of_parts, card).result() == {"words": "CLIPTextModel"}


def test_a_part_may_lie_inside_a_repository_of_several(hub: "FakeHub", process: ProcessPoolExecutor, saved: Path):
    hub.publish("someone/many", "main", saved)
    card = hub_card("someone/other", "main").model_copy(
        update={"parts": {"words": "hub:someone/many/text_encoder@main"}}
    )
    assert process.submit(names_of_parts, card).result() == {"words": "CLIPTextModel"}
    assert {path.rpartition("/")[0] for path in hub.asked if path.endswith(".safetensors")} == {
        f"/someone/many/resolve/{commit_of(saved)}/text_encoder"
    }


def test_pickles_inside_a_repository_are_refused_before_they_are_fetched(
    hub: "FakeHub", process: ProcessPoolExecutor, saved: Path, tmp_path: Path
):
    repository = shutil.copytree(saved, tmp_path / "repository")
    pickled(repository / "text_encoder")
    hub.publish("someone/many", "main", repository)
    card = hub_card("someone/other", "main").model_copy(
        update={"parts": {"words": "hub:someone/many/text_encoder@main"}}
    )
    with pytest.raises(UnsafeWeights, match=r"someone/many/text_encoder/.+\.bin"):
        process.submit(names_of_parts, card).result()


def test_an_adapter_may_be_a_file_inside_a_repository(hub: "FakeHub", process: ProcessPoolExecutor, saved: Path):
    hub.publish("someone/many", "main", saved)
    place = "hub:someone/many/unet/diffusion_pytorch_model.safetensors@main"
    assert process.submit(adapter_file, place).result().is_file()
    assert hub.files_asked_for() == {"diffusion_pytorch_model.safetensors"}


def test_a_repository_of_pickles_is_refused_before_they_are_fetched(
    hub: "FakeHub", process: ProcessPoolExecutor, saved: Path, tmp_path: Path
):
    repository = shutil.copytree(saved, tmp_path / "repository")
    pickled(repository / "unet")
    hub.publish("someone/tiny", "main", repository)
    with pytest.raises(UnsafeWeights, match=r"someone/tiny/unet/diffusion_pytorch_model\.bin"):
        process.submit(load_and_draw, hub_card("someone/tiny", "main")).result()
    assert hub.files_asked_for() == {"model_index.json"}


class FakeHub(ThreadingHTTPServer):
    """The routes of huggingface.co that downloads use, over folders."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.folders: dict[tuple[str, str], Path] = {}  # by repository, and revision or commit
        self.asked: list[str] = []
        self.gated = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files_asked_for(self) -> set[str]:
        return {Path(path).name for path in self.asked if "/resolve/" in path}

    def publish(self, repository: str, revision: str, folder: Path) -> None:
        self.folders[repository, revision] = self.folders[repository, commit_of(folder)] = folder

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class FakeHubHandler(BaseHTTPRequestHandler):
    ROUTES = re.compile(
        r"/api/models/(?P<model>\w+/\w+)/revision/(?P<revision>\w+)"
        r"|/api/models/(?P<listed>\w+/\w+)/tree/(?P<at>\w+)"
        r"|/(?P<repository>\w+/\w+)/resolve/(?P<commit>\w+)/(?P<file>.+)"
    )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub: Any = self.server
        hub.asked.append(self.path)
        route = self.ROUTES.fullmatch(self.path.partition("?")[0])
        assert route, f"huggingface_hub asks for a route that the fake lacks: {self.path}"
        parts = route.groupdict()
        key = (
            parts["model"] or parts["listed"] or parts["repository"],
            parts["revision"] or parts["at"] or parts["commit"],
        )
        if hub.gated:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
            return
        if key not in hub.folders:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        folder = hub.folders[key]
        commit = commit_of(folder)
        files = [(str(file.relative_to(folder)), file) for file in sorted(folder.rglob("*")) if file.is_file()]
        if parts["model"]:
            siblings = [{"rfilename": name} for name, _ in files]
            self.answer(200, json.dumps({"id": key[0], "sha": commit, "siblings": siblings}).encode())
        elif parts["listed"]:
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": oid(file)} for name, file in files
            ]
            self.answer(200, json.dumps(tree).encode())
        elif parts["file"] in dict(files):
            file = folder / parts["file"]
            self.answer(200, file.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{oid(file)}"'})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def commit_of(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    hub = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield hub
    hub.stop()


@pytest.fixture
def process(hub: FakeHub) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        yield process


def load_and_draw(card: ModelCard) -> np.ndarray:
    return draw(load_pipeline(card, "cpu"))


def names_of_parts(card: ModelCard) -> dict[str, str]:
    return {name: type(part).__name__ for name, part in load_parts(card, "cpu").items()}


def draw(pipeline: Any) -> np.ndarray:
    """A picture of 32 × 32 pixels, each from 0 to 1."""
    generator = torch.Generator().manual_seed(1)
    arguments = {"num_inference_steps": 2, "width": 32, "height": 32, "output_type": "np"}
    return pipeline("a cat", generator=generator, **arguments).images[0]


# -- cards and folders


def tiny_card(source: Folder | SingleFile | Hub) -> ModelCard:
    return Catalog.read(["emoji-sd"])["emoji-sd"].model_copy(update={"name": "tiny", "source": source})


def folder_card(path: Path) -> ModelCard:
    return tiny_card(Folder(kind="folder", path=path))


def file_card(path: Path, config: Path) -> ModelCard:
    return tiny_card(SingleFile(kind="file", path=path, config=config))


def hub_card(repository: str, revision: str, variant: str | None = None) -> ModelCard:
    return tiny_card(Hub(kind="hub", repository=repository, revision=revision, variant=variant))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion; tests write into copies."""
    return tiny.save(tiny.stable_diffusion(), tmp_path_factory.mktemp("saved"))


def without_weights(folder: Path, copy: Path) -> Path:
    return shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))


def pickled(component: Path) -> None:
    for weights in component.glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))


def edit_index(folder: Path, **entries: Any) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | entries))


# -- the layout of the original Stable Diffusion checkpoints, for the tiny pipeline's two levels

UNET = {
    r"(resnets\.\d)\.norm1": r"\1.in_layers.0",
    r"(resnets\.\d)\.conv1": r"\1.in_layers.2",
    r"(resnets\.\d)\.time_emb_proj": r"\1.emb_layers.1",
    r"(resnets\.\d)\.norm2": r"\1.out_layers.0",
    r"(resnets\.\d)\.conv2": r"\1.out_layers.3",
    r"(resnets\.\d)\.conv_shortcut": r"\1.skip_connection",
    r"^time_embedding\.linear_1": "time_embed.0",
    r"^time_embedding\.linear_2": "time_embed.2",
    r"^conv_in": "input_blocks.0.0",
    r"^down_blocks\.0\.resnets\.0": "input_blocks.1.0",
    r"^down_blocks\.0\.attentions\.0": "input_blocks.1.1",
    r"^down_blocks\.0\.downsamplers\.0\.conv": "input_blocks.2.0.op",
    r"^down_blocks\.1\.resnets\.0": "input_blocks.3.0",
    r"^mid_block\.resnets\.0": "middle_block.0",
    r"^mid_block\.attentions\.0": "middle_block.1",
    r"^mid_block\.resnets\.1": "middle_block.2",
    r"^up_blocks\.0\.resnets\.(\d)": r"output_blocks.\1.0",
    r"^up_blocks\.0\.upsamplers\.0": "output_blocks.1.1",
    r"^up_blocks\.1\.resnets\.0": "output_blocks.2.0",
    r"^up_blocks\.1\.attentions\.0": "output_blocks.2.1",
    r"^up_blocks\.1\.resnets\.1": "output_blocks.3.0",
    r"^up_blocks\.1\.attentions\.1": "output_blocks.3.1",
    r"^conv_norm_out": "out.0",
    r"^conv_out": "out.2",
}
AUTOENCODER = {
    r"down_blocks\.(\d)\.resnets": r"down.\1.block",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
    r"up_blocks\.0\.resnets": "up.1.block",  # the original counts from the outermost level
    r"up_blocks\.0\.upsamplers\.0": "up.1.upsample",
    r"up_blocks\.1\.resnets": "up.0.block",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
}


def original_format(pipeline: Any) -> dict[str, Tensor]:
    """The pipeline's weights under the names of the CompVis checkpoints."""
    return {
        **renamed(pipeline.unet, "model.diffusion_model.", UNET),
        **renamed(pipeline.vae, "first_stage_model.", AUTOENCODER),
        **renamed(pipeline.text_encoder, "cond_stage_model.transformer.text_model.", {r"^text_model\.": ""}),
    }


def renamed(module: torch.nn.Module, prefix: str, names: dict[str, str]) -> dict[str, Tensor]:
    weights = {}
    for name, weight in module.state_dict().items():
        for pattern, original in names.items():
            name = re.sub(pattern, original, name)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            weight = weight[:, :, None, None]  # 1 × 1 convolutions there
        weights[prefix + name] = weight.contiguous()
    return weights
