"""`python -m tests.screenshots [folder]`: the playground, as the README shows it; into docs/ unless told otherwise."""

import sys
import tempfile
from pathlib import Path

import httpx2
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from app.local import LocalService
from app.settings import Settings
from tests.test_playground import CHROMIUM, FLAGS

PROMPTS = [
    "a slice of pizza, fluent 3d style",
    "a cactus on a pink background",
    "a red apple on a blue background",
    "a hot air balloon on a light blue background",
    "a lemon next to a strawberry",
    "an owl on a yellow background, noto style",
    "a penguin, fluent 3d style",
    "a sunflower on a teal background",
    "a snail on a white background",
    "a guitar on an orange background, fluent flat style",
    "a whale on a light blue background, noto style",
    "a fox on a purple background, noto style",
    "a rocket on a dark blue background, twemoji style",
]
HERO = "a parrot on a green background"
VIEWS = {
    "playground": {"color_scheme": "dark", "viewport": {"width": 1440, "height": 900}},
    "playground-light": {"color_scheme": "light", "viewport": {"width": 1440, "height": 900}},
    "playground-phone": {
        "color_scheme": "dark",
        "viewport": {"width": 390, "height": 1680},
        "device_scale_factor": 1.5,
    },
}


def fill(url: str) -> None:
    with httpx2.Client(base_url=url, timeout=300) as http:
        for seed, prompt in enumerate(PROMPTS):
            http.post("/v1/generations", json={"prompt": prompt, "seed": seed}).raise_for_status()
        last = {"prompt": HERO, "seed": 3}
        http.post("/v1/generations", json=last, headers={"Prefer": "wait=60"}).raise_for_status()


def arrived(page: Page) -> None:
    page.wait_for_selector("img.hero")
    page.wait_for_function("[...document.images].slice(0, 12).every((image) => image.complete)")
    page.wait_for_timeout(800)  # what fades in has done so


def smaller(path: Path) -> None:
    """Six bits of each colour: nobody sees the others, and they take most of the file."""
    with Image.open(path) as shot:
        shot.convert("RGB").point(lambda value: value & 0xFC | value >> 6).save(path, optimize=True)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data, sync_playwright() as playwright:
        settings = Settings(data_dir=Path(data), port=0, log_level="warning")
        with LocalService(settings) as service:
            fill(service.url)
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            for name, view in VIEWS.items():
                page = browser.new_page(**view)
                page.goto(service.url)
                page.get_by_label("Prompt").fill(HERO)
                page.get_by_label("Prompt").blur()
                arrived(page)
                page.screenshot(path=folder / f"{name}.png")
                smaller(folder / f"{name}.png")
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs")
