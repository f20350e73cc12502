# Kubernetes: pods with this service account may log in. Where Vault runs outside of that Kubernetes, name its
# address in KUBERNETES_HOST, and the PEM file of its CA in KUBERNETES_CA_FILE.
: "$${SERVICE_ACCOUNT:?name of the service account that builds run as}"
: "$${SERVICE_ACCOUNT_NAMESPACE:?Kubernetes namespace of that service account}"
"$$cli" read "sys/auth/"$mount"/tune" >/dev/null 2>&1 || "$$cli" auth enable -path=$mount kubernetes
"$$cli" read "auth/"$mount"/config" >/dev/null 2>&1 || "$$cli" write "auth/"$mount"/config" \
  $${KUBERNETES_CA_FILE:+kubernetes_ca_cert=@"$$KUBERNETES_CA_FILE"} \
  kubernetes_host="$${KUBERNETES_HOST:-https://kubernetes.default.svc}" >/dev/null
"$$cli" write "auth/"$mount"/role/"$role \
  bound_service_account_names="$$SERVICE_ACCOUNT" \
  bound_service_account_namespaces="$$SERVICE_ACCOUNT_NAMESPACE" \
  token_policies=$policy token_no_default_policy=true token_ttl=1h token_max_ttl=4h >/dev/null
