"""What a pull costs: an image of 200 MB from Debian's registry on loopback, with TLS, beside `skopeo copy`.

    .venv/bin/python benchmarks/image_pull.py [--runs 5]

Both take turns, each into an empty directory. Needs docker-registry and skopeo.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

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

LAYERS, LAYER_BYTES = 5, 40 << 20


def registries(host: str, ca: CA) -> Registries:
    """Our client."""
    login = {"username": USER, "password": {"env": "PASSWORD"}, "ca_file": str(ca.certificate)}
    settings = RegistriesSettings.model_validate({"hosts": {host: login}})
    around = Surroundings(settings=settings, environ={"PASSWORD": PASSWORD, "HOME": "/"}, anchors=str)
    return Registries(around, Tasks())


def skopeo(host: str, certificates: Path) -> Callable[[Path], None]:
    """Theirs."""
    policy = certificates / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    command = ["skopeo", "--policy", str(policy), "copy", "--quiet", f"--src-cert-dir={certificates}"]
    source = [f"--src-creds={USER}:{PASSWORD}", f"docker://{host}/image:1"]
    return lambda target: void(subprocess.run([*command, *source, f"oci:{target}:image"], check=True))


def void(_: object) -> None:
    """Return nothing."""


def seconds(pull: Callable[[Path], None], target: Path) -> float:
    """Time one pull into an empty directory."""
    began = time.perf_counter()
    pull(target)
    taken = time.perf_counter() - began
    shutil.rmtree(target)
    return taken


def main() -> None:
    """Measure, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
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
            pairs = [(seconds(pull, work / "a"), seconds(theirs, work / "b")) for _ in range(runs)]
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"firebuild {mine:.2f} s, skopeo {other:.2f} s, ratio {mine / other:.2f} (to reach: 1.3)")


if __name__ == "__main__":
    main()
