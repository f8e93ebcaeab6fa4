"""The manifests of `docs/kubernetes.md` fit the image, the server and each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config import engine_config, engine_fields
from engine.runtimes.registry import RUNTIMES
from engine.units import parse_duration, parse_size
from server.auth import PROBES
from server.serve import FLUSH_S
from server.settings import ADMIN_MARK, ServerSettings
from tests.test_container import FINAL, only

PAGE = Path(__file__).parents[1] / "docs" / "kubernetes.md"


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)
    documents = [each for block in blocks for each in yaml.safe_load_all(block)]
    found = {(each["kind"], each["metadata"]["name"]): each for each in documents}
    assert len(found) == len(documents) == 7
    return found


@pytest.fixture
def pod(manifests: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = manifests["Deployment", "roundhouse"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["containers"]
    assert isinstance(found, dict)
    return found


def test_one_server_at_a_time(manifests: dict[tuple[str, str], dict[str, Any]]) -> None:
    spec = manifests["Deployment", "roundhouse"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    assert manifests["Service", "roundhouse"]["spec"]["selector"].items() <= (
        spec["template"]["metadata"]["labels"].items()
    )


def test_ports_and_probes_are_those_of_the_server(
    manifests: dict[tuple[str, str], dict[str, Any]], container: dict[str, Any]
) -> None:
    (port,) = container["ports"]
    assert str(port["containerPort"]) == only(FINAL, "EXPOSE").text
    (service,) = manifests["Service", "roundhouse"]["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    probes = {name: container[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    for probe in probes.values():
        assert probe["httpGet"]["path"] in PROBES
        assert probe["httpGet"]["port"] == port["name"]
    assert probes["readiness"]["httpGet"]["path"] == "/ready"
    assert probes["liveness"]["httpGet"]["path"] == "/health"
    assert probes["startup"]["httpGet"]["path"] == "/health"
    # The supervisor replaces a hung process sooner than that.
    patience_s = probes["liveness"]["periodSeconds"] * probes["liveness"]["failureThreshold"]
    assert patience_s > ServerSettings().hang_s + 90


def test_a_stop_waits_for_the_drain(pod: dict[str, Any], container: dict[str, Any]) -> None:
    program, pause_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    needed_s = parse_duration(pause_s) + ServerSettings().drain_s + FLUSH_S + 5
    assert pod["terminationGracePeriodSeconds"] >= needed_s


def test_the_variables_are_settings(pod: dict[str, Any], container: dict[str, Any]) -> None:
    assert pod["enableServiceLinks"] is False
    keys = {*engine_fields(), *ServerSettings.model_fields, "config"}
    own = [each["name"] for each in container["env"] if each["name"].startswith("ROUNDHOUSE_")]
    assert {name.removeprefix("ROUNDHOUSE_").lower() for name in own} == {"config", "api_keys_file"}
    assert {name.removeprefix("ROUNDHOUSE_").lower() for name in own} <= keys


def test_what_is_mounted_is_there(
    manifests: dict[tuple[str, str], dict[str, Any]],
    pod: dict[str, Any],
    container: dict[str, Any],
) -> None:
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert {*only(FINAL, "VOLUME").words()} <= {*mounts.values()}
    files = set()
    for name, volume in volumes.items():
        if claim := volume.get("persistentVolumeClaim"):
            assert ("PersistentVolumeClaim", claim["claimName"]) in manifests
        elif config := volume.get("configMap"):
            data = manifests["ConfigMap", config["name"]]["data"]
            files |= {f"{mounts[name]}/{file}" for file in data}
        else:
            data = manifests["Secret", volume["secret"]["secretName"]]["stringData"]
            assert all(item["key"] in data for item in volume["secret"]["items"])
            files |= {f"{mounts[name]}/{item['path']}" for item in volume["secret"]["items"]}
    assert {each["value"] for each in container["env"] if "value" in each} == files
    (reference,) = (
        each["valueFrom"]["secretKeyRef"] for each in container["env"] if "valueFrom" in each
    )
    assert reference["key"] in manifests["Secret", reference["name"]]["stringData"]


def test_the_data_fits_its_volume(manifests: dict[tuple[str, str], dict[str, Any]]) -> None:
    claim = manifests["PersistentVolumeClaim", "roundhouse-data"]["spec"]["resources"]["requests"]
    config = engine_config({"engine": {}, "models": [{"id": "any", "source": "any"}]}, RUNTIMES)
    assert parse_size(f"{claim['storage']}B") >= 2 * config.max_data


def test_the_user_is_that_of_the_image(pod: dict[str, Any], container: dict[str, Any]) -> None:
    (users,) = (each.text for each in FINAL if each.name == "RUN" and "useradd" in each.text)
    match = re.search(r"--uid (\d+)", users)
    assert match is not None
    security = pod["securityContext"]
    assert {security[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {int(match[1])}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_configuration_and_keys_can_be_read(
    manifests: dict[tuple[str, str], dict[str, Any]],
) -> None:
    text = manifests["ConfigMap", "roundhouse-config"]["data"]["roundhouse.yaml"]
    assert engine_config(yaml.safe_load(text), RUNTIMES).find("gpt-4o-mini").task == "generate"
    lines = manifests["Secret", "roundhouse-keys"]["stringData"]["keys"].split()
    assert [line.startswith(ADMIN_MARK) for line in lines] == [False, True]


def test_the_ingress_leads_to_the_service(
    manifests: dict[tuple[str, str], dict[str, Any]],
) -> None:
    ingress = manifests["Ingress", "roundhouse"]
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    service = path["backend"]["service"]
    (port,) = manifests["Service", service["name"]]["spec"]["ports"]
    assert service["port"]["name"] == port["name"]
    annotations = {
        name.rpartition("/")[2]: value for name, value in ingress["metadata"]["annotations"].items()
    }
    megabytes = int(annotations["proxy-body-size"].removesuffix("m"))
    assert megabytes * 2**20 == ServerSettings().max_body_bytes
    assert annotations["proxy-buffering"] == "off"
    assert int(annotations["proxy-read-timeout"]) >= 300
