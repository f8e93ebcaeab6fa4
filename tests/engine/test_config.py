"""A model's options: raw in the configuration, parsed as its runtime declares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig, ModelConfig, engine_config, is_service_link, read_sections
from engine.errors import ConfigError
from engine.runtimes.registry import REGISTRY, RUNTIMES, options_of
from engine.runtimes.vllm.options import VllmOptions
from engine.section import Section, parse_section
from engine.units import parse_duration


def model(**options: Any) -> ModelConfig:
    return ModelConfig(id="a", source="folder", options=options)


class TestOptions:
    def test_they_stay_as_they_were_written(self) -> None:
        assert model(kv_cache="1GiB").options == {"kv_cache": "1GiB"}
        assert model(kv_cache="1GiB").options_as(VllmOptions).kv_cache == 2**30

    def test_they_are_parsed_once(self) -> None:
        one = model(kv_cache="1GiB")
        assert one.options_as(VllmOptions) is one.options_as(VllmOptions)
        assert options_of(one) is one.options_as(VllmOptions)

    def test_a_copy_with_other_options_has_its_own(self) -> None:
        one = model(seed=1)
        assert one.options_as(VllmOptions).seed == 1
        other = one.model_copy(update={"options": {"seed": 2}})
        assert other.options_as(VllmOptions).seed == 2
        assert one.options_as(VllmOptions).seed == 1

    def test_another_form_is_parsed_anew(self) -> None:
        class Other(Section):
            seed: int

        class More(Other):
            more: int = 0

        one = model(seed=1)
        assert one.options_as(More) == More(seed=1)
        assert type(one.options_as(Other)) is Other

    def test_models_are_equal_whether_parsed_or_not(self) -> None:
        one = model(seed=1)
        one.options_as(VllmOptions)
        assert one == model(seed=1)
        assert one != model(seed=2)

    def test_an_error_names_model_and_option(self) -> None:
        with pytest.raises(ConfigError, match=r"^models\[a\]\.options\.dtyp: unknown key \(did"):
            model(dtyp="float32").options_as(VllmOptions)


def read(*models: dict[str, Any]) -> EngineConfig:
    return engine_config({"models": [{"source": "folder", **each} for each in models]}, RUNTIMES)


class TestModelsAreCheckedAsTheyAreRead:
    @pytest.mark.parametrize(
        ("entry", "told"),
        [
            ({"options": {"dtyp": 1}}, "models[1].options.dtyp: unknown key (did you mean dtype?)"),
            (
                {"options": {"seed": "x", "kv_cashe": 1}},
                "models[1].options.seed: it must be a whole number;"
                " models[1].options.kv_cashe: unknown key (did you mean kv_cache?)",
            ),
            (
                {
                    "runtime": "diffusers",
                    "task": "video",
                    "options": {"default": {"steps": 0, "guidance": 1}},
                },
                "models[1].options.default.steps: it must be at least 1",
            ),
            (
                {"options": None},
                "models[1].options: it must be an object",
            ),
            (
                {"runtime": "vlm", "options": {"no": "matter"}},
                "models[1].runtime: no runtime 'vlm'; there is bark, coqui, diffusers, kokoro,"
                " onnx_asr, pocket_tts, remote, sherpa_diarization, vllm, whisper",
            ),
            (
                {"task": "dance"},
                "models[1].task: it must be 'generate', 'embed', 'rerank', 'classify', 'image',"
                " 'video', 'speech', 'transcribe' or 'diarize'",
            ),
            (
                {"runtime": "remote", "options": {"model": "a", "api_key": "sk-1"}},
                "models[1].source: it is the provider's base URL, as https://api.example.com/v1",
            ),
            (
                {"task": "image"},
                "models[1].task: the runtime 'vllm' has no task 'image'; there is 'generate',"
                " 'embed', 'rerank', 'classify'",
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, entry: dict[str, Any], told: str) -> None:
        with pytest.raises(ConfigError) as raised:
            read({"id": "good"}, {"id": "bad", **entry})
        assert raised.value.message.startswith(told)

    def test_all_of_it_at_once(self) -> None:
        with pytest.raises(ConfigError) as raised:
            read({"id": "a", "options": {"seed": "x"}}, {"id": "b", "runtime": "x", "pinn": True})
        for key in ("models[0].options.seed", "models[1].runtime", "models[1].pinn"):
            assert key in raised.value.message

    def test_a_wrong_model_is_no_missing_model(self) -> None:
        with pytest.raises(ConfigError) as raised:
            read({"id": "a b"})
        assert raised.value.message.startswith("models[0].id: ")
        assert "at least 1" not in raised.value.message
        with pytest.raises(ConfigError, match=r"^models: it must have at least 1 item$"):
            read()

    def test_a_single_model(self) -> None:
        with pytest.raises(ConfigError, match=r"^models\[new\]\.options\.dtyp: unknown key"):
            entry = {"id": "new", "source": "me/new", "options": {"dtyp": 1}}
            parse_section(ModelConfig, entry, "models[new]", RUNTIMES)

    def test_only_the_runtimes_of_the_models_are_looked_up(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in REGISTRY.keys() - {"kokoro"}:
            monkeypatch.setitem(REGISTRY, name, "tests.no_such_module:Runtime")
        assert read({"id": "a", "runtime": "kokoro", "task": "speech"}).models[0].id == "a"


class TestFile:
    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("server: {api_keys: [a]}\nmodels: []\nserver: {}\n", r"line 3: server .* line 1$"),
            ("models:\n- id: a\n  source: b\n  id: c\n", r"line 4: id .* line 2$"),
            ("models:\n- options:\n    seed: 1\n    seed: 1\n", r"line 4: seed .* line 3$"),
            ("server: {port: 1, port: 2}\n", r"line 1: port .* line 1$"),
        ],
    )
    def test_a_key_written_twice_is_an_error(self, tmp_path: Path, text: str, wanted: str) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=wanted) as caught:
            read_sections(path, {}, {"engine": [], "server": ["port"]})
        assert str(caught.value).startswith(f"{path}: ")

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_it_is_read_in_the_encodings_of_yaml(self, tmp_path: Path, encoding: str) -> None:
        path = tmp_path / "config.yaml"
        path.write_text("server: {host: é}\n", encoding=encoding)
        sections = read_sections(path, {}, {"engine": [], "server": ["host"]})
        assert sections["server"] == {"host": "é"}

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            ("server: {host: é}\n".encode("latin-1"), "not valid YAML: unacceptable character"),
            (b"\x1f\x8b\x08\x00", "not valid YAML: "),
            (b"models: " + b"[" * 3000 + b"]" * 3000, "it is nested too deeply"),
        ],
    )
    def test_what_is_no_text_is_an_error(self, tmp_path: Path, content: bytes, told: str) -> None:
        path = tmp_path / "config.yaml"
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            read_sections(path, {}, {"engine": [], "server": ["host"]})
        assert str(caught.value).startswith(f"{path}: {told}")

    def test_a_merged_key_may_be_overridden(self, tmp_path: Path) -> None:
        path = tmp_path / "config.yaml"
        path.write_text("engine: &a {memory: 1}\nserver: {<<: *a, memory: 2}\n", encoding="utf-8")
        sections = read_sections(path, {}, {"engine": ["memory"], "server": ["memory"]})
        assert sections["server"] == {"memory": 2}


def links_of(service: str) -> dict[str, str]:
    """What Kubernetes puts into each pod for a Service of one named port."""
    return {
        f"{service}_SERVICE_HOST": "10.96.3.7",
        f"{service}_SERVICE_PORT": "8000",
        f"{service}_SERVICE_PORT_HTTP": "8000",
        f"{service}_PORT": "tcp://10.96.3.7:8000",
        f"{service}_PORT_8000_TCP": "tcp://10.96.3.7:8000",
        f"{service}_PORT_8000_TCP_PROTO": "tcp",
        f"{service}_PORT_8000_TCP_PORT": "8000",
        f"{service}_PORT_8000_TCP_ADDR": "10.96.3.7",
    }


class TestServiceLinks:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text("server: {port: 8001}\n", encoding="utf-8")
        return path

    @pytest.mark.parametrize("service", ["ROUNDHOUSE", "ROUNDHOUSE_API", "ROUNDHOUSE_PORT"])
    def test_those_of_a_service_are_ignored(self, path: Path, service: str) -> None:
        sections = read_sections(path, links_of(service), {"server": ["port"]})
        assert sections["server"] == {"port": 8001}

    def test_those_of_a_docker_link_are_ignored(self, path: Path) -> None:
        environ = {"ROUNDHOUSE_NAME": "/web/roundhouse", "ROUNDHOUSE_ENV_PATH": "/bin"}
        assert read_sections(path, environ, {"server": ["port"]})["server"] == {"port": 8001}

    @pytest.mark.parametrize(
        ("variable", "text"),
        [
            ("ROUNDHOUSE_PROT", "9000"),
            ("ROUNDHOUSE_SERVICE_HOTS", "10.96.3.7"),
            ("ROUNDHOUSE_SERVICE_HOST", "a name"),
            ("ROUNDHOUSE_SERVICE_PORT", "8000x"),
            ("ROUNDHOUSE_PORT_8000_TPC", "tcp://10.96.3.7:8000"),
            ("ROUNDHOUSE_API_PORT", "9000"),
            ("ROUNDHOUSE_NAME", "roundhouse"),
        ],
    )
    def test_a_misspelt_variable_is_still_an_error(
        self, path: Path, variable: str, text: str
    ) -> None:
        with pytest.raises(ConfigError, match=f"{variable}: unknown key"):
            read_sections(path, {variable: text}, {"server": ["port"]})

    def test_a_port_that_is_a_number_counts(self, path: Path) -> None:
        sections = read_sections(path, {"ROUNDHOUSE_PORT": "9000"}, {"server": ["port"]})
        assert sections["server"] == {"port": "9000"}

    def test_vllm_has_links_too(self) -> None:
        assert all(is_service_link("vllm", *each) for each in links_of("VLLM").items())
        assert not is_service_link("vllm", "VLLM_PORT", "5000")
        assert not is_service_link("vllm", "VLLM_PORT", "")


def test_a_duration_of_several_units() -> None:
    assert parse_duration("1h30m") == 5400.0
    assert parse_duration(" 1m 500ms ") == 60.5
    for text in ("1h30", "h", "1h-3m"):
        with pytest.raises(ValueError, match="not a duration"):
            parse_duration(text)
