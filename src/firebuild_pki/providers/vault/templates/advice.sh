# The settings of firebuild that belong to this; add tls.ca_file if no CA of the system vouches for the server.
cat <<'EOF'
$settings
EOF
