"""The client of registries: images are pulled and pushed by the OCI distribution specification (v1.1).

https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md. What a registry sends is untrusted:
every blob and manifest is verified against its digest while it comes, and bounded in size and time.
"""
