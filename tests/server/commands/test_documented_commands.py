"""Every command of the documentation runs as it is written there, against a real server.

Commands are the lines of `sh` blocks and whatever else, in blocks or in the text, begins with the
name of a program. They run in a folder that looks like the repository after `scripts/setup`; what
must differ from the page (`SUBSTITUTIONS`) and what cannot run here (`NOT_RUN`) is listed with the
reason. Of what takes minutes (`PARSED`) the arguments are checked, and nothing is measured.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import pytest
import typer
from typer.core import TyperGroup

from server.commands import cli
from tests.hub import Hub, serving
from tests.programs import write_program
from tests.server.real import ROOT, Server, free_port

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

PROGRAMS = frozenset({
    ".", "apt-get", "bash", "bench", "cat", "cd", "chmod", "chown", "cp", "curl", "dmesg", "docker",
    "env", "export", "git", "hf", "kill", "mkdir", "mv", "nohup", "nvidia-smi", "openssl", "pip",
    "podman", "pytest", "python", "python3", "rm", "roundhouse", "sh", "source", "sudo",
    "systemctl", "ulimit", "vllm", "wget",
})  # fmt: skip
FOLDERS = (".ci/", ".venv/bin/", "scripts/", "./")
"""What begins with one of these is a program of the repository, also by itself."""

REPO = "me/Tiny-Llama"
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(1000),
}
CONFIG = f"engine: {{memory: 1GiB}}\nmodels:\n  - {{id: mine, source: {REPO}}}\n"
"""For the commands that work on models of a hub."""

SMALL_CONFIG = """
models:
  - {id: tiny-whisper, runtime: whisper, task: transcribe, source: "starter:tiny-whisper"}
"""
"""For servers of which only the start is looked at: it imports one library."""

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Substitution:
    """What of a command is replaced, and why it cannot stay."""

    pattern: str
    """Of the whole command, as `re.sub` takes it."""
    replacement: str
    """{url}: of the server that is shared. {small}: a configuration that is soon there."""
    reason: str


SUBSTITUTIONS = (
    Substitution(r"http://127\.0\.0\.1:8000", "{url}", "port 8000 may be taken"),
    Substitution(
        r"^roundhouse (ps|usage.*|plan MODEL)$",
        r"roundhouse \1 --url {url}",
        "port 8000 may be taken",
    ),
    Substitution(r"(?<=^roundhouse plan )MODEL", "minilm-l6-v2", "a word for the reader's own"),
    Substitution(r"(?<=^roundhouse )(\w+) MODEL", r"\1 mine", "a word for the reader's own"),
    Substitution(
        r"(?<=^roundhouse keys )(.*)--model \S+",
        r"\1--model mine",
        "a model of the reader's own",
    ),
    Substitution(r" …$", "", "more of the same"),
    Substitution(r"\bowner/name$", REPO, "a word for the reader's own"),
    Substitution(r"\bFOLDER$", "./my-model", "a word for the reader's own"),
    Substitution(r"\bTRACE$", "abab", "a word for the reader's own"),
    Substitution(r"\bSCENARIO$", "llm", "a word for the reader's own"),
    Substitution(r"\bFILE$", "{small}", "a word for the reader's own"),
    Substitution(r"\bSTEP_MS\b", "20", "a word for the reader's own"),
    Substitution(r"(?<=^scripts/serve --config )configs/gpu-\w+\.yaml", "{small}", "needs a GPU"),
    Substitution(
        r"(?<=^scripts/serve --config )configs/samples\.yaml",
        "{small}",
        "the shared server has all of its models, and takes half a minute to start",
    ),
    Substitution(r"^bench ", "roundhouse bench ", "a table leaves the program out"),
    Substitution(
        r"^(hf auth login|hf cache rm)$", r"\1 --help", "asks the reader for a token, for models"
    ),
    Substitution(
        r"^(roundhouse bench llm --url \S+ --model gpt-4o-mini).*",
        r"\1 --streams 1 --rounds 1 --repeats 1 --output-tokens 2",
        "as written it takes minutes",
    ),
)

PYTHON_SUBSTITUTIONS = (
    Substitution(r"http://127\.0\.0\.1:8000", "{url}", "port 8000 may be taken"),
    Substitution(r"https://POD_ID-8000\.proxy\.runpod\.net", "{url}", "an address of the reader's"),
    Substitution(r"https://ENDPOINT_ID\.api\.runpod\.ai", "{url}", "an address of the reader's"),
)

CONTAINER = "needs a container engine; tests/test_container.py runs what is in the image"
TESTS = "runs these tests"
VLLM = "needs the distribution `vllm`, which the CPU build is not"

NOT_RUN: Mapping[str, str] = {
    r"roundhouse add FILE\.gguf": "tests/engine/conversion/ converts files",
    r"scripts/setup --cuda": "installs gigabytes; tests/test_container.py runs it without pip",
    r"scripts/test( .*)?": TESTS,
    r"\.ci/run": TESTS,
    r"(\.venv/bin/python )?scripts/check-gpu( .*)?": "needs a card; .ci/run runs it on the CPU",
    r"(?s)(\w+=\S+ )?docker .*": CONTAINER,
    r"chown 10001": CONTAINER,
    r"cd /opt/roundhouse && nohup scripts/container .*": CONTAINER,
    r"vllm serve": VLLM,
    r"(?s)vllm bench serve .*": VLLM,
    r"scripts/bench/bare": "`roundhouse bench` starts it (test_bench.py) and talks to it",
    r"dmesg \| grep Xid": "needs a card, and the rights of root",
    r"sudo \.venv/bin/python scripts/check-container": (
        "needs the rights of root and 11 GB; tests/test_container.py runs it with --dry-run"
    ),
}

NAMED = (r"roundhouse (add|bench|keys|pull|rm|simulate)",)
"""Named in a sentence, without what the command is to be given."""

PARSED = (
    r"roundhouse bench (SCENARIO|.*(--against|--streams).*)",
    r"bench .*",
    r"(\.venv/bin/python )?scripts/(bench/(?!bare)|measure-).*",
)

EXIT_STATUSES: Mapping[str, tuple[int, ...]] = {
    "roundhouse doctor": (0, 1),  # 1: something of this machine is bad
}

_NO_CI = "roundhouse keys remove ci || true"
_CI = f"{_NO_CI}; roundhouse keys add ci"

BEFORE: Mapping[str, str] = {
    "roundhouse rm mine": "roundhouse pull mine",
    "roundhouse keys add ci --model mine --endpoint chat --requests-per-minute 60"
    " --tokens-per-minute 20000 --concurrent 4": _NO_CI,
    "roundhouse keys set ci --tier gold --concurrent none": _CI,
    "roundhouse keys rotate ci": _CI,
    "roundhouse keys revoke ci": _CI,
}
"""What the page has the reader do first."""


# What the pages say.


@cache
def blocks(page: Path) -> tuple[tuple[str, str], ...]:
    """The blocks of code of a page: language and text."""
    fenced = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)
    text = page.read_text()
    found = [(match[2], textwrap.dedent(match[3])) for match in fenced.finditer(text)]
    indented = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
    found += [("", textwrap.dedent(block)) for block in indented.findall(fenced.sub("", text))]
    return tuple(found)


def spans(page: Path) -> Iterator[str]:
    """The pieces of code in a page's sentences and tables."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    for span in re.findall(r"`([^`]+)`", text):
        yield " ".join(span.replace(r"\|", "|").split())


def lines_of(block: str) -> Iterator[str]:
    """The commands of a block: a line, or several where one goes on."""
    command = ""
    for line in block.splitlines():
        command += line
        try:
            words = shlex.split(command, comments=True)
        except ValueError:  # a quotation goes on
            command += "\n"
            continue
        if command.endswith("\\"):
            command += "\n"
            continue
        if words:
            yield command
        command = ""
    assert not command, f"a command without its end: {command}"


def is_command(text: str, *, alone: bool) -> bool:
    """Whether its first word, after variables, is a program. `alone`: one word will do."""
    words = [word for word in text.split() if not re.match(r"[A-Z_]+=", word)]
    if not words:
        return False
    return words[0].startswith(FOLDERS) or (words[0] in PROGRAMS and (alone or len(words) > 1))


@cache
def commands() -> Mapping[str, str]:
    """Every command of the pages, once, and the first page that has it."""
    found: dict[str, str] = {}
    for page in PAGES:
        name = page.name
        for language, block in blocks(page):
            if language != "python":
                for line in lines_of(block) if language == "sh" else block.splitlines():
                    if language == "sh" or is_command(line, alone=True):
                        found.setdefault(line, name)
        for span in spans(page):
            if is_command(span, alone=False):
                found.setdefault(span, name)
    return found


def without_comment(command: str) -> str:
    return re.sub(r"\s+#.*$", "", command)


def is_any(patterns: Mapping[str, str] | tuple[str, ...], command: str) -> bool:
    return any(re.fullmatch(pattern, without_comment(command)) for pattern in patterns)


def starts_server(command: str) -> bool:
    return re.search(r"(^|\s)(scripts/|roundhouse )serve(\s|$)", command) is not None


def short(command: str) -> str:
    """The name of its test: the page and the beginning."""
    return f"{commands()[command]}: {' '.join(command.split())[:60]}"


NEWCOMERS = "scripts/serve"
FOLLOWS = "curl -N"

SERVERS = [c for c in commands() if starts_server(c)]
TO_PARSE = [c for c in commands() if is_any(PARSED, c)]
TO_KNOW = [c for c in commands() if is_any(NAMED, c)]
TO_FOLLOW = [c for c in commands() if c.startswith(FOLLOWS)]
TO_RUN = [
    command
    for command in commands()
    if command not in (*SERVERS, *TO_PARSE, *TO_KNOW, *TO_FOLLOW) and not is_any(NOT_RUN, command)
]
PYTHON_PAGES = [page for page in PAGES if any(language == "python" for language, _ in blocks(page))]


def test_the_tables_fit_the_pages() -> None:
    written = [without_comment(command) for command in commands()]
    assert len(written) > 50
    for pattern in (*NOT_RUN, *PARSED, *NAMED):
        assert [c for c in written if re.fullmatch(pattern, c)], f"no page has {pattern}"
    done = (*SERVERS, *TO_PARSE, *TO_KNOW, *TO_FOLLOW)
    assert [c for c in done if is_any(NOT_RUN, c) or done.count(c) > 1] == []
    used = set()
    for command in written:
        _, applied = substituted(command, SUBSTITUTIONS)
        used |= applied
    assert [each for each in SUBSTITUTIONS if each not in used] == []
    used = set()
    for page in PYTHON_PAGES:
        _, applied = substituted(python_of(page), PYTHON_SUBSTITUTIONS)
        used |= applied
    assert [each for each in PYTHON_SUBSTITUTIONS if each not in used] == []
    assert [command for command in BEFORE if command not in map(final, TO_RUN)] == []
    assert [command for command in EXIT_STATUSES if command not in TO_RUN] == []
    assert NEWCOMERS in SERVERS
    assert TO_FOLLOW


def test_a_command_may_go_on_over_several_lines() -> None:
    text = """\
        scripts/serve --port 1  # one

        curl -d '{
          "a": 1
        }'
        vllm serve \\
          --port 2
        # nothing
        unheard-of --all
    """
    assert [*lines_of(textwrap.dedent(text))] == [
        "scripts/serve --port 1  # one",
        "curl -d '{\n  \"a\": 1\n}'",
        "vllm serve \\\n  --port 2",
        "unheard-of --all",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("roundhouse ps", True),
        ("roundhouse", False),
        ("KEY=a roundhouse ps", True),
        ("ROUNDHOUSE_PORT=9000", False),
        ("scripts/test", True),
        ("configs/cpu.yaml", False),
        ("position", False),
    ],
)
def test_what_in_a_sentence_is_a_command(text: str, told: bool) -> None:
    assert is_command(text, alone=False) is told


# What they do.


def substituted(
    command: str, substitutions: tuple[Substitution, ...], **values: object
) -> tuple[str, set[Substitution]]:
    """The command as it runs here, and what was applied to it."""
    applied = set()
    for each in substitutions:
        replacement = each.replacement
        for name, value in values.items():
            replacement = replacement.replace(f"{{{name}}}", str(value))
        changed = re.sub(each.pattern, replacement, command)
        if changed != command:
            applied.add(each)
            command = changed
    return command, applied


def final(command: str, **values: object) -> str:
    return substituted(without_comment(command), SUBSTITUTIONS, **values)[0]


def asks_server(command: str) -> bool:
    return final(command, url="ITS URL") != final(command, url="ANOTHER")


def roundhouse() -> TyperGroup:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    return group


def python_of(page: Path) -> str:
    """The page's program: a block goes on where the one before has ended."""
    return "\n".join(text for language, text in blocks(page) if language == "python")


class Checkout:
    """A folder that looks like the repository after `scripts/setup`, and a shell in it."""

    def __init__(self, folder: Path, hub: Hub, sample_cache: Path) -> None:
        self.folder = folder
        self.config = folder / "mine.yaml"
        self.small_config = folder / "small.yaml"
        self.small_config.write_text(SMALL_CONFIG)
        (folder / "my-model").mkdir()
        for name, data in FILES.items():
            (folder / "my-model" / name).write_bytes(data)
        for name in ("engine", "server", "tests", "configs", "constraints", "docs", "scripts"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
        programs = folder / ".venv" / "bin"
        # What pip would install is there: in the environment that these tests run in.
        python = shlex.quote(sys.executable)
        write_program(programs / "python", f'[ "$1 $2" = "-m pip" ] || exec {python} "$@"')
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        module, _, function = project["scripts"]["roundhouse"].partition(":")
        entry = f"import sys; from {module} import {function}; sys.exit({function}())"
        write_program(programs / "roundhouse", f'exec {python} -c "{entry}" "$@"')
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ROUNDHOUSE_", "HF_"))}
        home = folder / "home"
        home.mkdir()
        (home / "cache").mkdir()
        (home / "cache" / "roundhouse").symlink_to(sample_cache)
        (home / ".curlrc").write_text("fail\nsilent\nshow-error\n")
        self.environ = {
            **kept,
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "CURL_HOME": str(home),
            "HF_HOME": str(home / "huggingface"),
            "HF_ENDPOINT": hub.url,
            "XDG_CACHE_HOME": str(home / "cache"),
            "XDG_DATA_HOME": str(home / "data"),
            "XDG_STATE_HOME": str(home / "state"),
        }
        self.run("scripts/setup --cpu --dev")

    def run(self, command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a command as somebody at a terminal who says yes to whatever it asks."""
        assert "sudo" not in command.split(), f"nothing that a test should do: {command}"
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env={**self.environ, **environ},
            input="y\n",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode in EXIT_STATUSES.get(command, (0,)), f"{command}\n{done.stdout}"
        return done


class Started(Server):
    """A server that a command of the pages started."""

    def __init__(self, checkout: Checkout, command: str, **environ: str) -> None:
        port = free_port()
        own = {
            "HF_HUB_OFFLINE": "1",
            "ROUNDHOUSE_PORT": str(port),
            # Two servers cannot share their jobs.
            "XDG_DATA_HOME": str(checkout.folder / f"{port}.data"),
        }
        self._start(
            port,
            ["bash", "-c", command],
            checkout.folder,
            {**checkout.environ, **own, **environ},
            checkout.folder / f"{port}.log",
        )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, sample_cache: Path) -> Iterator[Checkout]:
    with serving(Hub()) as hub:
        hub.repos[REPO] = FILES
        yield Checkout(tmp_path_factory.mktemp("checkout"), hub, sample_cache)


@pytest.fixture(scope="module", autouse=True)
def starting(checkout: Checkout) -> Iterator[Started]:
    """The server that the README's first command starts.

    It gets ready while the tests run that need none, which are the first for that.
    """
    server = Started(checkout, NEWCOMERS)
    try:
        yield server
    finally:
        status = server.stop()
    assert status == 0, server.log()


@pytest.mark.parametrize("command", [c for c in TO_RUN if not asks_server(c)], ids=short)
def test_it_runs(checkout: Checkout, command: str) -> None:
    checkout.config.write_text(CONFIG)
    (trace,) = (
        text for language, text in blocks(ROOT / "docs/simulator.md") if language == "jsonl"
    )
    (checkout.folder / "trace.jsonl").write_text(trace)
    command = final(command)
    if command in BEFORE:
        checkout.run(BEFORE[command], ROUNDHOUSE_CONFIG=str(checkout.config))
    checkout.run(command, ROUNDHOUSE_CONFIG=str(checkout.config))


@pytest.mark.parametrize("command", TO_PARSE, ids=short)
def test_its_arguments_are_understood(checkout: Checkout, command: str) -> None:
    """It would measure for minutes."""
    command = final(command, url="http://127.0.0.1:8000")
    words = shlex.split(command)
    if words[0] == "roundhouse":
        roundhouse().commands[words[1]].make_context(words[1], words[2:])
        return
    # A value that is wrong is told before the help.
    told = checkout.run(f"{command} --help").stdout
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"(?<!\S){word}\b", told), f"{command}\n{told}"


@pytest.mark.parametrize("command", TO_KNOW, ids=short)
def test_there_is_such_a_command(command: str) -> None:
    assert command.split()[1] in roundhouse().commands


# Once where two are the same here.
@pytest.mark.parametrize(
    "command", {final(c): c for c in SERVERS if c != NEWCOMERS}.values(), ids=short
)
def test_it_serves(checkout: Checkout, command: str) -> None:
    """The command is ready in time, and ends when it is told to."""
    small = checkout.small_config
    server = Started(checkout, final(command, small=small), ROUNDHOUSE_CONFIG=str(small))
    try:
        server.wait_ready()
    finally:
        status = server.stop()
    assert status == 0, server.log()


@pytest.fixture(scope="module")
def server(starting: Started) -> Started:
    starting.wait_ready()
    return starting


@pytest.mark.parametrize("command", [c for c in TO_RUN if asks_server(c)], ids=short)
def test_it_asks_the_server(checkout: Checkout, server: Started, command: str) -> None:
    checkout.run(final(command, url=server.url))


@pytest.mark.parametrize("command", TO_FOLLOW, ids=short)
def test_it_follows(checkout: Checkout, server: Started, command: str) -> None:
    """What goes on until it is stopped tells something meanwhile."""
    command = final(command, url=server.url)
    with (
        subprocess.Popen(
            ["bash", "-c", command],
            cwd=checkout.folder,
            env=checkout.environ,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
        ThreadPoolExecutor() as pool,
    ):
        assert process.stdout is not None
        line = pool.submit(process.stdout.readline)
        try:
            while not line.done():  # nobody tells when it begins to listen
                for order in ("load", "unload"):
                    httpx.post(f"{server.url}/v1/engine/models/minilm-l6-v2/{order}", timeout=180)
        finally:
            process.terminate()
    assert line.result()


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_python(checkout: Checkout, server: Started, page: Path) -> None:
    text, _ = substituted(python_of(page), PYTHON_SUBSTITUTIONS, url=server.url)
    (checkout.folder / "page.py").write_text(text)
    checkout.run(".venv/bin/python page.py")
