"""examples/demo: what can be known of images and services without Docker.

The files are checked against their schemas and each other, commands against `serve --dry-run`, and the steps that
install the page's images run in an environment of their own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lmcache_rag.cli.app import app
from lmcache_rag.connector.server_guard import MODULE
from lmcache_rag.protocol import VLLM_BLOCK

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
BIN = Path(sys.executable).parent
VARIABLE = re.compile(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}")
REQUIRED = {"LMCACHE_RAG_DEMO_PASSWORD": "a password for tests"}
PROFILES = {
    "two-gpus": {"blended", "stock", "page-two-gpus"},
    "one-gpu": {"blended", "page-one-gpu"},
    "cpu": {"page-cpu"},
}


# -- reading the files --------------------------------------------------------------------------------------------


def example_env() -> dict[str, str]:
    lines = (DEMO / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def filled_in(node: Any, env: Mapping[str, str]) -> Any:
    """Compose's `${NAME:-default}` and `${NAME:?message}`, which it fills in after it has read the YAML."""
    if isinstance(node, dict):
        return {key: filled_in(each, env) for key, each in node.items()}
    if isinstance(node, list):
        return [filled_in(each, env) for each in node]
    if not isinstance(node, str):
        return node

    def value(found: re.Match[str]) -> str:
        name, how, rest = found.groups()
        if env.get(name):
            return env[name]
        assert how == ":-", f"{name}: {rest}"
        return rest or ""

    return VARIABLE.sub(value, node)


def services(env: Mapping[str, str] = REQUIRED) -> dict[str, Any]:
    document = yaml.safe_load((DEMO / "compose.yaml").read_text())
    return {name: filled_in(service, env) for name, service in document["services"].items()}


def instructions(target: str) -> Iterator[tuple[str, str]]:
    """The Dockerfile's instructions up to a target, those of the stages below it first."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (DEMO / "Dockerfile").read_text(), flags=re.MULTILINE))
    stages: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for line in filter(None, text.splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            below, _, name = rest.partition(" AS ")
            stages[name] = (below, [])
        else:
            stages[name][1].append((word, rest))
    below, own = stages[target]
    if below in stages:
        yield from instructions(below)
    yield from own


def dry_run(*words: str) -> Any:
    done = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


# -- the files ----------------------------------------------------------------------------------------------------


def test_compose_file_fits_its_schema() -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEMO / "compose.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([BIN / "hadolint", "--no-color", DEMO / "Dockerfile"], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


def test_base_image_is_pinned_to_a_python_we_support() -> None:
    (base,) = re.findall(r"^FROM (\S+:\S+) AS", (DEMO / "Dockerfile").read_text(), flags=re.MULTILINE)
    version = re.fullmatch(r"python:(3)\.(\d+)\.\d+-slim-bookworm", base)
    assert version is not None
    assert int(version[2]) >= 11


def test_profiles_hold_what_they_promise() -> None:
    found = {
        profile: {name for name, each in services().items() if profile in each["profiles"]} for profile in PROFILES
    }
    assert found == PROFILES
    for profile, names in PROFILES.items():  # a service never waits for one that its profile leaves out
        for name in names:
            assert set(services()[name].get("depends_on", {})) <= names, profile


def test_pages_start_when_their_servers_are_healthy() -> None:
    for name, service in services().items():
        assert service["healthcheck"]["test"][:2] == ["CMD", "python"]  # slim images have no curl
        if not name.startswith("page"):
            continue
        servers = re.findall(r"http://(\w+):8000", " ".join(service["command"]))
        assert service.get("depends_on", {}) == {each: {"condition": "service_healthy"} for each in servers} or (
            not servers and "depends_on" not in service
        )


def test_each_server_gets_a_gpu_of_its_own() -> None:
    def gpus(name: str) -> list[str]:
        (device,) = services()[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        return device["device_ids"]

    assert (gpus("blended"), gpus("stock")) == (["0"], ["1"])


def test_nothing_listens_beyond_loopback_by_default() -> None:
    for env in (REQUIRED, example_env() | REQUIRED):
        for name, service in services(env).items():
            assert "network_mode" not in service, name
            assert service["ports"], name
            assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
    opened = services(REQUIRED | {"PAGE_HOST": "0.0.0.0"})
    assert {name for name, each in opened.items() if each["ports"][0].startswith("0.0.0.0")} == {
        "page-two-gpus",
        "page-one-gpu",
        "page-cpu",
    }


def test_compose_does_not_start_without_a_password() -> None:
    with pytest.raises(AssertionError, match="LMCACHE_RAG_DEMO_PASSWORD: fill it in"):
        services({})
    assert example_env()["LMCACHE_RAG_DEMO_PASSWORD"] == ""


def test_env_example_names_variables_with_defaults() -> None:
    used = VARIABLE.findall((DEMO / "compose.yaml").read_text())
    assert {name for name, _, _ in used} == set(example_env())
    for name, how, default in used:
        if how == ":-":
            assert example_env()[name] == default, name


def test_no_secret_gets_into_an_image() -> None:
    for target in ("page", "cpu", "gpu"):
        for word, rest in instructions(target):
            assert word != "ARG"
            assert "TOKEN" not in rest
            assert "PASSWORD" not in rest
    kept = (DEMO / "Dockerfile.dockerignore").read_text().splitlines()
    assert kept[1] == "*", "everything is left out but what is named"
    assert not [line for line in kept if line.startswith("!") and "env" in line]
    assert ".env" in (ROOT / ".gitignore").read_text().split()
    for service in services().values():  # not on a command line either
        assert not any("TOKEN" in word or "PASSWORD" in word for word in service["command"])


def test_all_that_is_copied_is_sent_to_the_builder() -> None:
    sent = [line[1:] for line in (DEMO / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    for target in ("cpu", "gpu"):
        for word, rest in instructions(target):
            if word == "COPY":
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists(), source
                    assert any(Path(source).match(pattern) for pattern in sent), source


# -- their commands -----------------------------------------------------------------------------------------------


def test_commands_are_those_of_serve() -> None:
    """`blended` runs `lmcache-rag serve`, `stock` what that runs as vLLM, but for the connector."""
    program, *words = services()["blended"]["command"]
    assert program == "lmcache-rag"
    made = dry_run(*words)
    assert json.loads(made["lmcache"][made["lmcache"].index("--server-module") + 1]) == {"module_path": MODULE}
    vllm = made["vllm"]
    at = vllm.index("--kv-transfer-config")
    assert services()["stock"]["command"] == [*vllm[:at], *vllm[at + 2 :]]
    assert made["url"] == "http://127.0.0.1:8000"
    assert made["environment"] == {}


def test_readme_shows_the_containers_commands() -> None:
    program, *words = services()["blended"]["command"]
    shown = CliRunner().invoke(app, [*words, "--dry-run"]).stdout
    assert f"```shell\n{shown}```" in (DEMO / "README.md").read_text()
    assert program == "lmcache-rag"


def test_a_model_of_ones_own_reaches_every_service() -> None:
    env = REQUIRED | {"MODEL": "some/model", "CPU_MODEL": "another/model", "HF_TOKEN": "hf_test"}
    found = services(env)
    assert found["blended"]["command"][2] == found["stock"]["command"][2] == "some/model"
    assert found["page-cpu"]["environment"]["LMCACHE_RAG_MODEL"] == "another/model"
    assert all(each["environment"]["HF_TOKEN"] == "hf_test" for each in found.values())


@pytest.mark.parametrize("name", ["page-two-gpus", "page-one-gpu", "page-cpu"])
def test_the_command_line_has_each_option_of_the_pages(name: str) -> None:
    import typer

    program, verb, *words = services()[name]["command"]
    assert program == "lmcache-rag"
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    command.make_context(verb, list(words), resilient_parsing=False)


def test_chunks_fit_the_block_of_vllm() -> None:
    chunk = dry_run(*services()["blended"]["command"][1:])["lmcache"]
    assert int(chunk[chunk.index("--chunk-size") + 1]) % VLLM_BLOCK == 0


# -- what is installed --------------------------------------------------------------------------------------------


def run(command: list[Any] | str, cwd: Path, env: Mapping[str, str], limit: float = 1500) -> str:
    done = subprocess.run(
        command if isinstance(command, str) else [str(word) for word in command],
        shell=isinstance(command, str),
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_pins_of_the_gpu_image_resolve(python: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", ROOT / "pyproject.toml", "--extra", "gpu"]
    command += [
        "--constraint",
        DEMO / "gpu.txt",
        "--python-version",
        python,
        "--python-platform",
        "x86_64-manylinux_2_36",
    ]
    run([*command, "--output-file", tmp_path / "lock.txt"], tmp_path, os.environ)
    lock = (tmp_path / "lock.txt").read_text()
    pins = [line for line in (DEMO / "gpu.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(pins) == 3
    assert all(re.search(rf"^{re.escape(pin)}\b", lock, flags=re.MULTILINE) for pin in pins)


class Image:
    """Where an image's steps were run: an environment, a folder for each of the image's.

    Args:
        place: Holds all of it.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.folders = {name: place / name.strip("/") for name in ("/opt/venv", "/cache", "/store", "/logs", "/src")}
        not_theirs = ("PYTHON", "COV", "VIRTUAL_ENV", "LMCACHE_RAG", "HF_")  # where packages come from stays
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(not_theirs)}
        for name in ("/cache", "/store", "/logs", "/src"):
            self.folders[name].mkdir(parents=True)

    def here(self, text: str) -> str:
        """A text of the image, with its folders as they are here."""
        for name, folder in self.folders.items():
            text = re.sub(rf"(?<![\w/.]){re.escape(name)}(?![\w-])", str(folder), text)
        return text

    def step(self, word: str, rest: str) -> None:
        if word == "ENV":
            for setting in shlex.split(rest):
                name, _, value = setting.partition("=")
                self.env[name] = self.here(value).replace("$PATH", self.env["PATH"])
        elif word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                to = self.folders["/src"] / target / (source if target == "./" else "")
                to.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, to)
        elif word == "RUN" and not rest.startswith(("useradd", "apt-get")):
            # Without what only makes an image smaller.
            text = rest.replace(" && rm -rf /root/.cache", "").replace(" --no-cache-dir", "").replace(" --no-cache", "")
            run(self.here(text), self.folders["/src"], self.env)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The steps of the image `cpu`, which are those of `page` first."""
    made = Image(tmp_path_factory.mktemp("image"))
    for word, rest in instructions("cpu"):
        made.step(word, rest)
    return made


@pytest.mark.full
@pytest.mark.slow
def test_images_install_and_their_page_is_healthy(image: Image, tmp_path: Path) -> None:
    """The command of `page-cpu` from an environment with nothing else in it, until its health check passes."""
    python = image.folders["/opt/venv"] / "bin" / "python"
    installed = json.loads(run([python, "-m", "pip", "list", "--format=json"], tmp_path, image.env))
    versions = {each["name"].lower(): each["version"] for each in installed}
    assert {"lmcache-rag", "nicegui", "torch"} <= set(versions)
    assert not {"vllm", "lmcache", "pytest"} & set(versions)
    assert not [name for name in versions if name.startswith("nvidia")], "the CPU build of torch"
    weights = [file for file in image.folders["/cache"].rglob("*.safetensors") if file.stat().st_size > 10_000_000]
    assert len(weights) == 2, "the model and the embedder are in the image"

    service = services()["page-cpu"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def here(word: str) -> str:
        return image.here(word.replace("0.0.0.0", "127.0.0.1").replace("8090", port))

    env = image.env | {name: str(value) for name, value in service["environment"].items()} | {"HF_HUB_OFFLINE": "1"}
    program, *words = map(here, service["command"])
    command = [python.parent / program, *words]
    with (tmp_path / "log").open("wb") as log:
        page = subprocess.Popen(command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _, *check = map(here, service["healthcheck"]["test"])
        until = time.monotonic() + 600
        while (subprocess.run([python, *check[1:]], env=env, capture_output=True).returncode) != 0:
            said = (tmp_path / "log").read_text()
            assert page.poll() is None, said
            assert time.monotonic() < until, said
            time.sleep(1)
        assert REQUIRED["LMCACHE_RAG_DEMO_PASSWORD"] not in (tmp_path / "log").read_text()
    finally:
        page.terminate()
        page.wait(60)
