"""The playground as people use it: in a real browser, on a real service with the shipped models."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright
from redis import Redis

from app.jobs import index_key
from app.local import LocalService, free_port, port_open
from app.page.routes import FILES
from app.parts import Part
from app.schemas import TAKES
from tests.conftest import local_settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KEY = "a key of the tests"
QUICK = {"width": 64, "height": 64, "num_inference_steps": 6}

expect.set_options(timeout=60_000)  # of a busy machine

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    settings = local_settings(tmp_path_factory.mktemp("playground"), models=("emoji-sd", "emoji-unclip"), max_rows=4)
    with LocalService(settings) as service:
        yield service


@pytest.fixture(scope="module")
def keyed(service: LocalService) -> Iterator[str]:
    """Another API of the same service, that wants a key."""
    port, settings = free_port("127.0.0.1"), service.settings
    environment = (
        os.environ
        | settings.environment()
        | {
            "REDIS_URL": service.redis_url,
            "DARKROOM_PORT": str(port),
            "DARKROOM_DATA_DIR": str(settings.data_dir.absolute()),
            "DARKROOM_API_KEYS": f"ada={hashlib.sha256(KEY.encode()).hexdigest()}",
        }
    )
    command = [sys.executable, "-m", "app.cli", "api"]
    api = Part("the API with keys", command, environment, lambda _: port_open("127.0.0.1", port))
    api.wait(30)
    yield f"http://127.0.0.1:{port}"
    api.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, service: LocalService) -> Iterator[BrowserContext]:
    """A visitor who has never been here, of a service that has drawn nothing; it draws small pictures in few steps.

    Nothing that the visitor does may end in an error on the console or in a request to anybody else.
    """
    with Redis.from_url(service.redis_url) as redis:
        redis.delete(index_key("everybody"), index_key("ada"))
    context = browser.new_context(base_url=service.url, accept_downloads=True)
    context.set_default_timeout(60_000)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    draft = f"localStorage['darkroom.draft'] ??= JSON.stringify({json.dumps(QUICK)})"
    context.add_init_script(f"if (location.protocol === 'http:') {draft}")
    asked: list[str] = []
    said: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    context.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    context.on("weberror", lambda error: said.append(str(error.error)))
    yield context
    context.close()
    assert [url for url in asked if not re.match(r"http://127\.0\.0\.1:\d+/|blob:http://127|data:", url)] == []
    # Chromium tells of every answer of 400 and more, which is how a browser learns that a field is wrong.
    assert [line for line in said if not line.startswith("Failed to load resource")] == []


@pytest.fixture
def page(context: BrowserContext) -> Page:
    page = context.new_page()
    page.goto("/")
    return page


@pytest.fixture
def http(service: LocalService) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service.url, timeout=60) as client:
        yield client


def draw(page: Page, prompt: str) -> None:
    """Ask for it, and wait until it hangs there."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Draw", exact=True).click()
    hangs(page, prompt)


def hangs(page: Page, alt: str) -> None:
    """It is there, and its pixels are."""
    hero = page.locator("img.hero").last
    expect(hero).to_have_attribute("alt", alt)
    page.wait_for_function("e => e.complete && e.naturalWidth > 0", arg=hero.element_handle())


def sent(page: Page, act: Callable[[], object]) -> dict[str, Any]:
    """The body of the generation that this asks for."""
    with page.expect_request(lambda r: r.method == "POST" and r.url.endswith("/v1/generations")) as asked:
        act()
    request: Request = asked.value
    return json.loads(request.post_data or "")


def newest(http: httpx2.Client) -> dict[str, Any]:
    return http.get("/v1/generations").json()["data"][0]


def opened(data_url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2])))


def apple(tmp_path: Path) -> Path:
    path = tmp_path / "apple.png"
    Image.new("RGB", (96, 64), "red").save(path)
    return path


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{it['id']}: {it['nodes'][0]['html']} {it['nodes'][0]['failureSummary']}" for it in found]


def test_a_prompt_becomes_a_picture_that_sharpens_on_the_way(page: Page):
    expect(page.get_by_role("heading", name="Nothing developed yet")).to_be_visible()
    page.get_by_role("button", name="a lemon next to a strawberry").click()
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.get_by_label("Steps", exact=True).fill("60")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.locator("img.preview")).to_be_visible()
    first = page.locator("img.preview").get_attribute("src")
    expect(page.locator("img.preview")).not_to_have_attribute("src", first or "")
    expect(page.get_by_role("progressbar")).to_have_attribute("value", re.compile(r"^0\.\d+"))
    expect(page.get_by_text(re.compile(r"^Drawing: step \d+ of 60, about \d+ s left$")).first).to_be_visible()
    hangs(page, "a lemon next to a strawberry")
    expect(page.get_by_role("status")).to_have_text("The picture is ready")
    expect(page.locator(".facts")).to_contain_text("60")
    assert page.locator(".tile").count() == 1


def test_a_generation_is_canceled(page: Page, http: httpx2.Client):
    page.get_by_label("Steps, exactly", exact=True).fill("100")
    page.get_by_label("Prompt").fill("a castle")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".fate")).to_have_text("Canceled")
    assert newest(http)["status"] == "canceled"
    page.get_by_role("button", name="Reuse").click()
    expect(page.get_by_label("Steps, exactly", exact=True)).to_have_value("100")


def test_the_gallery_survives_a_reload_and_says_how_each_picture_was_drawn(page: Page):
    page.get_by_label("Seed", exact=True).fill("5")
    draw(page, "a dog")
    page.get_by_label("Pictures").fill("2")
    page.get_by_label("Pictures").blur()
    page.get_by_label("Seed", exact=True).fill("0")
    draw_two = "a cat"
    page.get_by_label("Prompt").fill(draw_two)
    page.get_by_role("button", name="Draw", exact=True).click()
    hangs(page, "a cat, 1 of 2")
    page.reload()
    expect(page.locator(".tile img")).to_have_count(3)
    expect(page.get_by_label("Prompt")).to_have_value("a cat")
    page.get_by_role("button", name="a dog").click()
    hangs(page, "a dog")
    dog = re.findall("#([0-9a-f]{32})", page.url)[0]
    expect(page.locator(".facts div", has_text="Seed")).to_contain_text("5")
    page.reload()  # the address says which
    hangs(page, "a dog")
    page.get_by_role("button", name="Reuse").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("5")
    expect(page.get_by_role("button", name="Locked")).to_be_visible()
    page.get_by_role("button", name="Locked").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("")
    with page.expect_download() as loaded:
        page.get_by_role("link", name="Download").click()
    assert loaded.value.suggested_filename == f"{dog}-0.png"


def test_an_error_is_told_at_its_field(page: Page):
    page.get_by_label("Width").fill("100")
    page.get_by_label("Prompt").fill("a dog")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("must be a multiple of 16")
    expect(page.get_by_label("Width")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Width")).to_be_focused()
    expect(page.locator("#f-width-error")).to_contain_text("must be a multiple of 16 for emoji-sd, not 100")
    assert violations(page) == []
    page.get_by_label("Width").fill("64")
    page.get_by_label("Width").blur()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_number_half_typed_stays_when_the_page_is_drawn_again(page: Page, http: httpx2.Client):
    page.get_by_label("Prompt").fill("a dog")
    guidance = page.get_by_label("Guidance, exactly", exact=True)
    guidance.fill("6")
    http.post("/v1/generations", json={"prompt": "a cat"} | QUICK)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.get_by_role("button", name="a cat")).to_be_visible()
    expect(guidance).to_have_value("6")
    assert sent(page, lambda: guidance.press("Control+Enter"))["guidance_scale"] == 6


def test_the_form_is_what_the_model_can_do(page: Page):
    expect(page.get_by_role("radio")).to_have_count(3)
    page.get_by_label("Model").select_option("emoji-unclip")
    names = page.locator(".tasks label").all_inner_texts()
    assert names == ["From words", "Variation", "In between"]
    page.get_by_label("Variation").check()
    expect(page.get_by_label("Prompt")).to_have_count(0)
    expect(page.get_by_label("Strength")).to_have_count(0)
    expect(page.locator("#f-scheduler option")).to_have_count(10)
    page.get_by_text("More", exact=True).click()
    expect(page.get_by_label("Rescale", exact=True)).to_be_visible()
    expect(page.get_by_label("CLIP guidance", exact=True)).to_have_count(0)


def test_the_page_knows_what_each_task_takes(page: Page):
    tasks = page.evaluate("import('/page/request.js').then(({ TASKS }) => TASKS)")
    assert {name: (tuple(task["needs"]), tuple(task["may"])) for name, task in tasks.items()} == TAKES


def test_brackets_weigh_words_where_they_are_to(page: Page):
    page.get_by_label("Prompt").fill("a (red:1.2) apple")
    box = page.get_by_label("Brackets weigh words")
    page.get_by_text("More", exact=True).click()
    body = sent(page, lambda: page.get_by_role("button", name="Draw", exact=True).click())
    assert "prompt_weights" not in body
    hangs(page, "a (red:1.2) apple")
    expect(page.locator(".facts")).not_to_contain_text("Brackets")
    box.check()
    body = sent(page, lambda: page.get_by_role("button", name="Draw", exact=True).click())
    assert body["prompt_weights"] is True
    expect(page.locator(".facts")).to_contain_text("Brackets weigh words")
    hangs(page, "a (red:1.2) apple")
    box.uncheck()
    page.get_by_role("button", name="Reuse").click()
    expect(box).to_be_checked()
    page.get_by_role("button", name="Copy as").click()
    expect(page.locator("pre")).to_contain_text('"prompt_weights": true')
    page.keyboard.press("Escape")
    page.get_by_label("Model").select_option("emoji-unclip")
    expect(box).to_have_count(0)


def test_what_is_painted_is_what_is_repainted(page: Page, http: httpx2.Client):
    draw(page, "a red apple")
    page.get_by_role("button", name="Edit").click()
    canvas = page.locator("#f-mask")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.25)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.5, steps=5)
    page.mouse.up()
    page.get_by_label("Prompt").fill("a lemon")
    body = sent(page, lambda: page.get_by_role("button", name="Draw", exact=True).click())
    mask = opened(body["mask"]).convert("L")
    assert mask.size == opened(body["image"]).size
    assert mask.getpixel((mask.width // 4, mask.height // 3)) == 255
    assert mask.getpixel((mask.width * 3 // 4, mask.height * 3 // 4)) == 0
    hangs(page, "a lemon")
    parameters = newest(http)["parameters"]
    assert (parameters["task"], parameters["strength"]) == ("inpaint", 1.0)
    assert parameters["mask"].startswith("sha256:")
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_role("button", name="Undo")).to_be_disabled()


def test_a_mask_is_painted_by_keyboard(page: Page, tmp_path: Path):
    page.get_by_label("Repaint").check()
    page.get_by_label("Picture", exact=True).set_input_files(apple(tmp_path))
    canvas = page.locator("#f-mask")
    canvas.focus()
    for key in ("ArrowLeft", "Shift+ArrowUp", "Space"):
        canvas.press(key)
    page.get_by_label("Prompt").fill("a lemon")
    assert violations(page) == []
    body = sent(page, lambda: page.get_by_label("Prompt").press("Control+Enter"))
    white = opened(body["mask"]).convert("L").point(lambda value: value > 127, "1").getbbox()
    assert white
    assert white[0] < 32 < white[2]
    canvas.press("Backspace")
    canvas.press("Backspace")
    expect(page.get_by_role("button", name="Clear")).to_be_disabled()


def test_a_dropped_picture_is_where_drawing_starts(page: Page, http: httpx2.Client, tmp_path: Path):
    """Dropped anywhere, on a form that starts from words: it is then one that starts from a picture."""
    page.wait_for_selector("#f-prompt")
    data = base64.b64encode(apple(tmp_path).read_bytes()).decode()
    page.evaluate(
        """(data) => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], "apple.png", { type: "image/png" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
        }""",
        data,
    )
    expect(page.get_by_label("From a picture")).to_be_checked()
    page.get_by_label("Strength, exactly").fill("0.5")
    page.get_by_label("Strength, exactly").blur()
    draw(page, "a red apple")
    parameters = newest(http)["parameters"]
    assert (parameters["task"], parameters["strength"]) == ("image-to-image", 0.5)


def test_a_picture_to_follow_changes_no_task(page: Page, tmp_path: Path):
    """A proxy says that the model has a ControlNet."""

    def following(route: Any) -> None:
        answer = route.fetch()
        models = answer.json()
        models["data"][0]["needs"] = ["control_image"]
        route.fulfill(response=answer, json=models)

    page.route("**/v1/models", following)
    page.reload()
    page.get_by_label("Picture to follow").set_input_files(apple(tmp_path))
    expect(page.get_by_role("img", name="Picture to follow")).to_be_visible()
    expect(page.get_by_label("From words")).to_be_checked()


def test_a_picture_is_varied_and_met_half_way(page: Page, http: httpx2.Client, tmp_path: Path):
    page.get_by_label("Model").select_option("emoji-unclip")
    page.get_by_label("In between").check()
    page.get_by_label("From, in words").fill("a red apple")
    page.get_by_label("To, a picture").set_input_files(apple(tmp_path))
    page.get_by_label("Mix, exactly").fill("0.25")
    page.get_by_label("Mix, exactly").blur()
    page.get_by_label("From, in words").press("Control+Enter")
    hangs(page, "a red apple")
    parameters = newest(http)["parameters"]
    assert (parameters["task"], parameters["mix"], parameters["prompt"]) == ("interpolate", 0.25, "a red apple")
    page.get_by_role("button", name="Vary").click()
    expect(page.get_by_label("Variation")).to_be_checked()
    expect(page.get_by_label("Mix", exact=True)).to_have_count(0)
    page.get_by_label("To, in words").fill("a green apple")
    page.get_by_label("Mix, exactly").fill("0.25")
    page.get_by_label("Mix, exactly").blur()
    body = sent(page, lambda: page.get_by_role("button", name="Draw", exact=True).click())
    assert [body[name] for name in ("prompt", "end_prompt", "mix")] == ["a red apple", "a green apple", 0.25]
    hangs(page, "a red apple")
    page.get_by_role("button", name="Reuse").click()
    expect(page.get_by_label("To, in words")).to_have_value("a green apple")
    expect(page.get_by_label("Mix, exactly")).to_have_value("0.25")
    page.get_by_role("button", name="Copy as").click()
    page.get_by_role("radio", name="OpenAI").check()
    expect(page.locator("pre")).to_contain_text(re.compile(r'extra_body=\{[^}]*"prompt": "a red apple"'))
    page.keyboard.press("Escape")
    page.get_by_label("To, in words").fill("")
    page.get_by_role("button", name="Draw", exact=True).click()
    hangs(page, "a variation")
    assert newest(http)["parameters"]["task"] == "variation"


def test_two_settings_are_compared_side_by_side(page: Page):
    draw(page, "a red apple")
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("button", name="change one of its settings").click()
    page.get_by_label("Guidance, exactly", exact=True).fill("6")
    page.get_by_label("Guidance, exactly", exact=True).blur()
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".stage.two img.hero")).to_have_count(2)
    table = page.get_by_role("table", name="What is different")
    expect(table.get_by_role("row").nth(1)).to_have_text(re.compile("^Guidance36"))
    labels = table.get_by_role("rowheader").all_inner_texts()
    assert set(labels) <= {"Guidance", "Drawn in"}
    assert violations(page) == []
    page.get_by_role("button", name="Stop comparing").click()
    expect(page.locator("img.hero")).to_have_count(1)


def test_two_tabs_see_one_history(page: Page, context: BrowserContext, http: httpx2.Client):
    other = context.new_page()
    other.goto("/")
    expect(other.get_by_role("heading", name="Nothing developed yet")).to_be_visible()
    page.bring_to_front()
    draw(page, "a dog")
    expect(other.locator(".tile img")).to_have_attribute("alt", "a dog")
    made = http.post("/v1/generations", json={"prompt": "a cat", "num_inference_steps": 2}).json()  # by neither
    for tab in (page, other):
        tab.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # they are looked at again
    expect(page.get_by_role("button", name="a cat")).to_be_visible()
    expect(other.locator(f"img[src='/v1/generations/{made['id']}/images/0']").first).to_be_visible()


def test_a_hidden_tab_holds_no_connection(page: Page, http: httpx2.Client):
    def turn(hidden: bool) -> None:
        page.evaluate(
            """(hidden) => {
                Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            hidden,
        )

    def is_a_stream(request: Request) -> bool:
        return request.url.endswith("/events")

    page.get_by_label("Steps, exactly", exact=True).fill("100")
    page.get_by_label("Prompt").fill("a castle")
    with page.expect_request(is_a_stream):
        page.get_by_role("button", name="Draw", exact=True).click()
    with page.expect_event("requestfailed", is_a_stream):
        turn(hidden=True)
    with page.expect_request(is_a_stream):
        turn(hidden=False)
    http.delete(f"/v1/generations/{newest(http)['id']}")
    expect(page.locator(".fate")).to_have_text("Canceled")


def test_a_service_with_keys_asks_for_one(context: BrowserContext, keyed: str):
    page = context.new_page()
    page.goto(keyed)
    box = page.get_by_role("dialog", name="API key")
    expect(box).to_be_visible()
    assert violations(page) == []
    box.get_by_label("Key").fill("not it")
    box.get_by_role("button", name="Save").click()
    expect(box).to_contain_text("this API key is not known")
    box.get_by_label("Key").fill(KEY)
    box.get_by_role("button", name="Save").click()
    page.get_by_label("Steps, exactly", exact=True).fill("60")
    page.get_by_label("Prompt").fill("a dog")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.locator("img.preview")).to_have_attribute("src", re.compile("^blob:"))
    hangs(page, "a dog")
    with page.expect_download() as loaded:
        page.get_by_role("link", name="Download").click()
    assert Image.open(loaded.value.path()).size == (64, 64)
    page.get_by_role("button", name="Copy as").click()
    code = page.locator("pre").inner_text()
    assert "$DARKROOM_API_KEY" in code
    assert KEY not in code
    page.reload()
    expect(page.locator(".tile img")).to_have_count(1)
    held: list[tuple[Any, Any]] = []

    def slow(route: Any) -> None:
        if held:
            route.continue_()
        else:
            held.append((route, route.fetch()))

    page.route("**/v1/generations?*", slow)
    with page.expect_request("**/v1/generations?*"):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.get_by_role("button", name="API key").click()
    box.get_by_label("Key").fill("another")
    box.get_by_role("button", name="Save").click()
    expect(page.locator(".tile")).to_have_count(0)
    ((route, answer),) = held
    with page.expect_response(lambda it: it.status == 401):  # to the look after this one
        route.fulfill(response=answer)  # to the key before
    expect(box).to_be_visible()
    expect(page.locator(".tile")).to_have_count(0)


def test_the_code_that_is_copied_draws_the_same_picture(page: Page, http: httpx2.Client, tmp_path: Path):
    prompt = """a "dog's" 'bone' $HOME `id` \\ été 🍎"""
    draw(page, prompt)
    first = newest(http)
    page.get_by_role("button", name="Copy as").click()

    def copied(kind: str) -> str:
        page.get_by_role("radio", name=kind).check()
        page.get_by_role("button", name=f"Copy as {kind}").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        return page.evaluate("navigator.clipboard.readText()")

    for kind, run in (("curl", ["sh", "-c"]), ("Python", [sys.executable, "-c"]), ("OpenAI", [sys.executable, "-c"])):
        done = subprocess.run([*run, copied(kind)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        again = newest(http)
        assert again["id"] != first["id"]
        same = ("prompt", "seed", "width", "height", "num_inference_steps", "guidance_scale", "scheduler", "model")
        assert [again["parameters"][name] for name in same] == [first["parameters"][name] for name in same], kind
        first = again
    assert Image.open(tmp_path / "0.png").size == (64, 64)


def test_whom_a_generation_tells_is_not_told(page: Page):
    """Its webhook's address is often a secret. Here a proxy adds one: the service tells nobody."""
    draw(page, "a dog")

    def told(route: Any) -> None:
        answer = route.fetch()
        listed = answer.json()
        for generation in listed["data"]:
            generation["parameters"]["webhook"] = {"url": "https://example.com/secret", "events": ["succeeded"]}
        route.fulfill(response=answer, json=listed)

    page.route("**/v1/generations?*", told)
    with page.expect_response("**/v1/generations?*"):
        page.reload()
    hangs(page, "a dog")
    expect(page.locator(".facts")).not_to_contain_text("webhook")
    page.get_by_role("button", name="Copy as").click()
    for kind in ("curl", "Python", "OpenAI"):
        page.get_by_role("radio", name=kind).check()
        expect(page.locator("pre")).to_contain_text("a dog")
        expect(page.locator("pre")).not_to_contain_text("webhook")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Reuse").click()
    body = sent(page, lambda: page.get_by_role("button", name="Draw", exact=True).click())
    assert "webhook" not in body
    page.unroute_all(behavior="ignoreErrors")


def test_code_with_a_picture_reads_it_from_a_file(page: Page, http: httpx2.Client, tmp_path: Path):
    Image.effect_noise((64, 64), 90).convert("RGB").resize((512, 512)).save(
        tmp_path / "image.png"
    )  # too long to pass as an argument
    page.get_by_label("From a picture").check()
    page.get_by_label("Picture", exact=True).set_input_files(tmp_path / "image.png")
    draw(page, "a dog")
    first = newest(http)
    page.get_by_role("button", name="Copy as").click()
    done = subprocess.run(["sh", "-c", page.locator("pre").inner_text()], cwd=tmp_path, capture_output=True, timeout=60)
    assert json.loads(done.stdout)["status"] == "succeeded", done
    assert newest(http)["parameters"]["seed"] == first["parameters"]["seed"]
    assert newest(http)["parameters"]["task"] == "image-to-image"


def test_a_full_queue_is_counted_down_and_asked_again(page: Page, http: httpx2.Client):
    """The answer is the service's own, as it tells it when it is full; here a proxy gives it."""
    page.wait_for_selector("#f-prompt")
    keys: list[str] = []

    def full(route: Any) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if route.request.method == "POST" and len(keys) == 1:
            document = {"type": "urn:darkroom:problem:queue-full", "status": 503, "detail": "9 generations are waiting"}
            headers = {"Retry-After": "2", "Content-Type": "application/problem+json"}
            route.fulfill(status=503, headers=headers, body=json.dumps(document))
        else:
            route.continue_()

    page.route("**/v1/generations", full)
    page.get_by_label("Prompt").fill("a dog")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("9 generations are waiting")
    expect(page.locator(".countdown")).to_have_text(re.compile(r"Trying again in [12] s"))
    hangs(page, "a dog")
    assert len(keys) == 2
    assert keys[0] == keys[1]


def test_an_answer_that_breaks_off_is_asked_for_again(page: Page):
    page.wait_for_selector("#f-prompt")
    keys: list[str] = []

    def half(route: Any) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) == 1:
            route.fulfill(status=202, headers={"Content-Type": "application/json"}, body='{"id": "')
        else:
            route.continue_()

    page.route("**/v1/generations", half)
    page.get_by_label("Prompt").fill("a dog")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("The answer broke off.")
    hangs(page, "a dog")
    assert len(keys) == 2
    assert keys[0] == keys[1]


def test_a_service_that_is_away_is_waited_for(page: Page, context: BrowserContext):
    page.wait_for_selector("#f-prompt")
    context.set_offline(True)
    page.get_by_label("Prompt").fill("a dog")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer")
    context.set_offline(False)
    hangs(page, "a dog")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_has_no_accessibility_violations(browser: Browser, context: BrowserContext, scheme: Any):
    page = context.new_page()
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.goto("/")
    expect(page.get_by_role("heading", name="Nothing developed yet")).to_be_visible()
    assert violations(page) == []
    draw(page, "a dog")
    for summary in page.locator("summary").all():
        if summary.inner_text() == "More":
            summary.click()
    assert violations(page) == []
    page.get_by_role("button", name="Copy as").click()
    assert violations(page) == []
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_the_theme_is_a_choice_that_stays(page: Page):
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    before = page.evaluate(ground)
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(ground) != before
    dark = page.evaluate(ground)
    page.reload()
    assert page.evaluate(ground) == dark
    expect(page.get_by_role("button", name="Light theme")).to_be_visible()


def test_a_phone_is_wide_enough(context: BrowserContext):
    page = context.new_page()
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto("/")
    page.wait_for_selector("#f-prompt")
    draw(page, "a very small dog next to a strawberry on a dark blue background")
    page.get_by_text("Settings", exact=True).click()
    page.get_by_text("More", exact=True).click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert violations(page) == []
    page.get_by_role("button", name="Compare").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_the_status_page_shows_who_draws_and_what_waits(context: BrowserContext, http: httpx2.Client):
    page = context.new_page()
    page.goto("/status")
    expect(page.get_by_role("row", name=re.compile("emoji-sd"))).to_be_visible()
    slow = {"prompt": "a dog", "num_inference_steps": 100, "n": 4}
    ids = [http.post("/v1/generations", json=slow | {"priority": p}).json()["id"] for p in ("low", "high", "low")]
    card = page.locator(".card", has_text="emoji-sd")
    expect(card.locator("div", has=page.get_by_text("Being drawn"))).to_contain_text(re.compile("[1-9]"))
    expect(card).to_contain_text(re.compile(r"high, normal and low priority[01] · 0 · [12]"))
    assert violations(page) == []
    shown = http.get("/v1/status").json()
    for id in ids:
        http.delete(f"/v1/generations/{id}")
    (worker,) = shown["workers"]
    drawing = next(model for model in worker["models"] if model["name"] == "emoji-sd")
    asked = next(model for model in shown["models"] if model["name"] == "emoji-sd")
    assert drawing["rows_per_second"] > 0
    assert drawing["running"] + sum(asked["waiting"].values()) == 3
    assert asked["eta"] > 0
    expect(card).not_to_contain_text("priority")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_everything_that_the_page_is_made_of_is_served_safely(http: httpx2.Client, keyed: str):
    for name in ("", "status", *(f"page/{name}" for name in FILES)):
        answer = http.get(f"/{name}")
        assert answer.status_code == 200
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        again = http.get(f"/{name}", headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert httpx2.get(f"{keyed}/{name}").status_code == 200  # public: it holds nothing
    assert http.get("/page/../routes.py").status_code == 404
    assert http.get("/page/%2e%2e/routes.py").status_code == 404
    assert not [path for path in http.get("/openapi.json").json()["paths"] if path == "/" or path.startswith("/page")]
