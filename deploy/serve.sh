#!/bin/sh
# Start the stock server in the environment that it needs. `llama` and `python` must be on PATH.
set -eu
cd "$(dirname "$0")/.."

# Keys travel with the calls. The organization and the project would be added to every vendor's calls by the server's
# OpenAI SDK, whoever the caller is, and OPENAI_LOG would print what they say.
unset $(env | sed -n 's/^\([A-Z0-9_]*_API_KEY\)=.*/\1/p') OPENAI_ORG_ID OPENAI_PROJECT_ID OPENAI_LOG

# In the default format a wrong key is rendered as a rich traceback: 4 s in which nobody is served.
export LLAMA_STACK_LOG_FORMAT="${LLAMA_STACK_LOG_FORMAT:-json}"

# The passthrough provider makes a TLS context for every call. A bundle of CAs costs it 13 ms and more each time, a
# directory of hashed ones 0.1 ms.
if [ -z "${SSL_CERT_FILE-}${SSL_CERT_DIR-}" ]; then
  for dir in /etc/ssl/certs /etc/pki/ca-trust/extracted/pem/directory-hash; do
    set -- "$dir"/*.0
    if [ -e "$1" ]; then
      export SSL_CERT_DIR="$dir"
      break
    fi
  done
fi

# The server inserts every chat into inference_store and cannot be told not to: a view of that name takes the inserts and
# keeps nothing. The folder is the one that run.yaml names.
: "${SQLITE_STORE_DIR:=$(sed -n "s|.*SQLITE_STORE_DIR:=~\([^}]*\)}.*|$HOME\1|p" run.yaml)}"
export SQLITE_STORE_DIR
mkdir -p "$SQLITE_STORE_DIR"
for statement in \
  "CREATE VIEW IF NOT EXISTS inference_store AS SELECT '' AS id, 0 AS created, '' AS model, '' AS choices,
     '' AS input_messages, '' AS owner_principal, '' AS access_attributes WHERE 0" \
  "CREATE TRIGGER IF NOT EXISTS keeps_nothing INSTEAD OF INSERT ON inference_store BEGIN SELECT 1; END"; do
  python -m sqlite3 "$SQLITE_STORE_DIR/keeps-nothing.db" "$statement"
done

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
# JSON lines are let through, without the exceptions in them. (No line holds a \n: to the end, as $ would say, but $ makes
# sed wait for the next line.)
if [ "$LLAMA_STACK_LOG_FORMAT" = json ]; then
  pipe="$SQLITE_STORE_DIR/log.$$"
  mkfifo -m 600 "$pipe"
  (
    trap '' INT TERM
    rm "$pipe"
    exec sed -u \
      -e '/Application startup complete/,/\n/ { /^{/!d; }' \
      -e 's/"exc_info": \[.*\], "level"/"level"/'
  ) < "$pipe" &
  exec > "$pipe" 2>&1
fi

exec "$@" llama stack run run.yaml
