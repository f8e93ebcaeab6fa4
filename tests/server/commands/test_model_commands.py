"""The commands that fetch, list, remove and add models."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from engine.catalog.config_file import with_model
from engine.config import ENV_CONFIG, EngineConfig
from engine.errors import ConfigError
from engine.files.hub.cache import PARTIAL
from engine.runtimes.registry import RUNTIMES, options_of, runtime_class
from engine.samples.registry import can_build_all, sample_folder
from engine.starters.registry import starter_folder
from server.commands import cli, default_config, terminal
from server.commands.default_config import GIB, Facts
from tests.hub import Hub, etag, point_client_at, serving

REPO = "me/Tiny-Llama"
WEIGHTS = bytes(range(256)) * 8_000
LLAMA = {
    "config.json": json.dumps(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "max_position_embeddings": 131_072,
            "vocab_size": 128_256,
        }
    ).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
}
CONFIG = f"""\
# Mine.
engine:
  memory: 1GiB   # not more
models:
  - id: llama  # the small one
    aliases: [gpt-4o]
    source: {REPO}
    options: {{max_model_len: 512}}

  # Built on the spot.
  - id: tiny
    source: starter:tiny-qwen

# The end.
server:
  port: 0
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        hub.repos[REPO] = dict(LLAMA)
        yield hub


@pytest.fixture(autouse=True)
def cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(terminal.out, "width", 250)
    monkeypatch.delenv(ENV_CONFIG, raising=False)
    return point_client_at(hub, tmp_path, monkeypatch)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    monkeypatch.setenv(ENV_CONFIG, str(path))
    return path


def invoke(*arguments: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, arguments, input=answer)


def snapshots(cache: Path, repo: str = REPO) -> list[Path]:
    return list((cache / f"models--{repo.replace('/', '--')}" / "snapshots").glob("*"))


class TestPull:
    @pytest.mark.parametrize("name", ["llama", "gpt-4o", REPO])
    def test_by_any_name(self, hub: Hub, cache: Path, config: Path, name: str) -> None:
        result = invoke("pull", name)
        assert result.exit_code == 0, result.output
        (folder,) = snapshots(cache)
        assert str(folder) in result.stdout
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS

    def test_all(self, hub: Hub, cache: Path, config: Path, tmp_path: Path) -> None:
        tiny = starter_folder("tiny-qwen", tmp_path / "cache")
        tiny.mkdir(parents=True)
        result = CliRunner(env={"ROUNDHOUSE_CACHE_DIR": str(tmp_path / "cache")}).invoke(
            cli.app, ("pull", "--all")
        )
        assert result.exit_code == 0, result.output
        assert f"tiny: starter:tiny-qwen is in {tiny}\n" in result.stdout
        assert snapshots(cache)

    def test_a_sample_is_built(self, hub: Hub, config: Path, tmp_path: Path) -> None:
        if not can_build_all():
            pytest.skip("no sample models")
        config.write_text("models:\n  - {id: mini, source: 'samples:minilm-l6-v2'}\n")
        runner = CliRunner(env={"ROUNDHOUSE_CACHE_DIR": str(tmp_path / "cache")})
        result = runner.invoke(cli.app, ("pull", "mini"))
        assert result.exit_code == 0, result.output
        folder = sample_folder("minilm-l6-v2", tmp_path / "cache")
        assert result.stderr == "mini: building samples:minilm-l6-v2\n"
        assert result.stdout == f"mini: samples:minilm-l6-v2 is in {folder}\n"
        assert (folder / "model.safetensors").is_file()
        assert not runner.invoke(cli.app, ("pull", "mini")).stderr

    def test_a_folder_of_the_user(self, hub: Hub, config: Path, tmp_path: Path) -> None:
        config.write_text(f"models:\n  - {{id: mine, source: '{tmp_path}'}}\n")
        result = invoke("pull", "mine")
        assert result.stdout == f"mine: nothing to fetch, its files are in {tmp_path}\n"

    def test_one_failure_does_not_stop_the_others(
        self, hub: Hub, cache: Path, config: Path
    ) -> None:
        result = invoke("pull", "me/nothing", "llama")
        assert result.exit_code == 1
        assert "no repository me/nothing" in result.stderr
        assert snapshots(cache)

    def test_a_repository_of_parts(self, hub: Hub, cache: Path, config: Path) -> None:
        hub.repos["me/lora"] = {"style.safetensors": b"lora", "style.ckpt": b"pickle"}
        result = invoke("pull", "me/lora")
        assert result.exit_code == 0, result.output
        (folder,) = snapshots(cache, "me/lora")
        assert [path.name for path in folder.iterdir()] == ["style.safetensors"]

    def test_pickles(self, hub: Hub, cache: Path, config: Path) -> None:
        files = {"config.json": b'{"model_type": "bark"}', "pytorch_model.bin": b"pickle"}
        hub.repos["me/bark"] = files
        refused = invoke("pull", "me/bark")
        assert refused.exit_code == 1
        assert "pickled" in refused.stderr
        assert invoke("pull", "me/bark", "--allow-pickle").exit_code == 0
        (folder,) = snapshots(cache, "me/bark")
        assert (folder / "pytorch_model.bin").is_file()

    def test_no_name_or_too_many(self, config: Path) -> None:
        assert invoke("pull").exit_code == 2
        assert invoke("pull", "llama", "--all").exit_code == 2
        unknown = invoke("pull", "lama")
        assert unknown.exit_code == 1
        assert "Did you mean 'llama'" in unknown.stderr

    @pytest.mark.slow
    def test_ctrl_c_at_half_and_again(
        self, hub: Hub, cache: Path, config: Path, tmp_path: Path
    ) -> None:
        half = len(WEIGHTS) // 2
        hub.stall["model.safetensors"] = half
        environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        environ |= {"HF_HUB_OFFLINE": "0", "ROUNDHOUSE_CONFIG": str(config)}
        code = (
            "import os, signal, engine.files.hub.fetch\n"
            "tell = engine.files.hub.fetch.Fetch._tell\n"
            "def told(fetch):\n"
            "    tell(fetch)\n"
            f"    if fetch.missing_bytes <= {len(WEIGHTS) - half}:\n"
            "        engine.files.hub.fetch.Fetch._tell = tell\n"
            "        print('half', flush=True)\n"
            "engine.files.hub.fetch.Fetch._tell = told\n"
            "def stop(*_):\n"
            "    print('stopping', flush=True)\n"
            "    raise KeyboardInterrupt\n"
            "signal.signal(signal.SIGINT, stop)\n"
            "from server.commands.cli import main; main()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, "pull", "llama"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == "half\n"
            process.send_signal(signal.SIGINT)
            # Or the rest could come before the signal is looked at.
            assert process.stdout.readline() == "stopping\n"
            hub.let_go.set()
            stderr = process.stderr.read()
            assert process.wait(60) == 130, stderr
        assert "the next pull goes on from here" in stderr
        assert "Traceback" not in stderr
        blob = etag("model.safetensors", WEIGHTS)
        unfinished = cache / "models--me--Tiny-Llama" / "blobs" / (blob + PARTIAL)
        assert unfinished.stat().st_size == half
        assert snapshots(cache) == []
        assert invoke("pull", "llama").exit_code == 0
        assert (snapshots(cache)[0] / "model.safetensors").read_bytes() == WEIGHTS
        assert hub.sent["model.safetensors"] == len(WEIGHTS)


class TestDefault:
    """Without a named file, the commands read what `serve` would serve."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small = Facts(host_bytes=32 * GIB, hub_answers=True)
        monkeypatch.setattr(default_config, "detect", lambda _: small)

    @pytest.mark.parametrize(
        "command", [("pull", "whisper-1"), ("ls",), ("rm", "whisper-1", "--yes"), ("prune",)]
    )
    def test_it_is_the_one_for_the_machine(self, hub: Hub, command: tuple[str, ...]) -> None:
        result = invoke(*command)
        assert "cpu.yaml (no GPU, 32.0 GiB of host memory)" in result.stderr

    def test_a_named_one_is_not_told(self, config: Path) -> None:
        assert "configuration:" not in invoke("ls").stderr

    def test_an_error_is_told_once(self, hub: Hub) -> None:
        hub.repos.clear()
        result = invoke("pull", "whisper-1")
        assert result.stderr.count("Systran/faster-whisper-small") == 1


class TestLs:
    def test_what_is_here(self, hub: Hub, cache: Path, config: Path) -> None:
        before = invoke("ls")
        assert before.exit_code == 0
        assert [line.split("│")[3].strip() for line in rows(before, "llama")] == ["no"]
        hub.repos["me/other"] = dict(LLAMA)
        invoke("pull", "llama", "me/other")
        (row,) = rows(invoke("ls"), "llama")
        assert [cell.strip() for cell in row.split("│")][3:5] == ["yes", "2.0 MiB"]
        assert str(snapshots(cache)[0]) in row
        assert not rows(invoke("ls"), "me/other")
        assert rows(invoke("ls", "--all"), "me/other")


def rows(result: Result, text: str) -> list[str]:
    return [line for line in result.output.splitlines() if line.startswith("│") and text in line]


class TestRm:
    def test_it_asks_first(self, hub: Hub, cache: Path, config: Path) -> None:
        invoke("pull", "llama")
        kept = invoke("rm", "llama", answer="n\n")
        assert kept.exit_code == 1
        assert snapshots(cache)
        gone = invoke("rm", "llama", answer="y\n")
        assert gone.exit_code == 0, gone.output
        assert "2.0 MiB deleted" in gone.output
        assert not (cache / "models--me--Tiny-Llama").exists()

    def test_what_is_not_configured(self, hub: Hub, cache: Path, config: Path) -> None:
        hub.repos["me/other"] = dict(LLAMA)
        invoke("pull", "llama", "me/other")
        assert invoke("rm", "me/other", "--yes").exit_code == 0
        assert not snapshots(cache, "me/other")
        assert snapshots(cache)

    @pytest.mark.parametrize("name", ["llama", "me/other", "../../etc", "tiny"])
    def test_nothing_there(self, config: Path, name: str) -> None:
        result = invoke("rm", name, "--yes")
        assert result.exit_code == 1
        assert result.stderr


class TestPrune:
    def test_dry_run_question_and_deletion(self, hub: Hub, cache: Path, config: Path) -> None:
        invoke("pull", "llama")
        assert "everything was used" in invoke("prune").output
        (folder,) = snapshots(cache)
        for path in (*folder.iterdir(), folder):
            os.utime(path, (1, 1))
        assert "me/Tiny-Llama" in invoke("prune", "--dry-run").output
        assert invoke("prune", answer="n\n").exit_code == 1
        assert snapshots(cache)
        assert invoke("prune", "--yes").exit_code == 0
        assert not snapshots(cache)

    def test_others_only_with_all(self, hub: Hub, cache: Path, config: Path) -> None:
        hub.repos["me/other"] = dict(LLAMA)
        invoke("pull", "me/other")
        assert "everything was used" in invoke("prune", "--keep-days", "0").output
        assert invoke("prune", "--keep-days", "0", "--all", "--yes").exit_code == 0
        assert not snapshots(cache, "me/other")


def added(path: Path) -> dict[str, Any]:
    entry: dict[str, Any] = yaml.safe_load(path.read_text())["models"][-1]
    return entry


class TestAdd:
    def test_every_other_line_stays(self, config: Path) -> None:
        config.chmod(0o640)
        result = invoke("add", REPO)
        assert result.exit_code == 0, result.output
        text = config.read_text()
        entry = (
            "\n  - id: tiny-llama\n"
            f"    source: {REPO}\n"
            "    options:\n"
            "      max_model_len: 8192\n"
            "      tool_call_parser: llama3_json\n"
        )
        assert text.replace(entry, "") == CONFIG
        assert text.index("starter:tiny-qwen") < text.index(entry) < text.index("# The end.")
        assert "vllm, generate, 2.0 MiB" in result.output
        assert stat.S_IMODE(config.stat().st_mode) == 0o640

    def test_a_name_that_is_taken(self, config: Path) -> None:
        assert invoke("add", REPO).exit_code == invoke("add", REPO).exit_code == 0
        assert added(config)["id"] == "tiny-llama-2"
        taken = invoke("add", REPO, "--id", "gpt-4o")
        assert taken.exit_code == 2
        assert "is taken by" in taken.stderr

    def test_a_new_file(self, tmp_path: Path) -> None:
        path = tmp_path / "new.yaml"
        assert invoke("add", REPO, "--config", str(path), "--id", "mine").exit_code == 0
        assert added(path)["id"] == "mine"

    def test_the_shipped_file_is_not_written(self) -> None:
        result = invoke("add", REPO)
        assert result.exit_code == 2
        assert "--config" in result.stderr

    def test_nothing_is_added_when_the_fetch_fails(self, hub: Hub, config: Path) -> None:
        hub.corrupt.add("model.safetensors")
        assert invoke("add", REPO, "--pull").exit_code == 1
        assert config.read_text() == CONFIG

    def test_with_its_files(self, cache: Path, config: Path) -> None:
        assert invoke("add", REPO, "--pull").exit_code == 0
        assert snapshots(cache)

    @pytest.mark.parametrize("named", ["absolute", "relative"])
    def test_a_folder(
        self, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
    ) -> None:
        folder = tmp_path / "My Llama"
        folder.mkdir()
        for name, data in LLAMA.items():
            (folder / name).write_bytes(data)
        monkeypatch.chdir(tmp_path)
        source = str(folder) if named == "absolute" else "./My Llama"
        result = invoke("add", source, "--pull")
        assert result.exit_code == 0, result.output
        assert added(config) == {
            "id": "my-llama",
            "source": str(folder),
            "options": {"max_model_len": 8192, "tool_call_parser": "llama3_json"},
        }
        assert "vllm, generate, 2.0 MiB" in result.output

    @pytest.mark.parametrize(
        ("files", "told"),
        [
            (None, "cannot be read: "),
            ({}, "neither model_index.json nor config.json"),
            ({"model.gguf": b"x", "config.json": b"{}"}, "holds only GGUF weights"),
        ],
    )
    def test_a_folder_without_a_model(
        self, config: Path, tmp_path: Path, files: dict[str, bytes] | None, told: str
    ) -> None:
        folder = tmp_path / "folder"
        if files is not None:
            folder.mkdir()
            for name, data in files.items():
                (folder / name).write_bytes(data)
        result = invoke("add", str(folder))
        assert result.exit_code == 1
        assert told in result.stderr
        assert config.read_text() == CONFIG

    def test_no_such_repository(self, config: Path) -> None:
        result = invoke("add", "me/nothing")
        assert result.exit_code == 1
        assert "no repository" in result.stderr
        assert config.read_text() == CONFIG


def json_files(**documents: Any) -> dict[str, bytes]:
    return {
        f"{name.replace('__', '/')}.json": json.dumps(document).encode()
        for name, document in documents.items()
    }


SDXL = {
    **json_files(
        model_index={"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "U"]},
        unet__config={"sample_size": 64},
        vae__config={"block_out_channels": [128, 256, 512, 512]},
    ),
    "unet/diffusion_pytorch_model.safetensors": b"12345678",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"1234",
    "vae/diffusion_pytorch_model.fp16.safetensors": b"12",
}
HALF = {"dtype": "float16", "variant": "fp16"}
TURBO = {
    "scheduler": {"class": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "default": {"steps": 2, "guidance": 0.0},
}
SDXL_OPTIONS = {"pipeline": "StableDiffusionXLPipeline", **HALF, "width": 512, "height": 512}


class TestRecognition:
    @pytest.mark.parametrize(
        ("repo", "files", "runtime", "task", "options", "weights"),
        [
            ("a/sdxl", SDXL, "diffusers", "image", SDXL_OPTIONS, 6),
            ("a/sdxl-turbo", SDXL, "diffusers", "image", {**SDXL_OPTIONS, **TURBO}, 6),
            (
                "a/wan",
                {
                    **json_files(model_index={"_class_name": "WanPipeline"}),
                    "transformer/model.safetensors": b"123",
                },
                "diffusers",
                "video",
                {
                    "pipeline": "WanPipeline",
                    "dtype": "bfloat16",
                    "vae_dtype": "float32",
                    **{"width": 832, "height": 480, "num_frames": 81, "max_frames": 81, "fps": 16},
                },
                3,
            ),
            (
                "a/flux-schnell",
                {
                    **json_files(
                        model_index={"_class_name": "FluxPipeline"},
                        transformer__config={"guidance_embeds": False},
                    ),
                    "transformer/model.safetensors": b"123",
                    "flux.safetensors": b"the same once more",
                },
                "diffusers",
                "image",
                {
                    "pipeline": "FluxPipeline",
                    "dtype": "bfloat16",
                    "default": {"steps": 4, "guidance": 0.0},
                },
                3,
            ),
            (
                "a/bge",
                {
                    **json_files(
                        config={"architectures": ["BertModel"], "max_position_embeddings": 512}
                    ),
                    "model.safetensors": b"123",
                },
                "vllm",
                "embed",
                {"max_model_len": 512},
                3,
            ),
            (
                # 514 rows, of which RoBERTa's kind uses 512; the tokenizer says less.
                "a/wangchanberta",
                {
                    **json_files(
                        config={
                            "architectures": ["CamembertForMaskedLM"],
                            "model_type": "camembert",
                            "pad_token_id": 1,
                            "max_position_embeddings": 514,
                        },
                        tokenizer_config={"model_max_length": 416},
                    ),
                    "model.safetensors": b"123",
                },
                "vllm",
                "embed",
                {"max_model_len": 416},
                3,
            ),
            (
                "a/roberta",
                {
                    **json_files(
                        config={
                            "architectures": ["RobertaForMaskedLM"],
                            "model_type": "roberta",
                            "pad_token_id": 1,
                            "max_position_embeddings": 514,
                        }
                    ),
                    "model.safetensors": b"123",
                },
                "vllm",
                "embed",
                {"max_model_len": 512},
                3,
            ),
            (
                "a/cross-encoder",
                {
                    **json_files(
                        config={
                            "architectures": ["XLMRobertaForSequenceClassification"],
                            "id2label": {"0": "LABEL_0"},
                        }
                    ),
                    "model.safetensors": b"123",
                },
                "vllm",
                "rerank",
                {},
                3,
            ),
            (
                "a/toxic",
                {
                    **json_files(
                        config={
                            "architectures": ["BertForSequenceClassification"],
                            "id2label": {"0": "toxic", "1": "obscene", "2": "threat"},
                        }
                    ),
                    "model.safetensors": b"123",
                },
                "vllm",
                "classify",
                {},
                3,
            ),
            (
                "Qwen/Qwen3-Reranker",
                {
                    **json_files(
                        config={"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
                    ),
                    "model.safetensors": b"123",
                },
                "vllm",
                "rerank",
                {},
                3,
            ),
            (
                "Qwen/Qwen3-Embedding",
                {
                    **json_files(
                        config={"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
                        modules=[],
                    ),
                    "model.safetensors": b"123",
                },
                "vllm",
                "embed",
                {},
                3,
            ),
            (
                "Qwen/Qwen2.5",
                {
                    **json_files(
                        config={"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
                    ),
                    "model.safetensors": b"123",
                },
                "vllm",
                "generate",
                {"tool_call_parser": "hermes"},
                3,
            ),
            (
                "deepseek-ai/DeepSeek-R1-Distill",
                {
                    **json_files(
                        config={"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
                    ),
                    "model.safetensors": b"123",
                },
                "vllm",
                "generate",
                {"reasoning_parser": "deepseek_r1"},
                3,
            ),
            (
                "a/faster-whisper",
                {
                    **json_files(config={"alignment_heads": [], "lang_ids": []}, tokenizer={}),
                    "model.bin": b"1234",
                },
                "whisper",
                "transcribe",
                {},
                4,
            ),
            (
                "hexgrad/Kokoro",
                {
                    **json_files(config={"istftnet": {}}),
                    "kokoro-v1_0.pth": b"12",
                    "voices/a.pt": b"3",
                },
                "kokoro",
                "speech",
                {},
                3,
            ),
            (
                "coqui/XTTS",
                {**json_files(config={"model": "xtts"}), "model.pth": b"12"},
                "coqui",
                "speech",
                {},
                2,
            ),
            (
                "suno/bark",
                {**json_files(config={"model_type": "bark"}), "model.safetensors": b"12"},
                "bark",
                "speech",
                {},
                2,
            ),
        ],
        ids=lambda value: value if isinstance(value, str) and "/" in value else "",
    )
    def test_kinds(
        self,
        hub: Hub,
        config: Path,
        repo: str,
        files: dict[str, bytes],
        runtime: str,
        task: str,
        options: dict[str, Any],
        weights: int,
    ) -> None:
        hub.repos[repo] = files
        result = invoke("add", repo)
        assert result.exit_code == 0, result.output
        entry = added(config)
        assert (entry.get("runtime", "vllm"), entry.get("task", "generate")) == (runtime, task)
        assert entry.get("options", {}) == options
        read = EngineConfig.model_validate({"models": [entry]}, context=RUNTIMES).models[0]
        assert isinstance(options_of(read), runtime_class(runtime).Options)
        documents = sum(len(data) for path, data in files.items() if path.endswith(".json"))
        assert f"{weights + documents} B\n" in result.output

    @pytest.mark.parametrize(
        ("files", "told"),
        [
            ({"README.md": b"x"}, "neither model_index.json nor config.json"),
            ({"model.gguf": b"x"}, "GGUF"),
            (json_files(config={"model_type": "whisper", "architectures": ["W"]}), "CTranslate2"),
            ({**json_files(config={}), "model.bin": b"x"}, "no Whisper"),
            (
                {**json_files(config={"alignment_heads": []}), "model.bin": b"x"},
                "no tokenizer.json",
            ),
            (
                {**json_files(config={"architectures": ["X"]}), "pytorch_model.bin": b"x"},
                "no .safetensors files",
            ),
            (json_files(config=[]), "no mapping"),
            (json_files(model_index={"_class_name": "Other"}), "no pipeline"),
            ({"config.json": b"{"}, "no JSON"),
        ],
    )
    def test_what_is_not_served_here(
        self, hub: Hub, config: Path, files: dict[str, bytes], told: str
    ) -> None:
        hub.repos["me/odd"] = files
        result = invoke("add", "me/odd")
        assert result.exit_code == 1
        assert told in result.stderr
        assert config.read_text() == CONFIG


ENTRY = {"id": "new", "source": "a/b"}


class TestConfigText:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "# nothing yet\n",
            "models:\n",
            "models:  # none yet\nengine: {}\n",
            "engine: {}\n",
            "engine: {}",
            "models:\n- id: a\n  source: b",
            "models:\n- id: a\n  source: b\n\n\nengine: {}\n",
            "models:\n    - id: a\n      source: b\n      aliases:\n        - c\n    # last\n",
            'models:\n  - {id: a, source: "b"}  # one\n',
            "models:\n  - id: a\n    source: >-\n      b\n# after\nengine: {}\n",
            "models:\n  - id: a\n    source: |-\n      b\nengine: {}\n",
            "models:\n  - id: a\n    source: 'b\n      c'\nengine: {}\n",
        ],
    )
    def test_one_more_and_nothing_else(self, text: str) -> None:
        before = yaml.safe_load(text) or {}
        after = yaml.safe_load(with_model(text, ENTRY))
        assert after.pop("models") == [*(before.pop("models", None) or []), ENTRY]
        assert after == before
        assert [line for line in text.splitlines() if line not in with_model(text, ENTRY)] == []

    @pytest.mark.parametrize(
        "text", ["models: []\n", "models: {a: 1}\n", "[1]\n", "{a: 1}\n", "a: ["]
    )
    def test_what_cannot_be_added_to(self, text: str) -> None:
        with pytest.raises(ConfigError):
            with_model(text, ENTRY)
