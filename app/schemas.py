"""The public contract: what a client sends and sees."""

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Status = Literal["queued", "running", "succeeded", "failed", "canceled", "expired"]
Task = Literal[
    "text-to-image",
    "image-to-image",
    "inpaint",
    "variation",
    "interpolate",
    "upscale",
    "text-to-video",
    "image-to-video",
]
Guide = Literal["classifier_free", "rescale", "dynamic_threshold", "interval", "every", "clip", "classifier"]
OutputFormat = Literal["png", "jpeg", "webp", "avif", "mp4"]
Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)

TAKES: dict[Task, tuple[tuple[str, ...], tuple[str, ...]]] = {  # what each needs, and what it may have besides
    "text-to-image": (("prompt",), ()),
    "image-to-image": (("prompt", "image"), ("strength",)),
    "inpaint": (("prompt", "image", "mask"), ("strength",)),
    "variation": (("image",), ("prompt", "end_prompt", "mix")),
    "interpolate": ((), ("prompt", "image", "end_prompt", "end_image", "mix")),
    "upscale": (("image",), ("prompt",)),
    "text-to-video": (("prompt",), ()),
    "image-to-video": (("prompt", "image"), ()),
}
PICTURES = ("image", "mask", "end_image", "control_image", "ip_adapter_image")
Guiding = Literal["control_image", "ip_adapter_image"]

MAX_SEED = 2**53 - 1  # the largest integer that JSON clients in JavaScript keep


# PNG's text chunks, which say how a picture was made, cannot hold a NUL.
Text = Annotated[str, StringConstraints(max_length=10_000, pattern=r"^[^\x00]*$")]
Name = Annotated[str, StringConstraints(max_length=64)]


class Guidance(BaseModel, frozen=True):
    """What steers the sampling beside `guidance_scale`, which is that of classifier-free guidance."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    clip: float | None = Field(
        default=None, ge=0, description="CLIP guidance: how hard a noise-aware CLIP pulls to the prompt."
    )
    classifier: float | None = Field(
        default=None, ge=0, description="Classifier guidance: how hard a noisy classifier pulls to the class."
    )
    rescale: float | None = Field(
        default=None, ge=0, le=1, description="How much of the contrast that guidance adds is taken back."
    )
    dynamic_threshold: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Dynamic thresholding: the part of a picture's values, such as 0.995, that is to lie between black "
        "and white; at high guidance_scale more than that would not.",
    )
    interval: list[float] | None = Field(
        default=None,
        min_length=2,
        max_length=2,
        description="The part of the steps that is guided, such as [0.2, 0.8]; the others cost half as much.",
    )
    every: int | None = Field(
        default=None,
        ge=1,
        le=10,
        description="Guidance is computed at every so many of the guided steps; those between add what it added last, "
        "and cost half as much.",
    )

    @field_validator("every", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @field_validator("interval")
    @classmethod
    def _in_order(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and not 0 <= value[0] < value[1] <= 1:
            raise PydanticCustomError("interval", "must be two numbers from 0 to 1, the smaller first")
        return value

    @property
    def asked(self) -> list[Guide]:
        """What is to be used, by name."""
        return [
            name
            for name in ("rescale", "dynamic_threshold", "interval", "every", "clip", "classifier")
            if getattr(self, name)
        ]


class Lora(BaseModel, frozen=True):
    """An adapter of the model, and how much of it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Name = Field(description="One that the model lists.")
    scale: float = Field(default=1.0, ge=-4, le=4, description="How much of it; 1 is as it was trained.")


class Webhook(BaseModel, frozen=True):
    """Who is told of a generation's course: a signed POST, tried again until it is answered."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: Annotated[str, StringConstraints(max_length=2048)] = Field(description="http or https; of a public host.")
    events: list[Status] = Field(
        default=["succeeded", "failed", "canceled", "expired"],
        min_length=1,
        max_length=6,
        description="Of which changes of its status; if unset, of the one that ends it.",
    )


class GenerationRequest(BaseModel, frozen=True):
    """A picture, or `n` of them, to be made. Unset numbers take the model's defaults (`GET /v1/models`)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Name | None = Field(None, description="A name from `GET /v1/models`; the first one if unset.")
    task: Task | None = Field(None, description="What to do; if unset, it follows from what comes with the prompt.")
    prompt: Annotated[Text, StringConstraints(strip_whitespace=True, min_length=1)] | None = Field(
        None,
        description="What to draw. What exceeds the model's text encoder is cut, and `warnings` says what was. "
        "Variations and interpolations of pictures do without.",
    )
    negative_prompt: Text = Field("", description="What to steer away from; needs guidance_scale > 1.")
    prompt_weights: bool = Field(
        False,
        description="Brackets in the prompts are weights: `(word:1.3)`, `(word)` for 1.1, `[word]` for 1 / 1.1. With a "
        "backslash before it, one is text.",
    )
    n: int = Field(1, ge=1, description="How many pictures; picture i has the seed `seed + i`.")
    best_of: int = Field(
        1, ge=1, description="Draw so many for each picture, and keep the one that CLIP finds most like the prompt."
    )
    width: int | None = Field(None, ge=1, description="Pixels.")
    height: int | None = Field(None, ge=1, description="Pixels.")
    num_inference_steps: int | None = Field(None, ge=1, description="More are finer, and take longer.")
    guidance_scale: float | None = Field(
        None, ge=0, description="Classifier-free guidance; at 1 or less it is off, and a step costs half as much."
    )
    guidance: Guidance = Field(default_factory=Guidance, description="Other guidance, where the model has it.")
    scheduler: Name | None = Field(None, description="The sampler, by a name that the model lists.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Zero is a seed. A random one if unset.")
    image: str | None = Field(None, description="The picture to start from: base64 or a `data:` URL.")
    mask: str | None = Field(None, description="White where `image` is to be repainted; of the same size.")
    strength: float | None = Field(None, gt=0, le=1, description="How far to leave `image`: 1 ignores it.")
    end_prompt: Text | None = Field(
        None, description="Interpolation: what to draw at the other end. A variation moves as `prompt` differs from it."
    )
    end_image: str | None = Field(None, description="Interpolation: the picture at the other end.")
    control_image: str | None = Field(
        None, description="What a model with a ControlNet follows: edges, depth or a pose, as the model says."
    )
    control_scale: float | None = Field(None, ge=0, le=2, description="How closely; 1 if unset.")
    ip_adapter_image: str | None = Field(
        None, description="What a model with an IP-Adapter takes up: the things, the style, not the places."
    )
    ip_adapter_scale: float | None = Field(None, ge=0, le=2, description="How much of it; 1 if unset.")
    mix: float | None = Field(None, ge=0, le=1, description="Where between the two ends: 0 is the first. 0.5 if unset.")
    num_frames: int | None = Field(None, ge=1, description="How long a video is to be, as its model allows.")
    fps: int | None = Field(None, ge=1, le=120, description="Frames a second, of a video.")
    loras: list[Lora] = Field(default=[], max_length=4, description="LoRA adapters to draw with, each once.")
    output_format: OutputFormat | None = Field(
        None, description="`png` if unset, `mp4` of a video; a video may also be an animated `webp`, `png` or `avif`."
    )
    preview_every: int | None = Field(None, ge=1, description="Publish a preview after every so many steps.")
    reproducible: bool = Field(False, description="Same seed, same bytes, whatever else the worker is doing.")
    expires_in: int | None = Field(None, ge=1, le=604_800, description="Seconds after which nobody wants it any more.")
    priority: Priority = Field("normal", description="Worth a minute of waiting, either way.")
    webhook: Webhook | None = Field(None, description="Whom to tell when it has ended, or of its course.")
    metadata: dict[Name, Annotated[str, Field(max_length=512)]] = Field(
        default_factory=dict, max_length=16, description="Your own labels; returned as they are."
    )

    @field_validator(
        "n",
        "best_of",
        "width",
        "height",
        "num_inference_steps",
        "num_frames",
        "fps",
        "seed",
        "preview_every",
        "expires_in",
        mode="before",
    )
    @classmethod
    def _whole(cls, value: object) -> object:
        """64 for 64.0: one number to JSON Schema, and one spelling to languages without integers."""
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @field_validator("mask", "strength")
    @classmethod
    def _belongs_to_an_image(cls, value: str | float | None, info: ValidationInfo) -> str | float | None:
        if value is not None and info.data.get("image", "a wrong one") is None:
            raise PydanticCustomError("no_image", "needs an `image`")
        return value

    @property
    def kind(self) -> Task:
        """The task, also where it is not named."""
        if self.task is not None:
            return self.task
        if self.mask is not None:
            return "inpaint"
        if self.end_prompt is not None or self.end_image is not None:
            return "interpolate"
        return "text-to-image" if self.image is None else "image-to-image"

    def problems(self, kind: Task) -> Iterator[tuple[str, str]]:
        """What does not go together, or is missing, for such a task: (field, what is wrong)."""
        needed, allowed = TAKES[kind]
        for field in ("prompt", "image", "mask", "strength", "end_prompt", "end_image", "mix"):
            given = getattr(self, field) is not None
            if field in needed and not given:
                yield field, f"{kind} needs one"
            elif given and field not in needed + allowed:
                yield field, f"has no meaning for {kind}"
        if kind == "interpolate":
            for prompt, image in (("prompt", "image"), ("end_prompt", "end_image")):
                if (getattr(self, prompt) is None) == (getattr(self, image) is None):
                    yield prompt, f"interpolate needs either `{prompt}` or `{image}`"
        if kind == "variation" and self.end_prompt is not None and self.prompt is None:
            yield "prompt", "a variation moves as `end_prompt` differs from `prompt`"
        for scale, picture in (("control_scale", "control_image"), ("ip_adapter_scale", "ip_adapter_image")):
            if getattr(self, scale) is not None and getattr(self, picture) is None:
                yield scale, f"needs a `{picture}`"
        names = [lora.name for lora in self.loras]
        for i, name in enumerate(names):
            if name in names[:i]:
                yield f"loras.{i}.name", f"{name} is there already"
        if self.guidance.clip and self.guidance.classifier:
            yield "guidance.clip", "steers instead of `guidance.classifier`: give one of the two"


class Parameters(GenerationRequest, frozen=True, json_schema_serialization_defaults_required=True):
    """A request with everything decided: what the worker runs and `Generation.parameters` shows.

    Pictures are named by the SHA-256 of what is stored instead of their bytes.
    """

    model: str
    prompt: str = ""
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    seed: int
    output_format: OutputFormat = "png"

    @property
    def rows(self) -> int:
        """What it wants of every pass of the denoiser."""
        return self.n * self.best_of * (2 if self.guidance_scale > 1 else 1)


class Answer(BaseModel, json_schema_serialization_defaults_required=True):
    """Always whole: to who reads the OpenAPI document, no field may be missing."""


class Progress(Answer):
    step: int = Field(description="Steps done, of the picture that is furthest behind.")
    steps: int
    stage: str | None = Field(default=None, description="Of a model that draws in several: `prior`, for one.")


class Image(Answer):
    url: str
    seed: int
    width: int
    height: int
    frames: int = Field(1, description="More than one: it is a video.")


class Failure(BaseModel):
    type: str = Field(description="A stable name, such as `model-unavailable`.")
    detail: str


class Generation(Answer):
    """A generation as it stands now."""

    id: str
    status: Status
    model: str
    created_at: datetime
    position: int | None = Field(None, description="How many are ahead of it in the queue.")
    eta: float | None = Field(None, description="Seconds until it is likely done, from measured step times.")
    progress: Progress | None = None
    images: list[Image] = []
    parameters: Parameters
    error: Failure | None = None
    attempts: int = Field(0, description="How many workers have begun it.")
    resumed_at_step: int | None = Field(
        None, description="The step at which the last of them went on with what another had drawn before it died."
    )
    timings: dict[str, float] = Field(
        {}, description="Seconds: queued, running, encoding; and from submission to first_step and to drawn."
    )
    warnings: list[str] = []


class GenerationFilter(BaseModel, extra="forbid"):
    """Which generations to list."""

    cursor: str | None = Field(None, pattern="^[0-9a-f]{32}$", description="`next_cursor` of the page before.")
    limit: int = Field(20, ge=1, le=100, description="How many at most.")
    status: Status | None = Field(None, description="Only those.")
    model: str | None = Field(None, description="Only those that it draws.")


class GenerationList(Answer):
    data: list[Generation]
    next_cursor: str | None = Field(None, description="Pass as `cursor` for the next page.")


class Size(BaseModel):
    width: int
    height: int
    minimum: int
    maximum: int
    multiple_of: int


class ModelVideo(BaseModel):
    """Of a model that draws videos."""

    num_frames: int = Field(description="If a request says nothing.")
    maximum: int
    multiple_of: int = Field(description="Frames come in so many, and one more.")
    fps: int


class ModelLimits(Answer):
    n: int
    best_of: int = Field(1, description="More than one: candidates of which CLIP chooses.")
    num_inference_steps: int
    guidance_scale: float
    prompt_tokens: int


class ModelDefaults(BaseModel):
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    strength: float


class Model(Answer):
    """What a model can do: all that a client needs to build a form. `id` to `owned_by` are for OpenAI's clients."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(0, description="Not known.")
    owned_by: str = "darkroom"
    name: str
    title: str
    description: str
    family: str
    licence: str
    licence_url: str
    tasks: list[Task]
    guidance: list[Guide]
    classes: list[str] = Field([], description="What a class-conditional model draws: its prompts are these.")
    needs: list[Guiding] = Field([], description="Pictures that its requests must bring, and others may not.")
    loras: list[str] = Field([], description="LoRA adapters, by the names that requests call them.")
    prompt_weights: bool = Field(False, description="Whether words of a prompt may have weights.")
    size: Size
    video: ModelVideo | None = None
    limits: ModelLimits
    defaults: ModelDefaults
    schedulers: list[str]


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[Model]


class ModelAtWork(BaseModel):
    """A model that a worker holds ready."""

    name: str
    width: int = Field(description="Rows that a forward pass may have.")
    rows: float = Field(description="Rows that one had, in the mean since the last heartbeat; 0 if there was none.")
    running: int = Field(description="Generations that are being drawn.")
    rows_per_second: float = Field(description="Through the denoiser, as measured.")


class WorkerStatus(BaseModel):
    """A worker that is alive."""

    name: str
    device: str
    uptime_seconds: float
    stopping: bool = Field(description="It takes nothing new and ends when what it has is drawn.")
    models: list[ModelAtWork]


class ModelStatus(BaseModel):
    """What waits for a model."""

    name: str
    waiting: dict[Priority, int]
    oldest: float = Field(description="Seconds that the one which waits longest has waited.")
    eta: float | None = Field(
        description="Seconds until all that waits is through, as measured; null: nobody draws it."
    )


class ServiceStatus(BaseModel):
    """The service at this moment: its workers, as they said with their last heartbeat, and what waits for them."""

    workers: list[WorkerStatus]
    models: list[ModelStatus]


class FieldError(BaseModel):
    field: str = Field(description="As you sent it; below `metadata`, `metadata.name`.")
    detail: str


class WebhookSecret(BaseModel):
    secret: str = Field(
        description="What your webhooks are signed with: `whsec_` and base64, as Standard Webhooks has it."
    )


class Problem(BaseModel):
    """What went wrong: RFC 9457."""

    type: str = Field(description="A stable name, such as `urn:darkroom:problem:queue-full`.")
    title: str
    status: int
    detail: str
    errors: list[FieldError] | None = Field(None, description="Each wrong field.")


def merged(request: GenerationRequest, **decided: Any) -> Parameters:
    """The request with what was left open filled in."""
    return Parameters.model_validate(request.model_dump() | decided)
