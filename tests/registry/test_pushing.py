"""What is pushed, in which order, and which answers are refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import Manifest, parse_manifest
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.registry.answers import RegistryError
from firebuild_bootstrap.registry.push import push
from registry.conftest import LOGIN, Client
from registry.servers import PASSWORD, Behaviour, Handler, Image, Small, always, digest, once, wants_basic

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
        once("/uploads/1?", hang_up),
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
    (ended,) = small.asked("DELETE")
    assert ended.startswith("/uploads/")
    assert layer in small.blobs


LARGE = Image((bytes(range(256)) * (3 << 12),))  # 3 MiB


def sends(small: Small, client: Client, image: Image = LARGE, **special: Any) -> list[str]:
    """Push an image in chunks of 1 MiB, or as is said; returns what was sent of its layer, and from where."""
    for data in (image.config, *image.layers):
        client.blobs.add(data)
    found = parse_manifest(image.manifest)
    assert isinstance(found, Manifest)
    registries = client.registries(special={small.host: {"chunk_size": "1MiB", **special}}, connections=1)
    small.requests.clear()
    push(registries, Reference.parse(f"{small.host}/web:1"), found, client.blobs)
    assert small.blobs[digest(image.layers[0])] == image.layers[0]
    large = [each for each in small.requests if int(each[2].get("Content-Length", "0")) > 1000]
    return [f"{method} {headers.get('Content-Range', 'all')}" for method, _, headers in large]


def test_large_layers_go_in_chunks_where_the_settings_say_so(small: Small, client: Client) -> None:
    thirds = ["PATCH 0-1048575", "PATCH 1048576-2097151", "PUT 2097152-3145727"]
    assert sends(small, client) == thirds
    small.blobs.clear()
    small.begins["OCI-Chunk-Min-Length"] = str(2 << 20)
    assert sends(small, client) == ["PATCH 0-2097151", "PUT 2097152-3145727"]
    small.blobs.clear()
    assert sends(small, client, chunk_size=None) == ["PUT all"]


def number_of(handler: Handler) -> str:
    """Of an upload."""
    return handler.path.rpartition("/")[2].partition("?")[0]


def at(method: str, begin: int, act: Callable[[Handler], None]) -> Behaviour:
    """Behave so once, at the request that sends the large layer from there."""
    done: list[bool] = []

    def behave(handler: Handler) -> bool:
        large = int(handler.headers.get("Content-Length", "0")) > 1000
        place = handler.headers.get("Content-Range", "0-")
        if done or not large or handler.command != method or not place.startswith(f"{begin}-"):
            return False
        done.append(True)
        act(handler)
        return True

    return behave


def test_what_was_cut_off_goes_on_where_the_registry_has_got_to(small: Small, client: Client) -> None:
    def cut(handler: Handler) -> None:
        small.uploads[number_of(handler)] += handler.rfile.read(1000)
        handler.close_connection = True

    small.behaviours.append(at("PATCH", 1 << 20, cut))
    assert sends(small, client) == [
        *("PATCH 0-1048575", "PATCH 1048576-2097151", "PATCH 1049576-2098151", "PUT 2098152-3145727")
    ]
    small.blobs.clear()
    small.behaviours.append(at("PUT", 0, cut))
    assert sends(small, client, chunk_size=None) == ["PUT all", "PUT 1000-3145727"]


def test_an_upload_that_a_registry_gives_up_after_it_was_asked_begins_anew(
    small: Small, client: Client
) -> None:
    def cut(handler: Handler) -> None:
        small.uploads[number_of(handler)] += handler.rfile.read(1000)
        handler.close_connection = True

    def give_up(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        del small.uploads[number_of(handler)]
        handler.answer(404, b'{"errors": [{"code": "BLOB_UPLOAD_INVALID"}]}')

    small.behaviours[:] = [at("PATCH", 1 << 20, cut), at("PATCH", (1 << 20) + 1000, give_up)]
    anew = ["PATCH 0-1048575", "PATCH 1048576-2097151", "PUT 2097152-3145727"]
    assert sends(small, client) == [*anew[:2], "PATCH 1049576-2098151", *anew]


def test_an_upload_that_a_registry_has_forgotten_or_mixed_up_begins_anew(
    small: Small, client: Client
) -> None:
    def drop(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        del small.uploads[number_of(handler)]
        handler.answer(503)

    def mix_up(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        small.uploads[number_of(handler)] += b"x"
        handler.answer(503)

    def refuse(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.answer(400, b'{"errors": [{"code": "DIGEST_INVALID"}]}')

    anew = ["PATCH 0-1048575", "PATCH 1048576-2097151", "PUT 2097152-3145727"]
    small.behaviours.append(at("PATCH", 1 << 20, drop))
    assert sends(small, client) == anew[:2] + anew
    small.blobs.clear()
    # It says to have a byte more than it was sent, and finds out at the end that it was another one.
    small.behaviours[:] = [at("PATCH", 1 << 20, mix_up), at("PUT", 2097153, refuse)]
    assert sends(small, client)[2:] == ["PATCH 1048577-2097152", "PUT 2097153-3145727", *anew]
    small.blobs.clear()
    small.behaviours[:] = [at("PATCH", 0, lambda handler: says(handler, "0-5000000"))]
    with pytest.raises(RegistryError, match="it has 5000001 bytes, and 1048576 were sent"):
        sends(small, client)


def says(handler: Handler, place: str) -> None:
    handler.rfile.read(int(handler.headers["Content-Length"]))
    handler.answer(202, Location=handler.path, Range=place)


def test_a_layer_that_a_proxy_finds_too_large_goes_in_chunks(small: Small, client: Client) -> None:
    def proxy(handler: Handler) -> bool:
        size = int(handler.headers.get("Content-Length", "0"))
        if size <= 1 << 20:
            return False
        handler.rfile.read(size)
        handler.answer(413, b"<html>")
        return True

    small.behaviours.append(proxy)
    image = Image((bytes(range(256)) * (4 << 12),))
    quarters = [f"PATCH {begin << 20}-{(begin + 1 << 20) - 1}" for begin in range(3)]
    assert sends(small, client, image, chunk_size=None) == ["PUT all", *quarters, "PUT 3145728-4194303"]
    small.blobs.clear()
    small.behaviours.append(at("PATCH", 0, refuse_as_too_large))
    with pytest.raises(RegistryError, match=r"it answered 413 (Request Entity|Content) Too Large"):
        sends(small, client, image)


def refuse_as_too_large(handler: Handler) -> None:
    handler.rfile.read(int(handler.headers["Content-Length"]))
    handler.answer(413)


def test_a_blob_whose_last_answer_was_lost_is_not_sent_again(small: Small, client: Client) -> None:
    def lose(handler: Handler) -> None:
        small.blobs[digest(LARGE.layers[0])] = handler.rfile.read(len(LARGE.layers[0]))
        del small.uploads[number_of(handler)]
        handler.close_connection = True

    small.behaviours.append(at("PUT", 0, lose))
    assert sends(small, client, chunk_size=None) == ["PUT all"]


def test_what_goes_elsewhere_or_becomes_something_else_is_refused(small: Small, client: Client) -> None:
    small.behaviours.append(
        once("/uploads/", lambda handler: handler.answer(202, Location="http://registry.example/upload?a=b"))
    )
    with pytest.raises(RegistryError, match="it sends data on to http://registry"):
        pushed(small, client)
    small.behaviours[:] = [always("/blobs/uploads/", lambda handler: handler.answer(202, Location="//[bad"))]
    with pytest.raises(RegistryError, match="it sends data on to an invalid URL"):
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


@pytest.mark.parametrize(
    ("path", "status", "remedy"),
    [
        ("/blobs/uploads/", 405, "it is read-only"),
        ("/blobs/uploads/", 507, "no space left"),
        ("/manifests/", 409, "push under another one"),
    ],
)
def test_the_status_of_a_refused_push_says_what_to_do(
    small: Small, client: Client, path: str, status: int, remedy: str
) -> None:
    small.behaviours.append(always(path, lambda handler: handler.answer(status)))
    with pytest.raises(RegistryError, match=f"it answered {status}") as caught:
        pushed(small, client)
    assert remedy in (caught.value.hint or "")


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
    numbers = itertools.count()  # two blobs come at once

    def begins(handler: Handler) -> None:
        handler.answer(202, Location=f"{mirror.url}/uploads/{next(numbers)}?signature=x")

    small.behaviours += [wants_basic, once("/blobs/uploads/", begins, times=-1)]
    client.environ["REGISTRY_PASSWORD"] = PASSWORD
    registries = client.registries(mirror.host, special={small.host: LOGIN})
    push(registries, Reference.parse(f"{small.host}/web:1"), manifest(client), client.blobs)
    assert {digest(IMAGE.config), digest(IMAGE.layers[0])} <= mirror.blobs.keys()
    assert not any("Authorization" in headers for _, _, headers in mirror.requests)
