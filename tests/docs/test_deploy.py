"""Files and blocks that a deployer copies: they parse, and what they call exists."""

import configparser
import json
import re
import shlex
import tomllib
from pathlib import Path

import yaml

from pruneofa.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _block(language: str) -> str:
    [block] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return block


def _container() -> dict:
    deployment, service = yaml.safe_load_all(_block("yaml"))
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    return container


def test_the_container_of_the_manifest_has_probes_resources_and_its_volumes() -> None:
    container = _container()
    [port] = container["ports"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    assert f"EXPOSE {port['containerPort']}\n" in DOCKERFILE
    assert set(container["resources"]) == {"requests", "limits"}
    deployment = next(yaml.safe_load_all(_block("yaml")))
    volumes = {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_what_was_accepted_is_answered_before_anything_is_killed() -> None:
    grace = cli._parser(["serve", "model"]).grace
    pod = next(yaml.safe_load_all(_block("yaml")))["spec"]["template"]["spec"]
    container = _container()
    *_, before = container["lifecycle"]["preStop"]["exec"]["command"]
    assert int(before) >= 5 and pod["terminationGracePeriodSeconds"] >= int(before) + grace + 5
    assert all(container[probe]["timeoutSeconds"] == 5 for probe in ("startupProbe", "readinessProbe", "livenessProbe"))
    for option in (r"^TimeoutStopSec=(\d+)$", r"^docker run .*--stop-timeout (\d+) "):
        [seconds] = re.findall(option, PAGE, re.MULTILINE)
        assert int(seconds) >= grace + 5


def test_the_unit_starts_a_server_again_until_what_was_missing_is_there() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.read_string(_block("ini"))
    often = float(unit["Unit"].get("StartLimitIntervalSec", 10))  # systemd's default: 5 starts in 10 seconds
    assert often == 0 or 5 * float(unit["Service"]["RestartSec"]) > often
    assert unit["Service"]["Restart"] == "on-failure" and unit["Service"]["RestartPreventExitStatus"] == "2"


def test_what_the_image_the_manifest_and_the_unit_call_is_what_the_parser_takes() -> None:
    [default] = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    [unit] = re.findall(r"^ExecStart=\S+/pruneofa (.*)$", _block("ini"), re.MULTILINE)
    for command in (json.loads(default), _container()["args"], shlex.split(unit)):
        assert cli._parser(command).models


def test_the_image_installs_an_extra_that_exists() -> None:
    [extra] = re.findall(r"'/source\[(\w+)\]'", DOCKERFILE)
    assert extra in PROJECT["project"]["optional-dependencies"]


def test_the_image_is_built_from_all_that_the_wheel_is_built_from() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split() if line[0] == "!"}
    build = PROJECT["tool"]["scikit-build"]["wheel"]
    needed = {"pyproject.toml", "CMakeLists.txt", "native", "constraints.txt", PROJECT["project"]["readme"]}
    needed |= {name.split("/")[0] for name in (*build["packages"], *build["force-include"])}
    assert needed | set(PROJECT["project"]["license-files"]) == allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_the_workflows_parse_and_continuous_integration_is_one_script() -> None:
    jobs = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        for path in ROOT.glob(".github/workflows/*.yml")
    }
    assert [step["run"] for step in jobs["ci"]["test"]["steps"] if "run" in step] == ["bash .ci/run"]
    assert {row["platform"] for row in jobs["wheels"]["wheels"]["strategy"]["matrix"]["include"]} == {
        *("linux-x86_64", "linux-aarch64", "macos-arm64")
    }
    assert (ROOT / PROJECT["tool"]["cibuildwheel"]["test-command"].partition("{project}/")[2]).is_file()
