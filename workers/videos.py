"""The file that a client gets of a video."""

import io
import tempfile
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
from PIL import Image

from app.images import saved_as
from app.schemas import OutputFormat

# The same frames give the same bytes: in one thread, and without x264's look ahead, which reads memory that nobody has
# written (seen under MALLOC_PERTURB_, in small videos).
H264 = {"crf": "17", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}


def encode_video(frames: np.ndarray, output_format: OutputFormat, fps: int, text: str) -> bytes:
    """Frames, uint8 [n, height, width, 3], at so many a second; sides are even, as H.264 has them.

    `text`, from `parameters_text`, is an MP4's comment; in the animations of Pillow it lies where it does in pictures.
    """
    if output_format == "mp4":
        return mp4(frames, fps, text)
    out = io.BytesIO()
    first, *rest = [Image.fromarray(frame) for frame in frames]
    animated = {"save_all": True, "append_images": rest, "duration": round(1000 / fps), "loop": 0}
    first.save(out, output_format, **animated, **saved_as(output_format, text))
    return out.getvalue()


def mp4(frames: np.ndarray, fps: int, text: str) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:  # its index is moved to the front at last, so it needs one
        with av.open(file.name, "w", options={"movflags": "faststart"}) as container:
            container.metadata["comment"] = text
            stream = cast(Any, container.add_stream("libx264", rate=Fraction(fps), options=H264))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"  # what every browser plays
            for frame in frames:  # converted here: the stream's own conversion gives other bytes each time
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        return file.read()
