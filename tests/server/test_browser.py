"""The page at `/` in a real browser: against a real server with the starter models, and by key."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import shutil
import struct
import subprocess
import sys
import threading
import wave
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from math import pi, sin
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image
from pydantic import SecretStr
from websockets.sync.client import connect

from engine.engine import Engine
from engine.requests import TextRequest
from engine.runtimes.registry import REGISTRY
from server.app import create_app
from server.bench.quality.recordings import clips
from server.settings import ServerSettings
from tests.server.fake import fake_engine, listening
from tests.server.real import ROOT, STOP_S, Server
from tests.server.realtime.conftest import MODELS, Voices

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, FilePayload, Locator, Page, Route

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python"
)
expect = playwright.expect

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
"""The system's; None: the one that playwright has fetched, if it has."""
ARGUMENTS = (
    "--no-sandbox",  # tests may be run as root
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--autoplay-policy=no-user-gesture-required",
    # A microphone that beeps, and leave to use it.
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
TIMEOUT_MS = 60_000
PANELS = ("chat", "images", "videos", "speech", "transcription")
PIXEL = 1 / 1200
"""About one in the width of a bar."""
NARROW = 320
"""CSS pixels at which a page must need no scrolling to the side (WCAG 2.2, 1.4.10)."""

RECORD = """
    ([selector, property]) => {
        globalThis.seen = [];
        const look = () => {
            const value = document.querySelector(selector)?.[property];
            if (value && value !== globalThis.seen.at(-1)) globalThis.seen.push(value);
        };
        const all = { subtree: true, childList: true, characterData: true, attributes: true };
        new MutationObserver(look).observe(document.body, all);
        look();
    }
"""
"""Note each value that the page wrote. On a busy machine few of them stand for a frame."""

STOP_AT_THE_FIRST_WORD = """
    () => {
        const messages = document.querySelector("#chat-messages");
        new MutationObserver((_, observer) => {
            const texts = messages.querySelectorAll("li .text");
            if (texts.length < 2 || !texts[1].textContent) return;
            observer.disconnect();
            document.querySelector("#chat-form [data-stop]").click();
        }).observe(messages, { subtree: true, childList: true, characterData: true });
    }
"""
"""Click from within the page: a click from outside may come after the last word."""

KEY_CONFIG = """
engine: {{device: cpu, memory: 64MiB, state_dir: {folder}, data_dir: {folder}}}
server: {{port: 0, api_keys: [user-key], admin_keys: [admin-key]}}
models:
  - {{id: small, runtime: fake, source: none}}
"""


MICROPHONE = """
    () => {
        sessionStorage.setItem("roundhouse-api-key", "user-key");
        navigator.mediaDevices.getUserMedia = async ({ audio }) => {
            const context = new AudioContext();
            const stream = context.createMediaStreamDestination();
            globalThis.microphone = { wanted: audio, track: stream.stream.getTracks()[0] };
            globalThis.speak = async (wav) => {
                const bytes = Uint8Array.from(atob(wav), (each) => each.charCodeAt(0));
                const speech = await context.decodeAudioData(bytes.buffer);
                const source = new AudioBufferSourceNode(context, { buffer: speech });
                source.connect(stream);
                source.start();
            };
            return stream.stream;
        };
        globalThis.played = [];
        const { start, stop } = AudioBufferSourceNode.prototype;
        AudioBufferSourceNode.prototype.start = function (when) {
            const at = this.context.currentTime;
            if (when) played.push({ node: this, when, at, seconds: this.buffer.duration });
            return start.call(this, when);
        };
        AudioBufferSourceNode.prototype.stop = function () {
            played.find(({ node }) => node === this).stopped = this.context.currentTime;
            return stop.call(this);
        };
    }
"""
"""A microphone that hears what is given to `speak`, and a list of what the page plays."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as running:
        if CHROMIUM is None and not Path(running.chromium.executable_path).exists():
            pytest.skip("needs Chromium: the system's package, or `playwright install chromium`")
        browser = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.set_default_timeout(TIMEOUT_MS)
        expect.set_options(timeout=TIMEOUT_MS)
        yield context


@pytest.fixture
def faults() -> list[str]:
    """What the browser complained about."""
    return []


@pytest.fixture
def blank(context: BrowserContext, faults: list[str]) -> Page:
    """A page that nothing was opened in."""
    page = context.new_page()
    page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"uncaught: {error}"))
    return page


@pytest.fixture
def page(blank: Page, faults: list[str], server: Server) -> Iterator[Page]:
    """The page of the real server, with its models shown; any word on its console is a fault."""
    blank.goto(server.url)
    blank.locator("#models-list > li").first.wait_for()
    yield blank
    assert faults == []


def serious_faults(page: Page) -> list[str]:
    """What axe finds that keeps somebody from using the page."""
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{each['id']} at {node['target']}: {each['help']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def send(page: Page, panel: str, **fields: str) -> Locator:
    """Open a panel, fill its form and submit it; returns where its state is told."""
    page.locator(f"#tab-{panel}").click()
    for name, value in fields.items():
        field = page.locator(f"#{panel}-{name}")
        if field.evaluate("(node) => node.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)
    # By the keyboard: the page above moves, and a click meets nothing if it does so half-way.
    page.locator(f"#{panel}-form [type=submit]").press("Enter")
    return page.locator(f"#{panel}-form [data-status]")


def card_of(page: Page, model: str) -> Locator:
    return page.locator(f"#models-list > [data-key='{model}']")


def order(card: Locator, name: str) -> Locator:
    """A button of a model."""
    return card.get_by_role("button", name=name, exact=True)


def shares(bar: Locator) -> dict[str, float]:
    """Each part's share of the width of a bar, by the part's key."""
    found: dict[str, float] = bar.evaluate(
        """(bar) => Object.fromEntries([...bar.children].map((part) =>
            [part.dataset.key, part.getBoundingClientRect().width / bar.clientWidth]))"""
    )
    return found


def has_played(medium: Locator) -> None:
    """Return once it has played something."""
    expect(medium).not_to_have_js_property("currentTime", 0)
    expect(medium).to_have_js_property("error", None)


def spoken_wav() -> bytes:
    """Two seconds that change their pitch, 16 kHz."""
    rate = 16_000
    file = io.BytesIO()
    with wave.open(file, "wb") as recording:
        recording.setnchannels(1)
        recording.setsampwidth(2)
        recording.setframerate(rate)
        for index in range(2 * rate):
            time_s = index / rate
            sample = round(9000 * sin(2 * pi * (200 + 150 * time_s) * time_s))
            recording.writeframesraw(struct.pack("<h", sample))
    return file.getvalue()


class TestPlayground:
    def test_chat_streams_in_and_stops(self, page: Page) -> None:
        page.evaluate(RECORD, ["#chat-messages li:last-child .text", "textContent"])
        greedy = {"model": "tiny-llama", "temperature": "0"}
        status = send(page, "chat", **greedy, **{"max-tokens": "1000", "prompt": "Hello"})
        expect(status).to_have_text(re.compile(r"in all, \d+ tokens"))
        texts = page.evaluate("seen")
        answers = texts[texts.index("Hello") + 1 :] if "Hello" in texts else texts
        assert len(answers) > 5, "it did not come piece by piece"
        assert all(later.startswith(earlier) for earlier, later in pairwise(answers))
        entries = page.locator("#chat-messages li")
        expect(entries).to_have_count(2)
        expect(entries.last).to_contain_text("tiny-llama")

        page.locator("#chat-clear").click()
        expect(entries).to_have_count(0)
        page.evaluate(STOP_AT_THE_FIRST_WORD)
        # The answer to this prompt, taken greedily, has 1,144 tokens: there is time to stop it.
        send(page, "chat", **greedy, **{"max-tokens": "1500", "prompt": "Alphabet"})
        expect(status).to_have_text("Stopped.")
        expect(entries).to_have_count(2)
        expect(entries.last.locator(".text")).not_to_be_empty()
        expect(page.locator("#chat-form [type=submit]")).to_be_focused()
        assert serious_faults(page) == []

        curve = page.locator("#plots-figures [data-key='tokens'] .legend li", has_text="tiny-llama")
        expect(curve).to_contain_text("/s")
        hue = "(node) => node.querySelector('.swatch').style.getPropertyValue('--hue')"
        assert curve.evaluate(hue) == card_of(page, "tiny-llama").evaluate(hue)

    def test_an_image_appears_step_by_step(self, page: Page) -> None:
        page.evaluate(RECORD, ["#images-results img", "src"])
        status = send(
            page,
            "images",
            model="tiny-sdxl",
            prompt="A roundhouse at dusk",
            size="256x256",
            steps="40",
            seed="7",
        )
        expect(status).to_have_text("Done.")
        assert len(page.evaluate("seen")) >= 3, "no partial images"
        image = page.get_by_role("img", name="A roundhouse at dusk")
        assert image.evaluate("(node) => [node.naturalWidth, node.naturalHeight]") == [256, 256]
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").click()
        assert download.value.suggested_filename == "image-7.png"
        assert serious_faults(page) == []

    def test_a_video_plays(self, page: Page) -> None:
        status = send(page, "videos", model="tiny-wan", prompt="A turntable", seconds="1")
        expect(status).to_have_text(re.compile("^Created video_"))
        card = page.locator("#videos-list > li").first
        expect(card.locator("progress")).to_be_visible()
        expect(card).to_contain_text("completed")
        expect(card.locator("progress")).to_be_hidden()
        card.get_by_role("button", name="Play A turntable").click()
        has_played(card.locator("video"))
        assert card.locator("video").evaluate("(node) => node.videoWidth") == 128
        assert serious_faults(page) == []
        jobs = page.locator("#videos-list > li")
        before = jobs.count()
        card.get_by_role("button", name="Delete A turntable").click()
        expect(jobs).to_have_count(before - 1)
        expect(page.locator("#videos-title")).to_be_focused()

    def test_speech_plays(self, page: Page) -> None:
        page.locator("#tab-speech").click()
        page.locator("#speech-model").select_option("tiny-vits-multi")
        expect(page.locator("#speech-voice")).to_contain_text("p226")
        status = send(page, "speech", voice="p226", input="Good morning, roundhouse.")
        expect(status).to_have_text("Done.")
        has_played(page.locator("#speech-audio"))
        assert serious_faults(page) == []

    def test_a_recording_is_transcribed(self, page: Page) -> None:
        page.locator("#tab-transcription").click()
        file: FilePayload = {"name": "a.wav", "mimeType": "audio/wav", "buffer": spoken_wav()}
        page.locator("#transcription-file").set_input_files(file)
        with page.expect_response("**/v1/audio/transcriptions") as uploaded:
            status = send(page, "transcription")
        expect(status).to_have_text(re.compile("^Done"))
        said = re.findall(r'"transcript\.text\.done".*?"text":\s*"(.*?)"', uploaded.value.text())
        expect(page.locator("#transcription-text")).to_have_text(said[-1])
        assert serious_faults(page) == []

        page.reload()  # so that no file is chosen
        page.locator("#tab-transcription").click()
        page.locator("#record-toggle").click()
        expect(page.locator("#record-time")).to_have_text("1 s")
        page.locator("#record-toggle").click()
        expect(page.locator("#record-state")).to_contain_text("Recorded")
        with page.expect_response("**/v1/audio/transcriptions") as recorded:
            send(page, "transcription")
        assert recorded.value.status == 200
        expect(status).to_have_text(re.compile("^Done"))


class TestDashboard:
    def test_the_picture_of_memory_follows(self, page: Page, server: Server) -> None:
        model = "tiny-sd15"
        httpx.post(f"{server.url}/v1/engine/models/{model}/unload", timeout=180).raise_for_status()
        card = card_of(page, model)
        state, outcome = card.locator(".state"), card.locator(".outcome")
        on_device = page.locator("#device-parts")
        expect(state).to_have_text("absent")
        expect(order(card, "Park")).to_have_attribute("aria-disabled", "true")
        expect(on_device).not_to_contain_text(f"{model}:")

        order(card, "Load").press("Enter")
        expect(outcome).to_have_text("Load: done")
        expect(state).to_have_text("resident")
        expect(order(card, "Load")).to_be_focused()
        expect(on_device).to_contain_text(f"{model}: unet")
        # Not always on top: other models are parked meanwhile as they have been idle for long.
        loaded = page.locator("#events-list li:visible", has_text=f"loaded {model}")
        expect(loaded.first).to_be_visible()
        self.drawn_to_scale(page, server)

        order(card, "Park").click()
        expect(outcome).to_have_text("Park: done")
        expect(state).to_have_text("parked")
        expect(on_device).not_to_contain_text(f"{model}:")
        expect(page.locator("#host-parts")).to_contain_text(f"{model} (parked: ")
        expect(page.locator("#host-bar .block", has_text=f"{model} (parked")).to_have_count(1)
        expect(page.locator("#events-list")).to_contain_text(f"park {model}")

        order(card, "Pin").click()
        expect(state).to_have_text("parked, pinned")
        order(card, "Unpin").click()
        expect(state).to_have_text("parked")
        order(card, "Unload").click()
        expect(state).to_have_text("absent")
        expect(page.locator("#host-parts")).not_to_contain_text(model)

    def drawn_to_scale(self, page: Page, server: Server) -> None:
        """Every byte of the ledger has its share of the bar, and a larger one where enlarged."""
        # One status, held on to: what others use changes all the time.
        engine = httpx.get(f"{server.url}/v1/engine").json()
        engine["transition"] = "held still"
        page.route("**/v1/engine", lambda route: route.fulfill(json=engine))
        expect(page.locator("#transition")).to_have_text("Now: held still")
        drawn = shares(page.locator("#device-bar"))
        enlarged = shares(page.locator("#device-enlarged"))
        page.unroute_all(behavior="wait")
        ledger, entries = engine["ledger"], engine["ledger"]["entries"]
        assert sum(drawn.values()) == pytest.approx(1, abs=0.001)
        for name in ("foreign", "free"):
            expected = ledger[f"{name}_bytes"] / ledger["total_bytes"]
            assert drawn[name] == pytest.approx(expected, abs=PIXEL)
        copied_bytes = sum(model["host_bytes"] for model in engine["models"])
        assert 0 < copied_bytes <= engine["host"]["used_bytes"] <= engine["host"]["budget_bytes"]
        budget = f"of at most {engine['host']['budget_bytes'] / 2**30:.1f} GiB"
        expect(page.locator("#host-summary")).to_contain_text(budget)
        models_bytes = max(ledger["granted_bytes"], copied_bytes)
        assert len(enlarged) == len(entries)
        for entry in entries:
            key = f"{entry['kind']} {entry['owner']} {entry['name']} "
            for parts, whole_bytes in ((drawn, ledger["total_bytes"]), (enlarged, models_bytes)):
                (share,) = (share for name, share in parts.items() if name.startswith(key))
                assert share == pytest.approx(entry["nbytes"] / whole_bytes, abs=PIXEL)

    def test_models_are_found(self, page: Page) -> None:
        shown = page.locator("#models-list > li:visible")
        page.locator("#models-filter").fill("WHISPER transcribe")
        expect(shown).to_have_count(1)
        expect(shown).to_contain_text("tiny-whisper")
        page.locator("#models-filter").fill("")
        expect(shown).to_have_count(page.locator("#models-list > li").count())

    def test_restarts_are_told(self, page: Page) -> None:
        expect(page.locator("#restarts")).to_be_hidden()

        def restarted(route: Route) -> None:
            status = route.fetch().json()
            restarts = {"count": 2, "reason": "the device did not answer", "at": 1_000_000}
            route.fulfill(json={**status, "restarts": restarts})

        page.route("**/v1/engine", restarted)
        expect(page.locator("#restarts")).to_have_text(
            re.compile("^Restarted 2 times, last at .*1970.*: the device did not answer$")
        )
        page.unroute_all(behavior="wait")

    def test_everybody_can_use_it_in_the_dark_too(self, page: Page) -> None:
        page.emulate_media(color_scheme="dark")
        for panel in PANELS:
            page.locator(f"#tab-{panel}").click()
            assert serious_faults(page) == [], panel
        page.locator("#key-open").click()
        assert serious_faults(page) == []

    def test_by_keyboard(self, page: Page) -> None:
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#main")).to_be_focused()

        page.locator("#tab-chat").focus()
        for key, panel in (
            ("ArrowRight", "images"),
            ("End", "transcription"),
            ("ArrowRight", "chat"),
            ("ArrowLeft", "transcription"),
            ("Home", "chat"),
        ):
            page.keyboard.press(key)
            expect(page.locator(f"#tab-{panel}")).to_be_focused()
            expect(page.locator("[role=tabpanel]:visible")).to_have_id(f"panel-{panel}")
        page.locator("#chat-prompt").focus()
        page.keyboard.type("Hello")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#chat-messages li").first).to_contain_text("Hello")

        page.locator("#key-open").press("Enter")
        expect(page.get_by_role("dialog")).to_be_visible()
        assert serious_faults(page) == []
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        expect(page.locator("#key-open")).to_be_focused()

    def test_on_a_narrow_screen(self, page: Page) -> None:
        page.set_viewport_size({"width": NARROW, "height": 640})
        for panel in PANELS:
            page.locator(f"#tab-{panel}").click()
            assert page.evaluate("document.documentElement.scrollWidth") <= NARROW, panel


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that asks for a key. Its model answers one request at a time: never."""
    folder = tmp_path_factory.mktemp("locked")
    config = folder / "config.yaml"
    config.write_text(KEY_CONFIG.format(folder=folder))
    command = (sys.executable, "-m", "tests.server.serve_fake", "serve", "--no-supervisor")
    with subprocess.Popen(
        [*command, "--config", str(config)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            told = ""
            while (url := re.search(r"http://127\.0\.0\.1:\d+", told)) is None:
                line = process.stderr.readline()
                assert line, told
                told += line
            yield url[0]
        finally:
            process.terminate()
            process.communicate(timeout=STOP_S)


@contextmanager
def requests_without_end(url: str, count: int) -> Iterator[None]:
    """Chats that are open meanwhile: the first is being answered, the others wait."""
    with (
        httpx.Client(
            base_url=url, headers={"authorization": "Bearer user-key"}, timeout=60
        ) as client,
        ExitStack() as streams,
    ):
        for _ in range(count):
            body = {"model": "small", "messages": [], "stream": True}
            streams.enter_context(client.stream("POST", "/v1/chat/completions", json=body))
        yield


class TestWithKeys:
    def test_it_asks_for_a_key(self, blank: Page, faults: list[str], locked: str) -> None:
        blank.goto(locked)
        dialog = blank.get_by_role("dialog")
        expect(dialog).to_contain_text("The server asks for a key.")
        key = blank.get_by_label("Key", exact=True)
        key.fill("wrong-key")
        key.press("Enter")
        expect(dialog).to_contain_text("The server refuses this key.")
        expect(card_of(blank, "small")).to_have_count(0)
        key.fill("user-key")
        blank.get_by_role("button", name="Use this key").click()
        expect(card_of(blank, "small")).to_be_visible()
        expect(dialog).to_be_hidden()
        # Kept in this tab, and only there.
        blank.reload()
        expect(card_of(blank, "small")).to_be_visible()
        assert blank.evaluate("[localStorage.length, document.cookie]") == [0, ""]

        order(card_of(blank, "small"), "Load").click()
        expect(card_of(blank, "small").locator(".outcome")).to_contain_text("needs an admin key")
        refused = re.compile(r"error: Failed to load resource: .* 40[13] ")
        assert [each for each in faults if not refused.match(each)] == []

    def test_those_who_wait_are_shown(self, blank: Page, locked: str) -> None:
        blank.add_init_script("sessionStorage.setItem('roundhouse-api-key', 'user-key')")
        blank.goto(locked)
        expect(blank.locator("#queue-summary")).to_have_text("Nobody waits.")
        rows = blank.locator("#queue-rows tr")
        with requests_without_end(locked, 3):
            expect(blank.locator("#queue-summary")).to_have_text("2 requests wait.")
            expect(rows.nth(0)).to_contain_text(re.compile("^1small.*normal"))
            expect(rows.nth(1)).to_contain_text(re.compile("^2small.*normal"))
            expect(card_of(blank, "small")).to_contain_text("1 running · 2 waiting")
            assert serious_faults(blank) == []
        expect(blank.locator("#queue-summary")).to_have_text("Nobody waits.")


class TalkServer:
    """A server of fakes in a thread: the driver of the browser has this one's event loop."""

    def __init__(self, voices: Voices, engine: Engine, settings: ServerSettings) -> None:
        self.voices = voices
        self.url = ""
        self._app = create_app(engine, settings)
        self._listens = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> TalkServer:
        self._thread.start()
        assert self._listens.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with listening(self._app) as self.url:
            self._listens.set()
            await self._stop.wait()

    def told(self) -> list[dict[str, Any]]:
        """The messages that the language model got last. What is read ahead is no answer."""
        chats = [each for each in self.voices.requests if isinstance(each, TextRequest)]
        messages: list[dict[str, Any]] = [
            each.body["messages"] for each in chats if each.body["stream"]
        ][-1]
        return messages


@pytest.fixture
def talk_server(
    monkeypatch: pytest.MonkeyPatch, unfrozen_heap: None, tmp_path: Path
) -> Iterator[TalkServer]:
    monkeypatch.setitem(REGISTRY, "fake", "tests.server.realtime.conftest:Voices")
    voices = Voices()
    large = [{"id": name, "source": "none", "options": {"nbytes": 5000}} for name in ("ox", "elk")]
    models = [{"runtime": "fake", **model} for model in (*MODELS, *large)]
    engine = fake_engine(voices, tmp_path, models=models)
    settings = ServerSettings(api_keys=(SecretStr("user-key"),))
    with TalkServer(voices, engine, settings) as server:
        yield server


@pytest.fixture
def talk_page(blank: Page, talk_server: TalkServer) -> Iterator[Page]:
    """The page of that server, with a key and a microphone."""
    blank.add_init_script(f"({MICROPHONE})()")
    blank.goto(talk_server.url)
    expect(blank.locator("#talk-answers option")).to_have_count(4)
    yield blank
    blank.close()  # its streams would hold the server up


@pytest.fixture
def speech() -> str:
    """One second of read English: base64 of a WAV file."""
    found = clips()
    if not found:
        pytest.skip("scripts/setup --dev has not fetched the recordings")
    file = io.BytesIO()
    with wave.open(io.BytesIO(found[0].wav)) as whole, wave.open(file, "wb") as cut:
        rate = whole.getframerate()
        cut.setparams((1, 2, rate, 0, "NONE", ""))
        cut.writeframes(whole.readframes(rate))
    return base64.b64encode(file.getvalue()).decode()


class TestTalk:
    def test_it_hears_answers_and_is_interrupted(
        self, talk_page: Page, talk_server: TalkServer, faults: list[str], speech: str
    ) -> None:
        page, voices = talk_page, talk_server.voices
        toggle, phase = page.locator("#talk-toggle"), page.locator("#talk-phase")
        mine, theirs = page.locator("#talk-entries .mine"), page.locator("#talk-entries .theirs")
        toggle.press("Enter")
        expect(page.locator("#talk-status")).to_have_text("Connected: speak, or write below.")
        expect(phase).to_have_text("Listening")
        assert page.evaluate("microphone.wanted.echoCancellation") is True

        voices.words = [f"word{index} " for index in range(80)]  # eight seconds
        page.evaluate("(wav) => speak(wav)", speech)
        expect(mine.locator(".text")).to_have_text("hello there")
        expect(theirs.locator(".text")).to_have_text("".join(voices.words).strip())
        steps = page.locator("#talk-rows tr td")
        expect(steps).to_have_text([re.compile(r"^\d.* m?s$")] * 4)
        expect(phase).to_have_text("Answering")
        # Eight seconds are long enough for the recording to interrupt them.
        page.evaluate("(wav) => speak(wav)", speech)
        note = theirs.first.locator(".note")
        expect(note).to_have_text(re.compile(r"^interrupted after \d.* m?s$"))
        unheard = theirs.first.locator("s")
        expect(unheard).to_contain_text("word79")
        played = page.evaluate("played.map((each) => ({ ...each, node: null }))")
        stopped = [each for each in played if "stopped" in each]
        assert stopped, "it went on playing"
        late = 0
        for piece, following in pairwise(played[: played.index(stopped[-1]) + 1]):
            gap_s = following["when"] - piece["when"] - piece["seconds"]
            if gap_s > 1e-6 and following["at"] > following["when"] - 0.05:
                late += 1  # the server was slower than speech
            else:
                assert gap_s == pytest.approx(0, abs=1e-6)
        assert late < len(stopped)

        expect(mine).to_have_count(2)
        expect(theirs).to_have_count(2)
        kept = theirs.first.locator(".text").evaluate("(node) => node.firstChild.textContent")
        assert 0 < len(kept.split()) < 80
        told = talk_server.told()
        assert [each["role"] for each in told] == ["user", "assistant", "user"]
        assert told[1]["content"] == kept.strip()
        heard_s = float(re.findall(r"[\d.]+", note.text_content() or "")[0])
        heard_s /= 1000 if (note.text_content() or "").endswith("ms") else 1
        assert len(kept.split()) == pytest.approx(heard_s * 10, abs=2)
        assert heard_s <= stopped[0]["stopped"] - played[0]["when"] + 0.1

        voices.words = ["Yes."]
        page.locator("#talk-input").fill("Are you there?")
        page.locator("#talk-input").press("Enter")
        expect(mine.last.locator(".text")).to_have_text("Are you there?")
        expect(theirs.last.locator(".text")).to_have_text("Yes.")
        assert serious_faults(page) == []
        page.set_viewport_size({"width": NARROW, "height": 640})
        assert page.evaluate("document.documentElement.scrollWidth") <= NARROW

        expect(card_of(page, "voice")).to_contain_text("kept by 1 sessions")
        toggle.press("Enter")
        expect(page.locator("#talk-status")).to_have_text("You hung up.")
        expect(toggle).to_have_text("Talk")
        assert page.evaluate("microphone.track.readyState") == "ended"
        expect(card_of(page, "voice")).not_to_contain_text("kept by")
        assert faults == []

    def test_without_a_microphone_or_room(
        self, talk_page: Page, talk_server: TalkServer, faults: list[str]
    ) -> None:
        page, voices = talk_page, talk_server.voices
        toggle, status = page.locator("#talk-toggle"), page.locator("#talk-status")
        alarm = page.get_by_role("alert")
        absent = "mediaDevices.getUserMedia = async () => { throw new DOMException('', '%s') }"
        for refuse, why in (
            (absent % "NotFoundError", "this device has none."),
            (absent % "NotAllowedError", "this page may not use it."),
            ("__defineGetter__('mediaDevices', () => undefined)", "open this page by https or on"),
        ):
            page.evaluate(f"navigator.{refuse}; null")
            toggle.press("Enter")
            expect(alarm).to_have_text(re.compile(f"^No microphone: {why}.*You can write instead"))
            expect(status).to_have_text("Connected: write below.")
            page.locator("#talk-input").fill("Hello")
            page.locator("#talk-input").press("Enter")
            expect(page.locator("#talk-entries .theirs .text")).to_have_text("".join(voices.words))
            toggle.press("Enter")
        assert faults == []

        page.locator("#talk-answers").select_option("huge")
        toggle.press("Enter")
        expect(status).to_contain_text("These models never fit together")
        assert faults == []
        page.locator("#talk-answers").select_option("ox")
        url = talk_server.url.replace("http", "ws")
        headers = {"authorization": "Bearer user-key"}
        with connect(f"{url}/v1/realtime?model=elk", additional_headers=headers):
            toggle.press("Enter")
            expect(status).to_contain_text("There is no room for these models now: sessions")
            expect(toggle).to_have_text("Talk")
        # The browser's own words, which a page cannot keep away.
        assert all(re.search("WebSocket connection to .* 503", each) for each in faults)


class TestApiPage:
    def test_it_asks_for_the_key_and_sends_it(
        self, blank: Page, faults: list[str], locked: str
    ) -> None:
        asked: list[str] = []
        blank.on("request", lambda request: asked.append(request.url))
        blank.goto(f"{locked}/docs")
        key = blank.get_by_label("API key")
        key.fill("wrong-key")
        key.press("Enter")
        expect(blank.get_by_role("alert")).to_have_text("Incorrect API key.")
        expect(blank.locator(".opblock")).to_have_count(0)
        key.fill("user-key")
        key.press("Enter")
        document = httpx.get(f"{locked}/openapi.json", headers={"x-api-key": "user-key"}).json()
        operations = sum(len(methods) for methods in document["paths"].values())
        expect(blank.locator(".opblock")).to_have_count(operations)
        expect(key).to_be_hidden()
        expect(blank.get_by_role("alert")).to_be_hidden()

        operation = blank.locator("#operations-models-get_v1_models")
        operation.locator(".opblock-summary-control").click()
        operation.get_by_role("button", name="Try it out").click()
        operation.get_by_role("button", name="Execute").click()
        answer = operation.locator(".live-responses-table tbody .response")
        expect(answer.locator(".response-col_status")).to_contain_text("200")
        expect(answer).to_contain_text('"id": "small"')
        assert all(url.startswith((locked, "data:", "blob:")) for url in asked)
        refused = re.compile(r"error: Failed to load resource: .* 401 ")
        assert [each for each in faults if not refused.match(each)] == []

    def test_it_is_drawn(self, blank: Page, faults: list[str], locked: str) -> None:
        blank.add_init_script("sessionStorage.setItem('roundhouse-api-key', 'user-key')")
        blank.goto(f"{locked}/docs")
        expect(blank.get_by_role("heading", name=re.compile("^Roundhouse"))).to_be_visible()
        blank.locator("#operations-images-post_v1_images_generations").scroll_into_view_if_needed()
        with Image.open(io.BytesIO(blank.screenshot())) as drawn:
            colours = drawn.convert("RGB").getcolors(1 << 24) or []
        # Text, and the green, blue and red of the methods: without its style sheet, a handful.
        assert len(colours) > 500
        assert faults == []
