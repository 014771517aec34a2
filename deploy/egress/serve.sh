#!/bin/sh
# What deploy/serve.sh does with the egress proxy: start it and the gateway behind it. When one of them ends, so does the other.
set -eu
cd "$(dirname "$0")/../.."

# The CAs that the gateway is told to trust, or else the system's, wherever it keeps a bundle of them.
: "${EGRESS_CA:=${SSL_CERT_FILE:-${SSL_CERT_DIR-}}}"
for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/ca-bundle.pem /etc/ssl/cert.pem; do
  [ -n "$EGRESS_CA" ] || [ ! -e "$bundle" ] || EGRESS_CA="$bundle"
done

through="http://127.0.0.1:$EGRESS_PORT"
export OPENAI_PASSTHROUGH_URL="${OPENAI_PASSTHROUGH_URL:-$through/openai}"
export GEMINI_PASSTHROUGH_URL="${GEMINI_PASSTHROUGH_URL:-$through/gemini/v1beta/openai}"
export ANTHROPIC_PASSTHROUGH_URL="${ANTHROPIC_PASSTHROUGH_URL:-$through/anthropic}"

# Each in a session of its own, where there is setsid (Linux): Ctrl-C reaches this script alone, which lets streams finish, and
# all processes of a gateway can be ended at once.
apart=setsid group=-
setsid true 2> /dev/null || apart='' group=

EGRESS=0 EGRESS_WAY="through the egress proxy on port $EGRESS_PORT" $apart deploy/serve.sh < /dev/null &
gateway=$!

# Whoever takes the port of a dead proxy would be sent keys. So the proxy's own parent waits for its end and ends the gateway in
# the same moment; it lives on if this script is killed. A service manager's SIGTERM to all leaves both until streams are done.
(
  trap '' HUP INT TERM
  trap 'kill -KILL "$!"; wait "$!" 2> /dev/null || :; exit 0' USR1
  # Of the environment it gets what it needs: keys travel with the calls.
  $apart env -i PATH="$PATH" EGRESS_PORT="$EGRESS_PORT" ${EGRESS_CA:+"EGRESS_CA=$EGRESS_CA"} \
    ${EGRESS_NAMESERVER:+"EGRESS_NAMESERVER=$EGRESS_NAMESERVER"} \
    ${EGRESS_VENDOR_PORT:+"EGRESS_VENDOR_PORT=$EGRESS_VENDOR_PORT"} haproxy -db -f deploy/egress/haproxy.cfg &
  wait "$!" 2> /dev/null || :
  kill -KILL "$group$gateway" || :
  echo "The egress proxy has stopped, and the gateway with it." >&2
  exit 1
) &
watch=$!

trap 'kill "$gateway" || :' HUP TERM
trap 'kill "$gateway" || :; trap "kill -KILL $group$gateway || :" INT' INT
code=0
while kill -0 "$gateway" 2> /dev/null; do wait "$gateway" 2> /dev/null && code=0 || code=$?; done
kill -USR1 "$watch" 2> /dev/null || :
wait "$watch" || code=1
exit "$code"
