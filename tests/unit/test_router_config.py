"""The router's configuration: every mistake names its key and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from router.config import ConfigError, RouterConfig

REQUIRED = {"model_name": "tiny", "model_dir": "/models/tiny"}


def test_the_required_keys_suffice_and_nothing_listens_beyond_loopback() -> None:
    config = RouterConfig.from_mapping(REQUIRED)
    for address in (config.listen_address, config.admin_address, config.metrics_address):
        assert address.startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queue_limmit": 3}, "unknown key 'queue_limmit'; known keys: .*queue_limit"),
        ({"queue_limit": "3"}, "queue_limit must be a whole number, not str"),
        ({"queue_limit": True}, "queue_limit must be a whole number, not bool"),
        ({"queue_limit": -1}, "queue_limit is -1; must be 0 to"),
        ({"lease_s": 0.5}, "lease_s is 0.5; must be 1 to"),
        ({"max_context_token_count": "x"}, "max_context_token_count must be a whole number or absent"),
        ({"listen_address": "50051"}, "listen_address .* must be host:port"),
        ({"listen_address": "127.0.0.1:99999"}, "listen_address .* must be host:port"),
        ({"listen_address": "0.0.0.0:50051"}, "beyond loopback"),
        ({"metrics_address": "10.0.0.1:1"}, "metrics_address listens beyond loopback"),
        ({"default_deadline_s": 7200.0}, "default_deadline_s .* must not be above max_deadline_s"),
        (
            {"max_connection_age_s": 60.0, "max_connection_age_grace_s": 3600.0},
            r"max_connection_age_grace_s \(3600.0\) must be above max_deadline_s",
        ),
        ({"gap_timeout_s": 0.0}, "gap_timeout_s is 0.0; must be 0.1 to"),
        ({"worker_silence_s": 0.1}, "at least twice load_interval_s"),
        ({"placement": "both"}, 'placement is "both"'),
        ({"log_level": "loud"}, "log_level"),
        ({"model_name": ""}, "model_name is empty"),
    ],
)
def test_a_mistake_names_its_key_and_the_fix(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterConfig.from_mapping({**REQUIRED, **change})


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="missing key 'model_dir'"):
        RouterConfig.from_mapping({"model_name": "x"})


def test_whole_numbers_are_taken_for_seconds() -> None:
    assert RouterConfig.from_mapping({**REQUIRED, "lease_s": 5}).lease_s == 5.0


def test_json_and_toml_files_are_read_and_a_bad_file_is_named(tmp_path: Path) -> None:
    as_json, as_toml = tmp_path / "router.json", tmp_path / "router.toml"
    as_json.write_text(json.dumps(REQUIRED))
    as_toml.write_text('model_name = "tiny"\nmodel_dir = "/models/tiny"\n')
    assert RouterConfig.load(as_json) == RouterConfig.load(as_toml)
    as_toml.write_text("model_name = ")
    with pytest.raises(ConfigError, match=r"router\.toml is malformed"):
        RouterConfig.load(as_toml)
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere"):
        RouterConfig.load(tmp_path / "nowhere.json")
    as_json.write_text("[]")
    with pytest.raises(ConfigError, match="one object"):
        RouterConfig.load(as_json)
