"""Any diffusers pipeline, unmodified, as a program.

The pipeline runs in a greenlet on a shallow copy of itself whose nets are proxies: where it calls one, the request is
suspended and the engine runs the call together with those of other requests. Slower than a family's own program by the
scheduler's small operations, exact by construction, and the oracle of the tests.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import greenlet
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from app.schemas import Parameters, Task
from models import samplers
from models.catalog import ModelCard
from models.preview import LatentColours
from models.program import BUCKETS, Call, Net, Program, generator
from models.stable_diffusion import Inputs, cut_off

DENOISERS = ("unet", "transformer")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
NOT_PER_ROW = frozenset({"txt_ids", "img_ids"})  # FLUX's positions
AUTO: dict[Task, Any] = {
    "text-to-image": AutoPipelineForText2Image,
    "image-to-image": AutoPipelineForImage2Image,
    "inpainting": AutoPipelineForInpainting,
}

Suspend = Callable[[Call], Any]


class StockPipelines:
    """One resident model, run through diffusers' own pipelines for each task."""

    def __init__(self, card: ModelCard, pipeline: Any):
        self.card = card
        self.pipeline = pipeline
        self.pipelines = {task: AUTO[task].from_pipe(pipeline) for task in card.tasks}
        for one in self.pipelines.values():
            one.set_progress_bar_config(disable=True)
        self.scheduler_config = samplers.frozen_config(pipeline.scheduler)
        self.nets = nets(pipeline, card)
        self.denoiser = next(self.nets[name] for name in DENOISERS if name in self.nets)
        self.decoder = self.nets["vae.decode"]
        self.device = self.pipeline.device

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program:
        """One picture."""
        pipeline = self.pipelines[r.task]
        offered = {
            "prompt": r.prompt,
            "negative_prompt": r.negative_prompt or None,
            "num_inference_steps": r.num_inference_steps,
            "guidance_scale": r.guidance_scale,
            "width": r.width,
            "height": r.height,
            "image": inputs.image,
            "mask_image": inputs.mask,
            "strength": r.strength,
            "generator": generator(seed),
            "output_type": "pt",
        }
        takes = inspect.signature(pipeline.__call__).parameters
        arguments = {name: value for name, value in offered.items() if name in takes and value is not None}
        scheduler = samplers.scheduler(r.scheduler, self.scheduler_config)
        output = yield from stock(pipeline, self.nets, scheduler, **arguments)
        return output.images[0].float().cpu()

    def warnings(self, r: Parameters) -> list[str]:
        """What of the prompts the text encoders will not see: judged by the tokenizer that takes most."""
        tokenizers = [self.pipeline.components[name] for name in ("tokenizer", "tokenizer_2", "tokenizer_3")
                      if self.pipeline.components.get(name) is not None]  # fmt: skip
        roomiest = max(tokenizers, key=lambda tokenizer: tokenizer.model_max_length)
        cut = cut_off(roomiest, r.prompt)
        return [f"prompt is cut after {cut.kept} tokens: {cut.lost!r} is not seen"] if cut else []

    @functools.cached_property
    def colours(self) -> LatentColours:
        """For previews."""
        vae = self.pipeline.vae
        return LatentColours.fit(lambda pixels: vae.encode(pixels.to(vae.dtype)).latent_dist.mean, self.device)


def nets(pipeline: Any, card: ModelCard) -> dict[str, Net]:
    """The nets of a pipeline by the name of its component; the autoencoder's two directions are two nets."""
    buckets = tuple(bucket for bucket in BUCKETS if bucket <= card.max_rows)
    found = {
        name: Net(name, module, NOT_PER_ROW, buckets, reproducible_rows=card.reproducible_rows)
        for name in DENOISERS
        if (module := pipeline.components.get(name)) is not None
    }
    for name in ENCODERS:
        if (module := pipeline.components.get(name)) is not None:
            found[name] = Net(name, module, width=32)
    vae = pipeline.vae
    found["vae.decode"] = Net("vae.decode", lambda z: vae.decode(z, return_dict=False)[0], buckets=(1, 2, 4, 8))
    found["vae.encode"] = Net("vae.encode", lambda x: vae.encode(x).latent_dist.parameters, width=1)
    return found


def stock(pipeline: Any, nets: Mapping[str, Net], scheduler: Any = None, **arguments: Any) -> Program:
    """Run `pipeline(**arguments)` as a program; returns the pipeline's own output.

    Args:
        nets: by component name, see `nets`; components without one run inline.
        scheduler: this request's own; a copy of the pipeline's if none.
    """
    own = copy.copy(pipeline)  # shares weights; has its own scheduler and per-call attributes (_guidance_scale, …)
    own.__dict__["scheduler"] = watched = Watched(scheduler or copy.deepcopy(pipeline.scheduler))
    own.__dict__["maybe_free_model_hooks"] = lambda: None  # would reset caches that other requests are using

    def suspend(call: Call) -> Any:
        return greenlet_running.parent.switch(call)

    for name, net in nets.items():
        if name in DENOISERS:
            own.__dict__[name] = Denoiser(own.__dict__[name], net, suspend, watched)
        elif name in ENCODERS:
            own.__dict__[name] = Proxy(own.__dict__[name], net, suspend)
    if "vae.decode" in nets:
        own.__dict__["vae"] = Autoencoder(own.__dict__["vae"], nets, suspend)

    ended = object()
    output: Any = None

    def whole() -> Any:
        nonlocal output
        output = own(**arguments)
        return ended

    greenlet_running = greenlet.greenlet(whole)
    try:
        call = greenlet_running.switch()
        while call is not ended:
            try:
                value = yield call
            except Exception as error:  # the engine's word that the call failed belongs to the pipeline
                greenlet_running.parent = greenlet.getcurrent()
                call = greenlet_running.throw(error)
            else:
                greenlet_running.parent = greenlet.getcurrent()
                call = greenlet_running.switch(value)
        return output
    finally:
        if not greenlet_running.dead:
            greenlet_running.parent = greenlet.getcurrent()
            greenlet_running.throw()


class Proxy:
    """Stands for a resident module inside one request's pipeline: a call suspends the request."""

    def __init__(self, module: Any, net: Net, suspend: Suspend):
        self.__dict__.update(module=module, net=net, suspend=suspend)

    __class__ = property(lambda self: type(self.module))  # isinstance(proxy, nn.Module): device and dtype look-ups work

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("resident modules are read-only for requests")

    def __call__(self, *positional: Any, **named: Any) -> Any:
        names = list(inspect.signature(self.module.forward).parameters)
        return self.suspend(self.call(dict(zip(names, positional, strict=False)) | named))

    def call(self, args: dict[str, Any]) -> Call:
        rows = next(value.shape[0] for value in args.values() if isinstance(value, Tensor) and value.ndim)
        return Call(self.net, args, rows)


class Denoiser(Proxy):
    """A proxy whose calls are steps."""

    def __init__(self, module: Any, net: Net, suspend: Suspend, scheduler: "Watched"):
        super().__init__(module, net, suspend)
        self.__dict__["scheduler"] = scheduler

    def call(self, args: dict[str, Any]) -> Call:
        t = args.get("timestep")
        if isinstance(t, Tensor) and not t.is_floating_point():
            args["timestep"] = t.to(torch.float32)  # samplers disagree on the dtype, and the embedding is float anyway
        call = super().call(args)
        call.at, call.estimate = self.scheduler.position, self.scheduler.estimate
        return call


class Watched:
    """A request's scheduler, which also remembers how far it is and what the picture looks like."""

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self.estimate: Tensor | None = None
        self.steps = 0

    __class__ = property(lambda self: type(self.scheduler))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["scheduler"], name)

    @property
    def position(self) -> tuple[int, int]:
        begin = (self.scheduler.begin_index or 0) if hasattr(self.scheduler, "begin_index") else 0
        return self.steps, len(self.scheduler.timesteps) - begin

    @property
    def step(self) -> Callable[..., Any]:
        @functools.wraps(self.scheduler.step)
        def step(*positional: Any, **named: Any) -> Any:
            output = self.scheduler.step(*positional, **named)
            self.steps += 1
            if isinstance(output, tuple) and output[-1].ndim == 4:  # (next sample, x0 where the scheduler says)
                self.estimate = output[-1][:1]
            return output

        return step


class Autoencoder(Proxy):
    """A proxy with two nets: encode and decode."""

    def __init__(self, module: Any, nets: Mapping[str, Net], suspend: Suspend):
        super().__init__(module, nets["vae.decode"], suspend)
        self.__dict__["nets"] = nets

    def decode(self, z: Tensor, return_dict: bool = True, **_: Any) -> Any:
        pixels = self.suspend(Call(self.nets["vae.decode"], {"z": z}, z.shape[0]))
        return Decoded(pixels) if return_dict else (pixels,)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        moments = self.suspend(Call(self.nets["vae.encode"], {"x": x}, x.shape[0]))
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)


class Decoded:
    def __init__(self, sample: Tensor):
        self.sample = sample
