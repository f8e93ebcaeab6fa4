"""Fetching from a hub with the real client, and what becomes of it on the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

import pytest

from engine.catalog.downloads import pull, sources_of
from engine.catalog.model_files import files_of, other_repos, removable, remove, unused_repos
from engine.config import EngineConfig, ModelConfig
from engine.errors import Conflict, LoadFailed, NotFound
from engine.files.hub import cache as hub_cache
from engine.files.hub import fetch as hub_fetch
from engine.files.hub.cache import present
from engine.files.hub.fetch import FetchCancelledError, FetchProgress, fetch
from engine.files.hub.selection import HubSource, choose
from engine.memory.device import CpuDevice
from engine.model_folder import WANTED_FILES
from engine.runtimes.base import RuntimeContext
from engine.runtimes.diffusers.runtime import DiffusersRuntime
from engine.runtimes.registry import runtime_class
from tests.engine.catalog.conftest import (
    FILES,
    REPO,
    SMALL,
    WEIGHTS,
    nothing_is_registered,
    partial,
)
from tests.hub import TOKEN, Hub, etag

pytestmark = pytest.mark.slow  # a second each: many requests to a hub, and processes

VITS = b'{"model": "vits", "audio": {"sample_rate": 22050}}'
SOURCE = HubSource(REPO, WANTED_FILES)
TIMEOUT_S = 60


class TestFetch:
    def test_what_is_wanted_comes_once(self, hub: Hub, cache: Path) -> None:
        folder = fetch(SOURCE)
        assert folder.parent.parent.parent == cache
        assert {path.name for path in folder.iterdir()} == {*SMALL, "model.safetensors"}
        assert all((folder / name).read_bytes() == FILES[name] for name in SMALL)
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        assert hub.sent["model.safetensors"] == len(WEIGHTS)
        sent = hub.sent.copy()
        assert fetch(SOURCE) == folder
        assert hub.sent == sent

    def test_a_part_of_it_is_not_present(self, hub: Hub, cache: Path) -> None:
        assert present(SOURCE) is None
        only_weights = HubSource(REPO, ("*.safetensors",))
        folder = fetch(only_weights)
        assert present(only_weights) == folder
        assert present(SOURCE) is None
        assert fetch(SOURCE) == present(SOURCE) == folder
        assert hub.sent["model.safetensors"] == len(WEIGHTS)

    def test_progress_ends_with_all_of_it(self, cache: Path) -> None:
        told: list[FetchProgress] = []
        fetch(SOURCE, told.append)
        total = len(WEIGHTS) + sum(map(len, SMALL.values()))
        assert told[0] == FetchProgress(REPO, 0, total, 0, 3)
        assert told[-1] == FetchProgress(REPO, total, total, 3, 3)
        assert [each.done_bytes for each in told] == sorted(each.done_bytes for each in told)

    def test_cancelled_at_half_and_gone_on_with(self, hub: Hub, cache: Path) -> None:
        half = len(WEIGHTS) // 2
        hub.stall["model.safetensors"] = half
        cancelled = threading.Event()

        def tell(now: FetchProgress) -> None:
            if now.done_bytes >= half + sum(map(len, SMALL.values())):
                cancelled.set()
                hub.let_go.set()

        with pytest.raises(FetchCancelledError):
            fetch(SOURCE, tell, cancelled)
        assert partial(cache).stat().st_size == half
        assert nothing_is_registered(cache)
        folder = fetch(SOURCE)
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        assert hub.sent["model.safetensors"] == len(WEIGHTS)
        assert ("model.safetensors", half) in hub.ranges

    def test_killed_at_half_and_gone_on_with(self, hub: Hub, tmp_path: Path, cache: Path) -> None:
        half = len(WEIGHTS) // 2
        hub.stall["model.safetensors"] = half
        code = (
            "from engine.files.hub.fetch import fetch\n"
            "from engine.files.hub.selection import HubSource\n"
            f"fetch(HubSource({REPO!r}, ('model.safetensors',)),"
            " lambda now: print(now.done_bytes, flush=True))"
        )
        environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        environ |= {"HF_HUB_OFFLINE": "0"}
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) == half:
                    process.kill()
            assert process.wait(TIMEOUT_S) == -signal.SIGKILL
        hub.let_go.set()
        assert nothing_is_registered(cache)
        folder = fetch(SOURCE)
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        assert hub.sent["model.safetensors"] == len(WEIGHTS)

    def test_a_broken_connection_is_taken_up_again(self, hub: Hub, cache: Path) -> None:
        hub.stall["model.safetensors"] = 1_000_000
        hub.let_go.set()
        folder = fetch(SOURCE)
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        assert hub.sent["model.safetensors"] == len(WEIGHTS)

    def test_damaged_bytes_are_thrown_away(self, hub: Hub, cache: Path) -> None:
        hub.corrupt.add("model.safetensors")
        with pytest.raises(LoadFailed, match="not what the hub says"):
            fetch(SOURCE)
        assert nothing_is_registered(cache)
        assert not partial(cache).exists()
        hub.corrupt.clear()
        assert (fetch(SOURCE) / "model.safetensors").read_bytes() == WEIGHTS

    def test_a_damaged_small_file_too(self, hub: Hub, cache: Path) -> None:
        hub.corrupt.add("config.json")
        with pytest.raises(LoadFailed, match=r"config\.json"):
            fetch(SOURCE)

    def test_two_at_once_fetch_it_once(self, hub: Hub, cache: Path) -> None:
        threads = [threading.Thread(target=fetch, args=[SOURCE]) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert hub.sent["model.safetensors"] == len(WEIGHTS)
        assert (fetch(SOURCE) / "model.safetensors").read_bytes() == WEIGHTS


class TestDisk:
    def test_too_little_room_is_told_before_anything_is_written(
        self, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hub_cache, "free_disk_bytes", lambda _: 2**20)
        with pytest.raises(LoadFailed, match=r"needs 2\.9 MiB more .* 1\.0 MiB are free"):
            fetch(SOURCE)
        assert not cache.exists()
        assert hub.ranges == []

    def test_what_is_there_needs_no_room(
        self, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fetch(SOURCE)
        monkeypatch.setattr(hub_cache, "free_disk_bytes", lambda _: 0)
        fetch(SOURCE)

    def test_a_disk_that_fills_up_in_the_middle(
        self, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = hub_fetch._write_all

        def full(file: IO[bytes], data: bytes) -> None:
            if file.tell() > 1_000_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(file, data)

        monkeypatch.setattr(hub_fetch, "_write_all", full)
        with pytest.raises(LoadFailed, match=r"is full: model\.safetensors of me/tiny"):
            fetch(SOURCE)
        assert nothing_is_registered(cache)
        assert not partial(cache).exists(), "the disk stays full"
        monkeypatch.setattr(hub_fetch, "_write_all", write)
        assert (fetch(SOURCE) / "model.safetensors").read_bytes() == WEIGHTS

    def test_all_repositories_of_a_model_count(
        self, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.repos["me/other"] = {"model.safetensors": b"x" * 3_000_000}
        monkeypatch.setattr(hub_cache, "free_disk_bytes", lambda _: 4_000_000)
        sources = (SOURCE, HubSource("me/other", WANTED_FILES))
        with pytest.raises(LoadFailed, match="me/tiny and me/other needs"):
            pull(sources, lambda _: None, threading.Event())
        assert hub.ranges == []


class TestSeveral:
    def test_progress_is_over_all_of_them(self, hub: Hub, cache: Path) -> None:
        hub.repos["me/other"] = {"model.safetensors": b"x" * 1000}
        told: list[FetchProgress] = []
        folders = pull(
            (SOURCE, HubSource("me/other", WANTED_FILES)), told.append, threading.Event()
        )
        assert [(folder / "model.safetensors").is_file() for folder in folders] == [True, True]
        total = len(WEIGHTS) + sum(map(len, SMALL.values())) + 1000
        assert {each.total_bytes for each in told} == {total}
        assert [each.done_bytes for each in told] == sorted(each.done_bytes for each in told)
        assert told[-1] == FetchProgress("me/other", total, total, 4, 4)


class TestRefusals:
    def test_no_such_repository(self, hub: Hub, cache: Path) -> None:
        with pytest.raises(NotFound, match="no repository me/nothing"):
            fetch(HubSource("me/nothing", WANTED_FILES))

    def test_no_such_revision(self, hub: Hub, cache: Path) -> None:
        with pytest.raises(NotFound, match="revision"):
            fetch(HubSource(REPO, WANTED_FILES, "v9"))

    def test_no_name(self, hub: Hub, cache: Path) -> None:
        with pytest.raises(NotFound, match="is not the name of a repository"):
            fetch(HubSource("a//b", WANTED_FILES))

    def test_gated_without_a_token(self, hub: Hub, cache: Path) -> None:
        hub.gated.add(REPO)
        with pytest.raises(LoadFailed, match=r"gated: accept its conditions .* set HF_TOKEN"):
            fetch(SOURCE)
        assert hub.sent["model.safetensors"] == 0
        assert nothing_is_registered(cache)

    def test_gated_with_a_token_that_may_not(
        self, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.gated.add(REPO)
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        with pytest.raises(LoadFailed, match="your token may not read it"):
            fetch(SOURCE)

    def test_gated_with_the_token(
        self, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.gated.add(REPO)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert (fetch(SOURCE) / "model.safetensors").read_bytes() == WEIGHTS

    def test_nobody_answers(self, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(LoadFailed, match=r"cannot be fetched from http://127\.0\.0\.1:9"):
            fetch(SOURCE)

    def test_pickles_only_where_they_are_allowed(self, hub: Hub, cache: Path) -> None:
        hub.repos[REPO] = {**SMALL, "pytorch_model.bin": b"pickle"}
        with pytest.raises(LoadFailed, match="pickled"):
            fetch(SOURCE)
        folder = fetch(HubSource(REPO, WANTED_FILES, allow_pickle=True))
        assert (folder / "pytorch_model.bin").read_bytes() == b"pickle"

    def test_pickles_are_left_beside_safetensors(self, hub: Hub, cache: Path) -> None:
        hub.repos[REPO] = {**FILES, "pytorch_model.bin": b"pickle"}
        folder = fetch(HubSource(REPO, WANTED_FILES, allow_pickle=True))
        assert not (folder / "pytorch_model.bin").exists()


class TestChoice:
    def test_each_set_of_weights_once(self) -> None:
        paths = [
            "config.json",
            "consolidated.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "original/model.safetensors",
            "2_Dense/model.safetensors",
            "pytorch_model.bin",
            "onnx/model.onnx",
            "flax_model.msgpack",
        ]
        assert choose(paths, WANTED_FILES) == [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "2_Dense/model.safetensors",
        ]

    def test_a_pipeline_without_variant(self) -> None:
        paths = [
            "model_index.json",
            "sd_xl_base_1.0.safetensors",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.non_ema.safetensors",
            "text_encoder/model-00001-of-00002.safetensors",
            "text_encoder/model-00002-of-00002.safetensors",
            "text_encoder/model.fp16.safetensors",
            "vae/diffusion_pytorch_model.bin",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        ]
        (source,) = sources_of(pipeline())
        assert choose(paths, source.patterns) == [
            "model_index.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "text_encoder/model-00001-of-00002.safetensors",
            "text_encoder/model-00002-of-00002.safetensors",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        ]
        (source,) = sources_of(pipeline(variant="fp16"))
        assert choose(paths, source.patterns) == [
            "model_index.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "text_encoder/model.fp16.safetensors",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        ]

    def test_the_parts_of_a_pipeline(self) -> None:
        model = pipeline(
            components={"motion_adapter": "me/motion"},
            controlnet="me/control",
            ip_adapter={"source": "me/adapter"},
            lora_sources={"a": "me/lora", "b": "starter:tiny-lora-sdxl"},
        )
        repos = [source.repo for source in sources_of(model)]
        assert repos == ["me/pipe", "me/motion", "me/control", "me/adapter", "me/lora"]
        adapter = choose(
            [
                "models/ip-adapter_sd15.safetensors",
                "models/ip-adapter-full-face_sd15.safetensors",
                "models/image_encoder/model.safetensors",
                "models/image_encoder/config.json",
                "sdxl_models/ip-adapter_sdxl.safetensors",
            ],
            sources_of(model)[3].patterns,
        )
        assert adapter == [
            "models/ip-adapter_sd15.safetensors",
            "models/image_encoder/model.safetensors",
            "models/image_encoder/config.json",
        ]

    @pytest.mark.parametrize("source", ["starter:tiny-llama", "/models/llama", "./llama"])
    def test_what_is_local_has_no_repository(self, source: str) -> None:
        assert sources_of(ModelConfig(id="any", source=source)) == ()


def pipeline(**options: Any) -> ModelConfig:
    return ModelConfig(
        id="pipe", runtime="diffusers", task="image", source="me/pipe", options=options
    )


def configuration(tmp_path: Path, *models: dict[str, Any]) -> EngineConfig:
    return EngineConfig.model_validate(
        {
            "cache_dir": tmp_path / "starters",
            "models": list(models) or [{"id": "a", "source": REPO}],
        }
    )


class TestFilesOfModels:
    def test_before_and_after(self, hub: Hub, cache: Path, tmp_path: Path) -> None:
        config = configuration(tmp_path)
        (files,) = files_of(config.models[0], config)
        assert (files.path, files.nbytes, files.present) == (None, 0, False)
        folder = fetch(SOURCE)
        (files,) = files_of(config.models[0], config)
        assert (files.path, files.present, files.models) == (folder, True, ("a",))
        assert files.nbytes == len(WEIGHTS) + sum(map(len, SMALL.values()))
        assert files.unfinished_bytes == 0

    def test_what_broke_off_is_told_and_removed(
        self, hub: Hub, cache: Path, tmp_path: Path
    ) -> None:
        partial(cache).parent.mkdir(parents=True)
        partial(cache).write_bytes(b"half")
        config = configuration(tmp_path)
        (files,) = files_of(config.models[0], config)
        assert (files.present, files.nbytes, files.unfinished_bytes) == (False, 4, 4)
        assert remove(REPO) == 4
        assert not partial(cache).parent.parent.exists()

    def test_removing(self, hub: Hub, cache: Path, tmp_path: Path) -> None:
        fetch(SOURCE)
        hub.repos["me/other"] = dict(FILES)
        other = fetch(HubSource("me/other", WANTED_FILES))
        config = configuration(tmp_path)
        assert [each.source for each in other_repos(config)] == ["me/other"]
        assert remove(REPO) == len(WEIGHTS) + sum(map(len, SMALL.values()))
        assert (other / "model.safetensors").read_bytes() == WEIGHTS
        with pytest.raises(NotFound):
            remove(REPO)

    def test_what_others_read_stays(self, hub: Hub, cache: Path, tmp_path: Path) -> None:
        fetch(SOURCE)
        hub.repos["me/motion"] = {"motion.safetensors": b"m"}
        fetch(HubSource("me/motion", WANTED_FILES))
        video = {
            "id": "b",
            "runtime": "diffusers",
            "task": "video",
            "source": REPO,
            "options": {"components": {"motion_adapter": "me/motion"}},
        }
        config = configuration(tmp_path, {"id": "a", "source": REPO}, video)
        own = removable(config.find("b"), config)
        assert [each.source for each in own] == ["me/motion"]
        with pytest.raises(Conflict, match="those of b too"):
            removable(config.find("a"), config)

    def test_a_local_folder_is_left_alone(self, cache: Path, tmp_path: Path) -> None:
        config = configuration(tmp_path, {"id": "a", "source": str(tmp_path)})
        with pytest.raises(Conflict, match="no download"):
            removable(config.models[0], config)
        (files,) = files_of(config.models[0], config)
        assert (files.present, files.is_repo) == (True, False)

    def test_the_longest_unused_first(self, hub: Hub, cache: Path, tmp_path: Path) -> None:
        models = []
        for number, name in enumerate(("new", "old", "older", "pinned")):
            repo = f"me/{name}"
            hub.repos[repo] = {"model.safetensors": name.encode()}
            folder = fetch(HubSource(repo, WANTED_FILES))
            used = 10_000 if name == "new" else 1_000 - number
            os.utime(folder / "model.safetensors", (used, used))
            os.utime(folder, (used, used))
            models.append({"id": name, "source": repo, "pin": name == "pinned"})
        config = configuration(tmp_path, *models[1:])
        assert [each.source for each in unused_repos(config, 5_000)] == ["me/older", "me/old"]
        every = unused_repos(config, 20_000, unconfigured=True)
        assert [each.source for each in every] == ["me/older", "me/old", "me/new"]


class TestLoads:
    """What a load asks for is what a pull fetched."""

    @pytest.mark.parametrize(
        ("runtime", "task", "files"),
        [
            ("vllm", "generate", {**FILES, "original/model.safetensors": b"again"}),
            ("whisper", "transcribe", {**SMALL, "model.bin": b"model"}),
            ("kokoro", "speech", {**SMALL, "kokoro.pth": b"model", "voices/a.pt": b"voice"}),
            ("bark", "speech", {**FILES, "speaker_embeddings/a.npy": b"voice"}),
            ("coqui", "speech", {"config.json": VITS, "model.pth": b"model"}),
            (
                "diffusers",
                "image",
                {
                    "model_index.json": b"{}",
                    "vae/a.safetensors": b"a",
                    "vae/a.fp16.safetensors": b"b",
                },
            ),
        ],
    )
    def test_nothing_more_is_fetched(
        self,
        hub: Hub,
        cache: Path,
        tmp_path: Path,
        runtime: str,
        task: Any,
        files: dict[str, bytes],
    ) -> None:
        hub.repos[REPO] = files
        model = ModelConfig(id="a", runtime=runtime, task=task, source=REPO)
        (folder,) = pull(sources_of(model), lambda _: None, threading.Event())
        os.utime(folder, (1, 1))
        asked, listed = list(hub.ranges), list(hub.listed)
        made: Any = runtime_class(runtime)(RuntimeContext(CpuDevice(), tmp_path))
        found = made._fetched(model).folder if runtime == "coqui" else made._folder(model)
        assert found == folder
        assert (hub.ranges, hub.listed) == (asked, listed)
        assert folder.stat().st_mtime > 1, "a load is not seen as a use"

    def test_the_parts_of_a_pipeline(self, hub: Hub, cache: Path, tmp_path: Path) -> None:
        hub.repos |= {
            "me/pipe": {"model_index.json": b"{}", "vae/model.safetensors": b"a"},
            "me/motion": {"motion.safetensors": b"b"},
            "me/adapter": {
                "models/ip-adapter_sd15.safetensors": b"c",
                "models/ip-adapter_sd15_vit-G.safetensors": b"d",
                "models/image_encoder/model.safetensors": b"e",
            },
            "me/lora": {"pytorch_lora_weights.safetensors": b"f", "other.safetensors": b"g"},
        }
        model = pipeline(
            components={"motion_adapter": "me/motion"},
            ip_adapter={"source": "me/adapter"},
            lora_sources={"a": "me/lora"},
        )
        pull(sources_of(model), lambda _: None, threading.Event())
        asked = list(hub.ranges)
        assert "models/ip-adapter_sd15_vit-G.safetensors" not in {path for path, _ in asked}
        runtime = DiffusersRuntime(RuntimeContext(CpuDevice(), tmp_path))
        assert runtime._parts(model).keys() == {"motion_adapter", "image_encoder", "ip_adapter"}
        assert hub.ranges == asked


def test_the_etags_are_those_of_the_hub() -> None:
    """As git and the hub name them: `git hash-object` of `hello` and a newline."""
    assert etag("README.md", b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert etag("a.safetensors", b"") == hashlib.sha256(b"").hexdigest()
    assert json.loads(SMALL["config.json"])
