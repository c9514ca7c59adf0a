"""A client of Darkroom, for programs that wait and for those that do not.

from darkroom import Darkroom

with Darkroom("http://localhost:8000") as client:
    apple = client.generate("a red apple", seed=7)
    client.save(apple, "apple.png")
"""

from app.schemas import Generation, Guidance, Image, Lora, Model
from darkroom.client import AsyncDarkroom, Darkroom
from darkroom.errors import DarkroomError, NotDrawn, Refused, Unreachable
from darkroom.events import Event, Preview
from darkroom.fields import Fields, Picture

__all__ = [
    "AsyncDarkroom",
    "Darkroom",
    "DarkroomError",
    "Event",
    "Fields",
    "Generation",
    "Guidance",
    "Image",
    "Lora",
    "Model",
    "NotDrawn",
    "Picture",
    "Preview",
    "Refused",
    "Unreachable",
]
