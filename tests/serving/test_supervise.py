"""`serve` as a process tree that hangs, dies, resists and is killed.

Neither vLLM nor LMCache runs here: the servers are stand-ins (serve_kit), everything around them is real.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serve_kit import alive, free_ports

from lmcache_rag.errors import EngineError
from lmcache_rag.serving.process import descendants
from lmcache_rag.serving.supervise import check_ports

TESTS = Path(__file__).parents[1]
PATIENCE_S = 60.0


DRIVER = """
import sys
sys.path[:0] = {path!r}
from lmcache_rag.cli import main
from lmcache_rag.cli.run import Services, serve_commands
from lmcache_rag.serving.supervise import Timeouts
kit, folders = {kit!r}, {folders!r}
def commands(options):
    made, _, _ = serve_commands(options)
    return (made, [sys.executable, kit, "lmcache", str(options.lmcache_http_port), folders[0]],
            [sys.executable, kit, "vllm", str(options.port), folders[1]])
timeouts = lambda longest: Timeouts(20, longest, 0.02, 0.1, 1.0, 0.1, 0.5, 3.0)
main(Services(serve_commands=commands, serve_timeouts=timeouts))
"""


def until(what: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return result


@dataclass
class Serving:
    """`lmcache-rag serve` as a process, with its two stand-ins."""

    process: subprocess.Popen[str]
    folder: Path
    port: int

    @property
    def lmcache(self) -> Path:
        return self.folder / "lmcache"

    @property
    def vllm(self) -> Path:
        return self.folder / "vllm"

    def pids(self, who: Path) -> list[list[int]]:
        """Pids of a server and its two children, a list for each start of it."""
        file = who / "pids"
        return [[int(word) for word in line.split()] for line in file.read_text().splitlines()] if file.exists() else []

    def ready(self) -> str:
        """Wait for the line that says so."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def tree(self) -> list[int]:
        """Everything that runs: guards, servers, their children."""
        found = {
            *descendants(self.process.pid),
            *(pid for who in (self.lmcache, self.vllm) for p in self.pids(who) for pid in p),
        }
        return sorted(pid for pid in found if alive(pid))

    def end(self) -> tuple[int, str]:
        """Wait for the end: (status, stderr)."""
        _, stderr = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, stderr


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    begun: list[Serving] = []

    def run(*options: str, variables: dict[str, str] = {}, **files: str) -> Serving:  # noqa: B006
        """Start it; `files` are made in the servers' folders, as vllm_stubborn="" for example."""
        folders = [tmp_path / "lmcache", tmp_path / "vllm"]
        for folder in folders:
            folder.mkdir()
        for name, text in files.items():
            who, _, file = name.partition("_")
            (tmp_path / who / file).write_text(text)
        ports = free_ports(3)
        code = DRIVER.format(
            path=[str(TESTS.parent)],
            kit=str(TESTS / "support" / "serve_kit.py"),
            folders=[str(folder) for folder in folders],
        )
        flags = [f"--port={ports[0]}", f"--lmcache-port={ports[1]}", f"--lmcache-http-port={ports[2]}"]
        clean = {name: text for name, text in os.environ.items() if not name.startswith(("LMCACHE_RAG_", "VLLM_"))}
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", "tiny", *flags, "--log-dir", str(tmp_path / "logs"), *options],
            cwd=tmp_path,
            env={**clean, "PYTHONPATH": str(TESTS.parent), "LMCACHE_RAG_STATE": str(tmp_path / "state"), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun.append(Serving(process, tmp_path, ports[0]))
        return begun[-1]

    yield run
    for one in begun:
        left = one.tree()
        one.process.kill()
        for pipe in (one.process.stdout, one.process.stderr):
            pipe.close()
        one.process.wait()
        for pid in left:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_one_line_says_where_it_is_and_what_is_on(start: Callable[..., Serving]) -> None:
    serving = start("--l2", "kv")
    line = serving.ready()
    assert f"http://127.0.0.1:{serving.port}/v1 serves tiny" in line
    assert "blending: query at 0.15" in line
    assert "1 second tier" in line
    assert f"logs in {serving.folder / 'logs'}" in line
    serving.process.send_signal(signal.SIGTERM)
    status, stderr = serving.end()
    assert status == 143
    assert "LMCache is healthy" in stderr
    assert "vLLM is healthy" in stderr
    assert "vllm listens" in (serving.folder / "logs" / "vllm.log").read_text()


def test_a_recurrent_model_is_served_without_lmcache(start: Callable[..., Serving], tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text('{"architectures": ["GraniteMoeHybridForCausalLM"]}')
    serving = start()
    assert "serves tiny; blending: off, as it has recurrent layers; prefix caching: on" in serving.ready()
    assert not serving.pids(serving.lmcache)
    serving.process.send_signal(signal.SIGTERM)
    status, stderr = serving.end()
    assert status == 143
    assert stderr.startswith("GraniteMoeHybridForCausalLM has recurrent layers")
    assert not serving.tree()


def test_it_reports_what_the_server_really_does(start: Callable[..., Serving]) -> None:
    serving = start("--policy", "hkvd", vllm_mode="all")
    assert "blending: all at 1;" in serving.ready()
    serving.process.send_signal(signal.SIGTERM)
    serving.end()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_passes_through_and_nothing_is_left(
    start: Callable[..., Serving], number: signal.Signals, status: int
) -> None:
    serving = start()
    serving.ready()
    tree = serving.tree()
    assert len(tree) == 8  # two guards, two servers, two children of each
    serving.process.send_signal(number)
    assert serving.end()[0] == status
    assert [(who / "signals").read_text().split() for who in (serving.vllm, serving.lmcache)] == [[number.name]] * 2
    assert [pid for pid in tree if alive(pid)] == []


def test_a_signal_while_it_starts_leaves_nothing(start: Callable[..., Serving]) -> None:
    serving = start(vllm_hang="")
    until(lambda: serving.pids(serving.vllm))
    tree = serving.tree()
    serving.process.send_signal(signal.SIGTERM)
    assert serving.end()[0] == 143
    assert [pid for pid in tree if alive(pid)] == []


@pytest.mark.parametrize("files", [{}, {"vllm_stubborn": "", "lmcache_stubborn": ""}], ids=["willing", "stubborn"])
def test_nothing_outlives_a_parent_that_is_killed(start: Callable[..., Serving], files: dict[str, str]) -> None:
    serving = start(**files)
    serving.ready()
    tree = serving.tree()
    assert len(tree) == 8
    serving.process.kill()
    until(lambda: not any(map(alive, tree)), 20)


def test_a_second_signal_kills_a_server_that_resists(start: Callable[..., Serving]) -> None:
    serving = start(vllm_stubborn="")
    serving.ready()
    tree = serving.tree()
    serving.process.send_signal(signal.SIGINT)
    until((serving.vllm / "signals").exists)
    serving.process.send_signal(signal.SIGINT)
    status, stderr = serving.end()
    assert status == 130
    waits = "Ending vLLM, LMCache: running requests get up to 3 s; a second signal kills at once."
    assert waits in stderr, "said before anything is waited for"
    assert "vLLM is killed." in stderr
    assert [pid for pid in tree if alive(pid)] == []


def test_lmcache_is_started_again_and_vllm_goes_on(start: Callable[..., Serving]) -> None:
    serving = start()
    serving.ready()
    for times in (1, 2):
        os.kill(serving.pids(serving.lmcache)[-1][0], signal.SIGKILL)
        until(lambda times=times: len(serving.pids(serving.lmcache)) > times)
    first, second, third = serving.pids(serving.lmcache)
    assert [pid for pid in first + second if alive(pid)] == []
    assert all(map(alive, third))
    assert len(serving.pids(serving.vllm)) == 1
    serving.process.send_signal(signal.SIGTERM)
    status, stderr = serving.end()
    assert status == 143
    assert "LMCache ended with signal SIGKILL." in stderr
    assert "again in 0.1 s" in stderr
    assert "again in 0.2 s" in stderr


def test_lmcache_that_hangs_is_killed_and_restarted(start: Callable[..., Serving]) -> None:
    serving = start()
    serving.ready()
    (serving.lmcache / "hang").touch()
    until(lambda: not any(map(alive, serving.pids(serving.lmcache)[0])))
    (serving.lmcache / "hang").unlink()
    until(lambda: len(serving.pids(serving.lmcache)) > 1)
    assert alive(serving.pids(serving.vllm)[0][0])
    serving.process.send_signal(signal.SIGTERM)
    assert "has not answered for" in serving.end()[1]


@pytest.mark.parametrize("how", ["status 7", "SIGKILL"])
def test_the_end_of_vllm_ends_all_with_its_last_lines(start: Callable[..., Serving], how: str) -> None:
    serving = start()
    serving.ready()
    tree = serving.tree()
    if how == "SIGKILL":
        os.kill(serving.pids(serving.vllm)[0][0], signal.SIGKILL)
    else:
        (serving.vllm / "end").write_text("7")
    status, stderr = serving.end()
    assert status == (137 if how == "SIGKILL" else 7)
    assert f"vLLM ended with {'signal ' * (how == 'SIGKILL')}{how}." in stderr
    assert ("vllm listens" if how == "SIGKILL" else "vllm says its last words") in stderr
    assert [pid for pid in tree if alive(pid)] == []


@pytest.mark.parametrize(("who", "status"), [("vllm", 5), ("lmcache", 3)])
def test_a_server_that_cannot_start_says_why(start: Callable[..., Serving], who: str, status: int) -> None:
    serving = start(**{f"{who}_fail": ""})
    got, stderr = serving.end()
    assert got == status
    assert f"{who} cannot start: no such model" in stderr
    assert serving.tree() == []


def test_a_server_that_never_gets_healthy_is_given_up(start: Callable[..., Serving]) -> None:
    serving = start("--start-timeout", "1", vllm_hang="")
    status, stderr = serving.end()
    assert status == 3
    assert "vLLM was not healthy after 1 s." in stderr
    assert serving.tree() == []


def test_all_ports_in_use_are_named_at_once() -> None:
    with socket.socket() as one, socket.socket() as other:
        for taken in (one, other):
            taken.bind(("127.0.0.1", 0))
            taken.listen()
        ports = {"--port": one.getsockname()[1], "--lmcache-port": other.getsockname()[1]}
        with pytest.raises(EngineError) as problem:
            check_ports(ports)
        assert all(str(port) in problem.value.message for port in ports.values())
        assert all(flag in problem.value.remedy for flag in (*ports, "doctor"))
    check_ports(ports)


def test_a_port_in_use_is_told_before_anything_starts(start: Callable[..., Serving]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        serving = start(f"--port={taken.getsockname()[1]}")
        status, stderr = serving.end()
    assert status == 3
    assert "is in use" in stderr
    assert serving.pids(serving.lmcache) == []
