"""The container, as far as it can be looked at without building it: its own lines are run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path, PurePosixPath

import pytest
import yaml

from engine.config import EngineConfig, engine_fields
from engine.units import parse_duration
from server.serve import FLUSH_S
from server.settings import ServerSettings
from tests.dockerfile import BuildContext, Instruction, stages
from tests.http_thread import running
from tests.programs import write_program

ROOT = Path(__file__).parents[1]
# Where the development dependencies put it, or anywhere.
HADOLINT = shutil.which(
    "hadolint", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
)
WEIGHTS = ("*.safetensors", "*.gguf", "*.pt", "*.pth", "*.bin", "*.onnx", "*.ckpt")


CONTEXT = BuildContext(ROOT, (ROOT / ".dockerignore").read_text().splitlines())
BASE, ENVIRONMENT, FINAL = stages((ROOT / "Dockerfile.cuda").read_text())


def only(stage: list[Instruction], name: str) -> Instruction:
    (instruction,) = (each for each in stage if each.name == name)
    return instruction


def variables() -> dict[str, str]:
    """What ENV sets in the image."""
    return dict(word.split("=", 1) for word in only(FINAL, "ENV").words())


def copies(stage: list[Instruction]) -> list[tuple[list[str], str]]:
    """Sources and target of each COPY from the build context."""
    from_context = (each for each in stage if each.name == "COPY" and not each.flags)
    return [(words[:-1], words[-1]) for words in (each.words() for each in from_context)]


def copy_into(folder: Path, stage: list[Instruction]) -> None:
    """Do what a stage's COPYs do."""
    for sources, target in copies(stage):
        CONTEXT.copy(sources, folder / target)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the program in the image; Python and the command are stand-ins.

    The environment is made by the Dockerfile's own line in a folder of that stage, and taken over.
    """
    environment, final = (tmp_path_factory.mktemp(name) for name in ("environment", "final"))
    copy_into(environment, ENVIRONMENT)
    write_program(environment / ".venv/bin/python", 'echo "$@" >>installed')
    subprocess.run(only(ENVIRONMENT, "RUN").command(), cwd=environment, check=True, timeout=60)
    assert "--editable .[cuda]" in (environment / "installed").read_text()
    copy_into(final, FINAL)
    shutil.copytree(environment / ".venv", final / ".venv")
    write_program(final / ".venv/bin/python", 'echo "set up again: $@"; exit 1')
    write_program(final / ".venv/bin/roundhouse", 'env >"$0.environ"; echo "$ROUNDHOUSE_PORT" "$@"')
    return final


def start(image: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the image's entry point."""
    first, second, entry = only(FINAL, "ENTRYPOINT").words()
    assert (first, second) == ("tini", "--")
    inside = image / PurePosixPath(entry).relative_to(only(BASE, "WORKDIR").text)
    environ = {"PATH": "/usr/bin:/bin", "PORT": variables()["PORT"], **environ}
    return subprocess.run(
        [inside, *arguments], env=environ, capture_output=True, text=True, timeout=60, check=False
    )


def test_everything_that_is_copied_exists_and_is_sent_to_the_build() -> None:
    sources = [s for stage in (BASE, ENVIRONMENT, FINAL) for each, _ in copies(stage) for s in each]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if not CONTEXT.sends(source.rstrip("/"))] == []


@pytest.mark.parametrize(
    "path", [".git", ".venv", "tests/engine", "constraints/cpu.txt", "scripts/test"]
)
def test_what_is_not_copied_is_not_sent(path: str) -> None:
    assert not CONTEXT.sends(path)


def test_caches_of_python_are_not_sent() -> None:
    assert CONTEXT.sends("engine/engine.py")
    assert not CONTEXT.sends("engine/runtimes/__pycache__/vllm.pyc")


def test_no_weights_go_into_the_image(tmp_path: Path) -> None:
    copy_into(tmp_path, FINAL)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files for kind in WEIGHTS if path.match(kind)] == []
    assert sum(path.stat().st_size for path in files) < 20 * 2**20


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_the_linter_finds_nothing() -> None:
    command = [str(HADOLINT), "--no-color", str(ROOT / "Dockerfile.cuda")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_check_without_docker_knows_every_line() -> None:
    command = [sys.executable, str(ROOT / "scripts/check-container"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    marked = [line.partition(": ") for line in done.stdout.splitlines()]
    replaced = [text for mark, _, text in marked if mark == "replaced"]
    lines = [text for mark, _, text in marked if mark == "would do"]
    written = [f"{each.name} {each.text}" for each in (*BASE, *ENVIRONMENT, *FINAL)]
    assert any("scripts/setup --cuda" in text for text in replaced)
    assert not any("cuda" in line for line in lines)
    changed = [old for old, new in zip(written, lines, strict=True) if old != new]
    assert all("cuda" in line for line in changed)


def test_the_server_is_no_root() -> None:
    user = re.sub(r"^\$\{(\w+)\}$", r"\1", only(FINAL, "USER").text)
    name = next(e.text.partition("=")[2] for e in FINAL if e.text.startswith(f"{user}="))
    (users,) = (e.text for e in FINAL if e.name == "RUN" and "useradd" in e.text)
    assert name not in ("", "root", "0")
    assert re.search(rf"useradd --uid [1-9]\d* .*\b{name}\b", users)


def test_what_must_last_is_on_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables().items():
        if name.startswith("XDG_"):
            monkeypatch.setenv(name, value)
    config = EngineConfig.model_validate({"models": [{"id": "any", "source": "any"}]})
    volumes = {Path(volume) for volume in only(FINAL, "VOLUME").words()}
    folders = (config.cache_dir, config.state_dir, config.data_dir)
    assert [folder for folder in folders if not volumes & {*folder.parents}] == []
    assert config.cache_dir.parent not in (config.data_dir.parent, config.state_dir.parent)


def test_the_environment_is_made_once_and_arguments_reach_the_server(image: Path) -> None:
    done = start(image, "--log-level", "debug")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{only(FINAL, 'EXPOSE').text} serve --log-level debug\n"


@pytest.mark.parametrize(
    ("environ", "port"),
    [
        ({"PORT": "80", "PORT_HEALTH": "80"}, "80"),
        ({"PORT": "80", "ROUNDHOUSE_PORT": "9000"}, "9000"),
        ({"PORT": ""}, "8000"),
    ],
)
def test_a_platform_says_where_to_listen(
    image: Path, environ: Mapping[str, str], port: str
) -> None:
    assert start(image, **environ).stdout == f"{port} serve\n"


def test_a_port_for_probes_alone_is_refused(image: Path) -> None:
    done = start(image, PORT="80", PORT_HEALTH="8080")
    assert done.returncode == 2
    assert "PORT_HEALTH" in done.stderr


def test_what_is_compiled_for_a_model_lasts_with_the_cache(image: Path) -> None:
    names = ("FLASHINFER_WORKSPACE_BASE", "TRITON_CACHE_DIR")

    def places(**environ: str) -> list[str]:
        assert start(image, **environ).returncode == 0
        lines = (image / ".venv/bin/roundhouse.environ").read_text().splitlines()
        told = dict(line.split("=", 1) for line in lines)
        return [told[name] for name in names]

    cache = variables()["XDG_CACHE_HOME"]
    assert all(Path(place).is_relative_to(cache) for place in places(XDG_CACHE_HOME=cache))
    own = {name: f"/mine/{name}" for name in names}
    assert places(XDG_CACHE_HOME=cache, **own) == [*own.values()]


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server that answers with one status; its port, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    with running(server):
        yield server.server_port, asked


def check_health(**environ: str) -> int:
    python, *arguments = only(FINAL, "HEALTHCHECK").nested().command()
    assert Path(python).name == "python"
    environ = {"http_proxy": "http://127.0.0.1:9", **environ}
    done = subprocess.run(
        [sys.executable, *arguments], env=environ, capture_output=True, timeout=60, check=False
    )
    return done.returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_asks_the_server(status: int, code: int) -> None:
    with answering(status) as (port, asked):
        assert check_health(PORT=str(port)) == code
        assert check_health(PORT="9", ROUNDHOUSE_PORT=str(port)) == code
        # Kubernetes, for a Service called roundhouse; the entry point ignores it too.
        link = {"ROUNDHOUSE_PORT": "tcp://10.0.0.1:80"}
        assert check_health(PORT=str(port), **link) == code
    assert asked == ["/health"] * 3


def test_the_health_check_notices_that_nobody_answers() -> None:
    with answering(200) as (port, _):
        pass
    assert check_health(PORT=str(port)) == 1


def test_compose_fits_the_image() -> None:
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["roundhouse"]
    assert (ROOT / service["build"]["dockerfile"]).samefile(ROOT / "Dockerfile.cuda")
    mounted = {volume.split(":")[1] for volume in service["volumes"]}
    assert {*only(FINAL, "VOLUME").words()} <= mounted
    assert service["ports"][0].endswith(f":{only(FINAL, 'EXPOSE').text}")
    grace_s = parse_duration(service["stop_grace_period"])
    assert grace_s >= ServerSettings().drain_s + FLUSH_S + 5
    keys = {*engine_fields(), *ServerSettings.model_fields, "config"}
    own = [name for name in service["environment"] if name.startswith("ROUNDHOUSE_")]
    assert own
    assert [name for name in own if name.removeprefix("ROUNDHOUSE_").lower() not in keys] == []
