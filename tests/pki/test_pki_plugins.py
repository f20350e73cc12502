"""Plugins: found by entry point, loaded by name, and unable to hurt those who do not select them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import NoReturn

import pytest

from firebuild_pki import (
    CAError,
    CAEvent,
    Capability,
    EventKind,
    PluginCatalog,
    ProviderConflict,
    ProviderLoadError,
    ProviderNotFound,
    ProviderSpec,
    Settings,
    hookspecs,
    installed_providers,
    load_provider,
    open_authority,
)
from firebuild_pki.provider import RESERVED_NAMES
from pki import characters, signers
from pki.conftest import Install
from pki.tools import NOW, catalog_of, entry

# A complete provider as a stranger would write it: settings, three methods, one hook.
STRANGER = """
    from datetime import timedelta
    from cryptography import x509
    from firebuild_pki import (
        CAProvider, ProviderSpec, Settings, SignedCertificate, TrustBundle, hookimpl,
    )
    from firebuild_pki.keys import generate_key
    from firebuild_pki.x509 import Validity, make_leaf, make_root, to_pem

    class AcmeSettings(Settings):
        region: str
        days: int = 1

    class AcmeProvider(CAProvider):
        def __init__(self, settings, context):
            self.settings, self.clock = settings, context.clock

        def open(self):
            validity = Validity.starting(
                self.clock(), timedelta(days=self.settings.days), backdate=timedelta(minutes=1)
            )
            self.root = make_root(generate_key(), validity, with_intermediate=False)

        def trust_bundle(self):
            return TrustBundle(to_pem([self.root.certificate]))

        def sign(self, request):
            leaf = make_leaf(
                x509.load_pem_x509_csr(request.csr_pem).public_key(),
                self.root,
                Validity.starting(self.clock(), request.ttl, backdate=timedelta(minutes=1)),
                profile=request.profile,
                dns_names=request.dns_names,
            )
            return SignedCertificate(to_pem([leaf]))

    @hookimpl
    def register_ca_providers():
        return [
            ProviderSpec("acme-old", AcmeSettings, AcmeProvider, "Acme's former CA"),
            ProviderSpec("acme", AcmeSettings, AcmeProvider, "Acme's CA"),
        ]
"""


def test_the_embedded_provider_comes_through_the_same_door() -> None:
    (embedded,) = [plugin for plugin in installed_providers() if plugin.name == "embedded"]
    assert embedded.distribution == "firebuild"
    assert str(embedded) == f"firebuild {embedded.version}"
    assert load_provider("embedded").name == "embedded"


def test_a_strangers_plugin_is_found_and_works(install: Install) -> None:
    install("acme-pki", STRANGER, name="acme", module="acme_pki")
    assert ("acme", "acme-pki 1.2") in [(plugin.name, str(plugin)) for plugin in installed_providers()]
    with open_authority({"provider": "acme", "acme": {"region": "eu"}}, build_id="b") as authority:
        assert authority.provider_name == "acme"
        assert authority.issue_server().identity == "b.firebuild.internal"
        assert authority.warnings == ()


def test_a_plugin_that_is_not_selected_is_not_imported(install: Install) -> None:
    install("acme-pki", "raise SystemExit('imported')", name="acme", module="acme_unused")
    with open_authority({"acme": {"anything": "goes"}}) as authority:
        assert authority.provider_name == "embedded"
    assert "acme_unused" not in sys.modules


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('imported')", "importing acme_broken failed: SystemExit: imported"),
        ("import no_such_module", "importing acme_broken failed: ModuleNotFoundError: No module named"),
        ("", 'expected it to register a provider called "acme", found nothing'),
        (
            "def register_ca_providers(): return None",
            'expected it to register a provider called "acme", found nothing',
        ),
        (
            "from firebuild_pki import hookimpl\n@hookimpl\ndef register_ca_provider(): return None",
            "not a usable provider plugin: unknown hook 'register_ca_provider'",
        ),
        (
            "from firebuild_pki import hookimpl\n@hookimpl\ndef register_ca_providers(extra): return None",
            "not a usable provider plugin: ",
        ),
        (
            "from firebuild_pki import hookimpl\n@hookimpl\ndef register_ca_providers(): return 1 / 0",
            "its hook failed: ZeroDivisionError: division by zero",
        ),
        (
            "from firebuild_pki import hookimpl\n@hookimpl\ndef register_ca_providers(): return ['acme']",
            "register_ca_providers must return ProviderSpec objects, found str",
        ),
        (
            "from firebuild_pki import hookimpl\n@hookimpl\nasync def register_ca_providers(): return None",
            "register_ca_providers must return ProviderSpec objects, found coroutine",
        ),
    ],
)
def test_a_broken_plugin_is_explained_to_those_who_select_it(
    install: Install, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    install("acme-pki", code, name="acme", module="acme_broken")
    monkeypatch.delitem(sys.modules, "acme_broken", raising=False)
    with pytest.raises(ProviderLoadError) as caught:
        open_authority({"provider": "acme"})
    assert str(caught.value).startswith(
        f"ca-provider(acme): cannot use the plugin of acme-pki 1.2: {message}"
    )


@pytest.mark.parametrize("value", ["", "acme pki:!"])
def test_an_entry_point_that_leads_to_no_module_says_how_it_is_written(value: str) -> None:
    broken = EntryPoint("acme", value, "firebuild_pki.providers")
    with pytest.raises(ProviderLoadError) as caught:
        PluginCatalog(providers=[broken]).load_provider("acme")
    assert caught.value.message.endswith(f'expected its entry point to lead to a module, found "{value}"')
    assert str(caught.value.hint).startswith('write acme = "package.module" into its pyproject.toml')


def test_two_distributions_with_one_name_are_both_named(install: Install) -> None:
    install("acme-pki", STRANGER, name="acme", module="acme_pki_one")
    install("zebra-pki", STRANGER, name="acme", module="acme_pki_two")
    with pytest.raises(ProviderConflict) as caught:
        load_provider("acme")
    assert str(caught.value) == (
        'the provider name "acme" is claimed by acme-pki 1.2 and zebra-pki 1.2 (hint: uninstall all but one)'
    )
    with open_authority() as authority:
        assert authority.provider_name == "embedded"


def test_nobody_can_take_over_the_name_embedded(install: Install) -> None:
    install("evil-pki", STRANGER.replace('"acme"', '"embedded"'), name="embedded", module="evil_pki")
    with pytest.raises(ProviderConflict, match=r"claimed by evil-pki 1\.2 and firebuild "):
        open_authority()


def test_registering_another_name_than_the_entry_point_is_refused() -> None:
    catalog = PluginCatalog(providers=[entry("good-one", "pki.signers:good")])
    with pytest.raises(ProviderLoadError) as caught:
        catalog.load_provider("good-one")
    assert 'expected it to register a provider called "good-one", found good' in str(caught.value)
    assert "must be the same" in str(caught.value)


class Twice:
    @hookspecs.hookimpl
    def register_ca_providers(self) -> list[ProviderSpec]:
        return [signers.good.register_ca_providers()] * 2


class Future:
    @hookspecs.hookimpl
    def register_ca_providers(self) -> ProviderSpec:
        return ProviderSpec("future", Settings, characters.Pairs, "from later", api_version=2)


twice, future = Twice(), Future()


def test_a_plugin_that_registers_a_name_twice_is_refused() -> None:
    catalog = PluginCatalog(providers=[entry("good", f"{__name__}:twice")])
    with pytest.raises(ProviderConflict, match="registers it twice"):
        catalog.load_provider("good")


def test_a_plugin_for_another_version_of_the_contract_is_refused() -> None:
    catalog = PluginCatalog(providers=[entry("future", f"{__name__}:future")])
    with pytest.raises(
        ProviderLoadError, match="for version 2 of the contract, this framework speaks version 1"
    ):
        catalog.load_provider("future")


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ProviderNotFound) as caught:
        catalog_of("good").load_provider("goood")
    assert str(caught.value) == ('no installed provider is called "goood" (hint: did you mean "good"?)')


@pytest.mark.parametrize("name", ["Vault", "my_ca", "1st", "", "a b", *sorted(RESERVED_NAMES)])
def test_some_names_cannot_be_providers(name: str) -> None:
    with pytest.raises(ProviderLoadError, match="cannot be the name of a provider"):
        ProviderSpec(name, Settings, characters.Pairs, "")


@pytest.mark.parametrize("capabilities", [set(), {Capability.REVOKE}])
def test_a_provider_signs_or_has_pairs(capabilities: set[Capability]) -> None:
    with pytest.raises(ProviderLoadError, match="at least one of the capabilities sign and ready-pairs"):
        ProviderSpec("x", Settings, characters.Pairs, "", frozenset(capabilities))


def test_catalogs_of_the_same_plugins_are_equal() -> None:
    assert catalog_of("good") == catalog_of("good")
    assert hash(catalog_of("good")) == hash(catalog_of("good"))
    assert catalog_of("good") != catalog_of("nothing")
    assert catalog_of("good") != "good"


def test_injected_entry_points_without_distribution_are_described_by_their_target() -> None:
    (plugin,) = PluginCatalog(providers=[EntryPoint("x", "a.b", "g")]).providers()
    assert str(plugin) == "a.b"


def test_the_hooks_are_documented_with_their_signatures() -> None:
    page = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
    assert "def register_ca_providers() -> ProviderSpec | Sequence[ProviderSpec]:" in page
    assert "def ca_event(event: CAEvent, settings: BaseModel | None) -> None:" in page
    assert "def ca_observer_settings() -> type[BaseModel]:" in page
    with pytest.raises(NotImplementedError):
        hookspecs.register_ca_providers()
    with pytest.raises(NotImplementedError):
        hookspecs.ca_event(CAEvent(EventKind.CLOSED, NOW, "p", "b"), None)
    with pytest.raises(NotImplementedError):
        hookspecs.ca_observer_settings()


def test_the_provider_in_the_documentation_works(tmp_path: Path, install: Install) -> None:
    page = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
    code = next(block for block in page.split("```python\n") if "class StepProvider" in block)
    site = install("step-pki", code.split("```")[0], name="step", module="step_pki")
    program = (
        "from firebuild_pki import open_authority\n"
        "with open_authority({'provider': 'step', 'step': {'lifetime': '2h'}}) as authority:\n"
        "    authority.issue_server(), authority.issue_guest()\n"
        "    print(authority.provider_name, authority.warnings)\n"
    )
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("step ()\n", "")


def test_a_conflict_is_a_ca_error_like_all_others() -> None:
    for kind in (ProviderConflict, ProviderLoadError, ProviderNotFound):
        assert issubclass(kind, CAError)


def test_a_distribution_that_another_one_shadows_does_not_count(install: Install, tmp_path: Path) -> None:
    code = "from firebuild_pki import hookimpl"
    old = install("acme-pki", code, name="acme", module="acme_pki")
    moved = tmp_path / "older"
    old.rename(moved)
    new = install("acme-pki", code, name="acme", module="acme_pki")
    assert str(new) in sys.path[0]
    sys.path.append(str(moved))
    try:
        named = [one for one in PluginCatalog().providers() if one.name == "acme"]
        assert [str(one) for one in named] == ["acme-pki 1.2"]
        # the first on the path has none any more: it shadows the other all the same
        (new / "acme_pki-1.2.dist-info" / "entry_points.txt").unlink()
        os.utime(new, ns=(0, 0))
        assert "acme" not in PluginCatalog().provider_names
    finally:
        sys.path.remove(str(moved))


def test_a_distribution_without_metadata_hurts_nobody_else(install: Install) -> None:
    site = install("acme-pki", "", name="acme", module="acme_pki")
    (site / "acme_pki-1.2.dist-info" / "METADATA").unlink()
    assert {"acme", "embedded"} <= PluginCatalog().provider_names
    assert str(PluginCatalog().providers()[0]) == "acme_pki"
    with open_authority({"provider": "embedded"}) as authority:
        assert authority.issue_server()


def test_the_installed_distributions_are_read_once(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    before = PluginCatalog()

    def fail(*_: object, **__: object) -> NoReturn:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.distributions", fail)
        assert PluginCatalog() == before
    install("acme-pki", "", name="acme", module="acme_pki")
    assert PluginCatalog().provider_names == before.provider_names | {"acme"}


_TALKATIVE = """
import pathlib, time
here = pathlib.Path(__file__)
print("loading", here.stem)
here.with_suffix(".begun").touch()
while not here.with_suffix(".go").exists():
    time.sleep(0.01)
print("loaded", here.stem)
"""


def test_only_what_a_plugin_prints_is_kept_from_standard_output(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("first", "second")
    files = {
        name: install(name, _TALKATIVE, name=name, module=f"talk_{name}") / f"talk_{name}" for name in names
    }
    real = sys.stdout

    def load(name: str) -> None:
        with pytest.raises(ProviderLoadError):  # it has no hooks
            load_provider(name)

    threads = {name: threading.Thread(target=load, args=(name,)) for name in names}
    for name in names:  # both are loaded at once, and the first one ends first
        threads[name].start()
        while not files[name].with_suffix(".begun").exists():
            time.sleep(0.01)
    print("of the program")
    kept = sys.stdout
    for name in names:
        files[name].with_suffix(".go").touch()
        threads[name].join(20)
    assert sys.stdout is real
    print("still", file=kept)
    written = capsys.readouterr()
    assert written.out == "of the program\nstill\n"
    assert written.err.split("\n") == [
        f"{what} talk_{name}" for what in ("loading", "loaded") for name in names
    ] + [""]
