from __future__ import annotations

import json
from typing import Any

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.config import Healthcheck, ImageConfig

FULL = ImageConfig(
    env={"PATH": "/bin", "EMPTY": "", "EQUALS": "a=b"},
    entrypoint=("/bin/app", "--serve"),
    cmd=("--port", "80"),
    workdir="/srv",
    user="app:app",
    shell=("/bin/bash", "-c"),
    labels={"org.example": "yes"},
    exposed_ports=("80/tcp", "53/udp"),
    volumes=("/data",),
    stop_signal="SIGQUIT",
    healthcheck=Healthcheck(test=("CMD", "true"), interval_ns=5, retries=3),
    author="someone",
    onbuild=("RUN make",),
)


def test_a_full_config_survives_the_trip_through_json() -> None:
    assert ImageConfig.from_json(json.loads(json.dumps(FULL.as_json()))) == FULL


def test_an_empty_config_survives_the_trip_and_names_only_the_working_directory() -> None:
    assert ImageConfig().as_json() == {"WorkingDir": "/"}
    assert ImageConfig.from_json(ImageConfig().as_json()) == ImageConfig()


def test_the_json_has_the_key_names_of_oci() -> None:
    document = FULL.as_json()
    assert document["Env"] == ["PATH=/bin", "EMPTY=", "EQUALS=a=b"]
    assert document["ExposedPorts"] == {"80/tcp": {}, "53/udp": {}}
    assert document["Healthcheck"] == {"Test": ["CMD", "true"], "Interval": 5, "Retries": 3}


def test_a_whole_image_document_is_accepted_and_null_counts_as_absent() -> None:
    document = {
        "author": "me",
        "config": {"Cmd": ["sh"], "Entrypoint": None, "Labels": None, "Volumes": None},
    }
    config = ImageConfig.from_json(document)
    assert config.cmd == ("sh",)
    assert config.entrypoint is None
    assert config.author == "me"


def test_variables_without_a_value_are_empty_and_those_without_a_name_are_nothing() -> None:
    assert ImageConfig.from_json({"Env": ["A=b=c", "NOVALUE", "", "=x"]}).env == {"A": "b=c", "NOVALUE": ""}


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"Env": "A=b"}, "Env .* a list of strings"),
        ({"Env": ["A=\ud800"]}, "Env .* a list of strings"),
        ({"User": "a\0b"}, "User .* a string"),
        ({"Labels": {"\udfff": "x"}}, "Labels .* an object"),
        ({"Labels": {"a": "\udfff"}}, "Labels.a .* a string"),
        ({"Cmd": [1]}, "Cmd .* a list of strings"),
        ({"User": 7}, "User .* a string, found 7"),
        ({"Volumes": ["/data"]}, "Volumes .* an object"),
        ({"Labels": {"a": 1}}, r"Labels\.a .* a string"),
        ({"Healthcheck": {"Test": ["NONE"], "Retries": "3"}}, r"Healthcheck\.Retries .* a whole number"),
    ],
)
def test_a_member_of_the_wrong_type_is_named(document: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        ImageConfig.from_json(document)
