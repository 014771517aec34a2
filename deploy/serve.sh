#!/bin/sh
# Start the stock server in the environment that it needs. `llama` and `python` must be on PATH.
set -eu
cd "$(dirname "$0")/.."

# Keys travel with the calls, so none is handed to the server. The organization and the project are not its to have either:
# its OpenAI SDK would add them to every vendor's calls, whoever the caller is.
unset $(env | sed -n 's/^\([A-Z0-9_]*_API_KEY\)=.*/\1/p') OPENAI_ORG_ID OPENAI_PROJECT_ID

# On a port in use the server boots, says so in a log line among others, and exits with 0. Linux lists who listens (0A).
port="${LLAMA_STACK_PORT:-8321}"
case "${LLAMA_STACK_HOST:-127.0.0.1}" in
  127.0.0.1 | localhost) rival='(00000000|0100007F)' ;;
  0.0.0.0 | ::) rival='[0-9A-F]{8}' ;;
  *) rival=00000000 ;;
esac
if grep -Eqs "^ *[0-9]+: (0{32}|$rival):$(printf %04X "$port" 2>&1) [0-9A-F]+:[0-9A-F]+ 0A" /proc/net/tcp /proc/net/tcp6; then
  echo "Port $port is in use. Stop what listens there, or choose another with LLAMA_STACK_PORT." >&2
  exit 1
fi

# In the default format a wrong key is rendered as a rich traceback: seconds in which nobody is served.
export LLAMA_STACK_LOG_FORMAT="${LLAMA_STACK_LOG_FORMAT:-json}"

# The passthrough provider makes a TLS context for every call. A bundle of CAs is loaded whole each time, a
# directory of hashed ones is not (`make traps` has the difference).
if [ -z "${SSL_CERT_FILE-}${SSL_CERT_DIR-}" ]; then
  for dir in /etc/ssl/certs /etc/pki/ca-trust/extracted/pem/directory-hash; do
    set -- "$dir"/*.0
    if [ -e "$1" ]; then
      export SSL_CERT_DIR="$dir"
      break
    fi
  done
fi

# What callers send would be kept in the database in this folder, which is the one that run.yaml names. It is made anew at each
# start, so that nobody can have prepared it; nobody else may write to the folder.
: "${SQLITE_STORE_DIR:=$(sed -n "s|.*SQLITE_STORE_DIR:=~\([^}]*\)}/keeps.*|$HOME\1|p" run.yaml)}"
: "${SQLITE_STORE_DIR:?run.yaml does not say where it is to be, so run.yaml is not the one that ships}"
export SQLITE_STORE_DIR
(umask 077 && mkdir -p "$SQLITE_STORE_DIR")
store="$SQLITE_STORE_DIR/keeps-nothing.db"
new="$store.$$"
if said="$(python -m sqlite3 "$new" < deploy/keeps-nothing.sql 2>&1 | grep Error)"; then
  echo "The folder $SQLITE_STORE_DIR cannot be used: $(echo "$said" | tail -n 1)" >&2
  exit 1
fi
rm -f "$store-wal" "$store-shm"
mv "$new" "$store"

# Given one of the two without the other, the server says nothing and speaks plain HTTP.
case "${LLAMA_STACK_TLS_CERTFILE:+cert}${LLAMA_STACK_TLS_KEYFILE:+key}" in
  cert | key)
    echo "For HTTPS, set both LLAMA_STACK_TLS_CERTFILE and LLAMA_STACK_TLS_KEYFILE." >&2
    exit 2
    ;;
esac

# The server sends metrics by itself; traces, and numbers that tell one worker from the next, take the wrapper.
if [ -n "${OTEL_EXPORTER_OTLP_ENDPOINT-}" ]; then
  export OTEL_EXPORTER_OTLP_PROTOCOL="${OTEL_EXPORTER_OTLP_PROTOCOL:-http/protobuf}"
  export OTEL_SERVICE_NAME="${OTEL_SERVICE_NAME:-lls-openai}"
  set -- opentelemetry-instrument
else
  set --
fi

# The server's tracebacks quote what a caller sent (a malformed body) and what a vendor answered. Once it is up, only its
# JSON lines are let through, without the exceptions in them. Until then, only the last words of a traceback; and where
# run.yaml cannot be made into a server, it would neither serve nor exit, so it is ended. Should the log go nowhere any more
# (a full disk), it is read on, because a server that cannot print a traceback does not answer the call that caused it.
if [ "$LLAMA_STACK_LOG_FORMAT" = json ]; then
  pipe="$SQLITE_STORE_DIR/log.$$"
  mkfifo -m 600 "$pipe"
  (
    set +e
    trap '' INT TERM
    rm "$pipe"
    while IFS= read -r line; do
      case "$line" in
        *'"Application startup complete."'*)
          printf '%s\n' "$line"
          sed -u -e '/^{/!d' -e 's/"exc_info": \[.*\], "level"/"level"/' || exec cat > /dev/null
          exit
          ;;
        '  File "'*' in create_app') { sleep 1; kill $$ 2> /dev/null; } & ;;
        Traceback* | '  File "'* | '    '* | 'During handling'* | 'The above exception'* | '') ;;
        *) printf '%s\n' "$line" ;;
      esac
    done
    echo "The server did not start. What it said last is above."
  ) < "$pipe" &
  exec > "$pipe" 2>&1
fi

exec "$@" llama stack run run.yaml
