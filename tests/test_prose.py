"""What the pages, the docstrings and the comments name exists, and their sentences are short.

The test reads the source and imports none of it. It looks at what stands between backquotes and
has the form of a path, a module, a class, a member, a function, a constant or a test. Single words
in small letters (`plan`, `load`) are left alone: they may be anything.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
THIS = Path(__file__).relative_to(ROOT).as_posix()
"""Names that stand only in strings of this file are those that it looks for."""
PROGRAM = ("engine", "server")
FOLDERS = (*PROGRAM, "tests", "scripts", "configs", "constraints", "docs")
SECTIONS = {
    "engine": "EngineConfig",
    "server": "ServerSettings",
    "costs": "CostConfig",
    "vector_stores": "VectorStoreConfig",
}
"""The sections of the configuration, and the classes of their keys: `engine.memory`."""

MAX_WORDS = 40
"""Of a sentence. The aim is 25."""
MAX_LINE = 100

FILE = re.compile(
    r"[\w*-]+(\.[\w*-]+)*\.(bin|incomplete|json|jsonl|md|pt|pth|safetensors|toml|wav|yaml)"
)
"""A file of no known folder: of a model, of the reader."""
LIBRARY = {
    "AsyncLLM": "vllm/v1/engine/async_llm.py",
    "AsyncLLM.shutdown": "vllm/v1/engine/async_llm.py",
    "DiffusionPipeline.from_pretrained": "diffusers/pipelines/pipeline_utils.py",
    "KPipeline.join_timestamps": "kokoro/pipeline.py",
    "LanguageManager.init_from_config": "TTS/tts/utils/languages.py",
    "PAD_SILENCE_SAMPLES": "TTS/utils/synthesizer.py",
    "Synthesizer": "TTS/utils/synthesizer.py",
    "_autoregressive_generation": "pocket_tts/models/tts_model.py",
    "_from_pydantic_config_with_weights": "pocket_tts/models/tts_model.py",
    "char_limits": "TTS/tts/layers/xtts/tokenizer.py",
    "ctranslate2.specs.WhisperSpec": "ctranslate2/specs/__init__.py",
    "ctranslate2.specs.model_spec.ModelSpec._serialize": "ctranslate2/specs/model_spec.py",
    "faster_whisper.decode_audio": "faster_whisper/__init__.py",
    "french_24l": "pocket_tts/models/tts_model.py",
    "get_predefined_voice": "pocket_tts/utils/utils.py",
    "lora_A": "peft/tuners/lora/layer.py",
    "min_p": "vllm/sampling_params.py",
    "reset_prefix_cache_async": "vllm/v1/engine/core_client.py",
}
"""Names of libraries that no code here uses, and the file that must have their last part."""
NOT_OURS = {
    "headers of HTTP": {"Authorization", "Host", "Origin"},
    "words for the reader's own": {"WIDTHxHEIGHT", "roundhouse_key"},
    "variables of libraries and platforms": {
        "CUDA_VISIBLE_DEVICES", "OLLAMA_API_KEY", "OLLAMA_HOST", "OLLAMA_MAX_LOADED_MODELS",
        "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS",
    },
    "of libraries that are not written in Python": {
        "DataType", "MAX_HEADER_SIZE", "omp_pause_soft", "simple_tokenizer.py",
    },
    "forms of a value": {"en_gb", "lora.up"},
    "named because there is none": {"utils.py"},
}  # fmt: skip
ALLOWED = {*LIBRARY, *(name for names in NOT_OURS.values() for name in names)}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# What there is.


@dataclass(slots=True)
class Class:
    """What a class defines, and the names of its bases."""

    members: set[str] = field(default_factory=set)
    bases: set[str] = field(default_factory=set)


class Source(ast.NodeVisitor):
    """What one file defines, what it imports, and every name in it."""

    def __init__(self, tree: ast.Module) -> None:
        self.top: set[str] = set()
        self.functions: set[str] = set()
        self.parameters: set[str] = set()
        self.pairs: set[tuple[str, str]] = set()
        """Of `a.b` and `a["b"]`."""
        self.imported: set[str] = set()
        self.packages: set[str] = set()
        self.names: set[str] = set()
        self.classes: dict[str, Class] = {}
        self._class: Class | None = None
        self.docstrings: dict[int, ast.Constant] = {}
        for statement in tree.body:
            self.top |= defined(statement)
        self.visit(tree)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.add(node.name)
        outer, self._class = self._class, self.classes.setdefault(node.name, Class())
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            self._class.bases.add(ast.unparse(base).rpartition(".")[2])
        for statement in node.body:
            self._class.members |= defined(statement)
        self.generic_visit(node)
        self._class = outer

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.names.add(node.name)
        self.functions.add(node.name)
        self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            self.docstrings[node.lineno] = node.value
        else:
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.names.add(node.attr)
        self.pairs.add((last_name(node.value), node.attr))
        of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        if self._class is not None and of_self and isinstance(node.ctx, ast.Store):
            self._class.members.add(node.attr)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.pairs.add((last_name(node.value), last_name(node)))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.names.add(node.id)

    def visit_arg(self, node: ast.arg) -> None:
        self.names.add(node.arg)
        self.parameters.add(node.arg)
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        self.names.add(node.arg or "")
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self.packages.add(name.name.partition(".")[0])
            self.names.update(name.name.split("."))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        package = (node.module or "").partition(".")[0]
        self.names.update((node.module or "").split("."))
        if package not in FOLDERS:
            self.packages.add(package)
            self.imported |= {name.name for name in node.names}
            self.names |= self.imported

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.names.update(re.findall(r"\w+", node.value))
            for dotted in re.findall(r"\w+(?:\.\w+)+", node.value):
                self.pairs.update(pairwise(dotted.split(".")))


def last_name(node: ast.expr) -> str:
    """Of `a.b` and of `a["b"]`: b."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript):
        key = node.slice
        return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else ""
    return node.id if isinstance(node, ast.Name) else ""


def defined(statement: ast.stmt) -> set[str]:
    """The names that a statement at the top of a module or of a class defines."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {statement.name}
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    elif isinstance(statement, ast.If | ast.Try | ast.With):
        return set().union(*map(defined, statement.body))
    else:
        return set()
    every = [node for target in targets for node in ast.walk(target)]
    return {node.id for node in every if isinstance(node, ast.Name)}


def is_python(path: Path) -> bool:
    if not path.is_file() or path.suffix == ".py":
        return path.suffix == ".py"
    with path.open("rb") as file:
        return b"python" in file.readline()


class Repository:
    """Every file of the repository, and what it defines."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}
        self.paths: set[str] = {path.name for path in ROOT.iterdir()}
        self.classes: dict[str, Class] = defaultdict(Class)
        for folder in FOLDERS:
            for path in (ROOT / folder, *(ROOT / folder).rglob("*")):
                if "__pycache__" in path.parts:
                    continue
                name = path.relative_to(ROOT).as_posix()
                self.paths.add(name)
                if is_python(path):
                    self.sources[name] = Source(ast.parse(path.read_text()))
        for source in self.sources.values():
            for name, kind in source.classes.items():
                self.classes[name].members |= kind.members
                self.classes[name].bases |= kind.bases
        every = [*self.sources.values()]
        own = self.sources[THIS]
        self.top = set().union(*(source.top for source in every))
        self.members = set().union(*(kind.members for kind in self.classes.values()))
        self.functions = set().union(*(source.functions for source in every))
        self.parameters = set().union(*(source.parameters for source in every))
        self.imported = set().union(*(source.imported for source in every))
        self.pairs = set().union(*(source.pairs for source in every if source is not own))
        self.program_names = self._names((*PROGRAM, "scripts"))
        self.names = self._names(FOLDERS)
        for path in (*(ROOT / "configs").glob("*.yaml"), *(ROOT / "scripts").glob("*")):
            if path.is_file() and not is_python(path):
                self.names.update(re.findall(r"\w+", path.read_text()))

    def _names(self, folders: tuple[str, ...]) -> set[str]:
        every = [(name.split("/")[0], source) for name, source in self.sources.items()]
        own = self.sources[THIS]
        return set().union(*(s.names for top, s in every if top in folders and s is not own))

    def module(self, dotted: str) -> Source | None:
        path = dotted.replace(".", "/")
        return self.sources.get(f"{path}.py") or self.sources.get(f"{path}/__init__.py")

    def modules_called(self, stem: str) -> list[Source]:
        ends = (f"/{stem}.py", f"/{stem}/__init__.py")
        return [
            source
            for name, source in self.sources.items()
            if name.startswith(PROGRAM) and name.endswith(ends)
        ]

    def has_member(self, kind: str, member: str) -> bool:
        """Whether the class, or one of its bases that is here, defines it."""
        seen: set[str] = set()
        kinds = [kind]
        while kinds:
            name = kinds.pop()
            if name in self.classes and name not in seen:
                seen.add(name)
                if member in self.classes[name].members:
                    return True
                kinds += self.classes[name].bases
        return False

    def has_path(self, path: str, near: str) -> bool:
        """Whether there is such a file or folder; a name alone may be of any folder."""
        path = path.rstrip("/")
        if path.split("/")[0] in FOLDERS:
            if "*" in path:
                return any(ROOT.glob(path))
            return path in self.paths
        beside = f"{near.rpartition('/')[0]}/{path}"
        if near.startswith(PROGRAM) and "/" not in path and beside in self.paths:
            return True
        pattern = re.escape(path).replace(r"\*", "[^/]*")
        return any(re.search(rf"(^|/){pattern}$", each) for each in self.paths)


@cache
def repository() -> Repository:
    return Repository()


# What is named.


@dataclass(frozen=True, slots=True)
class Mention:
    """What stands between backquotes, and where: of a program, or of a page."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: `{self.text}`"


def spans(file: str, line: int, text: str) -> Iterator[Mention]:
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        yield Mention(file, line + text.count("\n", 0, match.start()), " ".join(match[1].split()))


def without_blocks(text: str) -> str:
    """A page without its blocks of code, each line in its place."""

    def empty(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    return re.sub(r"^ *```.*?^ *```$", empty, text, flags=re.M | re.S)


def mentions_of_page(page: Path) -> Iterator[Mention]:
    """Also the paths in its blocks of code: a drawing of the folders is prose."""
    file, text = name_of(page), page.read_text()
    yield from spans(file, 1, without_blocks(text))
    for block in re.finditer(r"^ *```\w*\n(.*?)^ *```$", text, flags=re.M | re.S):
        line = text.count("\n", 0, block.start()) + 2
        for match in re.finditer(
            r"(?<![\w./-])(?:engine|server|tests)/[\w/]*[\w/](?:\.py)?", block[1]
        ):
            yield Mention(file, line + block[1].count("\n", 0, match.start()), match[0])


def mentions_of_program() -> Iterator[Mention]:
    for file, source in repository().sources.items():
        if not file.startswith(PROGRAM):
            continue
        for line, docstring in source.docstrings.items():
            yield from spans(file, line, str(docstring.value))
        text = (ROOT / file).read_text()
        if not re.search(r"#.*`", text):
            continue
        comments = [
            (token.start[0], token.string)
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT
        ]
        # What begins in one line of a comment may end in the next.
        whole: list[tuple[int, int, str]] = []
        for line, comment in comments:
            if whole and whole[-1][1] == line - 1:
                whole[-1] = (whole[-1][0], line, f"{whole[-1][2]}\n{comment[1:]}")
            else:
                whole.append((line, line, comment[1:]))
        for line, _, comment in whole:
            yield from spans(file, line, comment)


def is_known(mention: Mention) -> bool:
    """Whether what it names is there, or has not the form of a name."""
    here, text = repository(), mention.text
    if text in ALLOWED:
        return True
    first, *rest = text.split("/")
    if re.fullmatch(r"[\w./*-]+", text) and (text.endswith(".py") or (rest and first in FOLDERS)):
        return here.has_path(text, mention.file)
    called = re.fullmatch(r"([\w.]+)\([^()]*\)", text)
    name = called[1] if called else text
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name, re.ASCII) or FILE.fullmatch(name):
        return True
    if "." in name:
        return is_known_dotted(name)
    if name.startswith("test_"):
        return name in here.functions or here.has_path(f"{name}.py", mention.file)
    if hasattr(builtins, name):
        return True
    if called:
        return name in here.functions | here.classes.keys() | here.parameters | here.imported
    if re.fullmatch(r"_?[A-Z][A-Z0-9]*[a-z]\w*", name):
        return name in here.classes or name in here.top | here.members | here.imported
    if re.fullmatch(r"_*[A-Z][A-Z0-9_]{2,}", name) or "_" in name.strip("_"):
        of_program = mention.file.startswith(PROGRAM)
        names = here.program_names if of_program else here.names
        return not {name, name.removesuffix("_total")}.isdisjoint(names)
    return True


def is_known_dotted(name: str) -> bool:
    here = repository()
    parts = name.split(".")
    first, rest = parts[0], parts[1:]
    if len(rest) == 1 and here.has_member(SECTIONS.get(first, ""), rest[0]):
        return True
    if first in (*PROGRAM, "tests"):
        for length in range(len(parts), 1, -1):
            module = here.module(".".join(parts[:length]))
            if module is not None:
                return is_defined(module, parts[length:])
        return False
    if first in here.classes:
        return here.has_member(first, rest[0])
    modules = here.modules_called(first)
    if any(is_defined(module, rest) for module in modules):
        return True
    if first in sys.stdlib_module_names and not modules:
        return hasattr(importlib.import_module(first), rest[0])
    return here.pairs.issuperset(pairwise(parts))


def is_defined(module: Source, parts: list[str]) -> bool:
    if not parts:
        return True
    if len(parts) > 1 and parts[0] in module.classes:
        return repository().has_member(parts[0], parts[1])
    return parts[0] in module.top


def unknown(mentions: Iterator[Mention]) -> str:
    return "\n".join(str(mention) for mention in mentions if not is_known(mention))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_exists(page: Path) -> None:
    wrong = unknown(mentions_of_page(page))
    assert not wrong, wrong


def test_what_docstrings_and_comments_name_exists() -> None:
    wrong = unknown(mentions_of_program())
    assert not wrong, wrong


@pytest.mark.parametrize("name", LIBRARY)
def test_the_names_of_libraries_are_theirs(name: str) -> None:
    package, _, file = LIBRARY[name].partition("/")
    found = find_spec(package)
    assert found is not None and found.origin is not None
    source = (Path(found.origin).parent / file).read_text()
    assert re.search(rf"\b{name.rpartition('.')[2]}\b", source)


def test_every_exception_is_needed() -> None:
    every = [*mentions_of_program(), *(each for page in PAGES for each in mentions_of_page(page))]
    assert ALLOWED - {mention.text for mention in every} == set()


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("engine/errors.py", True),
        ("engine/mistakes.py", False),
        ("engine/scheduling/", True),
        ("engine/schedules/", False),
        ("planner.py", True),
        ("planer.py", False),
        ("tests/test_*.py", True),
        ("tests/text_*.py", False),
        ("configs/cpu.yaml", True),
        ("configs/tpu.yaml", False),
        ("engine.scheduling.planner", True),
        ("engine.scheduling.planner.plan", True),
        ("engine.scheduling.planner.draw", False),
        ("engine.planner", False),
        ("engine.max_data_age", True),
        ("engine.max_data_weight", False),
        ("Scheduler", True),
        ("Planner", False),
        ("Gate.exclusive()", True),
        ("Gate.inclusive()", False),
        ("planner.plan", True),
        ("planner.Plan2", False),
        ("starter.STARTERS", False),
        ("ledger.entries", True),
        ("ledger.exits", False),
        ("plan(snapshot)", True),
        ("ponder(snapshot)", False),
        ("gc.freeze", True),
        ("gc.melt", False),
        ("max_overtake_s", True),
        ("max_overtaken_s", False),
        ("ROUNDHOUSE_MEMORY", True),
        ("test_what_a_page_names_exists", True),
        ("test_what_a_page_names_is_spelled_well", False),
        ("test_prose.py", True),
        ("RuntimeError", True),
        ("config.json", True),
        ("plan", True),
        ("curl -N", True),
        ("GET /v1/models", True),
    ],
)
def test_a_name_that_is_not_there_is_found(text: str, known: bool) -> None:
    assert is_known(Mention("ARCHITECTURE.md", 1, text)) is known


# How it is written.


def blocks_of(page: Path) -> Iterator[tuple[int, str]]:
    """The paragraphs, items and cells of a page: the line of each, and its text."""
    begin, lines = 0, list[str]()
    for number, line in enumerate([*without_blocks(page.read_text()).splitlines(), ""], 1):
        apart = not line.strip() or line.startswith(("#", "|"))
        if lines and (apart or re.match(r" *([*-]|\d+\.) ", line)):
            yield begin, " ".join(lines)
            lines = []
        if line.startswith("|"):
            yield from ((number, cell) for cell in re.split(r"(?<!\\)\|", line))
        elif not apart:
            begin = begin if lines else number
            lines.append(line.strip())


def sentences_of(text: str) -> list[str]:
    """A piece of code is a word, a link its text."""
    text = re.sub(r"`[^`]+`", "CODE", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^([*-]|\d+\.) ", "", text)
    return re.split(r"(?<=[.!?])[)\"'*_]*\s+", text)


def words_of(sentence: str) -> int:
    return sum(re.search(r"\w", word) is not None for word in sentence.split())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_sentence_is_too_long(page: Path) -> None:
    name = name_of(page)
    long = [
        f"{name}:{line}: {words_of(sentence)} words: {sentence}"
        for line, block in blocks_of(page)
        for sentence in sentences_of(block)
        if words_of(sentence) > MAX_WORDS
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_line_is_too_long(page: Path) -> None:
    """But for tables, blocks of code and the addresses of links."""
    long = [
        f"{name_of(page)}:{number}: {len(line)} characters"
        for number, line in enumerate(without_blocks(page.read_text()).splitlines(), 1)
        if not line.startswith("|") and len(re.sub(r"\]\([^)]*\)", "]", line)) > MAX_LINE
    ]
    assert not long, "\n".join(long)


def test_sentences_are_told_apart() -> None:
    text = "- One `a. b`, two. [Three](http://x. y) four: five! Six (or 7.) Eight."
    assert [words_of(each) for each in sentences_of(text)] == [3, 3, 3, 1]
