"""A card's weights, from wherever they are, as a diffusers pipeline ready to draw.

Only safetensors are read: a pickle runs whatever code its author put into it.
"""

import inspect
import json
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import diffusers
import safetensors.torch
import torch
import transformers
from diffusers import (
    AutoencoderTiny,
    ControlNetModel,
    DiffusionPipeline,
    PriorTransformer,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from httpx2 import HTTPError
from huggingface_hub import get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, GatedRepoError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer

from models.catalog import WEIGHTS, Folder, Hub, ModelCard, Parts, SingleFile, place_of
from models.ear import Ear
from models.guided import modules_of
from models.noised_clip import NoisedCLIP
from models.prepare import dtype_of, prepare
from models.token_transformer import TokenTransformer
from models.unclip import ImageProjection

INDEX = "model_index.json"
WITHOUT_INDEX = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth"})
UNREADABLE = (  # what the libraries raise for a source that is missing, out of reach, damaged or something else
    OSError,
    ValueError,
    HTTPError,
    CachedRepoTreeNotFoundError,
    SafetensorError,
    SingleFileComponentError,
)

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()  # the hub's as well


class UnsafeWeights(ValueError):
    """A part of the model exists only as a pickle."""


class ModelUnavailable(ValueError):
    """The source is missing, out of reach, or not a diffusers pipeline."""


def load_pipeline(card: ModelCard, device: str) -> DiffusionPipeline | None:
    """The card's pipeline on `device`, in the card's dtype for such a device, for inference only; None without one.

    Raises:
        UnsafeWeights: the message names the pickle; nothing was loaded.
        ModelUnavailable: the message names the card and the source.
    """
    dtype = dtype_of(card, device)
    with reading(card, repr(card.source)):
        match card.source:
            case Folder(place=folder):
                pipeline = from_folder(folder, dtype)
            case SingleFile(place=file, config=config):
                pipeline = from_single_file(file, WEIGHTS / config, dtype)
            case Hub() as hub:
                pipeline = from_folder(download(hub), dtype, hub.variant)
            case Parts():
                return None
    if card.merged_lora:
        with reading(card, f"its LoRA from {card.merged_lora}"):
            pipeline.load_lora_weights(adapter_file(card.merged_lora), adapter_name="merged")
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
    for name, place in card.loras.items():
        with reading(card, f"its LoRA {name} from {place}"):
            pipeline.load_lora_weights(adapter_file(place), adapter_name=name)
    pipeline = ready(pipeline, device)
    prepare(card, pipeline.components.values(), dtype)
    return pipeline


def adapter_file(place: str) -> Path:
    """The only `.safetensors` file of a folder, or the file itself.

    Raises:
        UnsafeWeights: there are only pickles.
        FileNotFoundError: there is none, or which of several is meant is anybody's guess.
    """
    path = adapter_folder(place)
    files = [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))
    if not files and path.is_dir():
        refuse_pickles(path, files_in(path), {})
    if len(files) != 1 or not files[0].is_file():
        raise FileNotFoundError(f"{path} is not one .safetensors file, nor a folder with one")
    return files[0]


def adapter_folder(place: str) -> Path:
    hub, inside = hub_of(place)
    if hub is None:
        return place_of(place)
    files = inside or "*.safetensors"
    return Path(snapshot_download(hub.repository, revision=hub.revision, allow_patterns=[files]), inside)


@contextmanager
def reading(card: ModelCard, what: str) -> Generator[None]:
    """What goes wrong meanwhile is the card's misfortune, and says of what."""
    try:
        yield
    except UnsafeWeights:
        raise
    except GatedRepoError as error:
        accept = f"accept {card.licence} ({card.licence_url}) on the hub, and set HF_TOKEN"
        raise ModelUnavailable(f"{card.name}: {what} is gated: {accept}") from error
    except UNREADABLE as error:
        raise ModelUnavailable(f"{card.name}: cannot load {what}: {error}") from error


def ready(pipeline: Any, device: str) -> Any:
    for module in modules_of(pipeline.components.values()):
        module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


PARTS: dict[str, Any] = {
    "AutoencoderTiny": AutoencoderTiny,
    "BertModel": transformers.BertModel,
    "ControlNetModel": ControlNetModel,
    "CLIPModel": transformers.CLIPModel,
    "CLIPTextModel": transformers.CLIPTextModel,
    "CLIPVisionModelWithProjection": transformers.CLIPVisionModelWithProjection,
    "Ear": Ear,
    "ImageProjection": ImageProjection,
    "JanusForConditionalGeneration": transformers.JanusForConditionalGeneration,
    "NoisedCLIP": NoisedCLIP,
    "PriorTransformer": PriorTransformer,
    "TokenTransformer": TokenTransformer,
    "UNet2DConditionModel": UNet2DConditionModel,
    "UNet2DModel": UNet2DModel,
    "VQModel": VQModel,
}


def load_parts(card: ModelCard, device: str) -> dict[str, Any]:
    """What the card's model has beside its pipeline, by name: models, of a class that their configuration names, whole
    pipelines, and the `tokenizer` and the `scheduler`, if they are called so.

    Raises:
        UnsafeWeights, ModelUnavailable: as of `load_pipeline`.
    """
    dtype = dtype_of(card, device)
    parts: dict[str, Any] = {}
    for name, path in card.parts.items():
        with reading(card, f"its {name} from {path}"):
            is_file = name == "ip_adapter"
            parts[name] = (
                read_ip_adapter(adapter_file(path)) if is_file else load_part(name, folder_of(path), dtype, device)
            )
    prepare(card, parts.values(), dtype)
    return parts


def folder_of(path: str) -> Path:
    """Of a part; what the hub has is fetched."""
    hub, inside = hub_of(path)
    return download(hub, inside) if hub else place_of(path)


def hub_of(place: str) -> tuple[Hub | None, str]:
    """What `hub:owner/name@revision` names, or `hub:owner/name/path/in/it@revision`: the repository, and the path."""
    if not place.startswith("hub:"):
        return None, ""
    path, _, revision = place.removeprefix("hub:").partition("@")
    owner, name, *inside = path.split("/")
    return Hub(kind="hub", repository=f"{owner}/{name}", revision=revision or "main"), "/".join(inside)


def read_ip_adapter(file: Path) -> dict[str, dict[str, Tensor]]:
    """Its two halves, as diffusers takes them: what looks at the picture, and the attention to what that saw."""
    weights = safetensors.torch.load_file(file)
    halves = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in weights.items():
        half, _, rest = name.partition(".")
        if half not in halves:
            raise ValueError(f"{file} is no IP-Adapter: it has {name}")
        halves[half][rest] = tensor
    return halves


def load_part(name: str, folder: Path, dtype: torch.dtype, device: str) -> Any:
    if (folder / INDEX).is_file():
        return ready(from_folder(folder, dtype), device)
    refuse_pickles(folder, [file.relative_to(folder) for file in folder.glob("*")], {})
    if name == "tokenizer":
        return AutoTokenizer.from_pretrained(folder)
    if name == "scheduler":
        index = json.loads((folder / "scheduler_config.json").read_text())
        return getattr(diffusers, index["_class_name"]).from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    kind = PARTS[config.get("_class_name") or config.get("architectures", ["CLIPModel"])[0]]
    part = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    return part.eval().requires_grad_(False).to(device)


def resident_bytes(modules: Iterable[nn.Module]) -> int:
    """What the parameters and buffers of these occupy; a tensor that modules share counts once."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def from_folder(folder: Path, dtype: torch.dtype, variant: str | None = None) -> Any:
    """A pipeline in diffusers' layout: an index, and a folder for each component."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    index = read_index(folder)
    refuse_pickles(folder, files_in(folder), index)
    cls = pipeline_class(index)
    return cls.from_pretrained(folder, dtype=dtype, variant=variant, use_safetensors=True, **no_safety_checker(cls))


def from_single_file(file: Path, config: Path, dtype: torch.dtype) -> Any:
    """All components in one file, as the original code publishes them; `config` is a folder in diffusers' layout."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    refuse_pickles(file.parent, [PurePath(file.name)], {})
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} is not a .safetensors file")
    index = read_index(config)
    refuse_pickles(config, files_in(config), index)  # a component that the file lacks may be read from here
    cls = pipeline_class(index)
    checker = no_safety_checker(cls)
    return cls.from_single_file(str(file), config=str(config), dtype=dtype, local_files_only=True, **checker)


def download(hub: Hub, inside: str = "") -> Path:
    """The folder in the hub's cache with what the pipeline or the single model needs: enough while the hub is away.

    Args:
        inside: where in the repository the model is, if that has several.
    """
    snapshot = Path(snapshot_download(hub.repository, revision=hub.revision, allow_patterns=[INDEX]))
    commit = snapshot.name  # what is judged here is what will be fetched, should the branch move meanwhile
    files = [PurePath(file.path) for file in get_cached_repo_tree(hub.repository, revision=commit)]
    if inside:
        own = [file.relative_to(inside) for file in files if file.is_relative_to(inside)]
        refuse_pickles(PurePath(hub.repository, inside), own, {})
        wanted = [f"{inside}/{pattern}" for pattern in WITHOUT_INDEX]
        return Path(snapshot_download(hub.repository, revision=commit, allow_patterns=wanted), inside)
    index = read_index(snapshot)
    refuse_pickles(PurePath(hub.repository), files, index)
    if not index:  # a model of transformers, say
        return Path(snapshot_download(hub.repository, revision=commit, allow_patterns=WITHOUT_INDEX))
    return Path(
        DiffusionPipeline.download(
            hub.repository,
            revision=commit,
            variant=hub.variant,
            use_safetensors=True,
            safety_checker=None,  # ignored by classes without one
        )
    )


def read_index(folder: Path) -> dict[str, Any]:
    """The pipeline's class and components; empty if this is no pipeline."""
    path = folder / INDEX
    return json.loads(path.read_text()) if path.is_file() else {}


def pipeline_class(index: dict[str, Any]) -> Any:
    """The class that the index names, if it is one of diffusers' own: code that comes with weights is never run."""
    name = str(index.get("_class_name", f"no {INDEX}"))
    cls = getattr(diffusers, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, DiffusionPipeline)):
        raise ValueError(f"not a pipeline of diffusers: {name}")
    return cls


def no_safety_checker(cls: type[DiffusionPipeline]) -> dict[str, Any]:
    """The arguments that keep Stable Diffusion's checker from being loaded, where the class has one.

    Being told that it is not required keeps diffusers from warning of its absence.
    """
    arguments = {"safety_checker": None, "requires_safety_checker": False}
    return {name: value for name, value in arguments.items() if name in inspect.signature(cls.__init__).parameters}


def files_in(folder: Path) -> list[PurePath]:
    return [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]


def refuse_pickles(place: PurePath, files: Collection[PurePath], index: dict[str, Any]) -> None:
    """Raises UnsafeWeights if a component has only pickles; without an index, all files are one component.

    Pickles that lie beside safetensors, or outside the components, are never opened.
    """
    components = [name for name, value in index.items() if isinstance(value, list) and all(value)]
    loaded = [[file for file in files if file.parts[0] == name] for name in components if name != "safety_checker"]
    for weights in loaded if index else [files]:
        pickles = sorted(file for file in weights if file.suffix.lower() in PICKLES)
        if pickles and not any(file.suffix == ".safetensors" for file in weights):
            raise UnsafeWeights(f"{place / pickles[0]} is a pickle, which can run code; convert it to safetensors")
