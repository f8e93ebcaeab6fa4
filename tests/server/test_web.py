"""The page at `/`: how it is served, that its parts fit together, and what its modules compute."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from math import pi, sin
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Histogram
from pydantic import SecretStr
from starlette.routing import Match

from server.metrics import render
from server.settings import ServerSettings
from server.sse import event_frame

WEB = Path(__file__).parents[2] / "server" / "web"
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in WEB.glob("*.js")}
FILES = {
    "/": "text/html; charset=utf-8",
    "/web/style.css": "text/css; charset=utf-8",
    "/web/favicon.svg": "image/svg+xml",
    **{f"/web/{name}": "text/javascript; charset=utf-8" for name in SCRIPTS},
}

METHODS = {"get": "GET", "post": "POST", "remove": "DELETE"}
"""What api.js offers."""
CALL = re.compile(rf"(?<![.\w])({'|'.join(METHODS)})\(\s*(?:([`\"])(/.*?)\2)?", re.DOTALL)
SOCKET = re.compile(r"\bopenSocket\(\s*(?:([`\"])(/.*?)\1)?")
LOOKUP = re.compile(r"\bbyId\((?:\"([\w-]+)\"\))?")
IMPORT = re.compile(r"^import [^;]* from \"([^\"]*)\";$", re.MULTILINE)
MARKUP_FROM_TEXT = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser"
    r"|srcdoc|\beval\b|\bFunction\(|javascript:"
)
REFERENCES = ("for", "aria-labelledby", "aria-controls", "aria-describedby")


class Page(HTMLParser):
    """Every element of index.html, as tag and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed((WEB / "index.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.elements if attribute in attrs]


@pytest.fixture
def page() -> Page:
    return Page()


class TestServing:
    async def test_types_and_headers(self, client: httpx.AsyncClient) -> None:
        for path, media_type in FILES.items():
            answer = await client.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == media_type
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache"
            name = path.removeprefix("/web/") if path != "/" else "index.html"
            assert answer.content == (WEB / name).read_bytes()
            head = await client.head(path)
            assert (head.status_code, head.headers["content-type"]) == (200, media_type)

    async def test_every_file_of_the_folder_is_served(self) -> None:
        served = {"index.html" if path == "/" else path.removeprefix("/web/") for path in FILES}
        assert served == {path.name for path in WEB.iterdir()}

    async def test_content_security_policy(self, client: httpx.AsyncClient) -> None:
        header = (await client.get("/")).headers["content-security-policy"]
        policy = {name: sources for name, *sources in map(str.split, header.split(";"))}
        assert policy["default-src"] == ["'none'"]
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == ["'self'"]
        assert policy["require-trusted-types-for"] == ["'script'"]
        for name in ("base-uri", "form-action", "frame-ancestors"):
            assert policy[name] == ["'none'"]
        assert "unsafe" not in header and "*" not in header and "http" not in header

    async def test_an_unchanged_file_is_not_sent_again(self, client: httpx.AsyncClient) -> None:
        tag = (await client.get("/web/app.js")).headers["etag"]
        for named in (tag, f"W/{tag}", f'"other", {tag}'):
            known = {"if-none-match": named}
            answer = await client.get("/web/app.js", headers=known)
            assert (answer.status_code, answer.content) == (304, b"")
            assert answer.headers["etag"] == tag
            assert (await client.get("/web/style.css", headers=known)).status_code == 200

    async def test_nothing_else_is_served(self, client: httpx.AsyncClient) -> None:
        for path in (
            "/web",
            "/web/",
            "/web/nothing.js",
            "/web/index.html/",
            "/web/../app.py",
            "/web/%2e%2e/app.py",
            "/web/..%2fapp.py",
            "/web/..%2f..%2fpyproject.toml",
            "/web/%2e%2e%2fweb%2fapp.js",
            "/web/%2fetc%2fpasswd",
            "/web//etc/passwd",
            "/web/app.js%00",
            "/app.js",
        ):
            assert (await client.get(path)).status_code == 404, path


class TestWithKeys:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(api_keys=(SecretStr("user-key"),))

    async def test_the_page_needs_no_key(self, client: httpx.AsyncClient) -> None:
        for path in FILES:
            assert (await client.get(path)).status_code == 200
            assert (await client.post(path)).status_code == 401

    async def test_its_data_does(self, client: httpx.AsyncClient) -> None:
        for path in ("/v1/engine", "/v1/engine/events", "/metrics", "/v1/videos", "/webs"):
            assert (await client.get(path)).status_code == 401

    async def test_the_page_is_no_way_around_the_key(self, client: httpx.AsyncClient) -> None:
        for path in ("/web/../v1/engine", "/web/%2e%2e%2fv1%2fengine", "//v1/engine"):
            assert (await client.get(path)).status_code in (401, 404)


class TestParts:
    """Nothing checks these modules before they run in a browser, so their seams are checked."""

    def test_every_element_looked_up_exists(self, page: Page) -> None:
        ids = page.values("id")
        found = [
            (name, match[1])
            for name, text in SCRIPTS.items()
            if name != "dom.js"  # which defines the lookup
            for match in LOOKUP.finditer(text)
        ]
        assert len(found) > 50
        for name, looked_up in found:
            assert looked_up, f"{name}: an id that is not written out cannot be checked"
            assert looked_up in ids, f"{name}: #{looked_up}"

    def test_every_endpoint_called_exists(self, app: FastAPI) -> None:
        called = set()
        for name, text in SCRIPTS.items():
            if name == "api.js":  # which defines the calls
                continue
            assert "fetch(" not in text, f"{name}: only api.js sends the key"
            for call, _, template in CALL.findall(text):
                assert template, f"{name}: a path that is not written out cannot be checked"
                path = re.sub(r"\$\{.*?\}", "x", template).partition("?")[0]
                scope = {"type": "http", "method": METHODS[call], "path": path, "headers": []}
                matches = [route.matches(scope)[0] for route in app.routes]
                assert Match.FULL in matches, f"{name}: {METHODS[call]} {path}"
                called.add(path)
            for _, template in SOCKET.findall(text):
                assert template, f"{name}: a path that is not written out cannot be checked"
                path = template.partition("?")[0]
                scope = {"type": "websocket", "path": path, "headers": []}
                matches = [route.matches(scope)[0] for route in app.routes]
                assert Match.FULL in matches, f"{name}: {path}"
                called.add(path)
        assert {
            "/v1/realtime",
            "/v1/engine",
            "/metrics",
            "/v1/chat/completions",
            "/v1/videos/x",
        } <= called

    def test_every_import_exists(self) -> None:
        for name, text in SCRIPTS.items():
            for source in IMPORT.findall(text):
                assert source.removeprefix("./") in SCRIPTS, f"{name} imports {source}"

    def test_every_reference_of_the_page_exists(self, page: Page) -> None:
        ids = page.values("id")
        assert len(ids) == len(set(ids))
        for attribute in REFERENCES:
            for value in page.values(attribute):
                assert set(value.split()) <= set(ids), f"{attribute}={value}"
        for link in [*page.values("href"), *page.values("src")]:
            assert f"/{link}" in FILES or (link[0] == "#" and link[1:] in ids), link

    def test_every_field_has_a_label(self, page: Page) -> None:
        labelled = page.values("for")
        for tag, attrs in page.elements:
            if tag in ("input", "select", "textarea") and attrs.get("type") != "checkbox":
                assert attrs["id"] in labelled

    def test_the_policy_lets_the_page_work(self, page: Page) -> None:
        for tag, attrs in page.elements:
            assert "style" not in attrs and not any(name.startswith("on") for name in attrs)
            assert tag != "style" and (tag != "script" or f"/{attrs['src']}" in FILES)

    def test_data_never_becomes_markup(self) -> None:
        for name, text in SCRIPTS.items():
            assert not MARKUP_FROM_TEXT.search(text), name

    def test_it_works_offline(self) -> None:
        for path in WEB.iterdir():
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?:|url\(|@import|[\"'(]//", text), path.name


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules where node takes them for modules."""
    folder = tmp_path_factory.mktemp("page") / "web"
    shutil.copytree(WEB, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    return folder


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's modules")
class TestModules:
    """What the modules compute, from what the server really sends."""

    def run(self, modules: Path, script: str, data: object) -> Any:
        """What the script, a module with `input` given, leaves in `output`."""
        code = f"let output; const input = {json.dumps(data)};\n{script}\n"
        done = subprocess.run(
            ["node", "--input-type=module"],
            input=f"{code}console.log(JSON.stringify(output));",
            cwd=modules,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def test_exposition(self, modules: Path) -> None:
        registry = CollectorRegistry()
        counter = Counter("odd", "Odd.", ("a", "b"), registry=registry)
        labels = ('quoted "x"', "back\\slash\nn {} 1")
        counter.labels(*labels).inc(2.5)
        Counter("plain", "Plain.", registry=registry).inc()
        text = render((registry,), "text/plain")[0].decode()
        script = """
            const { samples } = await import("./exposition.js");
            output = [...samples(input)];
        """
        found = {sample["name"]: sample for sample in self.run(modules, script, text)}
        assert found["odd_total"]["value"] == 2.5
        assert found["odd_total"]["labels"] == dict(zip("ab", labels, strict=True))
        assert found["plain_total"] == {"name": "plain_total", "labels": {}, "value": 1}

    def test_history(self, modules: Path) -> None:
        registry = CollectorRegistry()
        tokens = Counter("vllm:generation_tokens", "T.", ("model_name",), registry=registry)
        seconds = Histogram(
            "roundhouse_request_seconds",
            "S.",
            ("model", "phase"),
            buckets=(1, 2, 4),
            registry=registry,
        )

        def text() -> str:
            return render((registry,), "text/plain")[0].decode()

        tokens.labels("a").inc(1000)
        seconds.labels("a", "run").observe(100)
        scrapes = [[0, text()]]
        tokens.labels("a").inc(50)
        for model in ("a", "b"):
            for _ in range(10):
                seconds.labels(model, "queue").observe(0.5)
                seconds.labels(model, "run").observe(1.5)
        scrapes.append([10, text()])
        scrapes.append([45, text()])  # beyond the window of both
        tokens.clear()
        tokens.labels("a").inc(20)  # a restart
        scrapes.append([50, text()])
        script = """
            const { History } = await import("./history.js");
            const history = new History();
            for (const [at, text] of input) history.push(at, text);
            output = {};
            for (const [plot, curves] of history.curves) output[plot] = Object.fromEntries(curves);
        """
        curves = self.run(modules, script, scrapes)
        assert curves["tokens"]["a"] == [[10, 5], [50, 4]]
        assert curves["requests"] == {"a": [[10, 1], [50, 0]], "b": [[10, 1], [50, 0]]}
        # Twenty between 1 and 2: the 95th percentile is the nineteenth of them.
        assert curves["phases"]["run"] == [[10, pytest.approx(1.95)], [50, None]]
        assert curves["tokens_s"] == {}

    def test_events_in_pieces(self, modules: Path) -> None:
        documents = [{"type": "a", "text": "naïve – 日本"}, {"type": "b", "text": "x" * 50}]
        text = ": queued position=3 eta=12.4s\n\n: granted queue-ms=1\n\n"
        text += "".join(event_frame(document).data for document in documents)
        last = {"error": {"message": "abgebrochen – 途中で"}}
        text += f"data: {json.dumps(last, ensure_ascii=False)}\n\n"  # as vLLM writes
        script = """
            const { readDocuments } = await import("./sse.js");
            const bytes = new TextEncoder().encode(input);
            const body = new ReadableStream({
                start(controller) {
                    for (let at = 0; at < bytes.length; at += 7) {
                        controller.enqueue(bytes.slice(at, at + 7));
                    }
                    controller.close();
                },
            });
            output = { documents: [], told: [], error: null };
            try {
                for await (const each of readDocuments({ body }, (t) => output.told.push(t))) {
                    output.documents.push(each);
                }
            } catch (error) {
                output.error = error.message;
            }
        """
        assert self.run(modules, script, text) == {
            "documents": documents,
            "told": ["Waiting: queued position 3 eta 12.4s"],
            "error": "abgebrochen – 途中で",
        }

    @pytest.mark.parametrize("rate", [16_000, 24_000, 44_100, 48_000])
    def test_the_microphone_has_24_khz(self, modules: Path, rate: int) -> None:
        script = """
            output = [];
            globalThis.sampleRate = input;
            globalThis.AudioWorkletProcessor = class {
                port = { postMessage: (piece) => output.push(piece) };
            };
            globalThis.registerProcessor = (_, kind) => (globalThis.Capture = kind);
            await import("./microphone_worklet.js");
            const capture = new Capture();
            const tone = (index) => 0.5 * Math.sin((2 * Math.PI * 500 * index) / input);
            for (let begin = 0; begin < input; begin += 128) {
                const channel = Array.from({ length: 128 }, (_, index) => tone(begin + index));
                capture.process([[Float32Array.from(channel)]]);
            }
            capture.process([[]]); // nothing is connected
            output = output.map(({ pcm, level }) => [[...new Int16Array(pcm)], level]);
        """
        pieces = self.run(modules, script, rate)
        assert [len(samples) for samples, _ in pieces] == [960] * 25  # a second
        assert all(level == pytest.approx(0.5 / 2**0.5, abs=0.01) for _, level in pieces)
        heard = [sample / 32767 for samples, _ in pieces for sample in samples]
        expected = [0.5 * sin(2 * pi * 500 * index / 24_000) for index in range(len(heard))]
        # A mean lags by half the difference of the spans of two samples.
        assert max(abs(a - b) for a, b in zip(heard, expected, strict=True)) < 0.05

    def test_every_import_is_exported(self, modules: Path) -> None:
        # Linking fails for a name that is not there; app.js then runs, and there is no page.
        script = "output = await import('./app.js').catch((error) => error.message);"
        assert self.run(modules, script, None) == "document is not defined"
