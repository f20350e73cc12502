# The role for the certificates of the $ends: names below the suffix, what TLS needs, nothing else.
"$$cli" write $path issuer_ref=$issuer \
  allowed_domains=$domain allow_subdomains=true allow_bare_domains=false allow_glob_domains=false \
  allow_wildcard_certificates=false allow_localhost=false allow_ip_sans=false allow_any_name=false \
  require_cn=false$uris $flags key_usage=DigitalSignature \
  $key max_ttl=24h >/dev/null
