"""What a pull costs: an image of 200 MB in 5 layers, from Debian's registry on loopback with TLS, beside
`skopeo copy`.

Each pull is into an empty directory. Each layer is verified while it comes, and synced to the disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

from benchmarks.shape import Benchmark, Row, Run, command, timed
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.image.blobs import BlobStore
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import Manifest, parse_manifest
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.registry.pull import Registries
from firebuild_bootstrap.registry.push import push
from firebuild_bootstrap.registry.settings import RegistriesSettings
from firebuild_bootstrap.registry.transport import Surroundings
from registry.servers import CA, PASSWORD, USER, Image, debian_registry

PULL: Final = Row("an image of 200 MB in 5 layers", "skopeo copy", "s", 1.3, ("skopeo",))
LAYERS, LAYER_BYTES = 5, 40 << 20


def registries(host: str, ca: CA) -> Registries:
    """Our client."""
    login = {"username": USER, "password": {"env": "PASSWORD"}, "ca_file": str(ca.certificate)}
    settings = RegistriesSettings.model_validate({"hosts": {host: login}})
    around = Surroundings(settings=settings, environ={"PASSWORD": PASSWORD, "HOME": "/"}, anchors=str)
    return Registries(around, Tasks())


def skopeo(host: str, certificates: Path) -> Callable[[Path], object]:
    """Theirs."""
    policy = certificates / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    words = ["skopeo", "--policy", str(policy), "copy", "--quiet", f"--src-cert-dir={certificates}"]
    source = [f"--src-creds={USER}:{PASSWORD}", f"docker://{host}/image:1"]
    return lambda target: command([*words, *source, f"oci:{target}:image"])


def seconds(pull: Callable[[Path], object], target: Path) -> float:
    """Time one pull into an empty directory."""
    taken = timed(lambda: pull(target))
    shutil.rmtree(target)
    return taken


def measure(run: Run) -> None:
    """Push the image, and let both pull it."""
    work = run.directory
    ca = CA.made(work)
    (work / "ca.crt").write_bytes(ca.certificate.read_bytes())
    image = Image(tuple(os.urandom(LAYER_BYTES) for _ in range(LAYERS)))
    with debian_registry(work, ca) as host, closing(registries(host, ca)) as ours:
        reference = Reference.parse(f"{host}/image:1")
        manifest = parse_manifest(image.manifest)
        assert isinstance(manifest, Manifest)
        with closing(BlobStore(work / "pushed")) as blobs:
            for data in (image.config, *image.layers):
                blobs.add(data)
            push(ours, reference, manifest, blobs)

        def pull(target: Path) -> None:
            with closing(BlobStore(target)) as blobs:
                ours.pull(reference, blobs, Platform.host())

        theirs = skopeo(host, work)
        for _ in range(run.rounds):
            run.add(PULL, seconds(pull, work / "a"), seconds(theirs, work / "b"))


BENCHMARK: Final = Benchmark("pull", __doc__, (PULL,), measure, rounds=5, needs=("docker-registry",))
