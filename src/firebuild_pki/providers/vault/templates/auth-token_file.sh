# The program that keeps the token file filled needs this policy, for example a token made by:
"$$cli" token create -orphan -no-default-policy -policy=$policy -ttl="$${TOKEN_TTL:-768h}" -field=token >&3
