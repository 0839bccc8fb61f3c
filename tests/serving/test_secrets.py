"""Secrets of `serve`: which processes get them, and that neither `ps` nor any output shows one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_kit import alive, fake_packages, free_ports
from typer.testing import CliRunner

from lmcache_rag.cli.app import app
from lmcache_rag.credentials import ensure_secret, read_secret
from lmcache_rag.serving.commands import ServeOptions, commands, lmcache_environment
from lmcache_rag.serving.lmcache_server import arguments
from lmcache_rag.serving.process import descendants

PASSWORD = "hunter2-and-more"
TESTS = Path(__file__).parents[1]
PATIENCE_S = 60.0


def test_lmcache_gets_filled_placeholders_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PW", PASSWORD)
    given = ["server", "--l2-adapter", '{"type": "fs", "base_path": "/data"}', "--l2-adapter", '{"password": "${PW}"}']
    assert arguments(given) == [*given[:4], json.dumps({"password": PASSWORD})]
    assert "PW" not in os.environ


@pytest.mark.parametrize(
    ("words", "variable"),
    [
        (("--api-key", PASSWORD), "VLLM_API_KEY"),
        ((f"--api-key={PASSWORD}",), "VLLM_API_KEY"),
        (("--api_key", PASSWORD), "VLLM_API_KEY"),
        (("--hf-token", PASSWORD), "HF_TOKEN"),
    ],
)
def test_a_key_on_vllms_command_line_is_refused(words: tuple[str, ...], variable: str) -> None:
    result = CliRunner().invoke(app, ["serve", "some/model", "--dry-run", *words])
    assert result.exit_code == 2
    assert variable in result.stderr
    assert PASSWORD not in result.output + result.stderr


def test_a_token_that_vllm_reads_is_not_on_the_line() -> None:
    commands(ServeOptions("some/model", ("--hf-token", "--enforce-eager")), {})


def test_dry_run_shows_placeholders_and_paths(tmp_path: Path) -> None:
    variables = {"PW": PASSWORD, "VLLM_API_KEY": PASSWORD, "LMCACHE_RAG_SECRET": PASSWORD * 3}
    words = ["serve", "some/model", "--dry-run", "--l2", "redis://:${PW}@host:6379"]
    for more in ([], ["--json"]):
        result = CliRunner().invoke(app, [*words, *more], env=variables)
        assert result.exit_code == 0, result.output
        assert "${PW}" in result.stdout
        assert "lmcache_rag.serving.lmcache_server" in result.stdout
        assert PASSWORD not in result.output + result.stderr
    assert not (tmp_path / "state").exists()


FOREIGN = {
    "VLLM_API_KEY": "1",
    "LMCACHE_RAG_API_KEY": "1",
    "LMCACHE_RAG_SECRET": "1",
    "OPENAI_API_KEY": "1",
    "HF_TOKEN": "1",
    "AWS_SECRET_ACCESS_KEY": "1",
    "GITHUB_TOKEN": "1",
    "https_proxy": "http://me:pw@proxy",
    "PW": "1",
}


NEEDED = {"PATH": "/bin", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "0", "LD_LIBRARY_PATH": "/lib", "LMCACHE_X": "1"}


def test_lmcache_gets_no_secrets_of_others() -> None:
    """Fault D1: GET /env of LMCache's HTTP port shows its environment to any client."""
    assert lmcache_environment({**FOREIGN, **NEEDED}) == NEEDED
    assert lmcache_environment({**FOREIGN, **NEEDED}, ['{"type": "fs", "base_path": "/data"}']) == NEEDED


@pytest.mark.parametrize(
    ("tier", "more"),
    [
        ('{"type": "s3"}', {"AWS_SECRET_ACCESS_KEY", "https_proxy"}),
        ('{"type": "hfbucket"}', {"HF_TOKEN", "https_proxy"}),
        ('{"type": "resp", "password": "${PW}"}', {"PW"}),
    ],
)
def test_a_second_tier_gets_the_variables_of_its_own(tier: str, more: set[str]) -> None:
    assert lmcache_environment({**FOREIGN, **NEEDED}, [tier]).keys() == NEEDED.keys() | more


def test_where_the_secret_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_RAG_STATE", str(tmp_path))

    def found(environment: dict[str, str], **options: Any) -> tuple[Any, Any]:
        made = commands(ServeOptions("m", **options), environment)
        assert made.environment.get("LMCACHE_RAG_SECRET_FILE") == (str(made.secret_file) if made.secret_file else None)
        return made.secret_file

    by_file = {"LMCACHE_RAG_SECRET_FILE": "/named"}
    assert found({}) is None, "vLLM draws one"
    assert found({}, l2=("/kv",)) == tmp_path / "secret", "what is kept must be found again"
    assert found({"LMCACHE_RAG_SECRET": "x" * 40}, l2=("/kv",)) is None
    assert found(by_file, l2=("/kv",)) == Path("/named")
    assert found(by_file, secret_file=Path("here")) == Path.cwd() / "here"


@pytest.mark.parametrize("how", ["unwritable", "readable by others"])
def test_a_second_tier_needs_a_lasting_secret(tmp_path: Path, how: str) -> None:
    state = tmp_path / "state"
    if how == "unwritable":
        state.touch()
    else:
        ensure_secret(state / "secret")
        (state / "secret").chmod(0o644)
    code = (
        "import lmcache_rag.cli.serve as serve; from lmcache_rag.cli import main; "
        "serve._check_packages = serve._check_environment = lambda *_: None; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "some/model", "--l2", str(tmp_path / "kv")],
        env={**os.environ, "LMCACHE_RAG_STATE": str(state)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2
    assert "--secret-file" in done.stderr
    assert "LMCACHE_RAG_SECRET" in done.stderr


@pytest.mark.parametrize("words", [("--prefix-tokens", "100"), ("--prefix-tokens", "0")])
def test_prefix_tokens_are_whole_chunks(words: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, ["serve", "some/model", "--dry-run", *words]).exit_code == 2
    result = CliRunner().invoke(app, ["serve", "some/model", "--dry-run", "--prefix-tokens", "128"])
    assert '"lmcache_rag.prefix_tokens": 128' in result.stdout


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`lmcache-rag serve` with its guards and launchers; vLLM and LMCache are stand-ins."""
    begun: list[subprocess.Popen[str]] = []

    def run(*options: str, lmcache: str = "0.5.6", **variables: str) -> subprocess.Popen[str]:
        for name in ("lmcache", "vllm"):
            (tmp_path / name).mkdir(exist_ok=True)
        packages = fake_packages(tmp_path)
        for folder in packages.glob("lmcache-*.dist-info"):
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lmcache\nVersion: {lmcache}\n")
        ports = free_ports(3)
        flags = [f"--port={ports[0]}", f"--lmcache-port={ports[1]}", f"--lmcache-http-port={ports[2]}"]
        usual = {name: text for name, text in os.environ.items() if not name.startswith(("LMCACHE_", "VLLM_"))}
        path = os.pathsep.join([str(packages), str(TESTS.parent)])
        begun.append(
            subprocess.Popen(
                [sys.executable, "-m", "lmcache_rag.cli", "serve", "tiny", *flags, f"--log-dir={tmp_path}", *options],
                cwd=tmp_path,
                env={**usual, "PYTHONPATH": path, "LMCACHE_RAG_STATE": str(tmp_path / "state"), **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return begun[-1]

    yield run
    for one in begun:
        left = descendants(one.pid)
        one.send_signal(signal.SIGTERM)
        one.communicate(timeout=PATIENCE_S)
        assert not [pid for pid in left if alive(pid)]


def environ(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_text()
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def pid_of(folder: Path) -> int:
    return int((folder / "pids").read_text().split()[0])


def test_no_process_shows_a_secret(serve: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("file-" + PASSWORD)
    secrets = {
        "PW": PASSWORD,
        "VLLM_API_KEY": "key-" + PASSWORD,
        "HF_TOKEN": "hf-" + PASSWORD,
        "LMCACHE_RAG_SECRET": "s-" * 20 + PASSWORD,
    }
    tiers = []
    for name in ("PW", f"file:{tmp_path / 'pw'}"):  # the stand-in for LMCache knows no serde of ours
        tiers += ["--l2", json.dumps({"type": "resp", "password": f"${{{name}}}", "serde": {"type": "fp8"}})]
    process = serve(*tiers, **secrets)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "2 second tiers" in line
    shown = subprocess.run(["ps", "axww", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    lines = [one for one in shown.splitlines() if int(one.split()[0]) in descendants(process.pid)]
    assert any("lmcache_rag.serving.lmcache_server" in one and "${PW}" in one for one in lines)
    logs = "".join(file.read_text() for file in tmp_path.glob("*.log"))
    assert PASSWORD not in "".join(lines) + logs + line
    lmcache, vllm = environ(pid_of(tmp_path / "lmcache")), environ(pid_of(tmp_path / "vllm"))
    assert [name for name in secrets if name in lmcache] == ["PW"], "LMCache gets what it needs"
    assert secrets.items() <= vllm.items()


def test_with_a_second_tier_vllm_gets_a_lasting_secret(
    serve: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    tier = {"type": "fs", "base_path": str(tmp_path / "kv"), "serde": {"type": "fp8"}}
    process = serve("--l2", json.dumps(tier))
    assert process.stdout is not None
    assert process.stdout.readline()
    file = tmp_path / "state" / "secret"
    assert file.stat().st_mode & 0o777 == 0o600
    assert environ(pid_of(tmp_path / "vllm"))["LMCACHE_RAG_SECRET_FILE"] == str(file)
    assert "LMCACHE_RAG_SECRET_FILE" not in environ(pid_of(tmp_path / "lmcache"))
    lines = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert read_secret(file) not in lines


@pytest.mark.parametrize(
    ("version", "variables", "made"),
    [("0.5.6", {}, False), ("0.5.7rc2", {}, True), ("0.5.7", {"LMCACHE_HTTP_API_KEY": "mine"}, False)],
)
def test_lmcaches_http_port_gets_a_key_if_it_takes_one(
    serve: Callable[..., subprocess.Popen[str]], tmp_path: Path, version: str, variables: dict[str, str], made: bool
) -> None:
    process = serve(lmcache=version, **variables)
    assert process.stdout is not None
    assert process.stdout.readline()
    file = tmp_path / "state" / "lmcache-http-key"
    assert file.exists() == made
    found = environ(pid_of(tmp_path / "lmcache"))
    assert found.get("LMCACHE_HTTP_API_KEY_FILE") == (str(file) if made else None)
    assert found.get("LMCACHE_HTTP_API_KEY") == variables.get("LMCACHE_HTTP_API_KEY")
