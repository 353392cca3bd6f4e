"""Configuration: unknown keys refused, secrets in private files only, precedence, generated samples that load."""

import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from storage_proxy.core.config import ConfigModel, load_config, parse_request, reference, sample
from storage_proxy.core.errors import ConfigError, InsecureFileMode, InvalidPath, InvalidRequest
from storage_proxy.core.secrets import Secret
from storage_proxy.core.wire import TargetText


class Volume(ConfigModel):
    endpoint: str = Field(description="Where the server is.", examples=["https://s3.example.com"])
    secret_key: Secret | None = Field(default=None, description="The key.")


class Api(ConfigModel):
    port: int = Field(default=6022, ge=1, le=65535, description="The port.\nSecond line.")
    allow_all: bool = Field(default=False, description="Whether.")


class Whole(ConfigModel):
    node_id: str = Field(default="n1", description="Name of this node.")
    manager_api: Api = Field(default=Api(), description="The manager's side.")
    volume: dict[str, Volume] = Field(default={}, description="Volumes by name.")


def write(path: Path, text: str, mode: int = 0o644) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_dashes_and_underscores_are_both_read_but_names_stay(tmp_path: Path) -> None:
    text = '[manager_api]\nallow-all = true\n[volume.my_vol]\nendpoint = "https://a"\n'
    config = load_config(Whole, write(tmp_path / "c.toml", text), environ={})
    assert config.manager_api.allow_all
    assert list(config.volume) == ["my_vol"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodeid = 1\n", "nodeid: unknown key"),
        ("[manager-api]\nport = 70000\n", "manager-api.port"),
        ('[volume.a]\nendpoint = "x"\nfoo = 1\n', "volume.a.foo: unknown key"),
        ("[volume.a]\n", "volume.a.endpoint"),
        ("a = = 1\n", "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(Whole, write(tmp_path / "c.toml", text), environ={})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(Whole, tmp_path / "none.toml", environ={})


def test_a_wrong_value_is_not_repeated(tmp_path: Path) -> None:
    text = '[volume.a]\nendpoint = "x"\nsecret-key = ["hunter2hunter2"]\n'
    with pytest.raises(ConfigError) as caught:
        load_config(Whole, write(tmp_path / "c.toml", text, 0o600), environ={})
    assert "hunter2" not in str(caught.value)


def test_a_file_with_secrets_must_be_private(tmp_path: Path) -> None:
    text = '[volume.a]\nendpoint = "x"\nsecret-key = "s"\n'
    path = write(tmp_path / "c.toml", text, 0o644)
    with pytest.raises(InsecureFileMode):
        load_config(Whole, path, environ={})
    path.chmod(0o600)
    assert load_config(Whole, path, environ={}).volume["a"].secret_key == Secret("s")


def test_command_line_wins_over_environment_wins_over_file(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", "[manager_api]\nport = 1\n")
    environ = {"MOORING_MANAGER_API__PORT": "2", "MOORING_MANAGER_API__ALLOW_ALL": "true", "MOORING_STATE": "x"}
    assert load_config(Whole, path, environ={}).manager_api.port == 1
    config = load_config(Whole, path, environ=environ)
    assert (config.manager_api.port, config.manager_api.allow_all) == (2, True)
    assert load_config(Whole, path, environ=environ, overrides={"manager-api": {"port": 3}}).manager_api.port == 3


def test_the_sample_loads_and_shows_every_key(tmp_path: Path) -> None:
    text = sample(Whole, title="Whole")
    for key in ("node-id", "port", "allow-all", "endpoint", "secret-key", "[manager-api]", "[volume.example]"):
        assert key in text
    config = load_config(Whole, write(tmp_path / "c.toml", text), environ={})
    assert config.volume == {}, "an example that nobody needs is not switched on by copying the file"
    wanted = text.replace("# [volume.example]", "[volume.example]").replace("# endpoint =", "endpoint =")
    config = load_config(Whole, write(tmp_path / "d.toml", wanted), environ={})
    assert config.volume["example"].endpoint == "https://s3.example.com"
    uncommented = "\n".join(
        line.removeprefix("# ") if " = " in line or line.startswith("# [") else line for line in text.splitlines()
    )
    assert tomllib.loads(uncommented)["manager-api"]["port"] == 6022


class Needing(ConfigModel):
    volume: dict[str, Volume] = Field(description="Volumes by name.")


def test_an_example_that_must_be_there_is_not_commented_out(tmp_path: Path) -> None:
    config = load_config(Needing, write(tmp_path / "c.toml", sample(Needing, title="Needing")), environ={})
    assert list(config.volume) == ["example"]


def test_the_reference_shows_every_key() -> None:
    text = reference(Whole)
    for words in ("`[manager-api]`", "`[volume.NAME]`", "| `endpoint` | required |", "| `port` | `6022` |"):
        assert words in text


class Body(BaseModel):
    size: int
    target: TargetText = "/x"


def test_a_bad_request_names_its_fields_and_not_its_values() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(Body, {"size": "hunter2"})
    assert set(caught.value.detail) == {"size"}
    assert "hunter2" not in str(caught.value.to_problem())


def test_an_error_of_the_tree_inside_a_validator_keeps_its_class() -> None:
    with pytest.raises(InvalidPath):
        parse_request(Body, {"size": 1, "target": "/a/../b"})
