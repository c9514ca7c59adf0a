"""Whatever is sent as a picture, it is read or refused, and the refusal names the field: properties, by hypothesis."""

import base64
import io
import json
from collections.abc import Collection
from random import Random
from typing import Any, get_args

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from app.errors import InvalidRequest, RangeNotSatisfiable
from app.files import part
from app.images import encode, png_bytes, read_image, read_mask
from app.jobs import age_of, is_id, new_id
from app.routes.generations import preferred_wait
from app.schemas import MAX_SEED, OutputFormat, Parameters, Priority
from app.settings import Settings

MAX_PIXELS = 4096
SIDE = st.integers(1, 40)

# What Pillow writes in each format, the ones that we refuse too.
MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["1", "L", "RGB", "CMYK"],
    "WEBP": ["L", "RGB", "RGBA", "P"],
    "AVIF": ["L", "RGB", "RGBA"],
    "GIF": ["1", "L", "P", "RGB", "RGBA"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "F", "I;16", "LAB", "YCbCr"],
    "ICO": ["RGBA"],
    "PPM": ["1", "L", "RGB"],
    "TGA": ["L", "LA", "RGB", "RGBA"],
}
ACCEPTED = {"PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP"}

examples = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=150
)


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.frombytes("RGB", size, Random(0).randbytes(3 * size[0] * size[1]))


@st.composite
def files(draw: st.DrawFn, kinds: Collection[str] = MODES) -> dict[str, Any]:
    """A file that Pillow has written, and what it was."""
    kind = draw(st.sampled_from(sorted(kinds)))
    mode = draw(st.sampled_from(MODES[kind]))
    size = draw(st.tuples(SIDE, SIDE))
    picture = noise(size)
    if mode == "LAB":
        picture = Image.frombytes("LAB", size, picture.tobytes())  # Pillow converts to it by a colour profile only
    elif mode in ("F", "I;16"):
        picture = picture.convert("L").convert("I").point(lambda value: value * 257).convert(mode)
    else:
        picture = picture.convert(mode)
    orientation = draw(st.integers(0, 9)) if kind in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF") else 1
    how: dict[str, Any] = {}
    if kind in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        how["exif"] = exif
    if mode == "P" and kind in ("PNG", "GIF"):
        how |= draw(st.sampled_from([{}, {"transparency": 0}]))
    if kind in ("PNG", "WEBP", "GIF", "AVIF", "TIFF") and draw(st.integers(0, 9)) == 0:
        how |= {"save_all": True, "append_images": [ImageChops.invert(noise(size)).convert("L").convert(picture.mode)]}
        how.pop("transparency", None)
        how.pop("exif", None)  # several frames, turned: Pillow 13.0 writes AVIF of that into memory that is not its own
        orientation = 1
    out = io.BytesIO()
    picture.save(out, kind, **how)
    upright = size[::-1] if orientation in (5, 6, 7, 8) else size
    return {"kind": kind, "mode": mode, "size": upright, "several": "save_all" in how, "data": out.getvalue()}


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def read_or_refused(text: str, field: str = "image") -> Image.Image | None:
    """8-bit RGB without metadata, or None if the field was named; anything else is raised."""
    try:
        image = read_image(field, text, MAX_PIXELS)
    except InvalidRequest as refusal:
        [(named, problem)] = refusal.errors
        assert named == field
        assert problem
        return None
    assert image.mode == "RGB"
    assert image.info == {}
    assert 1 <= image.width * image.height <= MAX_PIXELS
    assert Image.open(io.BytesIO(png_bytes(image))).size == image.size
    return image


# -- pictures


@examples
@given(files())
def test_every_accepted_file_is_read_upright_and_every_other_refused(file: dict[str, Any]):
    image = read_or_refused(as_text(file["data"]))
    assert (image is not None) == (file["kind"] in ACCEPTED and not file["several"])
    assert image is None or image.size == file["size"]


@examples
@given(files(), st.data())
def test_a_file_cut_or_changed_anywhere_is_read_or_refused(file: dict[str, Any], data: st.DataObject):
    broken = bytearray(file["data"])
    for _ in range(data.draw(st.integers(0, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(broken)))
    read_or_refused(as_text(bytes(broken[: data.draw(st.sampled_from([end, len(broken)]))])))


MAGIC = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x20\0\0\0WEBP", b"\0\0\0\x20ftypavif", b"GIF89a", b"BM", b""]


@examples
@given(st.sampled_from(MAGIC), st.binary(max_size=400))
def test_bytes_are_read_or_refused(magic: bytes, data: bytes):
    read_or_refused(as_text(magic + data))


@examples
@given(st.text(max_size=200) | st.from_regex(r"(?i)data:image/[a-z+]{0,8}(;base64)?,[A-Za-z0-9+/=\s]{0,40}"))
def test_a_text_is_read_or_refused(text: str):
    read_or_refused(text)


@examples
@given(files({"PNG"}), st.data())
def test_base64_may_be_broken_by_white_space_anywhere_and_needs_its_padding(file: dict[str, Any], data: st.DataObject):
    text = as_text(file["data"])
    at = data.draw(st.integers(0, len(text)))
    spaced = text[:at] + data.draw(st.text(" \t\r\n", max_size=3)) + text[at:]
    plain, with_spaces = read_or_refused(text), read_or_refused(f"data:image/png;base64,{spaced}")
    assert (plain and plain.tobytes()) == (with_spaces and with_spaces.tobytes())
    assert (read_or_refused(text.rstrip("=")) is None) == (text.endswith("=") or file["several"])


@examples
@given(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1))
def test_a_picture_with_more_pixels_is_refused_by_its_header(width: int, height: int):
    data = bytearray(io.BytesIO(png_bytes(Image.new("L", (1, 1)))).getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    assert read_or_refused(as_text(bytes(data))) is None or (width, height) == (1, 1)


@examples
@given(files(ACCEPTED), files(ACCEPTED))
def test_a_mask_is_grey_and_of_its_picture_s_size_or_refused(image: dict[str, Any], mask: dict[str, Any]):
    picture = Image.new("RGB", image["size"])
    try:
        read = read_mask("mask", as_text(mask["data"]), picture, MAX_PIXELS)
    except InvalidRequest as refusal:
        fields = [field for field, _ in refusal.errors]
    else:
        fields = []
        assert (read.mode, read.size) == ("L", image["size"])
    assert fields == (["mask"] if mask["several"] or mask["size"] != image["size"] else [])


# -- what a picture says of itself


@examples
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=300))
def test_any_text_is_read_back_from_a_png(text: str):
    file = Image.open(io.BytesIO(encode(Image.new("RGB", (2, 2)), "png", text)))
    file.load()
    assert file.info == {"parameters": text}


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50)
NUMBERS = st.integers(1, 10**9)
PARAMETERS = st.builds(
    Parameters,
    model=st.text(max_size=64),
    prompt=TEXT.filter(lambda text: bool(text.strip())),
    negative_prompt=TEXT,
    n=NUMBERS,
    width=NUMBERS,
    height=NUMBERS,
    num_inference_steps=NUMBERS,
    guidance_scale=st.floats(0, allow_nan=False, allow_infinity=False),
    scheduler=st.text(max_size=64),
    seed=st.integers(0, MAX_SEED),
    output_format=st.sampled_from(get_args(OutputFormat)),
    preview_every=st.none() | NUMBERS,
    reproducible=st.booleans(),
    expires_in=st.none() | st.integers(1, 604_800),
    priority=st.sampled_from(get_args(Priority)),
    metadata=st.dictionaries(TEXT, TEXT, max_size=16),
)


@examples
@given(PARAMETERS)
def test_what_the_queue_keeps_of_a_request_is_the_request(parameters: Parameters):
    kept = json.dumps(parameters.model_dump(exclude_defaults=True))
    assert Parameters.model_validate(json.loads(kept)) == parameters
    assert Parameters.model_validate_json(parameters.model_dump_json()) == parameters


# -- headers, and ids

BOUND = st.none() | st.integers(0, 40) | st.integers(0, 10**18 - 1)


@examples
@given(st.binary(min_size=1, max_size=30), BOUND, BOUND)
def test_a_range_of_bytes_is_a_slice(data: bytes, first: int | None, last: int | None):
    wanted = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    places = range(len(data))
    if first is None and last is None:
        expected = list(places)
    elif first is None:
        expected = [at for at in places if at >= len(data) - (last or 0)]
    else:
        expected = [at for at in places if at >= first and (last is None or at <= last)]
    try:
        answer = part(data, wanted, "image/png", {})
    except RangeNotSatisfiable:
        assert not expected
    else:
        assert answer.body == bytes(data[at] for at in expected)
        assert answer.status_code == (200 if first is None and last is None else 206)


@examples
@given(st.text(max_size=40) | st.from_regex(r"bytes=[0-9, -]{0,20}", fullmatch=True))
def test_any_range_is_answered_or_refused(wanted: str):
    try:
        answer = part(b"0123456789", wanted, "image/png", {})
    except RangeNotSatisfiable:
        return
    assert answer.status_code == 206 or answer.body == b"0123456789"
    assert answer.body


@examples
@given(st.none() | st.text(max_size=40), st.integers(0, 10**12))
def test_nobody_waits_for_longer_than_allowed_whatever_is_preferred(noise: str | None, seconds: int):
    most = int(Settings().max_wait.total_seconds())
    assert 0 <= preferred_wait(noise, most) <= most
    assert preferred_wait(f"respond-async, wait={seconds}", most) == min(int(str(seconds)[:6]), most)


@examples
@given(st.lists(st.integers(10**12, 10**14), min_size=2, max_size=10))
def test_ids_sort_by_age(milliseconds: list[int]):
    ids = [new_id(at / 1000) for at in milliseconds]
    assert all(is_id(id) for id in ids)
    assert [round(age_of(id) * 1000) for id in sorted(ids)] == sorted(round(age_of(id) * 1000) for id in ids)
    assert all(abs(age_of(id) * 1000 - at) < 2 for id, at in zip(ids, milliseconds, strict=True))
