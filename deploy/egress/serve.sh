#!/bin/sh
# Start the egress proxy and the gateway behind it; when one of them ends, so does the other.
set -eu
cd "$(dirname "$0")/../.."

# Debian keeps it where only root looks.
PATH="$PATH:/usr/local/sbin:/usr/sbin"
if ! command -v haproxy > /dev/null; then
  echo "EGRESS=1 needs HAProxy: install the package haproxy (sudo apt-get install haproxy), or start without EGRESS=1." >&2
  exit 1
fi

# Keys travel with the calls: neither process needs one of its own.
unset $(env | sed -n 's/^\([A-Z0-9_]*_API_KEY\)=.*/\1/p')
export EGRESS_PORT="${EGRESS_PORT:-8322}"

# The CAs that the gateway is told to trust, or else the system's, wherever it keeps a bundle of them.
: "${EGRESS_CA:=${SSL_CERT_FILE:-${SSL_CERT_DIR-}}}"
for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/ca-bundle.pem /etc/ssl/cert.pem; do
  [ -n "$EGRESS_CA" ] || [ ! -e "$bundle" ] || EGRESS_CA="$bundle"
done
export EGRESS_CA="${EGRESS_CA:-@system-ca}"

[ -n "${EGRESS_NAMESERVER-}" ] || unset EGRESS_NAMESERVER
if [ -n "${HTTPS_PROXY-}${https_proxy-}${ALL_PROXY-}${all_proxy-}" ]; then
  echo "The egress proxy connects to the vendors itself: it does not use the proxy that the environment names." >&2
fi

# While streams finish, the gateway needs the proxy: it must survive what is sent to all processes at once (Ctrl-C, a service
# manager's SIGTERM), but not this script. Only Linux has these two; HAProxy 3 ends at Ctrl-C without them.
apart="setsid setpriv --pdeathsig KILL"
$apart true 2> /dev/null || apart=
(
  trap '' HUP INT TERM
  exec $apart haproxy -db -f deploy/egress/haproxy.cfg
) &
proxy=$!

through="http://127.0.0.1:$EGRESS_PORT"
export OPENAI_PASSTHROUGH_URL="${OPENAI_PASSTHROUGH_URL:-$through/openai}"
export GEMINI_PASSTHROUGH_URL="${GEMINI_PASSTHROUGH_URL:-$through/gemini/v1beta/openai}"
export ANTHROPIC_PASSTHROUGH_URL="${ANTHROPIC_PASSTHROUGH_URL:-$through/anthropic}"
others="${no_proxy:-${NO_PROXY-}}"
export no_proxy="127.0.0.1${others:+,$others}"
EGRESS=0 EGRESS_WAY="through the egress proxy on port $EGRESS_PORT" deploy/serve.sh &
gateway=$!

trap 'kill "$gateway" || :' HUP INT TERM
failed=
while kill -0 "$gateway" 2> /dev/null; do
  if [ -z "$failed" ] && ! kill -0 "$proxy" 2> /dev/null; then
    failed=1
    echo "The egress proxy has stopped, and the gateway with it." >&2
    kill "$gateway"
  fi
  sleep 1 || :
done
code=0
wait "$gateway" || code=$?
kill -USR1 "$proxy" 2> /dev/null || :
wait "$proxy" || :
exit "${failed:-$code}"
