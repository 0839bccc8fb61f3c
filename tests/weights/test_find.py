"""Where model and embedder come from: folder, Hugging Face cache, hub; what to do if it fails; digests of weights."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_kit
import pytest
from hub_kit import COMMIT, LocalServer, serving

from lmcache_rag.errors import SourceError
from lmcache_rag.weights import (
    choose_model,
    content_digest,
    find,
    find_embedder,
    find_model,
    find_recorded,
    kv_bytes_per_token,
    packages,
    revision_of,
    tokenizer_digest,
)

MODEL = {"config.json": b"{}", "model.safetensors": b"w" * 5000, "tokenizer.json": b"{}"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Own caches, and a hub that refuses connections: what a test does not set up is not there."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("LMCACHE_RAG_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return cache


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[hub_kit.Answer], LocalServer]]:
    """Start a server in the hub's place."""
    from contextlib import ExitStack

    from huggingface_hub import constants

    with ExitStack() as stack:

        def start(answer: hub_kit.Answer) -> LocalServer:
            server = stack.enter_context(serving(answer))
            monkeypatch.setattr(constants, "ENDPOINT", server.url)
            monkeypatch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
            )
            return server

        yield start


# A folder that the user names


def test_a_named_folder_is_served_before_anything_else(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", MODEL)
    source = find_model(folder)
    assert (source.path, source.origin, source.name) == (folder, "folder", "mine")
    assert str(folder) in source.message


def test_a_relative_folder_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "org" / "name", MODEL)
    monkeypatch.chdir(tmp_path)
    assert find_model("org/name").path == tmp_path / "org" / "name"


def test_a_folder_has_one_name_however_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mine", MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("mine") == find_model("./mine/") == find_model("~/mine")


@pytest.mark.parametrize(
    ("lacking", "without", "extra"),
    [
        ("there is no config.json", "config.json", {}),
        ("there are no *.safetensors", "model.safetensors", {}),
        ("pickled weights are never loaded", "model.safetensors", {"pytorch_model.bin": b"x"}),
        ("there is no tokenizer", "tokenizer.json", {}),
        (
            "b.safetensors is missing",
            "",
            {"model.safetensors.index.json": json.dumps({"weight_map": {"x": "b.safetensors"}}).encode()},
        ),
        ("a readable model.safetensors.index.json", "", {"model.safetensors.index.json": b"{"}),
    ],
)
def test_a_folder_that_is_not_whole_says_what_it_lacks(
    tmp_path: Path, lacking: str, without: str, extra: dict[str, bytes]
) -> None:
    write(tmp_path, {name: content for name, content in MODEL.items() if name != without} | extra)
    with pytest.raises(SourceError, match="Name a folder with") as caught:
        find_model(tmp_path)
    assert lacking in str(caught.value)


@pytest.mark.parametrize("name", ["./nothing", "~/nothing", "/nothing/here", "a/b/c"])
def test_a_missing_path_is_not_searched_on_the_hub(name: str, hub: Callable[[hub_kit.Answer], LocalServer]) -> None:
    server = hub(hub_kit.fail)
    with pytest.raises(SourceError, match="there is no such folder"):
        find_model(name)
    assert server.asked == []


def test_an_embedder_may_have_weights_in_a_module(tmp_path: Path) -> None:
    modules = json.dumps([{"path": "0_Static"}]).encode()
    files = {"modules.json": modules, "0_Static/model.safetensors": b"w", "0_Static/tokenizer.json": b"{}"}
    assert find_embedder(write(tmp_path, files)).path == tmp_path


# The Hugging Face cache and hub


def test_the_hub_cache_is_served_without_network(hub_cache: Path, hub: Callable[..., LocalServer]) -> None:
    snapshot = hub_kit.lay_out_snapshot(hub_cache, "acme/tiny", MODEL)
    server = hub(hub_kit.say_nothing)
    source = find_model("acme/tiny")
    assert (source.path, source.origin, source.name) == (snapshot, "hub", "acme/tiny")
    assert revision_of(source.path) == COMMIT
    assert server.asked == []


def test_a_download_that_was_cut_off_is_not_served(hub_cache: Path) -> None:
    hub_kit.lay_out_snapshot(hub_cache, "acme/tiny", {"config.json": b"{}", "tokenizer.json": b"{}"})
    with pytest.raises(SourceError, match=r"not whole: there are no \*\.safetensors"):
        find_model("acme/tiny")


def test_a_bare_embedder_is_of_sentence_transformers(hub_cache: Path) -> None:
    hub_kit.lay_out_snapshot(hub_cache, "sentence-transformers/tiny", MODEL)
    assert find_embedder("tiny").name == "sentence-transformers/tiny"


def test_the_hub_gives_data_but_no_pickles_or_code(hub: Callable[..., LocalServer]) -> None:
    unwanted = {
        "pytorch_model.bin": b"x",
        "modeling.py": b"x",
        "onnx/model.onnx": b"x",
        "consolidated.safetensors": b"x",
    }
    wanted = MODEL | {"chat_template.jinja": b"t", "merges.txt": b"m", "1_Pooling/config.json": b"{}"}
    server = hub(hub_kit.hub_of("acme/tiny", wanted | unwanted))
    source = find_model("acme/tiny")
    assert source.origin == "hub"
    files = {
        file.relative_to(source.path).as_posix(): file.read_bytes()
        for file in source.path.rglob("*.*")
        if file.is_file()
    }
    assert files == wanted
    assert revision_of(source.path) == COMMIT
    asked = len(server.asked)
    assert find_model("acme/tiny").path == source.path
    assert len(server.asked) == asked, "the second time needs no network"


def test_a_model_missing_on_the_hub_is_named(hub: Callable[..., LocalServer]) -> None:
    hub(hub_kit.hub_of("acme/other", MODEL))
    with pytest.raises(SourceError, match="acme/tiny") as caught:
        find_model("acme/tiny")
    assert "404" in str(caught.value)


def test_a_hub_model_without_safetensors_is_refused(hub: Callable[..., LocalServer]) -> None:
    hub(hub_kit.hub_of("acme/tiny", {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"x"}))
    with pytest.raises(SourceError, match=r"cannot be used: there are no \*\.safetensors"):
        find_model("acme/tiny")


ENDS = 60.0  # seconds; a probe takes 3


@pytest.mark.parametrize("trouble", [hub_kit.say_nothing, hub_kit.drip])
def test_a_hub_that_never_finishes_answering_is_left(trouble: hub_kit.Answer, hub: Callable[..., LocalServer]) -> None:
    server = hub(trouble)
    start = time.monotonic()
    with pytest.raises(SourceError, match=f"{server.url}") as caught:
        find_model("acme/tiny")
    assert 2.5 < time.monotonic() - start < ENDS
    assert len(server.asked) == 1
    assert "run once with network" in caught.value.remedy


def test_a_hub_that_accepts_no_connection_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as full:  # its queue of waiting connections is kept full, so that more are left unanswered
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{full.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(SourceError):
            find_model("acme/tiny")
        assert time.monotonic() - start < ENDS
        for client in waiting:
            client.close()


def test_a_look_up_of_the_hubs_name_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    # A name server that is silent cannot be had here without changing the machine's settings.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2 * ENDS))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid")
    start = time.monotonic()
    with pytest.raises(SourceError, match="did not answer within 3 s"):
        find_model("acme/tiny")
    assert time.monotonic() - start < ENDS


def test_a_gateway_that_reaches_nothing_is_no_hub(hub: Callable[..., LocalServer]) -> None:
    server = hub(hub_kit.fail)
    with pytest.raises(SourceError, match="answered with error 502"):
        find_model("acme/tiny")
    assert len(server.asked) == 1


def test_a_refused_connection_is_the_reason_given() -> None:
    with pytest.raises(SourceError, match="cannot be reached"):
        find_model("acme/tiny")


def test_offline_mode_is_respected_and_named(hub: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch) -> None:
    server = hub(hub_kit.hub_of("acme/tiny", MODEL))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="switched off by HF_HUB_OFFLINE") as caught:
        find_model("acme/tiny")
    assert "unset HF_HUB_OFFLINE" in caught.value.remedy
    assert server.asked == []


def test_a_name_that_cannot_be_one_is_told_as_such() -> None:
    with pytest.raises(SourceError, match=r"Tried: Hugging Face cache: .*not a name"):
        find_model("not a name")


def test_which_source_served_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, MODEL)
    with caplog.at_level(logging.INFO, logger="lmcache_rag"):
        source = find_model(tmp_path)
    assert caplog.messages == [source.message]


@pytest.mark.parametrize("changed", sorted(MODEL))
def test_one_changed_byte_makes_another_revision(tmp_path: Path, changed: str) -> None:
    before = revision_of(write(tmp_path, MODEL))
    content = bytearray(MODEL[changed])
    content[len(content) // 2] ^= 1
    (tmp_path / changed).write_bytes(content)
    assert revision_of(tmp_path) != before


def test_a_revision_ignores_place_and_notes(tmp_path: Path) -> None:
    first = write(tmp_path / "a", MODEL)
    second = write(tmp_path / "b", MODEL | {"README.md": b"text", "trainer_state.json": b"{}"})
    assert revision_of(first) == revision_of(second)


def test_moved_content_makes_another_revision(tmp_path: Path) -> None:
    first = write(tmp_path / "a", MODEL | {"a.safetensors": b"12", "b.safetensors": b"3"})
    second = write(tmp_path / "b", MODEL | {"a.safetensors": b"1", "b.safetensors": b"23"})
    third = write(tmp_path / "c", MODEL | {"a.safetensors": b"123", "b.safetensors": b""})
    assert len({revision_of(folder) for folder in (first, second, third)}) == 3


def test_an_embedders_module_counts_in_its_digest(tmp_path: Path) -> None:
    modules = json.dumps([{"path": ""}, {"path": "1_Dense"}, {"path": "2_Normalize"}]).encode()
    files = MODEL | {"modules.json": modules, "1_Dense/model.safetensors": b"1"}
    first = write(tmp_path / "a", files)
    second = write(tmp_path / "b", files | {"1_Dense/model.safetensors": b"2"})
    assert content_digest(first) != content_digest(second)


def test_the_tokenizers_digest_ignores_the_weights(tmp_path: Path) -> None:
    first = write(tmp_path / "a", MODEL)
    second = write(tmp_path / "b", MODEL | {"model.safetensors": b"other"})
    third = write(tmp_path / "c", MODEL | {"tokenizer.json": b"[]"})
    assert tokenizer_digest(first) == tokenizer_digest(second) != tokenizer_digest(third)


def test_another_folders_weights_are_another_revision(smollm2_path: Path, embedder_path: Path) -> None:
    digests = [revision_of(smollm2_path), revision_of(embedder_path)]
    assert len(set(digests)) == 2
    assert all(len(digest) in (32, 40) for digest in digests)


@pytest.mark.parametrize(
    ("facts", "size"),
    [
        ({"num_key_value_heads": 8, "head_dim": 128, "dtype": "bfloat16"}, 2 * 32 * 8 * 128 * 2),
        ({"num_key_value_heads": 4, "torch_dtype": "float32"}, 2 * 32 * 4 * 128 * 4),
        ({}, 2 * 32 * 32 * 128 * 2),  # Llama 7B's: as many KV heads as heads
        ({"dtype": "unheard"}, 0),
        ({"num_attention_heads": None}, 0),
    ],
)
def test_kv_bytes_are_read_from_the_configuration(tmp_path: Path, facts: dict[str, object], size: int) -> None:
    whole = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096} | facts
    for nested in (whole, {"text_config": whole}):
        (tmp_path / "config.json").write_text(json.dumps(nested))
        assert kv_bytes_per_token(tmp_path) == size
    assert kv_bytes_per_token(tmp_path / "nowhere") == 0


# The model of a new store, and of one that has one


def test_the_size_of_a_download_is_logged_first(
    hub: Callable[..., LocalServer], caplog: pytest.LogCaptureFixture
) -> None:
    files = MODEL | {"model.safetensors": bytes(7_000_000), "pytorch_model.bin": bytes(9_000_000)}
    hub(hub_kit.hub_of("acme/tiny", files))
    with caplog.at_level(logging.INFO, logger="lmcache_rag"):
        find_model("acme/tiny")
    assert caplog.messages[0].startswith("Getting acme/tiny (7 MB) from http://127.0.0.1:")


def test_a_new_store_gets_the_better_model(hub: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "BETTER_MODEL", "acme/better")
    hub(hub_kit.hub_of("acme/better", MODEL))
    assert choose_model().name == "acme/better"


def test_without_a_hub_a_new_store_gets_the_default(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "BETTER_MODEL", "acme/better")
    monkeypatch.setattr(find, "DEFAULT_MODEL", "acme/tiny")
    hub_kit.lay_out_snapshot(hub_cache, "acme/tiny", MODEL)
    assert choose_model().name == "acme/tiny"


def test_a_recorded_package_stays_the_source(hub_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from package_kit import NAME, install, tiny_package

    monkeypatch.setattr(packages, "PACKAGES", (tiny_package(),))
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    hub_kit.lay_out_snapshot(hub_cache, NAME, MODEL)
    assert find_model(NAME).origin == "hub"  # other weights under the same name
    assert find_recorded(NAME, "package").origin == "package"


def test_a_recorded_commit_stays_the_source(hub_cache: Path) -> None:
    snapshot = hub_kit.lay_out_snapshot(hub_cache, "acme/tiny", MODEL)
    newer = snapshot.with_name("f" * 40)
    write(newer, MODEL)
    (snapshot.parents[1] / "refs" / "main").write_text(newer.name)
    assert find_model("acme/tiny").path == newer
    assert find_recorded("acme/tiny", "hub", COMMIT).path == snapshot


def test_a_recorded_package_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from package_kit import NAME, tiny_package

    monkeypatch.setattr(packages, "PACKAGES", (tiny_package(),))
    for name, value in (("PIP_CONFIG_FILE", "/dev/null"), ("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path))):
        monkeypatch.setenv(name, value)
    with pytest.raises(SourceError, match=r"was filled with .* which cannot be had: .*--model"):
        find_recorded(NAME, "package")
