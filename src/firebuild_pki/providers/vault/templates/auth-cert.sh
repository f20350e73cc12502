# TLS certificates: those of this CA with this common name may log in.
: "$${CLIENT_CA_FILE:?PEM file of the CA that made the client certificates of builds}"
: "$${CLIENT_COMMON_NAME:?common name in these certificates, or a pattern with *}"
"$$cli" read "sys/auth/"$mount"/tune" >/dev/null 2>&1 || "$$cli" auth enable -path=$mount cert
"$$cli" write "auth/"$mount"/certs/"$name certificate=@"$$CLIENT_CA_FILE" \
  allowed_common_names="$$CLIENT_COMMON_NAME" \
  token_policies=$policy token_no_default_policy=true token_ttl=1h token_max_ttl=4h >/dev/null
