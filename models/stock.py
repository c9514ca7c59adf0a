"""Any diffusers pipeline, unmodified, as a program.

The pipeline runs in a greenlet on a shallow copy of itself whose nets are proxies: where it calls one, the request is
suspended and the engine runs the call together with those of other requests. Slower than a family's own program by the
scheduler's small operations, exact by construction, and the oracle of the tests.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, cast

import greenlet
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.pipelines.auto_pipeline import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from torch import Tensor

from app.schemas import Parameters, Task
from models import samplers
from models.adapters import PLAIN, Wardrobe, give_ip_adapter
from models.catalog import ModelCard
from models.guided import modules_of, unseen
from models.preview import LatentColours
from models.program import BUCKETS, Call, Inputs, Net, Program, generator
from models.stable_diffusion import NO_PARTS

DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder", "super_res_first", "super_res_last")
AUTOENCODERS = ("vae", "movq", "vqvae")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
NOT_PER_ROW = frozenset({"txt_ids", "img_ids"})  # FLUX's positions
AUTO: dict[Task, Any] = {
    "text-to-image": AutoPipelineForText2Image,
    "image-to-image": AutoPipelineForImage2Image,
    "inpaint": AutoPipelineForInpainting,
}

Suspend = Callable[[Call], Any]


class StockPipelines:
    """One resident model, run through diffusers' own pipelines for each task."""

    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any] = NO_PARTS):
        self.card, control = card, {"controlnet": parts["controlnet"]} if "controlnet" in parts else {}
        if looks := "ip_adapter" in parts:
            give_ip_adapter(pipeline, parts["ip_adapter"], parts["image_encoder"])
        self.pipelines = {task: AUTO[task].from_pipe(pipeline, **control) for task in card.tasks}
        self.pipeline = pipeline = next(iter(self.pipelines.values())) if control else pipeline
        self.modules = modules_of(pipeline.components.values())
        for one in self.pipelines.values():
            one.set_progress_bar_config(disable=True)
        if pipeline.vae.config.force_upcast and pipeline.vae.dtype == torch.float16:
            pipeline.vae.to(torch.float32)  # each request would otherwise do so and undo it, under the others' feet
        self.scheduler_config = samplers.frozen_config(pipeline.scheduler)
        self.nets, self.wardrobe = nets(pipeline, card), Wardrobe(pipeline, card.loras, looks)
        for net in self.nets.values():
            net.run = self.wardrobe.wearing(PLAIN, net.run)
        self.denoiser = next(self.nets[name] for name in DENOISERS if name in self.nets)
        self.decoder = self.nets["vae.decode"]
        self.device = self.pipeline.device
        self.colours = LatentColours.fit(self.latent_means, self.device)

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program:
        """One picture."""
        pipeline = self.pipelines[r.kind]
        offered = {
            "prompt": r.prompt,
            "negative_prompt": r.negative_prompt or None,
            "num_inference_steps": r.num_inference_steps,
            "guidance_scale": r.guidance_scale,
            "width": r.width,
            "height": r.height,
            "image": inputs.image or inputs.control_image,  # without `image`, that is what a ControlNet's is called
            "control_image": inputs.control_image,
            "controlnet_conditioning_scale": 1.0 if r.control_scale is None else r.control_scale,
            "ip_adapter_image": inputs.ip_adapter_image,
            "mask_image": inputs.mask,
            "strength": r.strength,
            "guidance_rescale": r.guidance.rescale,
            "max_sequence_length": self.card.limits.prompt_tokens,
            "generator": generator(seed),
            "output_type": "pt",
        }
        scheduler = samplers.scheduler(r.scheduler, self.scheduler_config)
        nets = {name: self.wardrobe.asked(r, net) for name, net in self.nets.items()}
        output = yield from stock(pipeline, nets, scheduler, **taken(pipeline, offered))
        return output.images[0].float()

    def warnings(self, r: Parameters) -> list[str]:
        """What of the prompts the text encoders will not see: judged by the tokenizer that takes most."""
        tokenizers = [t for name in TOKENIZERS if (t := self.pipeline.components.get(name)) is not None]
        lengths = [min(tokenizer.model_max_length, self.card.limits.prompt_tokens) for tokenizer in tokenizers]
        pairs = zip(tokenizers, lengths, strict=True)
        return unseen(r, *max(pairs, key=lambda pair: pair[1] - pair[0].num_special_tokens_to_add()))

    def latent_means(self, pixels: Tensor) -> Tensor:
        """[rows, 3, H, W] in [-1, 1] to the means of their latents, as the denoiser knows them."""
        vae = self.pipeline.vae
        mean = vae.encode(pixels.to(vae.dtype)).latent_dist.mean
        return (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def taken(pipeline: Any, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is there to be told, what this pipeline wants to know."""
    takes = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in offered.items() if name in takes and value is not None}


def nets(pipeline: Any, card: ModelCard) -> dict[str, Net]:
    """The nets of a pipeline by the name of its component; the autoencoder's two directions are two nets."""
    buckets = tuple(bucket for bucket in BUCKETS if bucket <= card.max_rows)
    found = {
        name: Net(
            name,
            module,
            NOT_PER_ROW,
            buckets,
            reproducible_rows=card.reproducible_rows,
            recordable=True,
            journaled=True,
        )
        for name in DENOISERS
        if (module := pipeline.components.get(name)) is not None
    }
    if (controlnet := pipeline.components.get("controlnet")) is not None:  # too much for a journal: it looks again
        found["controlnet"] = Net(
            "controlnet", controlnet, buckets=buckets, reproducible_rows=card.reproducible_rows, recordable=True
        )
    for name in ENCODERS:
        if (module := pipeline.components.get(name)) is not None:
            found[name] = Net(name, module, width=32)
    for name in AUTOENCODERS:
        if (module := pipeline.components.get(name)) is not None:
            found |= two_ways(name, module)
    return found


def two_ways(name: str, autoencoder: Any) -> dict[str, Net]:
    """An autoencoder's two directions."""
    whole = {} if name == "vae" else {"force_not_quantize": True}  # latents are drawn as they are

    def decode(z: Tensor, temb: Tensor | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """temb: [rows], if it is told how much noise is left; shape: of the latents of one picture, if z are tokens"""
        looked_up = {} if shape is None else {"shape": (len(z), *shape)}
        told = {} if temb is None else {"temb": temb}
        z = z if shape else z.to(autoencoder.dtype)
        return autoencoder.decode(z, return_dict=False, **whole, **looked_up, **told)[0]

    def encode(x: Tensor) -> Tensor:
        encoded = autoencoder.encode(x.to(autoencoder.dtype))
        return encoded.latent_dist.parameters if name == "vae" else encoded.latents

    return {
        f"{name}.decode": Net(f"{name}.decode", decode, buckets=(1, 2, 4, 8), width=8, recordable=True),
        f"{name}.encode": Net(f"{name}.encode", encode, width=1),
    }


def stock(
    pipeline: Any,
    nets: Mapping[str, Net],
    scheduler: Any = None,
    mark: Callable[[Call], None] = lambda _: None,
    **arguments: Any,
) -> Generator[Call, Any, Any]:
    """Run `pipeline(**arguments)` as a program; returns the pipeline's own output.

    Args:
        nets: by component name, see `nets`; components without one run inline.
        scheduler: this request's own; a copy of the pipeline's if none.
        mark: is shown each call before it is made.
    """
    own = copy.copy(pipeline)  # shares weights; has its own schedulers and per-call attributes (_guidance_scale, …)
    schedulers = {
        name: copy.deepcopy(one) for name, one in pipeline.components.items() if hasattr(one, "set_timesteps")
    }
    watched = Watched(scheduler or schedulers["scheduler"], own, arguments) if "scheduler" in schedulers else None

    def suspend(call: Call) -> Any:
        mark(call)
        return cast(greenlet.greenlet, inner.parent).switch(call)  # what runs has a parent

    replaced: dict[str, Any] = {
        **schedulers,
        **({"scheduler": watched} if watched else {}),
        "maybe_free_model_hooks": lambda: None,  # would reset caches that other requests are using
    }
    for name, net in nets.items():
        if name in DENOISERS:
            replaced[name] = Denoiser(getattr(own, name), net, suspend, watched)
        elif name in ENCODERS or name == "controlnet":
            replaced[name] = Proxy(getattr(own, name), net, suspend)
    for name in AUTOENCODERS:
        if f"{name}.decode" in nets:
            replaced[name] = Autoencoder(getattr(own, name), nets, name, suspend, watched)
    own.__dict__.update(replaced)

    ended = object()
    output: Any = None

    def whole() -> Any:
        nonlocal output
        output = own(**arguments)
        return ended

    inner = greenlet.greenlet(whole)
    try:
        call = inner.switch()
        while call is not ended:
            try:
                value = yield call
            except Exception as error:  # the engine's word that the call failed belongs to the pipeline
                inner.parent = greenlet.getcurrent()
                call = inner.throw(error)
            else:
                inner.parent = greenlet.getcurrent()
                call = inner.switch(value)
        return output
    finally:
        if not inner.dead:
            inner.parent = greenlet.getcurrent()
            inner.throw()
        own.__dict__.clear()  # its proxies refer back to it; now what the request held is free at once


class Proxy:
    """Stands for a resident module inside one request's pipeline: a call suspends the request."""

    def __init__(self, module: Any, net: Net, suspend: Suspend):
        self.__dict__.update(module=module, net=net, suspend=suspend)

    if not TYPE_CHECKING:  # isinstance(proxy, nn.Module) holds, so that device and dtype look-ups work
        __class__ = property(lambda self: type(self.module))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("resident modules are read-only for requests")

    def to(self, *_: Any, **__: Any) -> "Proxy":
        """SDXL casts its autoencoder before and after use; the others are using it."""
        return self

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self.suspend(self.call(dict(zip(forward_names(type(self.module)), positional, strict=False)) | named))

    def call(self, args: dict[str, Any]) -> Call:
        t = args.get("timestep")
        if isinstance(t, Tensor) and not t.is_floating_point():
            args["timestep"] = t.to(torch.float32)  # samplers disagree on the dtype, and the embedding is float anyway
        rows = next(value.shape[0] for value in args.values() if isinstance(value, Tensor) and value.ndim)
        return Call(self.net, args, rows)


@functools.cache
def forward_names(module: Any) -> list[str]:
    """The arguments of a module class's `forward`, in order."""
    return list(inspect.signature(module.forward).parameters)[1:]


class Denoiser(Proxy):
    """A proxy whose calls are steps."""

    def __init__(self, module: Any, net: Net, suspend: Suspend, scheduler: "Watched | None"):
        super().__init__(module, net, suspend)
        self.__dict__["scheduler"] = scheduler

    def call(self, args: dict[str, Any]) -> Call:
        call = super().call(args)
        if self.scheduler is not None:
            call.at, call.estimate = self.scheduler.position, self.scheduler.estimate
        return call


class Watched:
    """A request's scheduler, which also remembers how far it is and what the picture looks like."""

    def __init__(self, scheduler: Any, pipeline: Any, arguments: Mapping[str, Any]):
        self.scheduler, self.pipeline, self.arguments = scheduler, pipeline, arguments
        self.estimate: Callable[[], Tensor | None] | None = None
        self.calls_done = 0

    if not TYPE_CHECKING:
        __class__ = property(lambda self: type(self.scheduler))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["scheduler"], name)

    @property
    def position(self) -> tuple[int, int]:
        """Steps done, of how many; image-to-image leaves some of the schedule out."""
        scheduled = len(self.scheduler.timesteps)
        calls = getattr(self.pipeline, "_num_timesteps", scheduled)
        left_out = (scheduled - calls) // getattr(self.scheduler, "order", 1)
        steps = getattr(self.scheduler, "num_inference_steps", None) or scheduled
        return samplers.steps_done(self.calls_done, calls, steps - left_out)

    @property
    def step(self) -> Callable[..., Any]:
        @functools.wraps(self.scheduler.step)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *positional: Any, **named: Any) -> Any:
            if model_output.shape == sample.shape:  # a learned variance has more channels
                told = model_output, timestep, sample, self._scale(timestep)
                self.estimate = functools.partial(estimated, self.scheduler, self.pipeline, self.arguments, *told)
            self.calls_done += 1
            return self.scheduler.step(model_output, timestep, sample, *positional, **named)

        return step

    def _scale(self, t: Any) -> float:
        return float(self.scheduler.scale_model_input(torch.ones(1), t)) if hasattr(self, "scale_model_input") else 1.0


def estimated(
    scheduler: Any, pipeline: Any, arguments: Mapping[str, Any], e: Tensor, t: Any, x: Tensor, scale: float
) -> Tensor | None:
    """The picture, [1, C, h, w], judged from the sample and what the model made of it at timestep t."""
    of_x, of_e = samplers.estimate_coefficients(scheduler, t)
    return as_picture(of_x * scale * x[:1] + of_e * e[:1], pipeline, arguments)


def as_picture(latents: Tensor, pipeline: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """[1, C, h, w], also of latents that FLUX holds as a sequence of 2 x 2 patches, [1, h/2 · w/2, 4 C].

    Of a video, [1, C, frames, h, w], the middle of it.
    """
    if latents.ndim == 5:
        return latents[:, :, latents.shape[2] // 2]
    if latents.ndim != 3 or not hasattr(pipeline, "vae_scale_factor"):
        return latents if latents.ndim == 4 else None  # an embedding is no picture
    patch = 2 * pipeline.vae_scale_factor
    height, width = arguments.get("height", 0) // patch, arguments.get("width", 0) // patch
    if latents.shape[1] != height * width or latents.shape[2] % 4:
        return None
    patches = latents.view(1, height, width, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(1, -1, 2 * height, 2 * width)


class Autoencoder(Proxy):
    """A proxy with two nets: encode and decode."""

    def __init__(self, module: Any, nets: Mapping[str, Net], name: str, suspend: Suspend, scheduler: Watched | None):
        super().__init__(module, nets[f"{name}.decode"], suspend)
        self.__dict__.update(encoder=nets[f"{name}.encode"], quantizes=name != "vae", scheduler=scheduler)

    def decode(
        self,
        z: Tensor,
        temb: Tensor | None = None,
        return_dict: bool = True,
        shape: tuple[int, ...] | None = None,
        **_: Any,
    ) -> Any:
        at = self.scheduler.position if self.scheduler else None
        args: dict[str, Any] = {"z": z, "temb": temb, "shape": None if shape is None else tuple(shape[1:])}
        args = {name: value for name, value in args.items() if value is not None}
        pixels = self.suspend(Call(self.net, args, z.shape[0], at))
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        encoded = self.suspend(Call(self.encoder, {"x": x}, x.shape[0]))
        if self.quantizes:
            return VQEncoderOutput(latents=encoded) if return_dict else (encoded,)
        posterior = DiagonalGaussianDistribution(encoded)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)
