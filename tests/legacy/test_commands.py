"""Commands as JSON: what old guests are told, and what old servers tell."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap.guest.errors import ProtocolError
from firebuild_bootstrap.legacy.old_server import decoded
from firebuild_bootstrap.legacy.scripts import encode_command

RUN = wire.RunCommand(
    step=3,
    original="RUN make $X",
    workdir="/srv",
    user="app",
    argv=("/bin/sh", "-c", "make $X"),
    env={"A": "1"},
    args={"B": "2"},
)
COPY = wire.CopyCommand(step=4, original="COPY a /b/", source="step-4", target="/b/", chown="1:2")


def value(text: str) -> dict[str, str]:
    return {"OriginalCommand": "", "Value": text}


def test_a_run_has_the_members_that_old_guests_read() -> None:
    assert json.loads(encode_command(RUN)) == {
        "OriginalCommand": "RUN make $X",
        "Command": "make $X",
        "Shell": {"OriginalCommand": "", "Commands": ["/bin/sh", "-c"]},
        "Workdir": value("/srv"),
        "User": value("app"),
        "Env": {"A": "1"},
        "Args": {"B": "2"},
    }


def test_a_copy_has_the_members_that_old_guests_read() -> None:
    assert json.loads(encode_command(COPY)) == {
        "OriginalCommand": "COPY a /b/",
        "OriginalSource": "step-4",
        "Source": "step-4",
        "Stage": "",
        "Target": "/b/",
        "Workdir": value("/"),
        "User": value("0:0"),
        "UserFromLocalChown": value("1:2"),
    }


def test_commands_of_an_old_server_are_understood() -> None:
    run, copy = decoded(
        (
            '{"OriginalCommand":"RUN true","Args":{"B":"2"},"Command":"true","Env":{"A":"1"},'
            '"Shell":{"OriginalCommand":"","Commands":["/bin/sh","-c"]},'
            '"Workdir":{"OriginalCommand":"","Value":"/"},"User":{"OriginalCommand":"","Value":"0:0"}}',
            '{"OriginalCommand":"VOLUME /x"}',
            '{"originalcommand":"COPY s t","OriginalSource":"s","Source":"s","Stage":"","Target":"t",'
            '"Workdir":{"Value":"/w"},"User":{"Value":"0:0"},"UserFromLocalChown":null,"Future":1}',
        )
    )
    assert isinstance(run, wire.RunCommand)
    assert (run.step, run.argv, run.env, run.args) == (0, ("/bin/sh", "-c", "true"), {"A": "1"}, {"B": "2"})
    assert isinstance(copy, wire.CopyCommand)
    assert (copy.source, copy.target, copy.workdir, copy.chown) == ("s", "t", "/w", None)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nonsense", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "lacks OriginalCommand"),
        ('{"OriginalCommand":"RUN x"}', "lacks Shell"),
        ('{"OriginalCommand":"RUN x","Shell":{"Commands":"sh"}}', "Commands of a command: expected"),
        ('{"OriginalCommand":"RUN x","Shell":{"Commands":[1]}}', "Commands of a command: expected strings"),
        ('{"OriginalCommand":"RUN x","Shell":{},"Command":"x","Env":{"A":1}}', "Env of a command: expected"),
        ('{"OriginalCommand":"RUN x","User":"root"}', "User of a command: expected an"),
        ('{"OriginalCommand":"COPY x","Source":"x","Target":"a\\u0000"}', "Target of a command: .* a NUL"),
        (
            '{"OriginalCommand":"COPY x","Source":"\\ud800","Target":"a"}',
            "Source of a command: .* invalid Unicode",
        ),
        ('{"OriginalCommand":"RUN x","Workdir":{"Value":"\\u0000"}}', "Value of a command: .* a NUL"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_malformed_command_is_refused_in_words(text: str, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=f"command 1: .*{complaint}"):
        decoded([text])


def test_nothing_of_old_peers_is_imported_before_there_is_one() -> None:
    code = (
        "import sys, firebuild_bootstrap.service, firebuild_bootstrap.guest.bootstrap\n"
        "assert not [name for name in sys.modules if name.startswith('firebuild_bootstrap.legacy')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
