"""Preflight: everything that a build needs of its certificate authority, tried before a build does."""

from __future__ import annotations

from firebuild_pki.pem_files import Content
from firebuild_pki.preflighting.inspection import (
    CertificateFacts,
    InspectedItem,
    Inspection,
    KeyFacts,
    RequestFacts,
    RevocationListFacts,
    certificate_facts,
    certificates_of,
    inspect_files,
    read_bytes,
    read_file,
)
from firebuild_pki.preflighting.listing import ListedProvider, list_providers
from firebuild_pki.preflighting.report import PreflightReport, PreflightRow, RowLevel, Verdict
from firebuild_pki.preflighting.run import preflight, refused

__all__ = [
    "CertificateFacts",
    "Content",
    "InspectedItem",
    "Inspection",
    "KeyFacts",
    "ListedProvider",
    "PreflightReport",
    "PreflightRow",
    "RequestFacts",
    "RevocationListFacts",
    "RowLevel",
    "Verdict",
    "certificate_facts",
    "certificates_of",
    "inspect_files",
    "list_providers",
    "preflight",
    "read_bytes",
    "read_file",
    "refused",
]
