# The policy: sign with the roles, look at them, and at the own token.
"$$cli" policy write $policy - <<'EOF'
$rules
EOF
