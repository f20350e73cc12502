"""What a provider may lack, if it says so."""

from __future__ import annotations

from enum import StrEnum

from firebuild_pki.keys import KeyType


class Feature(StrEnum):
    """What not every provider can do. One that cannot lists it in ``unsupported``."""

    SIGN = "sign"
    """Signs what it is asked to sign. Providers of ready pairs do not."""
    REVOKE = "revoke"
    """Takes certificates back."""
    LIFETIME = "lifetime"
    """Certificates live as long as was asked, up to two hours."""
    SEVERAL_NAMES = "several-names"
    """One certificate can have several names."""
    CHECK = "check"
    """`CAProvider.check` has something to say about the backend."""
    POLICY = "policy"
    """The backend can refuse to sign; needs the fixture ``ca_refusing_settings``."""
    FAULTS = "faults"
    """There is something that can fail; needs the fixture ``ca_broken_settings``."""
    P256 = "p256"
    """Signs EC keys on the curve P-256."""
    P384 = "p384"
    """Signs EC keys on the curve P-384."""
    RSA2048 = "rsa2048"
    """Signs RSA keys of 2048 bits."""
    RSA3072 = "rsa3072"
    """Signs RSA keys of 3072 bits."""
    RSA4096 = "rsa4096"
    """Signs RSA keys of 4096 bits."""

    @classmethod
    def of_key(cls, key_type: KeyType) -> Feature:
        """Name the feature of signing a kind of key."""
        return cls(key_type.value)
