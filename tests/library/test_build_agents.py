"""A whole build with a real ssh-agent and OpenSSH's clients in a RUN; no key is anywhere but there."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cli.library import Library
from cli.watching import Watch
from firebuild_bootstrap.errors import InputError, Location, StepFailed
from firebuild_bootstrap.events import StepCached, StepOutput
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.outputs import OutputType
from firebuild_bootstrap.sshagent import read_agents

pytestmark = pytest.mark.needs("userns", "ssh-agent")
DOCKERFILE = """\
FROM host
COPY tools /tools
ENV LD_LIBRARY_PATH=/tools/lib
RUN --mount=type=ssh,required --mount=type=ssh,id=work,target=/work,mode=0640 --network=none \\
 stat -c %n:%F:%a:%u:%g $SSH_AUTH_SOCK /work && /tools/ssh-add -L > /keys && echo data > /data \\
 && /tools/ssh-keygen -q -Y sign -f /keys -n file < /data > /signature && ! /tools/ssh-add -q -D \\
 && ! /tools/ssh-add -q -x < /data && SSH_AUTH_SOCK=/work /tools/ssh-add -L && echo canary-7031 | tee /canary
RUN --mount=type=ssh,id=none test $SSH_AUTH_SOCK = /run/buildkit/ssh_agent.0 && test ! -e /run/buildkit
"""


@pytest.fixture
def user(tmp_path: Path) -> Iterator[Path]:
    """A user's directory: an agent at `socket` that has the key `id`, and another key."""
    user = tmp_path / "user"
    user.mkdir()
    words = ["ssh-agent", "-D", "-a", f"{user}/socket"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        agent.stdout.readline()  # it listens
        for name in ("id", "other"):
            keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", f"{user}/{name}"]
            subprocess.run(keygen, check=True)
        subprocess.run(["ssh-add", "-q", f"{user}/id"], check=True, env=environment(user))
        yield user
        agent.terminate()


def environment(user: Path) -> dict[str, str]:
    return {**os.environ, "SSH_AUTH_SOCK": f"{user}/socket"}


def put_tools(context: Path) -> None:
    """Put OpenSSH's clients into the context, with their libraries."""
    (context / "tools/lib").mkdir(parents=True)
    for name in ("ssh-add", "ssh-keygen"):
        program = shutil.which(name)
        assert program is not None
        shutil.copy(program, context / "tools")
        listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
        for line in listed.splitlines():
            if "=> /" in line:
                shutil.copy(line.split()[2], context / "tools/lib")


def test_a_run_lists_and_signs_and_no_key_is_anywhere(
    library: Library,
    host_home: Path,
    user: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    shutil.copytree(host_home, home, symlinks=True)
    put_tools(library.context)
    agents = read_agents(["default", f"work={user}/other", "unused=user/socket"], environment(user))
    watch = Watch([home])
    watch.expect("canary", b"canary-7031")
    library.home = Home(home)
    with caplog.at_level(logging.DEBUG), watch.running():
        image = library.build(DOCKERFILE, agents=agents, outputs=["dir"])
        with pytest.raises(StepFailed) as failed:
            library.build(
                f"{DOCKERFILE}RUN --mount=type=ssh exit 3\n",
                agents=agents,
                no_cache=False,
                keep_failed=home / "failed",
            )
    public = {name: (user / f"{name}.pub").read_text().split() for name in ("id", "other")}
    said = b"".join(event.data for event in library.of(StepOutput)).decode().splitlines()
    assert said[0].startswith("/run/buildkit/ssh_agent.0:socket:600:0:0")
    assert said[1].startswith("/work:socket:640:0:0")
    assert " ".join(public["other"][:2]) in [" ".join(line.split()[:2]) for line in said]

    made = image.output(OutputType.DIR)
    assert made is not None
    (tmp_path / "signers").write_text(f"me {' '.join(public['id'][:2])}\n")
    words = ["ssh-keygen", "-Y", "verify", "-f", "signers", "-I", "me", "-n", "file", "-s"]
    subprocess.run([*words, made / "signature"], input=b"data\n", check=True, capture_output=True)
    assert (made / "keys").read_text().split() == public["id"]
    assert not (made / "run/buildkit").exists()
    assert not os.path.lexists(made / "work")

    told = [
        *(json.dumps(event.as_json()) + repr(event) for event in library.events),
        *(repr(record.__dict__) for record in caplog.records),
        caplog.text,
        repr(failed.value.__dict__) + str(failed.value),
        repr(image) + repr(agents),
    ]
    assert [text for text in told if "canary-7031" in text]
    assert "file" in watch.places("canary")
    for name in ("id", "other"):
        for number, line in enumerate((user / name).read_text().splitlines()[2:-2]):
            watch.expect(f"{name} {number}", line.encode())
            assert watch.places(f"{name} {number}") == set()
            assert not [text for text in told if line in text]
    left = subprocess.run(
        ["ssh-add", "-L"], env=environment(user), capture_output=True, text=True, check=True
    )
    assert left.stdout.split() == public["id"]


def test_an_agent_that_is_required_is_missed_at_its_line_unless_the_step_is_cached(
    own_library: Library, user: Path
) -> None:
    dockerfile = "FROM host\n\nRUN --mount=type=ssh,id=work,required true\n"
    with pytest.raises(InputError) as caught:
        own_library.build(dockerfile)
    assert caught.value.message == ("RUN --mount=type=ssh: the SSH agent work is required, and was not given")
    assert caught.value.location == Location(str(own_library.context / "Dockerfile"), 3)
    assert "--ssh work=SOCKET" in str(caught.value)
    own_library.build(dockerfile, agents=read_agents(["work"], environment(user)))
    with closing(own_library.home):
        own_library.build(dockerfile, no_cache=False)
    assert len(own_library.of(StepCached)) == 1
