"""Where settings come from, and what is said when they have no meaning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmcache_rag.errors import ConfigError
from lmcache_rag.settings import FILE, Settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith("LMCACHE_RAG_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(text, encoding="utf-8")
    return folder


def test_defaults_hold_when_nothing_is_said() -> None:
    settings = Settings.load()
    assert (settings.policy, settings.ratio, settings.top_k, settings.blend) == ("query", "auto", 4, True)
    assert settings.store == Path("lmcache-rag-store")
    assert settings.model is None


def test_the_stores_file_goes_before_the_default(tmp_path: Path) -> None:
    store = write(tmp_path / "s", "top_k = 7\nblend = false\n")
    settings = Settings.load(store)
    assert (settings.top_k, settings.blend, settings.ratio) == (7, False, "auto")


def test_the_environment_goes_before_the_stores_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write(tmp_path / "s", "top_k = 7\nratio = 0.5\n")
    monkeypatch.setenv("LMCACHE_RAG_TOP_K", "8")
    settings = Settings.load(store)
    assert (settings.top_k, settings.ratio) == (8, 0.5)


def test_an_argument_goes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write(tmp_path / "s", "top_k = 7\n")
    monkeypatch.setenv("LMCACHE_RAG_TOP_K", "8")
    assert Settings.load(store, top_k=9).top_k == 9


def test_an_argument_of_none_counts_as_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_RAG_TOP_K", "8")
    assert Settings.load(top_k=None, ratio=None).top_k == 8


def test_an_empty_variable_counts_as_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write(tmp_path / "s", 'ratio = 0.5\nmodel = "m"\n')
    monkeypatch.setenv("LMCACHE_RAG_RATIO", "")
    monkeypatch.setenv("LMCACHE_RAG_MODEL", "")
    settings = Settings.load(store)
    assert (settings.ratio, settings.model) == (0.5, "m")


def test_the_environment_names_the_store_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_RAG_STORE", str(write(tmp_path / "s", "top_k = 7\n")))
    settings = Settings.load()
    assert (settings.store, settings.top_k) == (tmp_path / "s", 7)


def test_the_file_of_the_default_store_is_read(tmp_path: Path) -> None:
    write(tmp_path / "lmcache-rag-store", "top_k = 7\n")
    assert Settings.load().top_k == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", 1.5),
        ("ratio", -0.1),
        ("ratio", {"tokens": -1}),
        ("ratio", "tokens=many"),
        ("top_k", 0),
        ("max_tokens", 0),
        ("temperature", -1),
        ("chunk_tokens", 8),
        ("kv_budget_gb", 0),
        ("top_k", "many"),
    ],
)
def test_a_wrong_value_gives_an_error_with_its_setting(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: ") as caught:
        Settings.load(**{name: value})
    assert "lmcache-rag settings" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "toml", "value"),
    [
        ("auto", '"auto"', "auto"),
        ("0.25", "0.25", 0.25),
        ("1", "1", 1.0),
        ("tokens=400", "{ tokens = 400 }", {"tokens": 400}),
        ('{"tokens": 400}', '"tokens=400"', {"tokens": 400}),
    ],
)
def test_the_ratio_has_its_forms_in_every_place(
    text: str, toml: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Settings.load(ratio=value).ratio == value
    assert Settings.load(write(tmp_path / "s", f"ratio = {toml}\n")).ratio == value
    monkeypatch.setenv("LMCACHE_RAG_RATIO", text)
    assert Settings.load().ratio == value


@pytest.mark.parametrize("place", ["argument", "environment", "file"])
def test_an_unknown_policy_is_refused_with_the_choices(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write(tmp_path / "s", 'policy = "best"\n' if place == "file" else "")
    if place == "environment":
        monkeypatch.setenv("LMCACHE_RAG_POLICY", "best")
    wanted = r"^policy: There is no recompute policy 'best'\. Choose one of: query, hkvd, head, none, all\."
    with pytest.raises(ConfigError, match=wanted):
        Settings.load(store, policy="best" if place == "argument" else None)


def test_settings_know_the_policies_without_torch() -> None:
    code = "import sys; from lmcache_rag import Settings; Settings.load(policy='hkvd'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match="ratoi"):
        Settings.load(ratoi=0.5)


def test_an_unknown_name_in_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ratoi") as caught:
        Settings.load(write(tmp_path / "s", "ratoi = 0.5\n"))
    assert FILE in caught.value.remedy


def test_a_file_that_is_no_toml_is_refused_with_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{FILE} cannot be read.*line 2"):
        Settings.load(write(tmp_path / "s", "top_k = 1\nratio =\n"))


def test_a_folder_with_the_files_name_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "s" / FILE).mkdir(parents=True)
    assert Settings.load(tmp_path / "s").top_k == 4


def test_settings_cannot_be_changed_afterwards() -> None:
    settings = Settings.load()
    with pytest.raises(ValueError, match="frozen"):
        settings.top_k = 5


def test_every_setting_has_a_description() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_a_folder_may_be_a_path(tmp_path: Path) -> None:
    assert Settings.load(model=tmp_path, embedder=tmp_path).model == str(tmp_path)


def test_an_age_has_a_unit(tmp_path: Path) -> None:
    assert Settings.load(tmp_path, kv_ttl="12h").kv_ttl == 12 * 3600
    assert Settings.load(tmp_path, kv_ttl=90).kv_ttl == Settings.load(tmp_path, kv_ttl="1.5m").kv_ttl == 90
    assert Settings.load(tmp_path, kv_ttl="off").kv_ttl is Settings.load(tmp_path).kv_ttl is None
    for wrong in ("30 days", "d", "-1d", 0, "0h", True):
        with pytest.raises(ConfigError, match=r"^kv_ttl: .*is not an age"):
            Settings.load(tmp_path, kv_ttl=wrong)
