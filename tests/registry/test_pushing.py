"""What is pushed, in which order, and which answers are refused."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import Manifest, parse_manifest
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.registry.answers import RegistryError
from firebuild_bootstrap.registry.push import push
from registry.conftest import LOGIN, Client
from registry.servers import PASSWORD, Handler, Image, Small, always, digest, once, wants_basic

IMAGE = Image((b"first layer " * 40_000,))


def manifest(client: Client) -> Manifest:
    for data in (IMAGE.config, *IMAGE.layers):
        client.blobs.add(data)
    found = parse_manifest(IMAGE.manifest)
    assert isinstance(found, Manifest)
    return found


def pushed(small: Small, client: Client, *related: str) -> str:
    registries = client.registries(small.host, attempts=3)
    others = tuple(map(Reference.parse, related))
    return push(
        registries, Reference.parse(f"{small.host}/web:1"), manifest(client), client.blobs, related=others
    )


def test_blobs_come_before_the_manifest(small: Small, client: Client) -> None:
    named = pushed(small, client)
    assert small.manifests["1"][1] == IMAGE.manifest
    assert digest(small.manifests["1"][1]) == named
    puts = small.asked("PUT")
    assert puts[-1] == "/v2/web/manifests/1"
    queries = [parse_qs(urlsplit(path).query) for path in puts[:-1]]
    assert {query["digest"][0] for query in queries} == {digest(IMAGE.config), digest(IMAGE.layers[0])}
    assert all(query["state"] == ["x/y"] for query in queries)


def test_a_connection_that_is_cut_and_a_login_that_ends_are_tried_again(small: Small, client: Client) -> None:
    def hang_up(handler: Handler) -> None:
        handler.rfile.read(1)  # the smallest blob has few bytes, and more would be waited for
        handler.close_connection = True

    def ends(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.answer(401, b"", **{"WWW-Authenticate": 'Basic realm="x"'})

    client.environ["DOCKER_AUTH_CONFIG"] = (
        f'{{"auths": {{"{small.host}": {{"username": "me", "password": "secret"}}}}}}'
    )
    small.behaviours += [
        once("/uploads/1", hang_up),
        once(f"digest={digest(IMAGE.config)}".replace(":", "%3A"), ends),
    ]
    pushed(small, client)
    assert digest(IMAGE.config) in small.blobs
    assert digest(IMAGE.layers[0]) in small.blobs


def test_a_layer_of_the_base_is_taken_from_there(small: Small, client: Client) -> None:
    layer = digest(IMAGE.layers[0])

    def head(handler: Handler) -> bool:
        if handler.command != "HEAD":
            return False
        handler.answer(200 if handler.path.startswith("/v2/base/") and layer in handler.path else 404)
        return True

    small.behaviours += [
        head,
        once("mount=", lambda handler: handler.answer(201)),
    ]
    base = f"{small.host}/base:1"
    pushed(small, client, base, f"{small.host}/web:0", "registry.example/base:1")
    mounts = [path for path in small.asked("POST") if "mount=" in path]
    assert mounts == [f"/v2/web/blobs/uploads/?mount={layer.replace(':', '%3A')}&from=base"]
    assert layer not in small.blobs
    # A registry that does not do that begins an upload, which nobody needs.
    pushed(small, client, base)
    assert small.asked("DELETE") == ["/uploads/1?state=x%2Fy"]
    assert layer in small.blobs


def test_what_goes_elsewhere_or_becomes_something_else_is_refused(small: Small, client: Client) -> None:
    small.behaviours.append(
        once("/uploads/", lambda handler: handler.answer(202, Location="http://registry.example/upload?a=b"))
    )
    with pytest.raises(RegistryError, match="it wants data to go to http://registry"):
        pushed(small, client)
    small.behaviours[:] = [always("/blobs/uploads/", lambda handler: handler.answer(202, Location="//[bad"))]
    with pytest.raises(RegistryError, match="it wants data to go to nowhere"):
        pushed(small, client)
    small.behaviours.clear()
    small.behaviours.append(
        once(
            "/manifests/",
            lambda handler: handler.answer(201, b"", **{"Docker-Content-Digest": digest(b"other")}),
        )
    )
    with pytest.raises(RegistryError, match=f"it stored {digest(b'other')} instead of sha256:"):
        pushed(small, client)
    small.behaviours.append(always("/", lambda handler: handler.answer(307, Location="/elsewhere")))
    with pytest.raises(RegistryError, match="it redirects more than 5 times"):
        pushed(small, client)


def test_a_blob_that_is_not_in_the_store_is_missed_before_anything_is_sent(
    small: Small, client: Client
) -> None:
    found = parse_manifest(IMAGE.manifest)
    assert isinstance(found, Manifest)
    with pytest.raises(MachineError, match="the blob is not there"):
        push(client.registries(small.host), Reference.parse(f"{small.host}/web:1"), found, client.blobs)
    assert not small.requests


def test_what_was_pushed_can_be_pulled(small: Small, client: Client) -> None:
    named = pushed(small, client)
    registries = client.registries(small.host)
    pulled = registries.pull(Reference.parse(f"{small.host}/web:1"), client.blobs, Platform.host())
    assert pulled.digest == named


def test_data_may_go_to_another_host_and_no_login_goes_with_it(
    small: Small, mirror: Small, client: Client
) -> None:
    def begins(handler: Handler) -> None:
        handler.answer(202, Location=f"{mirror.url}/uploads/2?signature=x")

    small.behaviours += [wants_basic, once("/blobs/uploads/", begins, times=-1)]
    client.environ["REGISTRY_PASSWORD"] = PASSWORD
    registries = client.registries(mirror.host, special={small.host: LOGIN})
    push(registries, Reference.parse(f"{small.host}/web:1"), manifest(client), client.blobs)
    assert {digest(IMAGE.config), digest(IMAGE.layers[0])} <= mirror.blobs.keys()
    assert not any("Authorization" in headers for _, _, headers in mirror.requests)
