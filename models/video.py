"""Text to video, and image to video, by diffusers' pipelines: Wan (Wang et al. 2025), LTX-Video (HaCohen et al. 2024).

All frames are drawn together: to the engine a video is a picture with one more dimension.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import LTXImageToVideoPipeline, LTXPipeline
from torch import Tensor

from app.schemas import Parameters
from models.catalog import ModelCard
from models.preview import LatentColours
from models.program import Inputs, Program, generator
from models.stock import stock, taken
from models.stock_stages import Stages


class Video(Stages):
    """One resident model: a pipeline of text to video, and of image to video over the same nets, if there is one."""

    def __init__(self, card: ModelCard, pipeline: Any, parts: Mapping[str, Any]):
        pipelines = {"text-to-video": pipeline}
        if isinstance(pipeline, LTXPipeline):
            pipelines["image-to-video"] = LTXImageToVideoPipeline.from_pipe(pipeline)
        super().__init__(card, {"whole": pipeline}, {"whole.transformer": "base"}, "whole.vae.decode")
        self.of_task = {task: pipelines[task] for task in card.tasks}
        for one in self.of_task.values():
            one.set_progress_bar_config(disable=True)
        self.colours = LatentColours.fit(self.latents, self.device)

    def draw(self, r: Parameters, seed: int, inputs: Inputs) -> Program:
        offered = {
            "image": inputs.image,
            "prompt": r.prompt,
            "negative_prompt": r.negative_prompt or None,
            "num_inference_steps": r.num_inference_steps,
            "guidance_scale": r.guidance_scale,
            "width": r.width,
            "height": r.height,
            "num_frames": r.num_frames,
            "frame_rate": r.fps,
            "max_sequence_length": self.card.limits.prompt_tokens,
            "generator": generator(seed),
            "output_type": "pt",
        }
        pipeline = self.of_task[r.kind]
        output = yield from stock(pipeline, self.nets["whole"], **taken(pipeline, offered))
        return output.frames[0].float()

    def latents(self, pixels: Tensor) -> Tensor:
        """[rows, 3, H, W] in [-1, 1], each a video of one frame, to their latents as the denoiser knows them."""
        vae: Any = self.pipelines["whole"].vae
        mean = vae.encode(pixels.unsqueeze(2).to(vae.dtype)).latent_dist.mean[:, :, 0]
        shift, scale = (torch.as_tensor(one).to(mean).view(1, -1, 1, 1) for one in statistics(vae))
        return (mean - shift) / scale


def statistics(vae: Any) -> tuple[Any, Any]:
    """Mean and deviation of each latent channel."""
    own = vae if hasattr(vae, "latents_mean") else vae.config
    return own.latents_mean, own.latents_std
