# A token with this policy alone; put it where ca.vault.auth.token looks for it.
"$$cli" token create -orphan -no-default-policy -policy=$policy -ttl="$${TOKEN_TTL:-768h}" -field=token >&3
