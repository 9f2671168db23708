"""The page and what stands behind it: uploads, corruptions without torch, a click-through."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from epdistill.export.predict import predict_files
from epdistill.export.runtime import OnnxClassifier
from epdistill.export.serving import corruptions
from epdistill.export.serving.corruptions import CORRUPTIONS, corrupt
from epdistill.robustness import corruptions as evaluated

SAMPLES = Path(__file__).parents[3] / "export/serving/page/samples"
RANDOM = ("gaussian_noise", "impulse_noise")


def classify(url: str, content: bytes, **query: Any) -> requests.Response:
    return requests.post(f"{url}/v1/classify", params=query, data=content, timeout=10)


@pytest.mark.parametrize("name", ["digit-0.png", "digit-9.png", "ship.png"])
def test_an_upload_is_what_predict_sees(server: Any, direct: OnnxClassifier, name: str) -> None:
    (expected,) = predict_files(direct, [SAMPLES / name], top=10)
    answer = classify(server.url, (SAMPLES / name).read_bytes(), model="digits", top=10).json()
    assert [(entry["label"], entry["probability"]) for entry in answer["top"]] == list(expected.top)
    assert answer["label"] == expected.label
    assert set(answer["milliseconds"]) == {"decode", "queue", "model"}


def test_digits_are_read(server: Any) -> None:
    for model in ("digits", "other"):
        for digit in (0, 3, 6, 9):
            content = (SAMPLES / f"digit-{digit}.png").read_bytes()
            assert classify(server.url, content, model=model).json()["label"] == f"digit {digit}"


def test_jpegs_are_taken_and_other_files_refused(server: Any) -> None:
    file = io.BytesIO()
    picture = Image.open(SAMPLES / "ship.png")
    picture.save(file, "JPEG")
    answer = classify(server.url, file.getvalue(), top=3)
    assert answer.status_code == 200 and len(answer.json()["top"]) == 3
    for kind in ("BMP", "TIFF", "WEBP", "PPM"):
        file = io.BytesIO()
        picture.save(file, kind)
        assert classify(server.url, file.getvalue()).status_code == 415
    whole = (SAMPLES / "ship.png").read_bytes()
    for damaged in (whole[:8], whole[:700]):
        refused = classify(server.url, damaged)
        assert refused.status_code == 400 and "the upload" in refused.json()["error"]
    assert classify(server.url, b"").status_code == 415


def test_what_the_model_sees_is_shown(server: Any) -> None:
    content = (SAMPLES / "digit-3.png").read_bytes()
    with Image.open(SAMPLES / "digit-3.png") as original:
        pixels = np.asarray(original)
    for query, expected in (
        ({}, pixels),
        (
            {"corruption": "gaussian_noise", "severity": 5, "seed": 7},
            corrupt(pixels[None], "gaussian_noise", 5, seed=7)[0],
        ),
    ):
        seen = classify(server.url, content, show=True, **query).json()["seen"]
        shown = base64.b64decode(seen.removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(shown)) as image:
            np.testing.assert_array_equal(np.asarray(image), expected)
    assert "seen" not in classify(server.url, content).json()


@pytest.mark.parametrize(
    "query",
    [{"corruption": "fog"}, {"severity": 0}, {"severity": 6}, {"top": 0}, {"seed": -1},
     {"corruption": "contrast", "severity": "x"}, {"show": "perhaps"}],
)  # fmt: skip
def test_impossible_wishes_are_400(server: Any, query: dict[str, Any]) -> None:
    content = (SAMPLES / "digit-3.png").read_bytes()
    refused = classify(server.url, content, **query)
    assert refused.status_code == 400 and set(refused.json()) == {"error"}


def pictures(channels: int, n: int = 20, size: int = 24) -> np.ndarray:
    """Noise with a black corner, uint8 (N, C, H, W)."""
    images = np.random.default_rng(channels).integers(0, 256, (n, channels, size, size), np.uint8)
    images[:, :, :6, :6] = 0
    return images


def test_the_constants_are_those_of_the_evaluation() -> None:
    for name, (_, constants) in CORRUPTIONS.items():
        assert evaluated.CORRUPTIONS[name].constants == constants


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in RANDOM])
def test_corruptions_without_chance_are_those_of_the_evaluation(name: str, channels: int) -> None:
    images = pictures(channels)
    for severity in (1, 3, 5):
        expected = evaluated.corrupt(torch.from_numpy(images), name, severity, seed=0).numpy()
        found = np.stack([corrupt(image, name, severity, seed=0) for image in images])
        # Another order of summation may round a value to the neighbouring level.
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01
        assert (found != images).any()


def test_noise_has_the_statistics_of_the_evaluation() -> None:
    grey = np.full((3, 64, 64), 128, np.uint8)
    for severity in (1, 5):
        noisy = corrupt(grey, "gaussian_noise", severity, seed=0)
        sigma = CORRUPTIONS["gaussian_noise"][1][severity - 1]
        assert noisy.std() / 255 == pytest.approx(sigma, rel=0.05)
        hit = corrupt(grey, "impulse_noise", severity, seed=0)
        share = CORRUPTIONS["impulse_noise"][1][severity - 1]
        assert (hit != 128).mean() == pytest.approx(share, rel=0.2)
        assert (hit == 0).sum() == pytest.approx((hit == 255).sum(), rel=0.4)
        assert set(np.unique(hit)) == {0, 128, 255}
    for name in RANDOM:
        first, again = (corrupt(grey, name, 2, seed=3) for _ in range(2))
        np.testing.assert_array_equal(first, again)
        assert (first != corrupt(grey, name, 2, seed=4)).any()


def test_only_named_files_of_the_page_are_sent(server: Any) -> None:
    page = requests.get(server.url, timeout=5)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("playground.js", "playground.css", "samples/ship.png"):
        assert requests.get(f"{server.url}/page/{name}", timeout=5).status_code == 200
        assert f'"/page/{name}"' in page.text or name.startswith("samples")
    about = requests.get(f"{server.url}/v1/about", timeout=5).json()
    assert about["corruptions"] == list(corruptions.CORRUPTIONS)
    assert {path.name for path in SAMPLES.iterdir()} == {
        name.removeprefix("samples/") for name in about["samples"]
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")


@pytest.mark.slow
@needs_browser
def test_a_person_clicks_through_the_page(server: Any, browser: Any, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server.url)
    cards = page.locator(".card")
    expect(cards).to_have_count(2)
    best = page.locator(".bars li:first-child span:nth-of-type(1)")
    expect(best).to_have_text(["digit 0", "digit 0"])

    page.get_by_role("button", name="digit-3").click()
    expect(best).to_have_text(["digit 3", "digit 3"])
    expect(page.locator(".latency").first).to_contain_text("ms")
    clean = page.locator(".seen").first.get_attribute("src")

    page.get_by_label("Corruption").select_option("impulse_noise")
    expect(page.locator("#level")).to_have_text("3")
    expect(page.locator(".seen").first).not_to_have_attribute("src", clean)
    page.get_by_label("Severity").fill("0")
    expect(page.locator(".seen").first).to_have_attribute("src", clean)

    cards.nth(1).get_by_role("checkbox").uncheck()
    page.locator("#file").set_input_files(SAMPLES / "digit-9.png")
    expect(best).to_have_text(["digit 9", "digit 3"])  # the second one was not asked

    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(b"no picture")
    page.locator("#file").set_input_files(wrong)
    expect(page.get_by_role("alert")).to_contain_text("neither PNG nor JPEG")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # The refused file is reported by the browser itself.
    assert [text for text in complaints if "415" not in text] == []
    page.close()


@pytest.mark.slow
@needs_browser
def test_the_page_asks_for_the_token(start: Any, model: Path, browser: Any) -> None:
    from playwright.sync_api import expect

    with start(model, EPDISTILL_TOKEN="abc") as running:
        page = browser.new_page()
        page.goto(running.url)
        page.get_by_label("Token of this server").fill("abc")
        page.get_by_label("Token of this server").press("Enter")
        expect(page.locator(".bars li").first).to_contain_text("digit 0")
        expect(page.get_by_label("Token of this server")).to_be_hidden()
        page.close()
