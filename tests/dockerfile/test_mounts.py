"""RUN --mount and --network: the options, what they are without being said, and what is wrong."""

from __future__ import annotations

import pytest

from dockerfile.planning import Bases, Read
from firebuild_bootstrap.dockerfile.graph import (
    BindMount,
    CacheMount,
    ContextRef,
    Graph,
    ImageRef,
    Mount,
    Network,
    Run,
    SecretMount,
    Sharing,
    SshMount,
    StageRef,
    TmpfsMount,
)
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.image.config import ImageConfig


def run_of(graph: Graph) -> Run:
    operation = graph.target.steps[-1].operation
    assert isinstance(operation, Run)
    return operation


@pytest.mark.parametrize(
    ("options", "mount"),
    [
        ("target=/m", BindMount("/m")),
        ("type=bind,source=d/../e,dst=/m,rw", BindMount("/m", source="/e", writable=True)),
        ("destination=m,src=../x,ro=false", BindMount("/w/m", source="/x", writable=True)),
        ("target=/m,rw,readonly", BindMount("/m")),
        ("target=/m,readwrite=0", BindMount("/m")),
        ("target=.", BindMount("/w")),
        ("type=bind", BindMount("/w")),
        ("from=one,source=/a,target=/m", BindMount("/m", StageRef(0), "/a")),
        ("from=ONE,target=/m", BindMount("/m", StageRef(0))),
        ("from=tools,target=/m", BindMount("/m", ImageRef("tools"))),
        ("type=cache,target=/c", CacheMount("/c", "/c")),
        ("TYPE=Cache,target=/c/,sharing=LOCKED", CacheMount("/c", "/c", Sharing.LOCKED)),
        # The id is not that of the work directory.
        ("type=cache,target=c", CacheMount("/w/c", "c")),
        (
            "type=cache,target=/c,id=x,uid=1,gid=2,mode=0711,from=one,source=/s,ro",
            CacheMount("/c", "x", Sharing.SHARED, StageRef(0), "/s", True, 0o711, 1, 2),
        ),
        ("type=tmpfs,target=/t", TmpfsMount("/t")),
        ("type=tmpfs,target=/t,size=64m", TmpfsMount("/t", 64 * 1024**2)),
        ("type=tmpfs,target=/t,size=1.5GiB", TmpfsMount("/t", 3 * 1024**3 // 2)),
        ("type=tmpfs,target=/t,size=10", TmpfsMount("/t", 10)),
        ("type=secret,id=dir/key", SecretMount("dir/key", "/run/secrets/key")),
        ("type=secret,src=key,required", SecretMount("key", "/run/secrets/key", required=True)),
        ("type=secret,target=/etc/key", SecretMount("key", "/etc/key")),
        ("type=secret,id=key,env=KEY", SecretMount("key", "", "KEY")),
        ("type=secret,id=key,env=", SecretMount("key", "", "key")),
        ("type=secret,id=key,env=KEY,target=k", SecretMount("key", "/w/k", "KEY")),
        (
            "type=secret,id=key,mode=0440,uid=5,gid=6,required=false",
            SecretMount("key", "/run/secrets/key", "", False, 0o440, 5, 6),
        ),
        ("type=ssh", SshMount("default", "/run/buildkit/ssh_agent.0")),
        (
            "type=ssh,id=work,target=/s,required=true,mode=0666,uid=1,gid=1",
            SshMount("work", "/s", True, 0o666, 1, 1),
        ),
        (r"\"target=/a,b\",source=c", BindMount("/a,b", source="/c")),
        ("target=$T,source=${S:-d}", BindMount("/t", source="/d")),
        ("type=$KIND,target=/c", CacheMount("/c", "/c")),
    ],
)
def test_options_say_what_is_mounted(read: Read, bases: Bases, options: str, mount: Mount) -> None:
    bases.images["tools"] = ImageConfig()
    text = "FROM scratch AS one\nFROM scratch\nARG T=/t KIND=cache\nWORKDIR /w\n"
    assert run_of(read(f"{text}RUN --mount={options} true\n")).mounts == (mount,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("target=/", "the target can't be the root directory"),
        ("type=bind,source=a", "the target can't be the root directory"),
        ("type=magic,target=/m", "type: expected one of bind, cache, tmpfs, secret, ssh, found 'magic'"),
        ("target=/m,colour=blue", "unknown option 'colour'"),
        ("target", "expected target=VALUE, found 'target'"),
        ("target=/m,required", "required is not for the type bind"),
        ("target=/m,size=1m", "size is not for the type bind"),
        ("type=tmpfs,target=/m,size=big", "size: expected a size such as 64MiB, found 'big'"),
        ("target=/m,sharing=shared", "sharing is not for the type bind"),
        ("type=cache,target=/c,sharing=maybe", "sharing: expected one of shared, private, locked"),
        ("target=/m,mode=0755", "mode is not for the type bind"),
        ("type=tmpfs,target=/m,uid=1", "uid is not for the type tmpfs"),
        ("type=cache,target=/c,mode=9", "mode: expected an octal mode, found '9'"),
        ("type=cache,target=/c,uid=app", "uid: expected a number, found 'app'"),
        ("type=cache,target=/c,gid=4294967296", "gid: expected a number, found '4294967296'"),
        ("type=secret,id=s,uid=4294967295", "uid: expected a number, found '4294967295'"),
        ("target=/m,ro=maybe", "readonly: expected true or false, found 'maybe'"),
        ("type=secret", "a secret needs its id"),
        ("type=secret,id=a,source=b", "source and id can't both be given"),
        ("type=secret,id=a,from=b", "from is not for the type secret"),
        ("type=secret,id=a,env=A=B", "'A=B' is not the name of a variable"),
        ("type=ssh,from=b", "from is not for the type ssh"),
        (r"\"target", "the double quote that is character 1 has no end"),
        ("", "expected options such as type=cache,target=/path"),
        ("target=/m,from=$x", "from can't hold variables"),
        ("target=/m,from=0", "there is no image '0'"),
        ("target=/m,from=two", "the stage 'two' can't take files from itself"),
        ("target=${x", "failed to process '${x'"),
    ],
)
def test_a_wrong_mount_is_an_error(read: Read, options: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(f"FROM scratch AS one\nFROM scratch AS two\n\nRUN --mount={options} true\n")
    assert message in caught.value.message
    assert caught.value.location == Location("Dockerfile", 4)


def test_a_misspelt_option_is_suggested(read: Read) -> None:
    with pytest.raises(InputError) as caught:
        read("FROM scratch\nRUN --mount=typ=cache,target=/c true\n")
    assert caught.value.hint == "did you mean type?"


def test_mounts_keep_their_order_and_agents_are_numbered(read: Read) -> None:
    run = run_of(
        read("FROM scratch\nRUN --mount=type=ssh --mount=target=/m --mount=type=ssh,id=b --network=none x\n")
    )
    assert run.mounts == (
        SshMount("default", "/run/buildkit/ssh_agent.0"),
        BindMount("/m", ContextRef()),
        SshMount("b", "/run/buildkit/ssh_agent.1"),
    )
    assert run.network is Network.NONE


@pytest.mark.parametrize(
    ("flags", "network"),
    [
        ("", Network.DEFAULT),
        ("--network=default", Network.DEFAULT),
        ("--network=host --security=sandbox", Network.HOST),
    ],
)
def test_the_network_of_a_run(read: Read, flags: str, network: Network) -> None:
    assert run_of(read(f"FROM scratch\nRUN {flags} x\n")).network is network


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("network=hots", "RUN --network: expected default, none or host, found 'hots'"),
        ("security=loose", "RUN --security: expected sandbox, found 'loose'"),
    ],
)
def test_other_values_are_errors(read: Read, flag: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(f"FROM scratch\nRUN --{flag} x\n")
    assert caught.value.message == message
