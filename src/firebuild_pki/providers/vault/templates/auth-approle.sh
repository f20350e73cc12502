# AppRole: the role id and a secret id are printed at the end.
"$$cli" read "sys/auth/"$mount"/tune" >/dev/null 2>&1 || "$$cli" auth enable -path=$mount approle
"$$cli" write "auth/"$mount"/role/$role" token_policies=$policy token_no_default_policy=true \
  token_ttl=1h token_max_ttl=4h secret_id_ttl="$${SECRET_ID_TTL:-0}" >/dev/null
echo "role_id: $$("$$cli" read -field=role_id "auth/"$mount"/role/$role/role-id")" >&3
echo "secret_id: $$("$$cli" write -f -field=secret_id "auth/"$mount"/role/$role/secret-id")" >&3
