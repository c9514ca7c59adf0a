"""The emoji world: captioned scenes, and what they look like.

The drawings and the grammar are a data set of their own, which its recipe rebuilds; `data` is its folder.
"""

from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIZE = 128
MARGIN = 24  # pixels around a drawing that the resampling filter may reach


class World:
    def __init__(self, data: Path):
        self.captions = module(data / "captions.py")
        sprites, self.sprites = module(data / "load.py").load_sprites(str(data))
        self.pixels = torch.from_numpy(np.ascontiguousarray(sprites.transpose(0, 2, 1, 3)))  # [N, h, RGBA, w], uint8

    def scenes(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Captioned scenes; never one of the combinations that are kept for judging."""
        rng = np.random.default_rng(seed)
        return [self.captions.sample_scene(rng, self.sprites) for _ in range(count)]

    def render(self, scenes: list[dict[str, Any]]) -> Tensor:
        """[scenes, 3, 128, 128] in [0, 1]"""
        background = torch.tensor([scene["background"] for scene in scenes]) / 255.0
        picture = background[:, :, None, None].expand(-1, -1, SIZE, SIZE).clone()
        for place in range(max(len(scene["items"]) for scene in scenes)):
            rows = [row for row, scene in enumerate(scenes) if len(scene["items"]) > place]
            items = [scenes[row]["items"][place] for row in rows]
            picture[rows] = self._over(picture[rows], items)
        return picture.clamp(0, 1)

    def _over(self, below: Tensor, items: list[dict[str, Any]]) -> Tensor:
        """Draw an item over each picture: separable bicubic resampling, as two matrix products."""
        x, y, scale = torch.tensor([(item["cx"], item["cy"], item["scale"]) for item in items]).unbind(1)
        drawing = self.pixels[[item["index"] for item in items]].float().div_(255)
        rows = torch.bmm(resampling(y, scale), drawing.flatten(2)).view(-1, SIZE * 4, SIZE)
        drawn = torch.bmm(rows, resampling(x, scale).transpose(1, 2)).view(-1, SIZE, 4, SIZE).transpose(1, 2)
        alpha = drawn[:, 3:].clamp(0, 1)
        return below * (1 - alpha) + torch.minimum(drawn[:, :3].clamp(min=0), alpha)


def resampling(centre: Tensor, scale: Tensor) -> Tensor:
    """[n, SIZE, SIZE]: pixels of the canvas from those of a drawing, bicubic (a = -1/2), antialiased as in Pillow."""
    at = (torch.arange(SIZE) + 0.5) / SIZE
    source = ((at - centre[:, None]) / scale[:, None] + 0.5) * SIZE - 0.5
    taps = torch.arange(-MARGIN, SIZE + MARGIN)
    distance = ((source[:, :, None] - taps) / (1 / scale).clamp(min=1)[:, None, None]).abs()
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))
    return (weights / weights.sum(-1, keepdim=True).clamp(min=0.5))[:, :, MARGIN : MARGIN + SIZE]


def module(path: Path) -> ModuleType:
    """A Python file of the data set."""
    loader = SourceFileLoader(f"emoji_world_{path.stem}", str(path))
    loaded = ModuleType(loader.name)
    loaded.__file__ = str(path)
    loader.exec_module(loaded)
    return loaded
