"""Pictures as clients send them, as the store keeps them and as clients get them. Pillow only: the API has no torch."""

import base64
import io
import json
import struct
from importlib.metadata import version
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from app.errors import InvalidRequest
from app.schemas import OutputFormat, Parameters

VERSION = version("darkroom")

MEDIA_TYPES: dict[str, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "avif": "image/avif",
    "mp4": "video/mp4",
}

ACCEPTED = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP")  # what browsers show; every further decoder is a way in

# What Pillow's decoders raise on a broken file, found by feeding them 300,000: bytes changed, cut, moved.
BROKEN = (OSError, SyntaxError, ValueError, IndexError, RuntimeError, struct.error)

# A JPEG has about ten scans. One that repeats a 33-byte scan costs 10 ms for each at 16 megapixels: hours in 25 MiB.
# By chance as many random bytes (the video that a phone appends to a motion photo) hold 300 of the marker.
MAX_JPEG_SCANS = 500

ROUNDED_TO_EIGHT_BITS = [(value + 128) // 257 for value in range(65_536)]  # 65535 = 255 · 257

# Milliseconds and KiB at zlib levels 1, 3 and 6 (one core): emoji, 128² 0.6/12, 0.8/11, 1.8/10; 512² 6.6/82, 8.3/75,
# 16/64; with grain at 512² 22/425, 35/413, 108/360. A worker's time is dearer than a fifth of the bytes.
PNG_LEVEL = 1

# Measured on emoji at 128². 4:2:0 smears the edges of flat colours: 30 to 39 dB in every format.
LOSSY: dict[str, dict[str, int | str]] = {
    "jpeg": {"quality": 95, "subsampling": "4:4:4"},  # 43 to 46 dB, 7 KiB
    "webp": {"quality": 90},  # 30 to 39 dB, 2 KiB: it has 4:2:0 only, and more quality does not help its edges
    "avif": {"quality": 80, "subsampling": "4:4:4", "speed": 8},  # 40 to 44 dB, 2 KiB; speed 6: +1 dB, 3 times as long
}

EXIF_DIRECTORY, USER_COMMENT = 0x8769, 0x9286  # tags
LONG, UNDEFINED = 4, 7  # types
MAX_JPEG_EXIF = 65_533  # bytes: a segment's length is 16 bits and counts itself

UPRIGHT = {  # what undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

SAMPLERS = {  # as the AUTOMATIC1111 web UI spells them, so that it recognises them
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "euler_trailing": "Euler SGMUniform",
    "heun": "Heun",
    "deis": "DEIS",
    "ddpm": "DDPM",
    "unipc": "UniPC",
    "pndm": "PLMS",
    "lcm": "LCM",
    "tcd": "TCD",
    "lms": "LMS",
    "flow_match": "Flow match",
    "top_p": "top_p",
}


def read_image(field: str, text: str, max_pixels: int) -> Image.Image:
    """The picture in base64 or a `data:` URL: 8-bit RGB, upright, on white where it was transparent, without metadata.

    Raises:
        InvalidRequest: `text` is not base64, or holds no picture, half of one, several, or more than `max_pixels`.
    """
    return _flattened(_decoded(field, text, max_pixels), "white")


def read_mask(field: str, text: str, image: Image.Image, max_pixels: int) -> Image.Image:
    """The mask for `image`: 8-bit grey, upright, black where it was transparent.

    Raises:
        InvalidRequest: as `read_image`, or the mask has not the size of `image`.
    """
    mask = _flattened(_decoded(field, text, max_pixels), "black").convert("L")
    if mask.size != image.size:
        raise InvalidRequest([(field, f"is {_size(mask)}, the image {_size(image)}")])
    return mask


def alpha_as_mask(field: str, text: str, max_pixels: int) -> str | None:
    """White where the picture in base64 is transparent, as base64 of a PNG; None if it is nowhere.

    Raises:
        InvalidRequest: as `read_image`.
    """
    picture = _decoded(field, text, max_pixels)
    if not picture.has_transparency_data:
        return None
    alpha = picture.convert("RGBA").getchannel("A")
    if alpha.getextrema()[0] == 255:
        return None
    return base64.b64encode(png_bytes(alpha.point([255 - value for value in range(256)]))).decode()


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG, for the store: lossless, and fast rather than small."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=PNG_LEVEL)
    return out.getvalue()


def encode(picture: Image.Image | Image.SupportsArrayInterface, output_format: OutputFormat, text: str) -> bytes:
    """The file that a client gets of an RGB image or a uint8 array [height, width, 3].

    `text`, from `parameters_text`, lies where the AUTOMATIC1111 web UI looks for it: in a PNG's `parameters` chunk, in
    the others' EXIF.
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    out = io.BytesIO()
    image.save(out, output_format, **saved_as(output_format, text))
    return out.getvalue()


def saved_as(output_format: OutputFormat, text: str) -> dict[str, Any]:
    """How Pillow is to write such a file, and where in it the text goes."""
    if output_format == "png":
        chunks = PngInfo()
        chunks.add_text("parameters", text)  # tEXt if Latin-1 can hold it, else iTXt
        return {"compress_level": PNG_LEVEL, "pnginfo": chunks}
    exif = _user_comment(text)
    if output_format == "jpeg" and len(exif) > MAX_JPEG_EXIF:
        exif = b""  # only two prompts full of emoji are that long; half a prompt would describe another picture
    return {"exif": exif, **LOSSY[output_format]}


def parameters_text(parameters: Parameters, seed: int) -> str:
    """How the picture with this seed was made, in the "infotext" of the AUTOMATIC1111 web UI, which reads it back."""
    facts = {
        "Steps": parameters.num_inference_steps,
        "Sampler": SAMPLERS.get(parameters.scheduler, parameters.scheduler),
        "CFG scale": parameters.guidance_scale,
        "Seed": seed,
        "Size": f"{parameters.width}x{parameters.height}",
        "Model": parameters.model,
        "Denoising strength": parameters.strength,
        "Frames": parameters.num_frames,
        "FPS": parameters.fps,
        "Version": f"Darkroom {VERSION}",
    }
    facts |= {f"Guidance {name}": getattr(parameters.guidance, name) for name in parameters.guidance.asked}
    lines = [" ".join([parameters.prompt, *(f"<lora:{lora.name}:{lora.scale:g}>" for lora in parameters.loras)])]
    if parameters.negative_prompt:
        lines.append(f"Negative prompt: {parameters.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(fact))}" for name, fact in facts.items() if fact is not None))
    return "\n".join(lines)


def read_text(field: str, text: str, max_pixels: int) -> str:
    """What the picture's file says of how it was made, where the AUTOMATIC1111 web UI looks for it; empty if nothing.

    Raises:
        InvalidRequest: as `read_image`.
    """
    _decoded(field, text, max_pixels)
    picture = Image.open(io.BytesIO(_unpacked(field, text)), formats=ACCEPTED)
    said = picture.info.get("parameters")
    if isinstance(said, str):
        return said
    try:
        comment = picture.getexif().get_ifd(EXIF_DIRECTORY).get(USER_COMMENT, b"")
    except BROKEN:  # a picture that can be seen, whose EXIF cannot be read
        return ""
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        return comment[8:].decode("utf-16-be", errors="replace")
    return ""


def _decoded(field: str, text: str, max_pixels: int) -> Image.Image:
    """The picture as its file has it, upright and with at most eight bits a channel."""
    data = _unpacked(field, text)
    try:
        picture = Image.open(io.BytesIO(data), formats=ACCEPTED)  # reads the header only
        _refuse_what_is_too_much(field, picture, data, max_pixels)
        picture.load()
        return _eight_bits(_upright(picture))
    except UnidentifiedImageError:
        raise InvalidRequest([(field, "is no picture: PNG, JPEG, WebP, AVIF, GIF or BMP is needed")]) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # from far beyond any sensible `max_pixels`
        raise InvalidRequest([(field, f"has more than {max_pixels} pixels")]) from None
    except BROKEN as error:
        raise InvalidRequest([(field, f"is a broken picture: {error}")]) from None


def _unpacked(field: str, text: str) -> bytes:
    text = "".join(text.split())  # mail and `base64` break lines
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not (head.lower().startswith("data:image/") and head.lower().endswith(";base64")):
            raise InvalidRequest([(field, "is a data: URL, but not data:image/…;base64,…")])
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InvalidRequest([(field, f"is neither base64 nor a data: URL: {error}")]) from None


def _refuse_what_is_too_much(field: str, picture: Image.Image, data: bytes, max_pixels: int) -> None:
    if picture.width * picture.height > max_pixels:
        raise InvalidRequest([(field, f"is {_size(picture)}, which is more than {max_pixels} pixels")])
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # a camera's JPEG, whose other frames are its own previews
        raise InvalidRequest([(field, f"is an animation of {frames} frames; send one picture")])
    if picture.format in ("JPEG", "MPO") and (scans := data.count(b"\xff\xda")) > MAX_JPEG_SCANS:
        raise InvalidRequest([(field, f"is a JPEG of {scans} scans, which is more than {MAX_JPEG_SCANS}")])


def _upright(picture: Image.Image) -> Image.Image:
    """As the camera was held. `ImageOps.exif_transpose` would fail on the EXIF of some, because it writes it anew."""
    orientation = picture.getexif().get(ExifTags.Base.Orientation)
    return picture.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else picture


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey rounded to 8 bits: Pillow's conversion clips at 255. (Of 16-bit colour it takes the high byte.)"""
    if not picture.mode.startswith("I"):
        return picture
    wide = picture.convert("I")
    grey = wide.point(ROUNDED_TO_EIGHT_BITS, "L")
    see_through = grey.info.pop("transparency", None)
    if see_through is not None:
        grey.putalpha(wide.point([0 if value == see_through else 255 for value in range(65_536)], "L"))
    return grey


def _flattened(picture: Image.Image, backdrop: str) -> Image.Image:
    """RGB. Metadata goes: a sender's place and camera are not ours to keep."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        flat = Image.new("RGB", picture.size, backdrop)
        flat.paste(picture, mask=picture)
        return flat
    flat = picture.convert("RGB")
    flat.info = {}
    return flat


def _user_comment(text: str) -> bytes:
    """EXIF with the text as piexif, which those UIs use, writes and reads it: big-endian UTF-16, of type UNDEFINED.

    By hand, because Pillow writes the type BYTE, which piexif reads as a tuple and chokes on.
    """
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    first_directory = struct.pack(">HHHIII", 1, EXIF_DIRECTORY, LONG, 1, 26, 0)  # offsets count from "MM"
    exif_directory = struct.pack(">HHHIII", 1, USER_COMMENT, UNDEFINED, len(comment), 44, 0)
    return b"Exif\0\0MM" + struct.pack(">HI", 42, 8) + first_directory + exif_directory + comment


def _quoted(text: str) -> str:
    """As JSON if the web UI would read a comma, colon or new line as the end of the value."""
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


def _size(picture: Image.Image) -> str:
    return f"{picture.width}×{picture.height}"
