"""What is pulled, how often, and from where; and what a registry that misbehaves gets us to do."""

from __future__ import annotations

import gzip
import os
import re
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from firebuild_bootstrap.errors import InputError, Interrupted, MachineError
from firebuild_bootstrap.events import TaskFinished, TaskStarted
from firebuild_bootstrap.image.blobs import BlobError
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import INDEX, LAYER, MANIFEST, Descriptor, canonical
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.registry import transport
from firebuild_bootstrap.registry.answers import RegistryError
from firebuild_bootstrap.registry.pull import Pulled, Registries
from firebuild_bootstrap.registry.transport import STRANGER
from registry.conftest import Client
from registry.servers import CA, Handler, Image, Small, always, descriptor, digest, once, small_registry

HOST = Platform.host()
LARGE = Image((bytes(range(256)) * 4096 * 2, b"second layer"))


def pull(registries: Registries, client: Client, reference: str) -> Pulled:
    return registries.pull(Reference.parse(reference), client.blobs, HOST)


def failure(registries: Registries, client: Client, reference: str) -> RegistryError:
    with pytest.raises(RegistryError) as caught:
        pull(registries, client, reference)
    return caught.value


def test_an_image_comes_once_and_is_not_fetched_again(small: Small, client: Client) -> None:
    image = Image()
    named = small.add(image, "1")
    registries = client.registries(small.host)
    found = pull(registries, client, f"{small.host}/team/web:1")
    assert (found.digest, found.manifest.digest, found.document.config.cmd) == (named, named, ("/bin/true",))
    assert [client.blobs.required(digest(layer)).read_bytes() for layer in image.layers] == [*image.layers]
    started = {event.name: event.total_bytes for event in client.events if isinstance(event, TaskStarted)}
    assert started[f"pulling {small.host}/team/web:1, layer 2 of 2"] == len(image.layers[1])
    finished = {event.bytes for event in client.events if isinstance(event, TaskFinished)}
    assert {len(layer) for layer in image.layers} <= finished
    small.requests.clear()
    assert pull(registries, client, f"{small.host}/team/web:1").digest == named
    assert small.asked() == ["/v2/team/web/manifests/1"]
    small.requests.clear()
    assert registries.digest(Reference.parse(f"{small.host}/team/web:1")) == named
    assert pull(registries, client, f"{small.host}/team/web@{named}").digest == named
    assert [method for method, _, _ in small.requests] == ["HEAD"]


def test_images_come_side_by_side_and_what_they_share_comes_once(small: Small, client: Client) -> None:
    one, two = Image((b"shared", b"first")), Image((b"shared", b"second"))
    both = threading.Barrier(2, timeout=10)

    def meets(handler: Handler) -> None:
        both.wait()
        handler.serve()

    for tag, image in (("1", one), ("2", two)):
        small.add(image, tag)
        small.behaviours.append(once(digest(image.layers[1]), meets))
    registries = client.registries(small.host)
    wanted = [Reference.parse(f"{small.host}/web:{tag}") for tag in (1, 2)]
    found = registries.pull_several(wanted, client.blobs, HOST)
    assert [each.manifest.digest for each in found] == [digest(each.manifest) for each in (one, two)]
    assert len([path for path in small.asked() if digest(b"shared") in path]) == 1
    # Where one is not there, nothing of the others comes.
    small.add(Image((b"third",)), "3")
    with pytest.raises(RegistryError, match="404 Not Found"):
        registries.pull_several(
            [Reference.parse(f"{small.host}/web:{tag}") for tag in (3, 4)], client.blobs, HOST
        )
    assert client.blobs.hold(digest(b"third")) is None


def test_no_more_layers_come_at_a_time_than_the_setting_says(small: Small, client: Client) -> None:
    image = Image(tuple(b"layer %d" % number for number in range(8)))
    small.add(image, "1")
    lock, under_way, most, done = threading.Lock(), 0, 0, threading.Event()

    def count(handler: Handler) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        done.wait(0.3)  # time for all that may come beside it
        with lock:
            under_way -= 1
        handler.serve()

    small.behaviours.append(always("/blobs/", count))
    client.registries(small.host).pull(Reference.parse(f"{small.host}/web:1"), client.blobs, HOST)
    assert most == 4


def test_the_platform_is_chosen_from_an_index(small: Small, client: Client) -> None:
    other = Platform.parse("linux/s390x")
    image = Image((b"ours",))
    index = small.add_index({other: Image((b"theirs",), other), HOST: image}, "1")
    found = pull(client.registries(small.host), client, f"{small.host}/web@{index}")
    assert (found.digest, found.manifest.digest) == (index, digest(image.manifest))
    assert not client.blobs.hold(digest(b"theirs"))


def test_a_registry_without_the_digest_header_is_asked_for_the_manifest(small: Small, client: Client) -> None:
    named = small.add(Image(), "1")
    small.behaviours.append(
        once("/manifests/", lambda handler: handler.answer(200, b"", **{"Docker-Content-Digest": "md5:1"}))
    )
    assert client.registries(small.host).digest(Reference.parse(f"{small.host}/web:1")) == named


def test_a_cut_is_resumed_where_it_happened(small: Small, client: Client) -> None:
    small.add(LARGE, "1")
    blob, half = LARGE.layers[0], len(LARGE.layers[0]) // 2
    small.behaviours.append(once(digest(blob), lambda handler: handler.cut(blob[:half], len(blob))))
    pull(client.registries(small.host), client, f"{small.host}/web:1")
    ranges = [headers.get("Range") for _, path, headers in small.requests if digest(blob) in path]
    assert ranges == [None, f"bytes={half}-"]


def test_a_registry_that_knows_no_ranges_sends_all_of_it_again(small: Small, client: Client) -> None:
    small.add(LARGE, "1")
    blob = LARGE.layers[0]
    small.behaviours += [
        once(digest(blob), lambda handler: handler.cut(blob[:5000], len(blob))),
        once(digest(blob), lambda handler: handler.answer(200, blob)),
    ]
    pull(client.registries(small.host), client, f"{small.host}/web:1")
    assert client.blobs.required(digest(blob)).read_bytes() == blob


@pytest.mark.parametrize(
    "answer",
    [
        lambda handler: handler.answer(206, b"xyz", **{"Content-Range": "bytes 7-9/10"}),
        lambda handler: handler.answer(206, b"xyz"),
        lambda handler: handler.answer(416),
    ],
)
def test_another_part_than_was_asked_for_is_not_taken(
    small: Small, client: Client, answer: Callable[[Handler], None]
) -> None:
    small.add(LARGE, "1")
    blob = LARGE.layers[0]
    small.behaviours += [
        once(digest(blob), lambda handler: handler.cut(blob[:5000], len(blob))),
        once(digest(blob), answer),
    ]
    pull(client.registries(small.host), client, f"{small.host}/web:1")
    assert client.blobs.required(digest(blob)).read_bytes() == blob


def test_what_gets_on_is_tried_as_often_as_it_takes_and_what_does_not_is_given_up(
    small: Small, client: Client
) -> None:
    image = Image((bytes(6 << 20),))
    small.add(image, "1")
    blob = image.layers[0]

    def piece(handler: Handler) -> None:
        begin = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        end = f"bytes {begin}-{len(blob) - 1}/{len(blob)}"
        handler.send_response(206 if begin else 200)
        handler.send_header("Content-Length", str(len(blob) - begin))
        handler.send_header("Content-Range", end)
        handler.end_headers()
        handler.wfile.write(blob[begin : begin + (3 << 19)])
        handler.close_connection = True

    small.behaviours.append(always(digest(blob), piece))
    registries = client.registries(small.host, attempts=2)
    pull(registries, client, f"{small.host}/web:1")
    assert client.pauses == [0.5] * 3
    small.behaviours.append(once("/manifests/2", lambda handler: handler.cut(b"{", 1000), times=2))
    assert "the answer was cut off" in str(failure(registries, client, f"{small.host}/web:2"))


def test_429_and_5xx_are_waited_for_and_told_as_the_registry_tells_them(small: Small, client: Client) -> None:
    small.add(Image(), "1")
    busy = b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "rate \\u001b[31m limit"}]}'
    small.behaviours += [
        once("/manifests/", lambda handler: handler.answer(429, busy, **{"Retry-After": "7"})),
        once("/manifests/", lambda handler: handler.answer(503)),
    ]
    registries = client.registries(small.host, attempts=3)
    pull(registries, client, f"{small.host}/web:1")
    assert client.pauses == [7.0, 1.0]
    small.behaviours.append(always("/manifests/", lambda handler: handler.answer(429, busy)))
    error = failure(registries, client, f"{small.host}/web:1")
    assert error.message == (
        f"{small.host}: the manifest of web:1: it answered 429 Too Many Requests: "
        "TOOMANYREQUESTS: rate \\x1b[31m limit"
    )
    client.pauses.clear()
    small.behaviours.insert(
        0, once("/manifests/", lambda handler: handler.answer(429, busy, **{"Retry-After": "3600"}))
    )
    assert failure(registries, client, f"{small.host}/web:1").after == 3600
    assert client.pauses == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>", ""),
        (b"[1]", ""),
        (b"[" * 100_000, ""),
        (b'{"errors": [1, {"code": 2}]}', ""),
        (b'{"details": "nothing here"}', ": nothing here"),
        (b'{"errors": [{"message": "%s"}]}' % (b"x" * 60_000), f": {'x' * 300}… (60000 characters in all)"),
        (b'{"errors": [{"message": "%s"}]}' % (b"x" * 70_000), ""),
    ],
)
def test_what_a_registry_says_is_bounded(small: Small, client: Client, body: bytes, said: str) -> None:
    small.behaviours.append(always("/manifests/", lambda handler: handler.answer(499, body)))
    error = failure(client.registries(small.host), client, f"{small.host}/web:1")
    assert error.message == f"{small.host}: the manifest of web:1: it answered 499 unknown status{said}"


def test_a_wrong_digest_is_refused_and_nothing_of_it_is_kept(small: Small, client: Client) -> None:
    image = Image()
    small.add(image, "1")
    blob = image.layers[0]
    small.behaviours.append(always(digest(blob), lambda handler: handler.answer(200, blob[::-1])))
    with pytest.raises(BlobError, match="expected a blob with the digest"):
        pull(client.registries(small.host), client, f"{small.host}/web:1")
    assert client.blobs.hold(digest(blob)) is None


def test_a_manifest_of_another_digest_is_refused(small: Small, client: Client) -> None:
    named = small.add(Image(), "1")
    small.behaviours.append(always("/manifests/", lambda handler: handler.answer(200, b"{}")))
    error = failure(client.registries(small.host), client, f"{small.host}/web@{named}")
    assert f"expected the manifest of web@{named}, received one with the digest {digest(b'{}')}" in str(error)
    assert "broken or hostile" in (error.hint or "")


@pytest.mark.parametrize("announced", [True, False])
def test_a_wrong_length_is_refused(small: Small, client: Client, announced: bool) -> None:
    image = Image()
    small.add(image, "1")
    blob = image.layers[0]

    def endless(handler: Handler) -> None:
        if announced:
            handler.answer(200, blob + b"more")
            return
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        except OSError:
            handler.close_connection = True

    small.behaviours.append(always(digest(blob), endless))
    with pytest.raises(InputError, match=r"has \d+ bytes there, and|is longer than .* bytes, as was"):
        pull(client.registries(small.host), client, f"{small.host}/web:1")


def test_an_endless_or_huge_manifest_is_refused_after_4_mib(small: Small, client: Client) -> None:
    small.behaviours.append(once("/manifests/", lambda handler: handler.cut(b"{", 100 << 20)))
    registries = client.registries(small.host)
    error = failure(registries, client, f"{small.host}/web:1")
    assert "has 104857600 bytes, and 4194304 are allowed" in str(error)

    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        try:
            while True:
                handler.wfile.write(bytes(1 << 16))
        except OSError:
            pass

    small.behaviours.append(always("/manifests/", endless))
    assert "has more than 4194304 bytes" in str(failure(registries, client, f"{small.host}/web:1"))


def test_a_head_or_a_body_that_drips_is_given_up(small: Small, client: Client) -> None:
    small.add(LARGE, "1")
    blob, ended = LARGE.layers[0], threading.Event()

    def drip(text: bytes, first: bytes = b"HTTP/1.1 200 OK\r\n") -> Callable[[Handler], None]:
        def act(handler: Handler) -> None:
            handler.close_connection = True
            handler.wfile.write(first)
            try:
                handler.wfile.write(text)
                while not ended.wait(0.01):
                    handler.wfile.write(b"x")
            except OSError:
                pass

        return act

    registries = client.registries(small.host, timeout="1s", attempts=1)
    small.behaviours.append(once("/manifests/", drip(b"X-Long: ")))
    assert "no answer in time" in str(failure(registries, client, f"{small.host}/web:1"))
    small.behaviours.append(once("/manifests/", drip(b"Content-Type: text/plain\r\n\r\n")))
    error = failure(registries, client, f"{small.host}/web:1")
    assert "did not arrive in time" in str(error)
    assert error.hint == "try again; where it is always that slow, raise registries.timeout"
    small.behaviours.append(once("/manifests/", drip(b"Transfer-Encoding: chunked\r\n\r\n")))
    assert "no answer in time" in str(failure(registries, client, f"{small.host}/web:1"))
    refusal = b"Content-Type: text/plain\r\n\r\n"
    small.behaviours.append(once("/manifests/", drip(refusal, b"HTTP/1.1 404 Not Found\r\n")))
    assert "it answered 404 Not Found" in str(failure(registries, client, f"{small.host}/web:1"))
    small.behaviours.append(
        always(digest(blob), drip(f"Content-Length: {len(blob)}\r\n\r\n".encode() + blob[:100]))
    )
    assert "arrives too slowly" in str(failure(registries, client, f"{small.host}/web:1"))
    ended.set()


def test_an_encoding_that_was_not_asked_for_is_refused(small: Small, client: Client) -> None:
    bomb = gzip.compress(bytes(1 << 20))
    small.behaviours.append(
        always("/manifests/", lambda handler: handler.answer(200, bomb, **{"Content-Encoding": "gzip"}))
    )
    error = failure(client.registries(small.host), client, f"{small.host}/web:1")
    assert "it answers in the encoding gzip, which was not asked for\n  hint: a proxy" in str(error)
    assert all(headers["Accept-Encoding"] == "identity" for _, _, headers in small.requests)


def test_redirects_are_followed_a_few_times_and_never_to_plain_http(small: Small, client: Client) -> None:
    image = Image()
    small.add(image, "1")
    blob = image.layers[0]
    registries = client.registries(small.host)
    small.behaviours.append(
        always(
            f"/blobs/{digest(blob)}",
            lambda handler: handler.answer(307, Location="http://registry.example/x?secret=1"),
        )
    )
    error = failure(registries, client, f"{small.host}/web:1")
    assert "it redirects to http://registry.example, which is not https" in str(error)
    assert (
        error.hint
        == "behind a proxy that terminates TLS, the registry's own URL has to be configured with https"
    )
    small.behaviours[:] = [
        always("/blobs/", lambda handler: handler.answer(307, Location="http://localhost:1/"))
    ]
    error = failure(registries, client, f"{small.host}/web:1")
    assert "it redirects to http://localhost:1, which is not https" in str(error)
    small.behaviours[:] = [always("/blobs/", lambda handler: handler.answer(302, Location=handler.path))]
    assert "it redirects more than 5 times\n  hint: is it the registry that answers there?" in str(
        failure(registries, client, f"{small.host}/web:1")
    )
    for location in ("//[bad", "https://[::1", "https://registry.example:port/"):
        answer = partial(Handler.answer, status=307, Location=location)
        small.behaviours[:] = [always("/blobs/", answer)]
        assert "redirects to an invalid URL" in str(failure(registries, client, f"{small.host}/web:1"))
    small.behaviours[:] = [always("/manifests/", lambda handler: handler.answer(302))]
    assert "it redirects without saying where to" in str(failure(registries, client, f"{small.host}/web:1"))
    small.behaviours[:] = [
        once("/web/manifests/1", lambda handler: handler.answer(301, Location="/v2/web/manifests/1?again"))
    ]
    small.manifests["1?again"] = small.manifests["1"]
    pull(registries, client, f"{small.host}/web:1")


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ({"schemaVersion": 2, "manifests": []}, "there is no image for"),
        ({"schemaVersion": 1, "fsLayers": []}, "schema 1"),
    ],
)
def test_what_is_no_image_for_this_platform_is_refused(
    small: Small, client: Client, document: dict[str, object], why: str
) -> None:
    small.name("", canonical(document), "1")
    with pytest.raises(InputError, match=why):
        pull(client.registries(small.host), client, f"{small.host}/web:1")


def test_documents_that_claim_too_much_are_refused(small: Small, client: Client) -> None:
    image = Image()
    small.add(image)
    registries = client.registries(small.host)
    where = {"os": HOST.os, "architecture": HOST.architecture, "variant": HOST.variant}

    def index(tag: str, media_type: str, data: bytes, **members: object) -> None:
        entry = {**descriptor(media_type, data), "platform": where, **members}
        document = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}
        small.name(INDEX, canonical(document), tag)

    index("huge", MANIFEST, image.manifest, size=5 << 20)
    with pytest.raises(InputError, match="has 5242880 bytes; 4194304 are allowed"):
        pull(registries, client, f"{small.host}/web:huge")
    index("short", MANIFEST, image.manifest, size=5)
    with pytest.raises(InputError, match="expected 5 bytes with the digest"):
        pull(registries, client, f"{small.host}/web:short")
    index("0", MANIFEST, image.manifest)
    for level in range(3):
        index(str(level + 1), INDEX, small.manifests[str(level)][1])
    with pytest.raises(InputError, match="more than 3 indexes in indexes"):
        pull(registries, client, f"{small.host}/web:3")
    odd = canonical(
        {
            "schemaVersion": 2,
            "config": descriptor("application/vnd.oci.image.config.v1+json", image.config),
            "layers": [],
        }
    )
    small.name(MANIFEST, odd, "odd")
    with pytest.raises(InputError, match="manifest of the image has 0 layers, and its configuration 2"):
        pull(registries, client, f"{small.host}/web:odd")
    large = canonical(
        {
            "schemaVersion": 2,
            "config": {**descriptor("application/vnd.oci.image.config.v1+json", b""), "size": 5 << 20},
            "layers": [],
        }
    )
    small.name(MANIFEST, large, "large")
    with pytest.raises(InputError, match="its configuration has 5242880 bytes"):
        pull(registries, client, f"{small.host}/web:large")


def test_what_can_not_be_used_is_refused_before_a_layer_comes(
    small: Small, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Platform.parse("linux/s390x")
    small.add(Image((b"theirs",), other), "other")
    image = Image()
    small.add(image, "1")
    registries = client.registries(small.host)
    with pytest.raises(InputError, match=f"the image is for linux/s390x, and this machine is {HOST}"):
        pull(registries, client, f"{small.host}/web:other")
    # What is there already, in part or whole, needs no room.
    for data in (image.layers[1], small.manifests["1"][1], image.config):
        client.blobs.add(data)
    first = Descriptor(LAYER, digest(image.layers[0]), len(image.layers[0]))
    with client.blobs.writer(first) as writer:
        writer.write(image.layers[0][:8000])
    disk = os.statvfs_result((4096, 4096, 9, 9, 9, *os.statvfs("/")[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    with pytest.raises(MachineError) as caught:
        pull(registries, client, f"{small.host}/web:1")
    assert caught.value.message == (
        f"the layers that are missing have 40,000 bytes, and the disk of {client.blobs.root} has 36,864 free"
    )
    assert not [path for path in small.asked() if any(digest(layer) in path for layer in image.layers)]


def test_mirrors_come_first_and_one_that_fails_is_said_once(
    small: Small, mirror: Small, client: Client
) -> None:
    image = Image()
    small.add(image, "1")
    mirror.add(image, "1")
    blob = image.layers[1]
    mirror.behaviours.append(always(digest(blob), lambda handler: handler.answer(200, blob[::-1])))
    registries = client.registries(
        mirror.host, special={small.host: {"mirrors": [f"{mirror.host}/hub", "localhost:1"]}}, attempts=1
    )
    pull(registries, client, f"{small.host}/team/web:1")
    assert "/v2/hub/team/web/manifests/1" in mirror.asked()
    assert [path for path in small.asked() if "sha256" in path] == [f"/v2/team/web/blobs/{digest(blob)}"]
    assert client.blobs.required(digest(blob)).read_bytes() == blob
    pull(registries, client, f"{small.host}/team/web:1")
    refused, unreachable = client.said
    assert refused.startswith(f"{mirror.host} failed, localhost:1 is asked instead: expected a blob")
    assert unreachable.startswith(f"localhost:1 failed, {small.host} is asked instead: localhost:1: ")


def test_names_without_a_registry_mean_the_default_one(small: Small, client: Client) -> None:
    small.add(Image(), "latest")
    pull(client.registries(small.host, default=small.host), client, "alpine")
    pull(client.registries(small.host, default=small.host, namespace=""), client, "docker.io/library/alpine")
    pull(client.registries(small.host, default=small.host), client, "acme/web")
    assert [path for path in small.asked() if "latest" in path] == [
        "/v2/library/alpine/manifests/latest",
        "/v2/alpine/manifests/latest",
        "/v2/acme/web/manifests/latest",
    ]
    hub = client.registries().repository(Reference.parse("alpine"))
    assert (str(hub), hub.registry.base) == ("docker.io/library/alpine", "https://index.docker.io")


def test_plain_http_is_spoken_on_loopback(client: Client) -> None:
    with small_registry(None) as plain:
        plain.add(Image(), "1")
        error = failure(client.registries(), client, f"{plain.host}/web:1")
        assert "it does not speak TLS" in error.message
        assert error.hint == (
            f"if it speaks plain http, set address: {plain.url} in registries.hosts of {plain.host}"
        )
        pull(client.registries(special={plain.host: {"address": plain.url}}), client, f"{plain.host}/web:1")


def test_plain_http_of_another_machine_is_refused_with_what_to_do_instead(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        transport, "is_safe", lambda _: False
    )  # as for an address that is not of this machine
    with small_registry(None) as plain:
        error = failure(client.registries(), client, f"{plain.host}/web:1")
    assert error.hint is not None
    assert "plain http is spoken on this machine only" in error.hint


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(403, "may not do that there"), (404, "is the name right"), (429, "log in"), (503, "its log says why")],
)
def test_the_status_of_an_answer_says_what_to_do(
    small: Small, client: Client, status: int, remedy: str
) -> None:
    small.behaviours.append(always("/manifests/", lambda handler: handler.answer(status)))
    error = failure(client.registries(small.host, attempts=1), client, f"{small.host}/web:1")
    assert remedy in (error.hint or "")


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b"rate limited by the proxy\n\nask \x1b[1mops\n", ": rate limited by the proxy ask \\x1b[1mops"),
        (b"x" * 1000, f": {'x' * 300}… (1000 characters in all)"),
        (b"<html><h1>no</h1></html>", ""),
        (b'{"errors": [', ""),
        (b"\x1f\x8b\x08\0", ""),
        (b"a\0b", ""),
    ],
)
def test_what_a_proxy_says_in_plain_text_is_shown_in_one_line(
    small: Small, client: Client, body: bytes, shown: str
) -> None:
    small.behaviours.append(always("/manifests/", lambda handler: handler.answer(403, body)))
    error = failure(client.registries(small.host), client, f"{small.host}/web:1")
    assert error.message.endswith(f"it answered 403 Forbidden{shown}")


def test_an_image_that_is_not_whole_and_a_page_in_its_place_say_what_to_do(
    small: Small, client: Client
) -> None:
    image = Image()
    small.add(image, "1")
    del small.blobs[digest(image.layers[0])]
    error = failure(client.registries(small.host), client, f"{small.host}/web:1")
    assert "push that again" in (error.hint or "")
    html = {"Content-Type": "text/html; charset=utf-8"}
    small.behaviours.append(always("/manifests/", lambda handler: handler.answer(200, b"<html>", **html)))
    error = failure(client.registries(small.host), client, f"{small.host}/web:1")
    assert (error.message, error.hint) == (f"{small.host}: the manifest of web:1 is a web page", STRANGER)


def test_the_time_to_wait_is_in_whole_seconds(small: Small, client: Client) -> None:
    late = {"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}
    small.behaviours.append(always("/manifests/", lambda handler: handler.answer(429, b"", **late)))
    error = failure(client.registries(small.host), client, f"{small.host}/web:1")
    assert re.search("it asks to wait for [0-9]{9,} seconds", error.message)


@pytest.mark.parametrize("what", ["manifest", "configuration", "layer"])
def test_an_interruption_ends_a_pull_at_once(small: Small, client: Client, ca: CA, what: str) -> None:
    image = Image()
    small.add(image, "1")
    arrived, ended = threading.Event(), threading.Event()
    blobs = {"configuration": image.config, "layer": image.layers[0]}
    where = digest(blobs[what]) if what in blobs else "/manifests/"

    def silent(handler: Handler) -> None:
        arrived.set()
        ended.wait(30)
        handler.close_connection = True

    def check() -> None:
        if arrived.is_set():
            raise Interrupted("the build was interrupted")

    small.behaviours.append(once(where, silent))
    client.check = check
    begin = time.monotonic()
    with pytest.raises(Interrupted):
        pull(client.registries(small.host, timeout="60s"), client, f"{small.host}/web:1")
    assert time.monotonic() - begin < 15
    ended.set()
