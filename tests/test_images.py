"""Pictures that clients send are read as any viewer shows them, and what they get can be read by others."""

import base64
import io
import struct
import tomllib
import zlib
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from app.errors import InvalidRequest
from app.images import MAX_JPEG_SCANS, MEDIA_TYPES, SAMPLERS, encode, parameters_text, png_bytes, read_image, read_mask
from app.schemas import OutputFormat, Parameters

MAX_PIXELS = 1_000_000
FORMATS = [name for name in get_args(OutputFormat) if name != "mp4"]  # which no picture is
CARDS = Path(__file__).parents[1] / "models" / "cards"

PROMPTS = [
    "a red apple",
    "a café, naïve: «déjà vu»",
    'two lines,\nand a third: "quoted" \\ back\\slash\n\nNegative prompt: not really',
    "🍎 on 蓝色 background, ½ 𝕏\tтест\r\n",
    "",
]


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with sharp-edged boxes on them; turned or mirrored it is another picture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) * 85 // (width + height)], -1)
    for _ in range(4):
        top, left = rng.integers(0, height), rng.integers(0, width)
        picture[top : top + height // 4, left : left + width // 3] = rng.integers(0, 256, 3)
    return picture.astype(np.uint8)


def saved(picture: Image.Image | np.ndarray, file_format: str, **options: object) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def read(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    image = read_image("image", as_text(data), max_pixels)
    assert image.mode == "RGB"
    return np.asarray(image)


def refusal(data: bytes | str, max_pixels: int = MAX_PIXELS) -> str:
    """What a client is told is wrong with its `image`."""
    with pytest.raises(InvalidRequest) as caught:
        read_image("image", data if isinstance(data, str) else as_text(data), max_pixels)
    [(field, problem)] = caught.value.errors
    assert field == "image"
    return problem


def png(width: int, height: int, depth: int, colour: int, rows: list[bytes], transparency: bytes = b"") -> bytes:
    """A PNG written by hand, for kinds that Pillow does not write."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    parts += [(b"tRNS", transparency)] if transparency else []
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def big_endian_rows(values: np.ndarray) -> list[bytes]:
    return [row.astype(">u2").tobytes() for row in values]


# Reading


@pytest.mark.parametrize(("file_format", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_a_lossless_picture_is_read_pixel_for_pixel(file_format, options):
    picture = scene(30, 50)
    assert (read(saved(picture, file_format, **options)) == picture).all()


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "AVIF"])
def test_a_lossy_picture_is_read_as_its_decoder_gives_it(file_format):
    picture = scene(64, 96)
    difference = read(saved(picture, file_format, quality=95)).astype(float) - picture
    assert np.abs(difference).mean() < 3


def test_a_gif_of_one_frame_is_a_picture():
    picture = Image.fromarray(scene(20, 30)).quantize(64)
    assert (read(saved(picture, "GIF")) == np.asarray(picture.convert("RGB"))).all()


def test_a_data_url_and_broken_lines_read_like_bare_base64():
    picture = scene(20, 30)
    text = as_text(saved(picture, "PNG"))
    lines = "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for spelling in (
        f"data:image/png;base64,{text}",
        f"DATA:image/x-any;name=a;base64,{text}",
        f"  {lines}\n",
        f"data:image/png;base64,\n{lines}",
    ):
        assert (np.asarray(read_image("image", spelling, MAX_PIXELS)) == picture).all()


@pytest.mark.parametrize("text", ["!!!!", "abc", "ab=c", "-_-_", "äöü=", "http://example.com/a.png", "AAAA%3D"])
def test_what_is_not_base64_is_refused(text):
    assert refusal(text).startswith("is neither base64 nor a data: URL")


@pytest.mark.parametrize("url", ["data:image/png,abcd", "data:text/plain;base64,abcd", "data:;base64,abcd"])
def test_a_data_url_of_something_else_is_refused(url):
    assert refusal(url) == "is a data: URL, but not data:image/…;base64,…"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        saved(scene(9, 9), "TIFF"),
        saved(scene(9, 9), "ICO"),
    ],
    ids=["nothing", "text", "SVG", "EPS", "TIFF", "ICO"],
)
def test_what_is_no_accepted_picture_is_refused(data):
    assert refusal(data) == "is no picture: PNG, JPEG, WebP, AVIF, GIF or BMP is needed"


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP"])
def test_half_a_picture_is_refused(file_format):
    data = saved(scene(64, 96), file_format)
    assert "picture" in refusal(data[: len(data) // 2])
    assert "picture" in refusal(data[: len(data) * 9 // 10])


def test_a_changed_byte_in_a_png_is_noticed():
    data = bytearray(saved(scene(64, 96), "PNG"))
    data[len(data) // 2] ^= 1
    assert refusal(bytes(data)).startswith("is a broken picture: ")


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "WEBP", "AVIF"])
def test_an_animation_is_refused_with_its_number_of_frames(file_format):
    frames = [Image.fromarray(scene(20, 30, seed)) for seed in range(3)]
    data = saved(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert refusal(data) == "is an animation of 3 frames; send one picture"


def test_a_camera_s_jpeg_with_previews_inside_is_one_picture():
    first, preview = scene(64, 96), scene(32, 48, seed=1)
    data = saved(first, "MPO", save_all=True, append_images=[Image.fromarray(preview)], quality=95)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(read(data).astype(float) - first).mean() < 3


def test_the_largest_allowed_picture_is_read_and_one_more_row_is_refused():
    assert read(saved(scene(40, 50), "PNG"), max_pixels=2000).shape == (40, 50, 3)
    assert refusal(saved(scene(41, 50), "PNG"), max_pixels=2000) == "is 50×41, which is more than 2000 pixels"


def test_a_picture_that_is_too_large_is_refused_by_its_header_alone():
    assert refusal(png(5000, 5000, 8, 2, [])) == "is 5000×5000, which is more than 1000000 pixels"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_beyond_pillow_s_own_limits_too():
    assert refusal(png(10_000, 10_000, 8, 2, [])) == "is 10000×10000, which is more than 1000000 pixels"
    assert refusal(png(100_000, 100_000, 8, 2, [])) == "has more than 1000000 pixels"


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_where_warnings_are_errors():
    assert refusal(png(10_000, 10_000, 8, 2, [])) == "has more than 1000000 pixels"


def test_a_jpeg_of_endless_scans_is_refused_and_an_ordinary_progressive_one_is_read():
    data = saved(scene(64, 96), "JPEG", progressive=True, quality=95)
    assert np.abs(read(data).astype(float) - scene(64, 96)).mean() < 3
    scans = data.count(b"\xff\xda")
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    problem = refusal(data[:-2] + last_scan * MAX_JPEG_SCANS + data[-2:])
    assert problem == f"is a JPEG of {scans + MAX_JPEG_SCANS} scans, which is more than {MAX_JPEG_SCANS}"


def test_sixteen_bit_grey_is_rounded_not_clipped():
    values = np.arange(65_536).reshape(256, 256)
    seen = read(png(256, 256, 16, 0, big_endian_rows(values)))
    assert (seen == np.round(values / 257)[..., None]).all()


def test_sixteen_bit_grey_may_have_a_transparent_value():
    values = np.array([[0, 20_000, 40_000, 65_535]])
    seen = read(png(4, 1, 16, 0, big_endian_rows(values), transparency=struct.pack(">H", 20_000)))
    assert seen[0, :, 0].tolist() == [0, 255, 156, 255]


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4)], ids=["RGB", "RGBA"])
def test_sixteen_bit_colour_is_within_a_level(colour, channels):
    ramp = np.arange(65_536).reshape(256, 256)
    values = np.stack([ramp, ramp[::-1], ramp.T, np.full_like(ramp, 65_535)][:channels], -1)
    seen = read(png(256, 256, 16, colour, big_endian_rows(values)))
    assert np.abs(seen - values[..., :3] / 257).max() < 1


def test_cmyk_becomes_rgb():
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow: red
    assert np.abs(read(saved(inks, "JPEG", quality=100)).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palettes_become_rgb(mode):
    picture = Image.fromarray(scene(20, 30)).convert(mode)
    assert (read(saved(picture, "PNG")) == np.asarray(picture.convert("RGB"))).all()


def test_transparent_parts_are_flattened_onto_white():
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(0, 0, 0, 0), (0, 0, 0, 128), (200, 100, 0, 255)])
    for file_format, options in [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})]:
        assert read(saved(picture, file_format, **options)).tolist() == [[[255] * 3, [127] * 3, [200, 100, 0]]]


def test_a_transparent_colour_of_a_palette_or_of_rgb_or_grey_is_flattened_onto_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert read(saved(palette, "PNG", transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert read(saved(palette, "PNG", transparency=b"\xff\x00")).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    colour = Image.new("RGB", (2, 1), (10, 20, 30))
    colour.putpixel((1, 0), (40, 50, 60))
    assert read(saved(colour, "PNG", transparency=(40, 50, 60))).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((1, 0), 9)
    assert read(saved(grey, "PNG", transparency=9)).tolist() == [[[7] * 3, [255] * 3]]


def stored_as(orientation: int, upright: np.ndarray) -> np.ndarray:
    """How a camera stores `upright` when it says this EXIF orientation: where its first row and first column lie."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]


def exif_of(orientation: int, *entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF by hand: (tag, type, count, four bytes) after the orientation."""
    fields = [(0x0112, 3, 1, struct.pack(">HH", orientation, 0)), *entries]
    packed = b"".join(struct.pack(">HHI", *field[:3]) + field[3] for field in fields)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(fields)) + packed + bytes(4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_the_camera_was_held(orientation):
    upright = scene(20, 30)
    data = saved(np.ascontiguousarray(stored_as(orientation, upright)), "PNG", exif=exif_of(orientation))
    assert (read(data) == upright).all()


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "AVIF"])
def test_every_format_with_exif_is_turned(file_format):
    upright = scene(64, 96)
    data = saved(np.ascontiguousarray(stored_as(6, upright)), file_format, quality=95, exif=exif_of(6))
    assert np.abs(read(data).astype(float) - upright).mean() < 3


def test_exif_that_pillow_cannot_write_again_does_not_keep_a_picture_from_being_read():
    upright = scene(20, 30)
    width_as_bytes = (0x0100, 7, 4, b"abcd")
    data = saved(np.ascontiguousarray(stored_as(8, upright)), "PNG", exif=exif_of(8, width_as_bytes))
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (read(data) == upright).all()


def test_the_sender_s_metadata_is_forgotten():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for picture in (Image.fromarray(scene(20, 30)), Image.new("RGBA", (20, 30), (1, 2, 3, 4))):
        data = saved(picture, "PNG", exif=exif_of(1), icc_profile=profile, dpi=(300, 300))
        image = read_image("image", as_text(data), MAX_PIXELS)
        assert image.info == {}
        kept = Image.open(io.BytesIO(png_bytes(image)))
        assert kept.info == {}
        assert not kept.getexif()


# Masks


def mask_of(data: bytes, image: Image.Image) -> Image.Image:
    return read_mask("mask", as_text(data), image, MAX_PIXELS)


def test_a_mask_keeps_its_greys():
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for picture in (Image.fromarray(greys), Image.fromarray(greys).convert("RGB")):
        mask = mask_of(saved(picture, "PNG"), Image.new("RGB", (16, 16)))
        assert mask.mode == "L"
        assert (np.asarray(mask) == greys).all()


def test_the_transparent_parts_of_a_mask_are_black():
    drawn = Image.new("RGBA", (3, 1))
    drawn.putdata([(255, 255, 255, 0), (255, 255, 255, 128), (255, 255, 255, 255)])
    assert list(mask_of(saved(drawn, "PNG"), Image.new("RGB", (3, 1))).tobytes()) == [0, 128, 255]


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(InvalidRequest) as caught:
        mask_of(saved(Image.new("L", (64, 32)), "PNG"), Image.new("RGB", (128, 128)))
    assert str(caught.value) == "mask: is 64×32, the image 128×128"


def test_a_mask_matches_the_picture_as_it_is_seen_not_as_it_is_stored():
    photo = read_image("image", as_text(saved(Image.new("RGB", (64, 32)), "JPEG", exif=exif_of(6))), MAX_PIXELS)
    assert mask_of(saved(Image.new("L", (32, 64)), "PNG"), photo).size == (32, 64)
    with pytest.raises(InvalidRequest, match="mask: is 64×32, the image 32×64"):
        mask_of(saved(Image.new("L", (64, 32)), "PNG"), photo)


def test_a_mask_is_checked_like_any_picture():
    with pytest.raises(InvalidRequest, match="mask: is no picture"):
        mask_of(b"hello", Image.new("RGB", (8, 8)))
    with pytest.raises(InvalidRequest, match="mask: is 2000×2000, which is more than"):
        mask_of(png(2000, 2000, 8, 0, []), Image.new("RGB", (8, 8)))


# Writing


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_stored_picture_reads_back_pixel_for_pixel(mode):
    image = Image.fromarray(scene(40, 60)).convert(mode)
    stored = Image.open(io.BytesIO(png_bytes(image)))
    assert (stored.format, stored.mode) == ("PNG", mode)
    assert (np.asarray(stored) == np.asarray(image)).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_png_reads_back_with_the_same_pixels_and_the_exact_text(prompt, seed):
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (*rng.integers(1, 200, 2), 3), dtype=np.uint8)
    image = Image.open(io.BytesIO(encode(picture, "png", prompt)))
    assert (np.asarray(image) == picture).all()
    assert image.info == {"parameters": prompt}


def test_a_png_s_text_is_plain_if_latin_and_international_if_not():
    assert b"tEXtparameters\0a caf\xe9" in encode(scene(8, 8), "png", "a café")
    assert b"iTXtparameters\0\0\0\0\0" + "🍎".encode() in encode(scene(8, 8), "png", "🍎")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("output_format", ["jpeg", "webp", "avif"])
def test_the_other_formats_carry_the_text_as_an_exif_user_comment(output_format, prompt):
    data = encode(scene(64, 96), output_format, prompt)
    comment = b"UNICODE\0" + prompt.encode("utf-16-be")
    assert Image.open(io.BytesIO(data)).getexif().get_ifd(0x8769) == {0x9286: comment}
    assert struct.pack(">HHI", 0x9286, 7, len(comment)) in data  # type UNDEFINED: piexif reads BYTE as a tuple


def test_a_text_too_long_for_a_jpeg_is_left_out_and_the_longest_that_fits_is_kept():
    def has_text(output_format: OutputFormat, text: str) -> bool:
        return 0x9286 in Image.open(io.BytesIO(encode(scene(8, 8), output_format, text))).getexif().get_ifd(0x8769)

    longest = (65_533 - 50 - 8) // 2  # a segment, less EXIF's frame and UNICODE\0, in two-byte units
    assert has_text("jpeg", "x" * longest)
    assert not has_text("jpeg", "x" * (longest + 1))
    assert has_text("webp", "x" * (longest + 1))
    assert has_text("avif", "x" * (longest + 1))


@pytest.mark.parametrize(("output_format", "decibels"), [("jpeg", 43), ("webp", 28), ("avif", 31)])
def test_lossy_formats_stay_close_to_the_picture(output_format, decibels):
    y, x = np.mgrid[0:128, 0:128]
    inside = (np.hypot(x - 64, y - 64) < 40)[..., None]
    picture = np.where(inside, [220, 40, 30], [40, 90, 200]).astype(np.uint8)  # a red apple on a blue background
    image = Image.open(io.BytesIO(encode(picture, output_format, "")))
    error = np.asarray(image).astype(float) - picture
    assert image.mode == "RGB"
    assert 10 * np.log10(255**2 / np.square(error).mean()) > decibels


def test_jpeg_and_avif_keep_colour_at_full_resolution():
    """One-pixel stripes of one brightness, which 4:2:0 would mix to brown."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, 0::2], stripes[:, 1::2] = (200, 40, 40), (40, 112, 40)
    for output_format in ("jpeg", "avif"):
        seen = np.asarray(Image.open(io.BytesIO(encode(stripes, output_format, "")))).astype(float)
        assert np.abs(seen - stripes).mean() < 10


@pytest.mark.parametrize("output_format", FORMATS)
def test_every_format_is_what_its_media_type_says(output_format):
    assert (
        Image.open(io.BytesIO(encode(scene(8, 8), output_format, ""))).get_format_mimetype()
        == MEDIA_TYPES[output_format]
    )
    assert set(MEDIA_TYPES) == {*FORMATS, "mp4"}


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_array_and_an_image_of_the_same_pixels_give_the_same_bytes_every_time(output_format):
    picture = scene(64, 96)
    assert len({encode(p, output_format, "text") for p in (picture, picture.copy(), Image.fromarray(picture))}) == 1


# Parameters


def parameters(**changes: object) -> Parameters:
    decided = {"model": "emoji-sd", "prompt": "a red apple", "width": 128, "height": 96, "seed": 5}
    decided |= {"num_inference_steps": 20, "guidance_scale": 3, "scheduler": "dpmpp_2m"}
    return Parameters.model_validate(decided | changes)


def test_parameters_read_as_the_web_ui_writes_them():
    assert parameters_text(parameters(), seed=5) == (
        "a red apple\n"
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 3.0, Seed: 5, Size: 128x96, Model: emoji-sd, Version: Darkroom 0.1.0"
    )


def test_parameters_tell_the_negative_prompt_and_the_strength():
    text = parameters_text(
        parameters(negative_prompt="blurry,\ndark", image="0" * 64, strength=0.6, scheduler="euler_a"), seed=0
    )
    assert text == (
        "a red apple\nNegative prompt: blurry,\ndark\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 3.0, Seed: 0, Size: 128x96, Model: emoji-sd, "
        "Denoising strength: 0.6, Version: Darkroom 0.1.0"
    )


def test_each_picture_of_a_request_tells_its_own_seed():
    assert ", Seed: 7, " in parameters_text(parameters(seed=5, n=3), seed=7)


def test_a_value_with_a_comma_or_a_colon_is_quoted():
    text = parameters_text(parameters(model='my: "best", model', scheduler="a,b"), seed=5)
    assert r'Model: "my: \"best\", model", ' in text
    assert 'Sampler: "a,b", ' in text


def test_every_scheduler_of_every_card_has_the_web_ui_s_name():
    schedulers = {name for card in CARDS.glob("*.toml") for name in tomllib.loads(card.read_text())["schedulers"]}
    assert schedulers
    assert schedulers <= set(SAMPLERS)


def test_an_unknown_scheduler_is_named_as_it_is():
    assert "Sampler: restart, " in parameters_text(parameters(scheduler="restart"), seed=5)
