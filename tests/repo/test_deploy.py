"""What is deployed: manifests that Kubernetes' own schemas take, patches that meet what they patch, images that do not run as root."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from ninerank.cli.main import build

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
VERSION = "1.30"
OVERLAYS = {"cpu": {}, "gpu": {"nvidia.com/gpu": "1"}, "npu": {"huawei.com/Ascend910": "1"}}


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def merged(base: Any, patch: Any) -> Any:
    """A strategic merge as kustomize does it: mappings by key, lists of named things by name, other lists replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {
            key: merged(base[key], patch[key]) if key in base and key in patch else patch.get(key, base.get(key))
            for key in {**base, **patch}
        }
    if isinstance(base, list) and isinstance(patch, list) and all(isinstance(own, dict) and "name" in own for own in (*base, *patch)):
        by_name = {own["name"]: own for own in patch}
        known = {own["name"] for own in base}
        return [merged(own, by_name.get(own["name"], {})) for own in base] + [own for own in patch if own["name"] not in known]
    return patch


def base() -> dict[str, dict[str, Any]]:
    listed = documents(KUBERNETES / "base" / "kustomization.yaml")[0]["resources"]
    assert sorted(listed) == sorted(path.name for path in (KUBERNETES / "base").glob("*.yaml") if path.name != "kustomization.yaml")
    return {document["kind"]: document for name in listed for document in documents(KUBERNETES / "base" / name)}


def deployment(overlay: str) -> dict[str, Any]:
    place = KUBERNETES / "overlays" / overlay
    (kustomization,) = documents(place / "kustomization.yaml")
    assert kustomization["resources"] == ["../../base"]
    found = base()["Deployment"]
    for patch in kustomization["patches"]:
        (document,) = documents(place / patch["path"])
        assert (document["kind"], document["metadata"]["name"]) == (found["kind"], found["metadata"]["name"])
        found = merged(found, document)
    return found


@pytest.mark.parametrize(
    "kind", ["Deployment", "Service", "ServiceAccount", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy"]
)
def test_kubernetes_takes_every_object(kind: str) -> None:
    kubernetes_validate.validate(base()[kind], VERSION, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_takes_every_overlay_and_it_asks_for_its_device(overlay: str) -> None:
    found = deployment(overlay)
    kubernetes_validate.validate(found, VERSION, strict=True)
    (container,) = found["spec"]["template"]["spec"]["containers"]
    for name, count in OVERLAYS[overlay].items():
        assert container["resources"]["limits"][name] == container["resources"]["requests"][name] == count
    assert container["image"] == f"ninerank:{overlay.replace('gpu', 'cuda')}"
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


def test_the_check_tells_a_wrong_object() -> None:
    wrong = merged(base()["Deployment"], {"spec": {"replicas": "two"}})
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(merged(base()["Deployment"], {"spec": {"replica": 2}}), VERSION, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_command_line_takes_what_containers_give_it(overlay: str) -> None:
    """Every option of the container is one of `ninerank serve`, and the server's drain fits into the pod's end."""
    spec = deployment(overlay)["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    words = container["args"]
    assert words[0] == "serve"
    group: Any = typer.main.get_command(build("serve"))
    known = {word for parameter in group.commands["serve"].params for word in parameter.opts}
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words if word.startswith("--")}
    assert given.keys() <= known
    assert spec["terminationGracePeriodSeconds"] > float(given["--drain-seconds"]) + 5
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (str(ports["grpc"]), str(ports["metrics"])) == (given["--port"], given["--metrics-port"])


def test_selectors_meet_their_pods() -> None:
    objects = base()
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_images_install_by_the_projects_own_files_and_do_not_run_as_root(device: str) -> None:
    text = (ROOT / "deploy" / "docker" / f"Dockerfile.{device}").read_text(encoding="utf-8")
    lines = [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    words = [word for word, _ in lines]
    assert set(words) <= {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert dict(lines)["USER"] == "10001"
    assert f"scripts/setup.py --venv /opt/ninerank --device {device} --for run" in text
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())
