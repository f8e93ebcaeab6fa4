"""Which configuration is chosen, and what the doctor finds."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from engine.config import ENV_PREFIX
from engine.files.hub.fetch import fetch
from engine.files.hub.selection import HubSource
from engine.memory.nvidia_smi import Gpu, GpuProcess, read_gpus, read_processes
from server.commands import cli, default_config, doctor, terminal
from server.commands.default_config import GIB, Facts, choose, detect, hub_answers
from server.commands.doctor import Finding, State, examine, read_speed
from tests.hub import Hub, point_client_at, serving

Driver = Callable[[str], None]

CARD = "0, NVIDIA L4, 580.82.07, 23034, 22500"
GPUS = f'case "$1" in --query-gpu*) echo "{CARD}";; *) echo "77, /usr/bin/python, 1024";; esac'


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver, no hub, no compiler, no variables."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for variable in ("CONFIG", "API_KEYS", "ADMIN_KEYS"):
        monkeypatch.delenv(ENV_PREFIX + variable, raising=False)


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    """Puts an `nvidia-smi` on the path that runs a line of shell."""

    def put(script: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return put


def facts(gpu_gib: float | None, host_gib: float = 64, **more: object) -> Facts:
    gpu_bytes = None if gpu_gib is None else int(gpu_gib * GIB)
    given = {"hub_answers": True, **more}
    return Facts(gpu_bytes=gpu_bytes, host_bytes=int(host_gib * GIB), **given)  # type: ignore[arg-type]


class TestChoice:
    @pytest.mark.parametrize(
        ("given", "name", "reason"),
        [
            (facts(79.6), "gpu-80gb", "a GPU of 79.6 GiB"),
            (facts(139), "gpu-80gb", "a GPU of 139.0 GiB"),
            (facts(47), "gpu-24gb", "a GPU of 47.0 GiB"),
            (facts(23.5), "gpu-24gb", "a GPU of 23.5 GiB"),
            (facts(15.6), "gpu-8gb", "a GPU of 15.6 GiB"),
            (facts(7.6), "gpu-8gb", "a GPU of 7.6 GiB"),
            (facts(5.8), "cpu", "a GPU of 5.8 GiB is too small"),
            (facts(5.8, 8), "starter", "8.0 GiB of host memory is too little"),
            (facts(None), "cpu", "no GPU, 64.0 GiB of host memory"),
            (facts(None, 8), "starter", "too little for the models of cpu"),
            (facts(None, 8, samples_installed=True), "samples", "small sample models"),
            (facts(23.5, torch_has_cuda=False), "cpu", "built for the CPU"),
        ],
    )
    def test_by_what_there_is(self, given: Facts, name: str, reason: str) -> None:
        chosen = choose(given)
        assert chosen.path.stem == name
        assert chosen.path.is_file()
        assert reason in chosen.reason

    def test_without_a_hub_and_files_it_is_the_samples_or_else_the_starter(self) -> None:
        chosen = choose(facts(23.5, hub_answers=False))
        assert chosen.path.stem == "starter"
        assert "does not answer" in chosen.reason and "starter models" in chosen.reason
        others = facts(23.5, hub_answers=False, present={"gpu-80gb": 3}, samples_installed=True)
        assert choose(others).path.stem == "samples"
        assert "does not answer" in choose(others).reason

    def test_what_is_here_is_served_without_a_hub(self) -> None:
        chosen = choose(facts(23.5, hub_answers=False, present={"gpu-24gb": 2}))
        assert chosen.path.stem == "gpu-24gb"
        assert "only what is here" in chosen.reason

    def test_the_facts_of_a_machine(
        self, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        driver(GPUS)
        with serving(Hub()) as hub:
            point_client_at(hub, tmp_path, monkeypatch)
            hub.repos["BAAI/bge-small-en-v1.5"] = {"model.safetensors": b"x"}
            fetch(HubSource("BAAI/bge-small-en-v1.5", ("*.safetensors",)))
            found = default_config.detect({"HF_ENDPOINT": hub.url})
        assert found.gpu_bytes == 23034 * 2**20
        assert found.hub_answers
        assert found.present == {"gpu-80gb": 0, "gpu-24gb": 0, "gpu-8gb": 1, "cpu": 1}

    def test_a_broken_driver_is_no_card(self, driver: Driver) -> None:
        driver("echo Failed to initialize NVML; exit 255")
        assert default_config.detect({"HF_HUB_OFFLINE": "1"}).gpu_bytes is None


class TestHubProbe:
    def test_it_answers(self) -> None:
        with serving(Hub()) as hub:
            assert hub_answers({"HF_ENDPOINT": hub.url})
            assert not hub_answers({"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"})

    def test_nobody_there(self) -> None:
        assert not hub_answers({"HF_ENDPOINT": "http://127.0.0.1:9"})
        assert not hub_answers({"HF_ENDPOINT": "no url"})

    def test_a_name_that_is_looked_up_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No time limit of an HTTP client holds for that."""
        found = threading.Event()

        def head(url: str, timeout: float) -> httpx.Response:
            found.wait(60)
            return httpx.Response(200)

        monkeypatch.setattr(default_config, "HUB_TIMEOUT_S", 0.05)
        monkeypatch.setattr(httpx, "head", head)
        assert not hub_answers({})
        assert not found.is_set()
        found.set()

    def test_a_silent_one_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(default_config, "HUB_TIMEOUT_S", 0.05)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            assert not hub_answers({"HF_ENDPOINT": url})


class TestNvidiaSmi:
    def test_what_it_tells(self, driver: Driver) -> None:
        driver(GPUS)
        assert read_gpus() == (Gpu(0, "NVIDIA L4", "580.82.07", 23034 * 2**20, 22500 * 2**20),)
        assert read_processes() == (GpuProcess(77, "/usr/bin/python", 1024 * 2**20),)

    def test_no_driver(self) -> None:
        assert read_gpus() == ()

    def test_a_process_of_another_container(self, driver: Driver) -> None:
        driver('echo "77, [Not Found], [N/A]"')
        assert read_processes() == (GpuProcess(77, "[Not Found]", None),)

    def test_a_failure_is_told_in_its_own_words(self, driver: Driver) -> None:
        driver("echo Failed to initialize NVML: Driver/library version mismatch; exit 18")
        with pytest.raises(OSError, match="version mismatch"):
            read_gpus()

    def test_one_that_hangs(self, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engine.memory.nvidia_smi.TIMEOUT_S", 0.05)
        driver("exec /bin/sleep 30")
        with pytest.raises(OSError, match="does not answer"):
            read_gpus()


def config_file(folder: Path, text: str = "") -> Path:
    path = folder / "config.yaml"
    default = "models:\n  - {id: tiny, source: 'starter:tiny-llama'}\n"
    path.write_text(text or default)
    return path


def found(path: Path, environ: dict[str, str] | None = None) -> dict[str, Finding]:
    return {each.what: each for each in examine(path, environ or {"HF_HUB_OFFLINE": "1"})}


class TestDoctor:
    def test_a_machine_without_a_card(self, tmp_path: Path) -> None:
        findings = found(config_file(tmp_path))
        assert findings["configuration"].state is State.OK
        assert findings["GPU"] == Finding("GPU", State.OK, "none: models run on the CPU")
        assert findings["API keys"].state is State.OK
        assert "host copies" in findings["host memory"].found
        assert "driver" not in findings and "C compiler" not in findings
        assert all(each.advice for each in findings.values() if each.state is not State.OK)

    def test_a_wrong_configuration(self, tmp_path: Path) -> None:
        findings = found(config_file(tmp_path, "engine: {memry: 1}\nmodels: []"))
        assert findings["configuration"].state is State.BAD
        assert "engine.memry" in findings["configuration"].found

    def test_a_card_that_is_wanted_and_not_there(self, tmp_path: Path) -> None:
        text = "engine: {device: cuda}\nmodels:\n  - {id: tiny, source: 'starter:tiny-llama'}\n"
        assert found(config_file(tmp_path, text))["GPU"].state is State.BAD

    def test_a_broken_driver(self, driver: Driver, tmp_path: Path) -> None:
        driver("echo Driver/library version mismatch; exit 18")
        findings = examine(config_file(tmp_path), {"HF_HUB_OFFLINE": "1"})
        broken = next(each for each in findings if each.what == "GPU")
        assert broken.state is State.BAD
        assert "version mismatch" in broken.found

    def test_a_card(self, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        driver(GPUS.replace("580", "535"))
        monkeypatch.setattr(doctor, "torch_has_cuda", lambda: True)
        monkeypatch.setattr(doctor, "TORCH_CHECK", 'print(\'["2.13", "NVIDIA L4", 1, 2]\')')
        text = (
            "models:\n"
            "  - {id: tiny, source: 'starter:tiny-llama'}\n"
            "  - {id: ear, runtime: whisper, task: transcribe, source: 'starter:tiny-whisper'}\n"
            "  - {id: voice, runtime: coqui, task: speech, source: 'starter:tiny-vits'}\n"
        )
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
        (tmp_path / "libcublas.so.12").touch()
        findings = found(config_file(tmp_path, text))
        assert "NVIDIA L4, 22.0 GiB of 22.5 GiB free" in findings["GPU"].found
        assert findings["driver"].state is State.WARN
        assert findings["torch"] == Finding(
            "torch", State.OK, "2.13 sees NVIDIA L4, 1 B of 2 B free"
        )
        assert "/usr/bin/python (77, 1.0 GiB)" in findings["other programs"].found
        assert findings["other programs"].state is State.WARN
        assert findings["C compiler"].state is State.BAD
        assert findings["cuBLAS 12"].found == str(tmp_path / "libcublas.so.12")
        assert findings["espeak-ng"].state is State.WARN
        assert "pinned memory" in findings

    def test_a_torch_that_does_not_reach_the_card(
        self, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        driver(GPUS)
        monkeypatch.setattr(doctor, "torch_has_cuda", lambda: True)
        monkeypatch.setattr(doctor, "TORCH_CHECK", "raise SystemExit('no kernel image')")
        torch = found(config_file(tmp_path))["torch"]
        assert (torch.state, torch.found) == (State.BAD, "no kernel image")
        monkeypatch.setattr(doctor, "torch_has_cuda", lambda: False)
        assert found(config_file(tmp_path))["torch"].state is State.BAD

    def test_keys(self, tmp_path: Path) -> None:
        path = config_file(tmp_path)
        offline = {"HF_HUB_OFFLINE": "1"}
        keys = found(path, {**offline, "ROUNDHOUSE_API_KEYS": "a"})["API keys"]
        assert (keys.state, "no admin key" in keys.found) == (State.WARN, True)
        both = {**offline, "ROUNDHOUSE_API_KEYS": "a", "ROUNDHOUSE_ADMIN_KEYS": "b"}
        assert found(path, both)["API keys"].state is State.OK
        everybody = {**offline, "ROUNDHOUSE_HOST": "0.0.0.0", "ROUNDHOUSE_INSECURE": "true"}
        assert found(path, everybody)["API keys"].state is State.WARN
        (key_file := tmp_path / "keys").write_text("a\n")
        key_file.chmod(0o644)
        readable = found(path, {**offline, "ROUNDHOUSE_API_KEYS_FILE": str(key_file)})
        assert readable["key file"].advice == f"chmod 600 {key_file}"

    def test_models_that_cannot_be_fetched(self, tmp_path: Path) -> None:
        text = "models:\n  - {id: a, source: me/tiny}\n"
        models = found(config_file(tmp_path, text))["models"]
        assert models.state is State.WARN
        assert "me/tiny" in models.found and "does not answer" in models.found

    def test_models_that_can(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = config_file(tmp_path, "models:\n  - {id: a, source: me/tiny}\n")
        with serving(Hub()) as hub:
            point_client_at(hub, tmp_path, monkeypatch)
            environ = {"HF_ENDPOINT": hub.url}
            assert "pull --all" in found(path, environ)["models"].advice
            assert found(path, environ)["hub token"].state is State.WARN
            hub.repos["me/tiny"] = {"model.safetensors": b"x"}
            fetch(HubSource("me/tiny", ("*.safetensors",)))
        assert "every configured model" in found(path)["models"].found

    def test_little_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engine.files.hub.cache.free_disk_bytes", lambda _: 2**20)
        findings = found(config_file(tmp_path))
        assert findings["disk of the model cache"].state is State.WARN
        assert findings["disk of the data"].state is State.WARN

    def test_disk_speed(self, tmp_path: Path) -> None:
        (path := tmp_path / "file").write_bytes(bytes(2**20))
        times = iter((10.0, 10.5))
        assert read_speed(path, lambda: next(times)) == 2**21

    def test_a_slow_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        blobs = tmp_path / "hub" / "models--me--tiny" / "blobs"
        blobs.mkdir(parents=True)
        assert "not measured" in found(config_file(tmp_path))["disk speed"].found
        (blobs / "abc").write_bytes(bytes(doctor.SPEED_BYTES // 16))
        monkeypatch.setattr(doctor, "read_speed", lambda path: 50e6)
        speed = found(config_file(tmp_path))["disk speed"]
        assert (speed.state, speed.found) == (State.WARN, "50 MB/s")

    def test_the_disk_of_a_folder_that_is_configured(self, tmp_path: Path) -> None:
        """`HF_HOME` has nothing; what the server will read is somewhere else."""
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "a.safetensors").write_bytes(bytes(doctor.SPEED_BYTES // 16))
        text = f"models:\n  - {{id: mine, source: '{tmp_path / 'mine'}'}}\n"
        assert found(config_file(tmp_path, text))["disk speed"].found.endswith("MB/s")

    def test_the_choice_is_told_where_no_file_is_named(self) -> None:
        findings = {each.what: each for each in examine(None, {"HF_HUB_OFFLINE": "1"})}
        chosen = choose(detect({"HF_HUB_OFFLINE": "1"}))
        assert f"no file was named: {chosen.path.name}" in findings["choice"].found


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["doctor", *arguments])


class TestCommand:
    def test_table_and_status(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(terminal.out, "width", 200)
        result = invoke("--config", str(config_file(tmp_path)))
        assert result.exit_code == 0, result.output
        assert "configuration" in result.output and "ok" in result.output
        bad = invoke("--config", str(config_file(tmp_path, "models: 1")))
        assert bad.exit_code == 1
        assert "bad" in bad.output

    def test_json(self, tmp_path: Path) -> None:
        result = invoke("--json", "--config", str(config_file(tmp_path)))
        document = json.loads(result.stdout)
        assert document[0].keys() == {"what", "state", "found", "advice"}
        assert (document[0]["what"], document[0]["state"]) == ("configuration", "ok")
