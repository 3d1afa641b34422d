"""examples/app.py in a headless browser, in the layout of a Space, and the models that it refuses."""

import base64
import io
import json
import re
import runpy
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from common.models import default_processor, load_focal, prepare
from conftest import ROOT
from example_runs import example_command, tiny_config
from focal_hf import FocalForImageClassification
from focal_hf.visualization import query_attention, record_attention, shaded
from ports import reserve_port

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
NAMES = ["quickstart/model", "other"]
AT = (0.3, 0.7)


def save_model(folder: Path, seed: int, **changes) -> None:
    torch.manual_seed(seed)
    config = tiny_config(initializer_range=0.5, id2label={0: "cat", 1: "dog & bone", 2: "<b>"}, **changes)
    FocalForImageClassification(config).save_pretrained(folder)
    default_processor(config, crop=1.0).save_pretrained(folder)


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    """Writes the folder that docs/visualization.md describes, with two models."""
    folder = tmp_path_factory.mktemp("space")
    for name in ("examples", "src"):
        (folder / name).symlink_to(ROOT / name)
    save_model(folder / NAMES[0], 4, image_size=32)
    page = (ROOT / "docs" / "visualization.md").read_text()
    commands = re.search(r"```sh\n((?:.+\n)+)cd my_space && gradio deploy .*--app-file app.py\n", page)[1]
    subprocess.run(["sh", "-ec", commands], cwd=folder, check=True)
    # One more stage, and a level of smaller cells.
    deeper = {"depths": (1, 1, 2), "num_heads": (1, 2, 2), "focal_windows": (3, 1, 1), "expand_sizes": (2, 2, 2)}
    save_model(folder / "my_space" / NAMES[1], 1, image_size=64, focal_levels=(3, 2, 2), **deeper)
    return folder / "my_space"


@pytest.fixture(scope="module")
def address(space, tmp_path_factory):
    """Starts the app from its folder, which must hold all that it imports, and returns its address."""
    port = reserve_port()
    environment = example_command("app.py", folder=space)["env"] | {
        "FOCAL_MODELS": " ".join(NAMES),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("gradio")),
    }
    environment.pop("PYTHONPATH", None)
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"], env=environment, cwd=space, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(3000):
            if "Running on" in log.read_text() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert "Running on" in log.read_text(), log.read_text()
        yield f"http://127.0.0.1:{port}"
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def page(address):
    """Opens the page in a browser. Afterwards checks that it had no errors and made no requests to other hosts."""
    if BROWSER is None:
        pytest.skip("needs Chromium: as root, apt-get install chromium")
    from playwright.sync_api import sync_playwright

    wrong = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(20_000)
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith((address, "data:")) or wrong.append(asked.url))
        page.goto(address)
        page.locator(".looks img").first.wait_for()
        yield page
        browser.close()
    assert not wrong


def picture(page, selector: str) -> np.ndarray:
    data = page.locator(selector).first.get_attribute("src").partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def changes(page, selector: str, act) -> np.ndarray:
    """Calls `act`, and returns the picture that replaces the one shown before."""
    before = page.locator(selector).first.get_attribute("src")
    act()
    page.wait_for_function(
        "([selector, before]) => document.querySelector(selector).src != before", arg=[selector, before]
    )
    return picture(page, selector)


def upload(page, file: Path) -> None:
    page.locator("input[type=file]").set_input_files(file)


def click(page, across: float, down: float) -> None:
    box = page.locator("#picture img").bounding_box()
    page.mouse.click(box["x"] + box["width"] * across, box["y"] + box["height"] * down)


def choose(page, dropdown: str, option: str) -> None:
    page.get_by_label(dropdown).click()
    page.get_by_role("option", name=option, exact=True).click()


def expected(space: Path, name: str, file: Path, levels=None, stage: int = 0) -> np.ndarray:
    """Returns the result of `shaded` for a picture, enlarged as on the page."""
    model, processor = load_focal(str(space / name))
    pixel_values, image = prepare(processor, Image.open(file).convert("RGB"))
    seen = query_attention(record_attention(model, pixel_values), AT, stage)
    pixels = shaded(image, seen, levels)[: image.shape[0], : image.shape[1]]
    scale = -(-224 // max(image.shape))
    return pixels.repeat(scale, 0).repeat(scale, 1).astype(int)


def same(shown: np.ndarray, wanted: np.ndarray) -> bool:
    """Compares two pictures, except for the frames around a token and its window, and JPEG errors."""
    return shown.shape == wanted.shape and np.median(abs(shown - wanted)) <= 2 and abs(shown - wanted).mean() < 12


def test_upload_click_levels_heads_and_comparison(page, space, tmp_path):
    file = tmp_path / "noise.png"
    noise = np.random.default_rng(0).integers(0, 256, (8, 11, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((88, 64), Image.Resampling.NEAREST).save(file)

    changes(page, ".looks img", lambda: upload(page, file))
    model, processor = load_focal(str(space / NAMES[0]))
    scores = model(prepare(processor, Image.open(file))[0]).logits[0].softmax(0)
    best = [model.config.id2label[number] for number in scores.argsort(descending=True).tolist()]
    assert page.get_by_test_id("label-output-value").first.inner_text().strip() == best[0]
    for name, score in zip(best, scores.sort(descending=True).values.tolist(), strict=True):
        page.get_by_text(name, exact=True).first.wait_for()
        page.get_by_text(f"{score:.0%}", exact=True).first.wait_for()

    shown = changes(page, ".looks img", lambda: click(page, *AT))
    both = expected(space, NAMES[0], file)
    assert same(shown, both)
    without = changes(page, ".looks img", lambda: page.get_by_label("level 1").uncheck())
    assert same(without, expected(space, NAMES[0], file, [0]))
    assert not same(without, both)

    assert page.locator(".looks.heads img").count() == 1
    changes(page, ".looks.heads img", lambda: page.get_by_label("1", exact=True).check())
    assert page.locator(".looks.heads img").count() == 2
    changes(page, ".saliency img", lambda: choose(page, "Show evidence for", best[-1]))

    choose(page, "Compare with", NAMES[1])
    page.get_by_role("heading", name=f"{NAMES[1]}: each stage").wait_for()
    page.get_by_label("level 2").wait_for()
    assert page.locator(".looks:not(.heads)").count() == 2
    assert same(picture(page, ".looks:not(.heads) >> nth=1 >> img"), expected(space, NAMES[1], file))
    page.get_by_label("2", exact=True).check()
    page.get_by_text("There is no such layer in stage 2 of this model.").wait_for()

    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.screenshot(path=tmp_path / f"page-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


class Visitor:
    """A session of the page's server, without a browser."""

    def __init__(self, address: str):
        self.address, self.session = f"{address}/gradio_api/queue", secrets.token_hex(8)
        config = httpx.get(f"{address}/config").json()
        self.components = {component["id"]: component["props"] for component in config["components"]}
        self.events = {name: event for event in config["dependencies"] for _, name in event["targets"]}

    def send(self, name: str, **values) -> tuple[dict, list[str]]:
        """What the server answers to the last event of this name, and what it warns of.

        Args:
            values: of components, by their `elem_id`; others have those that the page begins with.
        """
        event = self.events[name]
        shown = [self.components[number] for number in event["inputs"]]
        data = [values.get(props.get("elem_id"), props.get("value")) for props in shown]
        point = {"index": [100, 200], "value": None}
        content = {"data": data, "fn_index": event["id"], "session_hash": self.session, "event_data": point}
        httpx.post(f"{self.address}/join", json=content).raise_for_status()
        warned = []
        with httpx.stream("GET", f"{self.address}/data?session_hash={self.session}", timeout=60) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data:") or "{}")
                if message.get("msg") == "log":
                    warned.append(message["log"])
                if message.get("msg") == "process_completed":
                    return message, warned
        raise AssertionError(f"no answer to {name}")


def test_many_visitors_can_click(address):
    visitors = [Visitor(address) for _ in range(24)]
    for visitor in visitors:
        assert visitor.send("load")[0]["success"]
    for _ in range(2):
        for visitor in visitors:
            answer, warned = visitor.send("select", levels=[0, 1])
            assert (answer["success"], warned) == (True, []), answer
            assert "each stage</h3>" in json.dumps(answer["output"]["data"])


def test_expired_session_asks_to_reload_the_page(address):
    answer, warned = Visitor(address).send("select", levels=[0, 1])
    assert answer["success"], answer
    assert warned == ["There is no stored picture for this page: upload one, or load the page again."]


def test_unusual_and_invalid_uploads(page, space, tmp_path):
    changes(page, ".looks img", lambda: click(page, *AT))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    odd = {
        "rgba.png": Image.fromarray(pixels),
        "cmyk.jpg": Image.fromarray(pixels, "CMYK"),
        "sixteen bit.png": Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
        "float.tiff": Image.fromarray(pixels[..., 1].astype(np.float32) / 255),
        "one pixel.png": Image.new("RGB", (1, 1), "red"),
    }
    for name, image in odd.items():
        image.save(tmp_path / name)
        shown = changes(page, ".looks img", lambda name=name: upload(page, tmp_path / name))
        if name in ("sixteen bit.png", "float.tiff"):
            Image.fromarray(pixels[..., int(name == "float.tiff")]).save(tmp_path / "eight bit.png")
            name = "eight bit.png"
        assert same(shown, expected(space, NAMES[0], tmp_path / name)), name
    frames = [Image.fromarray(pixels[..., channel]) for channel in range(3)]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    changes(page, ".looks img", lambda: upload(page, tmp_path / "animated.gif"))

    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    whole = (tmp_path / "rgba.png").read_bytes()
    (tmp_path / "cut off.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (11_000, 11_000)).save(tmp_path / "large.png")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "huge.png")
    Image.new("RGB", (900, 100)).save(tmp_path / "thin.png")
    bad = {
        "empty.png": "not a picture that can be read",
        "text.png": "text.png (UnidentifiedImageError: cannot identify image file)",
        "cut off.png": "not a picture that can be read",
        "large.png": "Image size (121000000 pixels) exceeds limit of 100000000 pixels",
        "huge.png": "not a picture that can be read",
        "thin.png": "900 x 100 pixels; this page takes sides of up to 1 : 8",
    }
    for name, message in bad.items():
        before = page.locator(".looks img").first.get_attribute("src")
        upload(page, tmp_path / name)
        page.locator(".toast-body", has_text=message).wait_for()
        page.locator(".toast-close").first.click()
        page.locator(".toast-body").wait_for(state="hidden")
        assert page.locator(".looks img").first.get_attribute("src") == before
    changes(page, ".looks img", lambda: click(page, 0.1, 0.1))


def test_unsupported_models_are_refused(tmp_path, monkeypatch, capfd):
    vit = ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    )
    vit.save_pretrained(tmp_path / "vit")
    default_processor(tiny_config(), crop=1.0).save_pretrained(tmp_path / "vit")
    wanted = {
        (): "error: There is no quickstart/model here: run `make quickstart`, or name a model with --model.",
        ("--model", "vit"): "error: --model vit is a vit; this script shows Focal's attention: use a Focal model.",
        ("--model", "nowhere"): "error: Cannot load --model nowhere and its image processor: ",
    }
    monkeypatch.delenv("FOCAL_MODELS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    # In this process, because each new process would import Gradio.
    for arguments, message in wanted.items():
        monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "examples" / "app.py"), run_name="__main__")
        assert caught.value.code.startswith(message)
        assert "\n" not in caught.value.code
    assert capfd.readouterr() == ("", "")
