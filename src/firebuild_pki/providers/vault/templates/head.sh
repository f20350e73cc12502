#!/bin/sh
# Prepares Vault or OpenBao for firebuild. Run it once, with a token that may mount engines and write policies.
# It can be run again: what is there stays, roles and policy are written anew.
set -eu
# What the tool says goes to standard error: standard output is for credentials alone, so that they can be piped.
exec 3>&1 >&2
cli=$${VAULT_CLI:-$$(command -v bao || command -v vault)}
VAULT_ADDR=$${VAULT_ADDR:-$${BAO_ADDR:-$address}} BAO_ADDR=$${BAO_ADDR:-$${VAULT_ADDR:-$address}}
VAULT_NAMESPACE=$namespace BAO_NAMESPACE=$namespace
export VAULT_ADDR BAO_ADDR VAULT_NAMESPACE BAO_NAMESPACE
