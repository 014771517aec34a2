#!/bin/sh
# Start the egress proxy and the gateway behind it; when one of them ends, so does the other.
set -eu
cd "$(dirname "$0")/../.."

refuse() {
  echo "$1" >&2
  exit 1
}

# Debian keeps it where only root looks.
PATH="$PATH:/usr/local/sbin:/usr/sbin"
case "$(haproxy -v 2>&1 || :)" in
  *"version 1."* | *"version 2."[0-5][.-]*)
    refuse "The egress proxy needs HAProxy 2.6 or later. Install a newer one, or start with EGRESS=0."
    ;;
  *roxy" version "*) ;;
  *)
    refuse "The egress proxy needs HAProxy: install the package haproxy (Debian and Ubuntu: sudo apt-get install haproxy, \
Fedora: sudo dnf install haproxy, macOS: brew install haproxy), or start with EGRESS=0."
    ;;
esac
if [ -n "${HTTPS_PROXY-}${https_proxy-}${ALL_PROXY-}${all_proxy-}" ]; then
  refuse "The egress proxy connects to the vendors itself, past the proxy that HTTPS_PROXY or ALL_PROXY names. \
Start with EGRESS=0, or unset the variable."
fi

# One above the gateway's. Linux lists who listens (0A); elsewhere HAProxy says that it is taken.
EGRESS_PORT="${EGRESS_PORT:-$((${LLAMA_STACK_PORT:-8321} + 1))}"
if grep -Eqs ": (0{32}|00000000|0100007F):$(printf %04X "$EGRESS_PORT" 2>&1) [0-9A-F]+:[0-9A-F]+ 0A" /proc/net/tcp /proc/net/tcp6; then
  refuse "Port $EGRESS_PORT, where the egress proxy is to listen, is in use. Choose another with EGRESS_PORT."
fi

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
while kill -0 "$gateway" 2> /dev/null; do
  wait "$gateway" 2> /dev/null && code=0 || code=$?
done
kill -USR1 "$watch" 2> /dev/null || :
wait "$watch" || code=1
exit "$code"
