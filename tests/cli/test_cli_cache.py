"""`firebuild cache`: what there is, and what goes."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import closing

import pytest

from cli.conftest import Cli
from firebuild_bootstrap.home import Home
from solve.stores import key, layer

pytestmark = pytest.mark.needs("userns")

BASE = f"sha256:{'1' * 64}"


def fill(cli: Cli) -> None:
    """What a build leaves: a base, two steps on it, and a cache mount."""
    with closing(Home(cli.home)) as home:
        home.layers.adopt(BASE, layer(cli.home, "base", "base"))
        first = home.cache.commit(
            key("a"), layer(cli.home, "a", "a"), parent=BASE, text="RUN\x1b[1m make", size=1 << 20
        )
        home.cache.commit(key("b"), layer(cli.home, "b", "b"), parent=first, size=2 << 20)
    mount = cli.home / "cache-mounts" / "single" / ("0" * 64)
    (mount / "0" / "data").mkdir(parents=True)
    (mount / "0" / "data" / "file").write_text("x" * 5000)
    (mount / "0" / "lock").touch()
    (mount / "id").write_text("/root/.cache/pip")
    (cli.home / "cache-mounts" / "single" / "1" / "0").mkdir(parents=True)
    (cli.home / "cache-mounts" / "single" / "1" / "0" / "lock").touch()


def entries(cli: Cli) -> list[str]:
    return [one["step"] for one in json.loads(cli("cache", "du", "--json").out)["entries"]]


def test_an_empty_cache_is_shown_and_pruned(cli: Cli) -> None:
    assert json.loads(cli("cache", "du", "--json").out) == {"bytes": 0, "entries": []}
    assert cli("buildx", "prune", "--all", "--force").out == "freed 0 B\n"


def test_du_shows_what_there_is_and_prune_removes_it(cli: Cli) -> None:
    fill(cli)
    shown = json.loads(cli("cache", "du", "--json").out)
    assert [one["kind"] for one in shown["entries"]].count("step") == 2
    assert shown["bytes"] == sum(one["bytes"] for one in shown["entries"]) > 3 << 20
    by_step = {one["step"]: one for one in shown["entries"]}
    assert by_step[key("b")]["bytes"] == 2 << 20
    assert by_step["/root/.cache/pip"]["in_use"] is False
    assert by_step[f"FROM {BASE}"]["created"] == ""
    assert by_step[key("b")]["created"].endswith("+00:00")
    table = cli("cache", "du").out
    assert "\x1b" not in table
    assert table.splitlines()[0].split() == [
        "KEY",
        "STEP",
        "SIZE",
        "CREATED",
        "LAST",
        "USED",
        "IN",
        "USE",
        "ORIGIN",
    ]
    assert table.splitlines()[-1].split()[:3] == ["total", "5", "entries"]
    assert "cache " in cli("du").out

    assert cli("cache", "prune").out == "freed 0 B\n"
    assert cli("cache", "prune", "--max-size", "2MiB", "-n").out.startswith(
        f"would remove step {key('b')[:40]}"
    )
    assert len(entries(cli)) == 5
    assert cli("cache", "prune", "--max-size", "2MiB").out.splitlines()[-1] == "freed 2.0 MiB"
    assert key("b") not in entries(cli)
    cli("cache", "prune", "--older-than", "1h")
    assert len(entries(cli)) == 4
    lock = cli.home / "cache-mounts" / "single" / ("0" * 64) / "0" / "lock"
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        assert "/root/.cache/pip" not in cli("cache", "prune", "--all", "--dry-run").out
        removed = cli("cache", "prune", "--all").out
    kinds = [" ".join(line.split()[:2]) for line in removed.splitlines()]
    assert sorted(kinds[:-1]) == ["removed base", "removed cache", "removed step"]
    assert entries(cli) == ["/root/.cache/pip"]
    os.utime(lock, (1, 1))
    assert "cache mount /root/.cache/pip" in cli("cache", "prune", "--older-than", "2w", "-n").out
    assert "cache mount /root/.cache/pip" in cli("cache", "prune", "--max-size", "1KiB").out
    assert entries(cli) == []
    assert cli.leftovers() == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-size", "5X", "--max-size: expected a size such as 64MiB"),
        ("--older-than", "yesterday", "--older-than: expected a duration such as 72h or 2w, found yesterday"),
        ("--older-than", "-1h", "--older-than: expected a duration of zero or more"),
    ],
)
def test_a_limit_that_is_none_is_refused(cli: Cli, option: str, value: str, message: str) -> None:
    assert cli("cache", "prune", option, value, status=2).first.startswith(f"error: {message}")


def test_no_cache_and_its_stages_are_read() -> None:
    from firebuild_bootstrap.cli.rootfs import _names

    assert _names(("Build, test", "", "0")) == {"build", "test", "0"}
