#!/bin/sh
# The whole chain on one virtual machine: from power-on over the approval queue
# to a certificate, then a theft. Needs root; see docs/how-to/test-in-the-lab.md.
set -eu
MUSTER=${MUSTER:-muster}

$MUSTER lab up
LAB=$($MUSTER lab list -o json | jq -r '.[0].name')

# Wait until the machine has proved itself.
until ID=$($MUSTER lab exec "$LAB" get requests --state pending -o json | jq -er '.[0].id'); do sleep 5; done
$MUSTER lab exec "$LAB" describe "$ID"
$MUSTER lab exec "$LAB" approve "$ID" --site shop-1 --label rack=2

# It collects its certificate and calls with it.
until $MUSTER lab exec "$LAB" get nodes -o json | jq -e '.[0].state == "active"' >/dev/null; do sleep 1; done
NODE=$($MUSTER lab exec "$LAB" get nodes -o json | jq -r '.[0].id')

# Stolen, and found again.
$MUSTER lab exec "$LAB" deny "$NODE" --reason "stolen from shop-1"
$MUSTER lab exec "$LAB" allow "$NODE" --reason "found again"
$MUSTER lab exec "$LAB" get requests

$MUSTER lab exec "$LAB" audit verify
$MUSTER lab down "$LAB"
