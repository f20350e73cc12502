# JWT: tokens with this audience and subject may log in.
: "$${BOUND_AUDIENCE:?the claim aud of the tokens}"
: "$${BOUND_SUBJECT:?the claim sub of the tokens, or a pattern with *}"
"$$cli" read "sys/auth/"$mount"/tune" >/dev/null 2>&1 || "$$cli" auth enable -path=$mount jwt
if ! "$$cli" read "auth/"$mount"/config" >/dev/null 2>&1; then
  # a file with the public keys of the issuer, or the address where it publishes them
  if [ -n "$${JWT_PUBLIC_KEYS-}" ]; then
    "$$cli" write "auth/"$mount"/config" jwt_validation_pubkeys=@"$$JWT_PUBLIC_KEYS" default_role=$role >/dev/null
  else
    "$$cli" write "auth/"$mount"/config" default_role=$role \
      oidc_discovery_url="$${OIDC_DISCOVERY_URL:?issuer of the tokens, such as https://gitlab.example}" >/dev/null
  fi
fi
"$$cli" write "auth/"$mount"/role/"$role - >/dev/null <<EOF
{"role_type": "jwt", "user_claim": "sub", "bound_audiences": ["$$BOUND_AUDIENCE"],
 "bound_claims_type": "glob", "bound_claims": {"sub": "$$BOUND_SUBJECT"},
 "token_policies": ["$policy"], "token_no_default_policy": true, "token_ttl": "1h", "token_max_ttl": "4h"}
EOF
