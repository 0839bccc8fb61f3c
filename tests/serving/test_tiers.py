"""Second tiers: what `--l2` takes, and that no password stands in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lmcache_rag.cli.app import app
from lmcache_rag.errors import ConfigError
from lmcache_rag.plan.economics import Tier, tier_json
from lmcache_rag.serving.tiers import checked_tier, filled, second_tier

PASSWORD = "hunter2-and-more"


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"path": "/data"}', '{"type": 5}', "s3://bucket", "redis://host", "redis://me:${PW}@host:x", "{}"],
)
def test_a_second_tier_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--l2"):
        second_tier(text)


@pytest.mark.parametrize(
    "text",
    [
        f"redis://me:{PASSWORD}@host:1",
        f"redis://:{PASSWORD}@host:1",
        f"rediss://:{PASSWORD}@host:1",
        f"redis://:{PASSWORD}@host",
        json.dumps({"type": "resp", "password": PASSWORD}),
        json.dumps({"type": "resp", "password": PASSWORD + "${X}"}),
        json.dumps({"type": "hfbucket", "token": PASSWORD}),
        json.dumps({"type": "s3", "options": [{"aws_secret_access_key": PASSWORD}]}),
        json.dumps({"type": "s3", "aws_access_key_id": PASSWORD}),
        json.dumps({"type": "plugin", "redis_password": PASSWORD, "apiKey": PASSWORD}),
        json.dumps({"type": "valkey", "url": f"valkey://me:{PASSWORD}@host:1"}),
        json.dumps({"type": "resp", "password": PASSWORD})[:-1],
    ],
)
def test_a_password_on_the_command_line_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        second_tier(text)
    assert PASSWORD not in str(caught.value)
    assert (
        "${" in caught.value.remedy
        or "--l2 is not valid JSON" in caught.value.message
        or "known" in caught.value.message
    )
    result = CliRunner().invoke(app, ["serve", "some/model", "--dry-run", f"--l2={text}"])
    assert result.exit_code == 2
    assert PASSWORD not in result.output + result.stderr


@pytest.mark.parametrize(
    "tier",
    [
        {"type": "s3", "s3_endpoint": "b.s3.amazonaws.com", "s3_region": "eu-west-1"},
        {"type": "hfbucket", "token_env": "MY_TOKEN", "key_prefix": "kv", "max_tokens": 5},
        {"type": "resp", "host": "r", "port": 1, "password": "${file:/run/secrets/redis}"},
        {"type": "fs", "base_path": "/data/token"},
    ],
)
def test_a_second_tier_in_json_is_passed_on(tier: dict[str, Any]) -> None:
    assert json.loads(second_tier(json.dumps(tier))) == tier


def test_placeholders_come_from_variables_or_files(tmp_path: Path) -> None:
    (tmp_path / "pw").write_text(f"{PASSWORD}\n")
    tier = second_tier(f"redis://me:${{file:{tmp_path / 'pw'}}}@[::1]:6379")
    assert PASSWORD not in tier
    wanted = {"type": "valkey", "startup_nodes": "::1:6379", "request_timeout": 2.0, "username": "me"}
    wanted["password"] = PASSWORD
    assert json.loads(filled(tier, {})) == wanted
    tier = second_tier('{"type": "x", "deep": [{"password": "${PW}"}], "n": 5}')
    assert json.loads(filled(tier, {"PW": 'a"b'})) == {"type": "x", "deep": [{"password": 'a"b'}], "n": 5}
    with pytest.raises(ConfigError, match="PW is not set"):
        filled(tier, {})
    with pytest.raises(ConfigError, match="cannot be read"):
        filled('{"type": "x", "password": "${file:/no/such}"}', {})
    with pytest.raises(ConfigError, match="names no variable"):
        second_tier('{"type": "x", "password": "${a b}"}')


def test_bytes_of_a_tier_are_checked(tmp_path: Path) -> None:
    sealed = {"type": "lmcache_rag", "secret_file": str(tmp_path / "secret")}
    for text in ("/data/kv", "redis://r:6379", '{"type": "resp", "host": "r", "port": 1}', '{"type": "s3"}'):
        assert json.loads(checked_tier(second_tier(text), tmp_path / "secret"))["serde"] == sealed
    assert json.loads(checked_tier(second_tier("/data/kv"), None))["serde"] == {"type": "lmcache_rag"}
    recommended = tier_json(Tier("disk", 100, 6), "/data/kv")  # by plan
    assert json.loads(checked_tier(second_tier(recommended), None))["serde"] == {"type": "lmcache_rag"}
    for text in (
        '{"type": "raw_block"}',
        '{"type": "fs", "base_path": "/d", "use_odirect": true}',
        '{"type": "fs", "base_path": "/d", "serde": {"type": "fp8"}}',
    ):
        assert json.loads(checked_tier(second_tier(text), None)) == json.loads(text)
