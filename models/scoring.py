"""How well pictures agree with what was asked for: by a CLIP model, and by their pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, ResNetForImageClassification

from models.catalog import WEIGHTS

transformers.utils.logging.disable_progress_bar()

BORDER = 4  # pixels
NEAR = 40.0  # of 441, the distance from black to white


class Scorer:
    """A CLIP model in transformers' layout; the shipped one knows the shipped models' world only."""

    def __init__(self, folder: Path = WEIGHTS / "emoji-clip"):
        self.clip: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.size = self.clip.config.vision_config.image_size

    @torch.no_grad()
    def captions(self, captions: list[str]) -> Tensor:
        """[captions, width], of length one"""
        length = self.clip.config.text_config.max_position_embeddings
        ids = self.tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return torch.nn.functional.normalize(self.clip.get_text_features(input_ids=ids).pooler_output, dim=-1)

    @torch.no_grad()
    def pictures(self, pictures: list[Image.Image]) -> Tensor:
        """[pictures, width], of length one"""
        rows = list[Tensor]()
        for picture in pictures:
            pixels = np.asarray(picture.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC))
            features = self.clip.get_image_features(
                pixel_values=torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
            ).pooler_output
            rows.append(torch.nn.functional.normalize(features, dim=-1))
        return torch.cat(rows)


class Judge:
    """Tells the classes of emoji-classes apart, and shares nothing with the models that draw them."""

    def __init__(self, folder: Path = WEIGHTS / "emoji-judge"):
        self.model: Any = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
        self.classes: list[str] = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> Tensor:
        """[pictures, classes] log p(class | picture)"""
        pixels = [np.asarray(one.convert("RGB").resize((64, 64), Image.Resampling.BOX)) for one in pictures]
        seen = torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
        return torch.log_softmax(self.model(pixel_values=seen).logits, -1)


def distance_from(picture: Image.Image, colour: tuple[int, int, int]) -> float:
    """How far the border's median colour is from the one that was asked for."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    border = np.ones(pixels.shape[:2], bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    return float(np.linalg.norm(np.median(pixels[border], axis=0) - np.asarray(colour)))
