"""Model cards: data that says what a model is and can do. Readable without torch."""

import hashlib
import importlib.util
import tomllib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.schemas import GenerationRequest, Guide, Guiding, Model, ModelDefaults, ModelLimits, ModelVideo, Size, Task
from models.weighting import HEAVIEST, fragments

CARDS = Path(__file__).parent / "cards"
WEIGHTS = Path(__file__).parent / "weights"


def place_of(path: str) -> Path:
    """A folder of weights: below `models/weights`, absolute, or in an installed package (`package:name/folder`).

    Raises:
        FileNotFoundError: there is no such package; the message names it.
    """
    if not path.startswith("package:"):
        return WEIGHTS / path
    name, _, folder = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the Python package {name} is not installed")
    return Path(spec.origin).parent / folder


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Folder(Strict):
    """A folder in diffusers' layout; relative paths start at `models/weights`."""

    kind: Literal["folder"]
    path: Path

    @property
    def place(self) -> Path:
        return WEIGHTS / self.path


class SingleFile(Strict):
    """One `.safetensors` checkpoint; `config` is a folder with the pipeline's configuration."""

    kind: Literal["file"]
    path: Path
    config: Path

    @property
    def place(self) -> Path:
        return WEIGHTS / self.path


class Hub(Strict):
    """A repository on the Hugging Face hub, at one revision."""

    kind: Literal["hub"]
    repository: str
    revision: str
    variant: str | None = None


class Dtype(Strict):
    """In which precision a model draws. `auto` is bfloat16 where the processor computes in it, else float32."""

    cpu: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    cuda: Literal["float32", "float16", "bfloat16"] = "float16"


class Speed(Strict):
    """What is done to a model's nets before they first run; all of it is off unless it measures faster."""

    channels_last: Literal["none", "denoiser", "decoder", "both"] = "none"
    fused_qkv: bool = False  # one product for queries, keys and values
    storage: Literal["float8"] | None = None  # the denoiser's weights in half the memory; computed in the dtype above
    quantize: Literal["float8"] | None = None  # its products in float8, by torchao
    compile: Literal["off", "whole", "regional"] = "off"  # the denoiser; its cache lies in the data directory


class Parts(Strict):
    """No pipeline: the model is what the card's `parts` make of it."""

    kind: Literal["parts"]


class Stage(Strict):
    """How a stage samples that a request says nothing of."""

    num_inference_steps: int
    guidance_scale: float = 1.0


class Sampling(Strict):
    """How a transformer's next code is chosen."""

    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)


VIDEO: dict[Task, Task] = {"text-to-image": "text-to-video", "image-to-image": "image-to-video"}
FEW_STEPS = {"lcm": 50, "tcd": 50}  # samplers of models distilled at so many timesteps, beyond which there are none
ADAPTABLE = ("stable-diffusion", "diffusers")  # families whose programs put adapters on
WEIGHABLE = ("stable-diffusion",)  # families whose programs weigh words
GUIDED_BY: dict[str, tuple[Guiding, str]] = {  # parts of a model that look at a picture of the request's
    "controlnet": ("control_image", "ControlNet"),  # Zhang et al. 2023
    "ip_adapter": ("ip_adapter_image", "IP-Adapter"),  # Ye et al. 2023
}


class ModelCard(Strict):
    """One file of `models/cards`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")  # part of queue names and metrics
    title: str
    description: str
    family: str
    source: Annotated[Folder | SingleFile | Hub | Parts, Field(discriminator="kind")]
    dtype: Dtype = Dtype()
    speed: Speed = Speed()
    licence: str
    licence_url: str
    tasks: list[Task]
    guidance: list[Guide] = ["classifier_free"]
    classes: list[str] = []  # of a class-conditional model, which draws nothing else
    parts: dict[str, str] = {}  # what it has beside the source: a `place_of`, or `hub:repository[/path]@revision`
    merged_lora: str | None = None  # an adapter that is in the weights for good, such as LCM-LoRA: a place likewise
    loras: dict[str, str] = {}  # adapters that requests may ask for: places as of `parts`
    prompt_weights: bool = False  # words may have weights
    sampling: Sampling | None = None  # of models that write codes, one a step: they take no other number of steps
    stages: dict[str, Stage] = {}  # beside the one that a request decides: unCLIP's prior, a cascade's upsampler
    size: Size
    video: ModelVideo | None = None  # of models that draw those, and nothing else
    limits: ModelLimits
    defaults: ModelDefaults
    schedulers: list[str]
    memory_mib: int  # of the resident model on an accelerator; residency plans with it before loading
    max_rows: int = 32  # widest forward pass worth trying; diffusers' Upsample2D takes another path from 64 on
    reproducible_rows: int = 8  # the exact lane's row count, part of the contract: changing it changes bytes

    @model_validator(mode="after")
    def _defaults_are_possible(self) -> "ModelCard":
        defaults = self.defaults.model_dump(exclude={"strength"})
        size = self.size.model_dump(include={"width", "height"})
        ordinary = GenerationRequest.model_validate({"prompt": "an ordinary one", **size, **defaults})
        if self.loras and self.family not in ADAPTABLE:
            raise ValueError(f"loras: the family {self.family} has none; {' and '.join(ADAPTABLE)} have")
        if self.merged_lora and self.family not in ADAPTABLE:
            raise ValueError(f"merged_lora: the family {self.family} has none; {' and '.join(ADAPTABLE)} have")
        if "decoder" in self.parts and self.family != "stable-diffusion":
            raise ValueError(f"parts.decoder: the family {self.family} has its own; stable-diffusion takes another")
        if self.prompt_weights and self.family not in WEIGHABLE:
            raise ValueError(f"prompt_weights: the family {self.family} has none; {' and '.join(WEIGHABLE)} has")
        for how in ("fused_qkv", "storage", "quantize"):
            if self.loras and getattr(self.speed, how):
                raise ValueError(f"speed.{how}: LoRA adapters need the weights as they are")
        for part in GUIDED_BY:
            if part in self.parts and self.family != "diffusers":
                raise ValueError(f"parts.{part}: the family {self.family} has none; diffusers has")
        if ("ip_adapter" in self.parts) != ("image_encoder" in self.parts):
            raise ValueError("parts: an ip_adapter and the image_encoder that it was trained with go together")
        if self.limits.best_of > 1 and "clip" not in self.parts:
            raise ValueError("limits.best_of: it needs a part `clip`, to choose")
        if problems := [f"default {field}: {what}" for field, what in self._limit_problems(ordinary)]:
            raise ValueError("; ".join(problems))
        return self

    @property
    def digest(self) -> str:
        """What tells this card from others, and from what it was."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def needs(self) -> list[Guiding]:
        """Pictures that each request must bring, for the model's parts to look at."""
        return [picture for part, (picture, _) in GUIDED_BY.items() if part in self.parts]

    def public(self) -> Model:
        """The part of the card that clients see."""
        shown = {name: getattr(self, name) for name in Model.model_fields if hasattr(self, name)}
        return Model.model_validate(shown | {"id": self.name, "loras": list(self.loras)})

    def kind(self, request: GenerationRequest) -> Task:
        """The task of a request to this model, also where it is not named."""
        kind = request.kind
        return VIDEO.get(kind, kind) if self.video and request.task is None else kind

    def problems(self, request: GenerationRequest) -> Iterator[tuple[str, str]]:
        """What this model cannot do of a request: (field, what is wrong)."""
        kind = self.kind(request)
        yield from self._limit_problems(request)
        yield from self._video_problems(request)
        yield from self._weight_problems(request)
        yield from request.problems(kind)
        if kind not in self.tasks:
            yield self._what_made_it(request), f"{self.name} does not do {kind}"
        for picture, part in GUIDED_BY.values():
            if (picture in self.needs) != (getattr(request, picture) is not None):
                what = f"needs one, for its {part}" if picture in self.needs else f"has no {part}"
                yield picture, f"{self.name} {what}"
        for i, lora in enumerate(request.loras):
            if lora.name not in self.loras:
                yield f"loras.{i}.name", f"{self.name} has no {lora.name!r}; it has {', '.join(self.loras) or 'none'}"
        for guide in request.guidance.asked:
            if guide not in self.guidance:
                yield f"guidance.{guide}", f"{self.name} has none; it has {', '.join(self.guidance)}"
        if self.classes and request.prompt is not None and request.prompt not in self.classes:
            some = ", ".join(self.classes[:5])
            yield "prompt", f"{self.name} draws {len(self.classes)} classes, such as {some}; see `GET /v1/models`"
        if request.negative_prompt and self.classes:
            yield "negative_prompt", f"{self.name} draws classes, and has none to steer away from"
        elif request.negative_prompt and not self.guidance:
            yield "negative_prompt", f"{self.name} has no guidance, which would steer away from it"

    @staticmethod
    def _what_made_it(request: GenerationRequest) -> str:
        """The field that decided what kind of generation this is."""
        if request.task is not None:
            return "task"
        fields = ("mask", "end_prompt", "end_image", "image")
        return next((field for field in fields if getattr(request, field) is not None), "prompt")

    def _limit_problems(self, request: GenerationRequest) -> Iterator[tuple[str, str]]:
        for field in ("width", "height"):
            if (pixels := getattr(request, field)) is not None:
                yield from self._size_problems(field, pixels)
        for field in ("n", "best_of", "num_inference_steps", "guidance_scale"):
            value, limit = getattr(request, field), getattr(self.limits, field)
            if value is not None and value > limit:
                yield field, f"{value} is more than {self.name} allows ({limit})"
        steps = self.defaults.num_inference_steps
        if self.sampling and request.num_inference_steps not in (None, steps):
            yield "num_inference_steps", f"{self.name} always takes {steps}"
        scheduler, steps = request.scheduler or self.defaults.scheduler, request.num_inference_steps or steps
        if steps > FEW_STEPS.get(scheduler, steps):
            yield "num_inference_steps", f"{steps} is more than {scheduler} has ({FEW_STEPS[scheduler]})"
        if request.scheduler is not None and request.scheduler not in self.schedulers:
            yield "scheduler", f"{self.name} has no {request.scheduler!r}; it has {', '.join(self.schedulers)}"

    def _weight_problems(self, request: GenerationRequest) -> Iterator[tuple[str, str]]:
        if not request.prompt_weights:
            return
        if not self.prompt_weights:
            yield "prompt_weights", f"{self.name} has none: it takes brackets for what they are"
        for field in ("prompt", "negative_prompt"):
            for text, weight in fragments(getattr(request, field) or ""):
                if not 0 <= weight <= HEAVIEST:
                    yield field, f"weights are from 0 to {HEAVIEST:g}, and {text.strip()[:64]!r} has {weight:g}"

    def _video_problems(self, request: GenerationRequest) -> Iterator[tuple[str, str]]:
        frames, output_format = request.num_frames, request.output_format
        if self.video is None:
            for field in ("num_frames", "fps"):
                if getattr(request, field) is not None:
                    yield field, f"{self.name} draws single pictures"
            if output_format == "mp4":
                yield "output_format", f"{self.name} draws single pictures, and mp4 is for videos"
            return
        if output_format == "jpeg":
            yield "output_format", f"{self.name} draws videos, which no jpeg holds"
        if frames is not None and frames > self.video.maximum:
            yield "num_frames", f"{frames} is more than {self.name} allows ({self.video.maximum})"
        elif frames is not None and (frames - 1) % self.video.multiple_of:
            yield (
                "num_frames",
                f"must be one more than a multiple of {self.video.multiple_of} for {self.name}, not {frames}",
            )

    def _size_problems(self, field: str, pixels: int) -> Iterator[tuple[str, str]]:
        size = self.size
        if not size.minimum <= pixels <= size.maximum:
            yield field, f"{self.name} draws {size.minimum} to {size.maximum} pixels, not {pixels}"
        elif pixels % size.multiple_of:
            yield field, f"must be a multiple of {size.multiple_of} for {self.name}, not {pixels}"


class Catalog:
    """The cards of the served models, in the order they were named."""

    def __init__(self, cards: Iterable[ModelCard]):
        self._cards = {card.name: card for card in cards}

    @classmethod
    def read(cls, names: Iterable[str], extra: Path | None = None) -> "Catalog":
        """The cards of `names`, from `models/cards` and the folder `extra`.

        Raises:
            ValueError: a name has no card, or a card is wrong (the message names the file).
        """
        cards = {card.name: card for folder in (CARDS, extra) if folder for card in read_cards(folder)}
        if missing := [name for name in names if name not in cards]:
            raise ValueError(f"no card for {', '.join(missing)}; there are {', '.join(sorted(cards))}")
        return cls(cards[name] for name in names)

    def __iter__(self) -> Iterator[ModelCard]:
        return iter(self._cards.values())

    def __getitem__(self, name: str) -> ModelCard:
        return self._cards[name]

    def __contains__(self, name: object) -> bool:
        return name in self._cards

    @cached_property
    def default(self) -> ModelCard:
        return next(iter(self))

    @property
    def names(self) -> list[str]:
        return list(self._cards)


def read_cards(folder: Path) -> Iterator[ModelCard]:
    for path in sorted(folder.glob("*.toml")):
        try:
            yield ModelCard.model_validate(tomllib.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
