# The secrets engine. A CA that it has already stays; otherwise a root is made in an engine of its own,
# and an intermediate that signs the certificates of builds.
mount=$mount
mounted() { "$$cli" read "sys/mounts/$$1/tune" >/dev/null 2>&1; }
mounted "$$mount" || "$$cli" secrets enable -path="$$mount" -max-lease-ttl=43800h pki
if ! "$$cli" read "$$mount/issuer/default" >/dev/null 2>&1; then
  mounted "$$mount-root" || "$$cli" secrets enable -path="$$mount-root" -max-lease-ttl=87600h pki
  "$$cli" read "$$mount-root/issuer/default" >/dev/null 2>&1 ||
    "$$cli" write "$$mount-root/root/generate/internal" common_name="firebuild root" \
      key_type=ec key_bits=256 ttl=87600h >/dev/null
  request=$$("$$cli" write -field=csr "$$mount/intermediate/generate/internal" \
    common_name="firebuild intermediate" key_type=ec key_bits=256)
  signed=$$("$$cli" write -field=certificate "$$mount-root/root/sign-intermediate" \
    csr="$$request" common_name="firebuild intermediate" max_path_length=0 ttl=43800h)
  root=$$("$$cli" read -field=certificate "$$mount-root/cert/ca")
  # the root's certificate goes along, so that the mount knows the whole chain
  "$$cli" write "$$mount/intermediate/set-signed" certificate="$$signed
$$root" >/dev/null
fi
