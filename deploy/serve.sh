#!/bin/sh
# Start the stock server in the environment that it needs. The `python` on PATH must be the one that has it.
set -eu
cd "$(dirname "$0")/.."

refuse() { printf '%s\n' "$1" >&2 && exit 2; }
say() { # To a person at a terminal, or as a line of the log.
  if [ -t 1 ]; then printf '%s\n' "$1"; else
    printf '{"event": "%s", "level": "info", "logger": "deploy/serve.sh", "timestamp": "%s"}\n' "$1" "$(date -u +%FT%TZ)"
  fi || :
}
# What run.yaml has for a variable that is not set.
default() { sed -n "s|.*{env\.$1:=\([^}]*\)}.*|\1|p" run.yaml | head -n 1; }
# Whether somebody listens on a port of 127.0.0.1, of every address, or of ::1, which `localhost` means too. Linux lists who (0A).
taken() {
  pattern="(0{8}|0{32}|0100007F|0{24}01000000|0{16}FFFF00000100007F):$(printf %04X "$1") [0-9A-F]+:[0-9A-F]+ 0A"
  [ -r /proc/net/tcp ] || pattern="[.]$1 .*LISTEN"
  { cat /proc/net/tcp /proc/net/tcp6 2> /dev/null || netstat -an; } | grep -Eq "$pattern"
}

# Settings that cannot work, or would without a word do something else than they say.
wrong="$(env | sed -nE -f deploy/settings.sed)"
[ -z "$wrong" ] || refuse "$wrong"
[ -n "$(default SQLITE_STORE_DIR)" ] || refuse "run.yaml is not the one that ships: it does not say where SQLITE_STORE_DIR is."
cert="${LLAMA_STACK_TLS_CERTFILE-}" key="${LLAMA_STACK_TLS_KEYFILE-}"
case "${cert:+cert}${key:+key}" in cert | key) refuse "For HTTPS, set both LLAMA_STACK_TLS_CERTFILE and LLAMA_STACK_TLS_KEYFILE." ;; esac
for file in ${cert:+"$cert" "$key"}; do [ -r "$file" ] || refuse "$file cannot be read: see the LLAMA_STACK_TLS_ settings."; done
[ -z "$key" ] || ! grep -q ENCRYPTED "$key" || refuse "The key in $key has a passphrase, for which nobody is asked: give the server a key without."
[ -n "${AUTH_JWKS_URI-}" ] || [ -z "${AUTH_ISSUER-}${AUTH_AUDIENCE-}" ] ||
  refuse "Without AUTH_JWKS_URI nobody needs a token: set it, or unset AUTH_ISSUER and AUTH_AUDIENCE."

# Beside a rival on these addresses keys would go astray. On others the server itself says that the port is taken.
export LLAMA_STACK_HOST="${LLAMA_STACK_HOST:-$(default LLAMA_STACK_HOST)}"
export LLAMA_STACK_PORT="${LLAMA_STACK_PORT:-$(default LLAMA_STACK_PORT)}"
case "$LLAMA_STACK_HOST" in 127.0.0.1 | ::1 | localhost)
  ! taken "$LLAMA_STACK_PORT" || refuse "Port $LLAMA_STACK_PORT is in use. Stop what listens there, or choose another with LLAMA_STACK_PORT." ;;
esac

# The egress proxy keeps connections to the vendors open. It cannot go through another proxy. Debian keeps it where root looks.
PATH="$PATH:/usr/local/sbin:/usr/sbin"
demanded="${https_proxy:-${HTTPS_PROXY:-${all_proxy:-${ALL_PROXY-}}}}"
haproxy="$(haproxy -v 2> /dev/null | grep -E 'version (2\.([6-9]|[1-9][0-9])|[3-9])' || :)"
case "${EGRESS-}${haproxy:+ possible}${demanded:+ not}" in
  1* | yes* | true* | ' possible')
    [ -n "$haproxy" ] || refuse "The egress proxy needs HAProxy 2.6 or later: install haproxy (sudo apt-get install haproxy on Debian \
and Ubuntu, sudo dnf install haproxy on Fedora, brew install haproxy on macOS), or start with EGRESS=0."
    [ -z "$demanded" ] || refuse "The egress proxy connects to the vendors itself, past the proxy that HTTPS_PROXY or ALL_PROXY names. \
Start with EGRESS=0, or unset the variable."
    export EGRESS_PORT="${EGRESS_PORT:-$((LLAMA_STACK_PORT + 1))}"
    ! taken "$EGRESS_PORT" || refuse "Port $EGRESS_PORT, where the egress proxy is to listen, is in use. Choose another with EGRESS_PORT."
    exec deploy/egress/serve.sh
    ;;
esac

# Keys travel with the calls, so none is handed to the server. The organization and the project are not its to have either:
# its OpenAI SDK would add them to every vendor's calls, whoever the caller is.
# shellcheck disable=SC2046 # Names of variables, an argument each.
unset $(env | sed -n 's/^\([A-Z0-9_]*_API_KEY\)=.*/\1/p') OPENAI_ORG_ID OPENAI_PROJECT_ID
# In the default format a wrong key is rendered as a rich traceback: seconds in which nobody is served.
export LLAMA_STACK_LOG_FORMAT=json
# Other releases of llama-stack-client work as well as the server's own.
export LLAMA_STACK_DISABLE_VERSION_CHECK=1
# Callers choose what X-Forwarded-For says. It is believed of a balancer alone, if one is named here.
export FORWARDED_ALLOW_IPS="${FORWARDED_ALLOW_IPS-}"
# Each connection takes a descriptor, and the server never closes an idle one.
# shellcheck disable=SC3045 # Every sh of today has it.
ulimit -n 65536 2> /dev/null || ulimit -n "$(ulimit -H -n)"

# The passthrough provider makes a TLS context for every call. A bundle of CAs is loaded whole each time, a directory of hashed
# ones is not (`make workarounds` has the difference).
for dir in /etc/ssl/certs /etc/pki/ca-trust/extracted/pem/directory-hash; do
  set -- "$dir"/*.0
  [ -n "${SSL_CERT_FILE-}${SSL_CERT_DIR-}" ] || [ ! -e "$1" ] || export SSL_CERT_DIR="$dir"
done

# A call can hold URLs, such as an MCP server's, that the server would fetch. Whatever is not named here is sent to a proxy that
# is not there. A proxy that the operator demands decides about HTTPS instead, the vendors' included.
OTEL_EXPORTER_OTLP_ENDPOINT="$(printf '%s\n' "${OTEL_EXPORTER_OTLP_ENDPOINT-}" | sed -E 's#//(127.0.0.1|\[::1])#//localhost#')"
named="${no_proxy:-${NO_PROXY-}}"
for url in "$(default OPENAI_PASSTHROUGH_URL)" "$(default GEMINI_PASSTHROUGH_URL)" "$(default ANTHROPIC_PASSTHROUGH_URL)" \
  "${OPENAI_PASSTHROUGH_URL-}" "${GEMINI_PASSTHROUGH_URL-}" "${ANTHROPIC_PASSTHROUGH_URL-}" \
  "${AUTH_JWKS_URI-}" "$OTEL_EXPORTER_OTLP_ENDPOINT"; do
  host="${url#*://}" && host="${host%%[/?#]*}"
  case "${demanded:+proxy}$url" in '' | proxy | proxyhttps:*) ;; *) named="$named,${url%%://*}://$host" ;; esac
done
unset http_proxy HTTP_PROXY https_proxy HTTPS_PROXY all_proxy no_proxy
[ -z "$demanded" ] || export HTTPS_PROXY="$demanded"
export ALL_PROXY=http://127.0.0.1:9 NO_PROXY="${named#,}"

# The database in which the server would keep what callers send, in the folder that run.yaml names: made anew at each start, where
# nobody else may write, so that nobody can have prepared it.
export SQLITE_STORE_DIR="${SQLITE_STORE_DIR:-$HOME$(default SQLITE_STORE_DIR | sed 's/^~//')}"
store="$SQLITE_STORE_DIR/keeps-nothing.db"
(umask 077 && mkdir -p "$SQLITE_STORE_DIR") 2> /dev/null || :
[ -n "$(find "$SQLITE_STORE_DIR/." -prune -user "$(id -u)" ! -perm -020 ! -perm -002 2> /dev/null)" ] ||
  refuse "SQLITE_STORE_DIR is $SQLITE_STORE_DIR: it has to be a folder that is yours, and that nobody else may write to."
! said="$(python -P -m sqlite3 "$store.$$" < deploy/keeps-nothing.sql 2>&1 | grep Error)" ||
  refuse "SQLITE_STORE_DIR is $SQLITE_STORE_DIR, which cannot be used: $(echo "$said" | tail -n 1)"
rm -f "$store-wal" "$store-shm"
mv "$store.$$" "$store"

# The server sends metrics by itself; traces, and numbers that tell one worker from the next, take the wrapper. No logs go out,
# which quote keys and prompts, and of an attribute of a span, such as a URL, 4 characters. Model names, which callers make up,
# label metrics: as differences they can be forgotten. The last host above is the collector's, whose exporter wants no scheme.
set --
if [ -n "$OTEL_EXPORTER_OTLP_ENDPOINT" ]; then
  set -- opentelemetry-instrument
  export OTEL_EXPORTER_OTLP_ENDPOINT OTEL_LOGS_EXPORTER=none OTEL_SERVICE_NAME="${OTEL_SERVICE_NAME:-lls-openai}" NO_PROXY="$NO_PROXY,$host"
  export OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT="${OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT:-4}"
  export OTEL_EXPORTER_OTLP_PROTOCOL="${OTEL_EXPORTER_OTLP_PROTOCOL:-http/protobuf}"
  export OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE="${OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE:-delta}"
fi
for url in ${AUTH_JWKS_URI:+"$AUTH_JWKS_URI"} ${OTEL_EXPORTER_OTLP_ENDPOINT:+"$OTEL_EXPORTER_OTLP_ENDPOINT"}; do
  httpx "$url" 2> /dev/null | grep -q '^HTTP/' || say "Nothing answers at $url. The gateway starts all the same."
done

# The log goes through a filter, which reads on where nobody takes it (a full disk): a server that cannot print does not answer.
by_line="$(sed -u '' < /dev/null > /dev/null 2>&1 && echo -u || echo -l)" # -l is BSD's name for it.
[ -t 1 ] && form=deploy/terminal.sed || form=/dev/null
show() { sed "$by_line" -E -f deploy/log.sed -f "$form"; }
pipe="$SQLITE_STORE_DIR/log.$$" && mkfifo -m 600 "$pipe"
say "The gateway starts. It asks each vendor for its models first, and waits for one that is silent. Calls go ${EGRESS_WAY:-straight to the vendors}."
# It is `llama stack run`, though from no file: each worker would import that before it answers uvicorn, which replaces one that is
# silent for 5 s.
"$@" python -P -c 'from llama_stack.cli.llama import main; main()' stack run run.yaml < /dev/null > "$pipe" 2>&1 &
server=$!
workers() { ps -A -o pid= -o ppid= 2> /dev/null | awk -v of="$server" '$2 == of { print $1 }'; }
(
  set +e
  trap '' HUP INT TERM
  rm "$pipe"
  # Until it takes calls, all that it says is shown, but for tracebacks. A single worker is complete before it has the port, and
  # says so in a line more; of several, each takes calls as soon as it is complete.
  missing="${LLAMA_STACK_WORKERS:-$(default LLAMA_STACK_WORKERS)}" starting=true single=false
  [ "$missing" -gt 1 ] || missing=2 single=true
  while [ "$missing" -gt 0 ] && IFS= read -r line; do
    case "$starting $line" in
      'true '*'[Errno '*) echo "LLAMA_STACK_HOST is '$LLAMA_STACK_HOST', LLAMA_STACK_PORT is '$LLAMA_STACK_PORT': ${line#*\[Errno }" ;;
      'true {'* | 'false {'*) printf '%s\n' "$line" | show ;;
      # It would neither serve nor exit, or start its workers for ever. One that is told to stop while it fails forgets that.
      'true   File "'*' in create_app' | 'true Process SpawnProcess-'*) { sleep 1 && kill "$server" && workers | xargs kill -KILL; } 2> /dev/null & ;;
      false* | 'true ' | 'true   File "'* | 'true     '* | 'true Traceback'* | 'true During handling'* | 'true The above exception'*) ;;
      *) printf '%s\n' "$line" ;;
    esac
    case "$line" in
      '{"event": "Application startup complete.'*) starting="$single" missing=$((missing - 1)) ;;
      '{"event": "Uvicorn running on '*) starting=false missing=$((missing - 1)) ;;
    esac
  done
  [ "$missing" -eq 0 ] || exit 1
  host="$(printf '%s\n' "$LLAMA_STACK_HOST" | sed 's/.*:.*/[&]/')"
  say "The gateway answers at http${key:+s}://$host:$LLAMA_STACK_PORT. Ctrl-C stops it."
  show || exec cat > /dev/null
) < "$pipe" &
log=$!

# Asked to stop, the server refuses new calls and finishes those in flight. Asked twice, it would hang for its threads' sake.
asked='' code=0
stop() {
  [ -n "$asked" ] || say "The gateway stops when the calls in flight have ended. Ctrl-C ends it at once."
  asked="${asked:-0}"
  kill "$server" 2> /dev/null || :
}
insist() {
  [ -z "$asked" ] || { asked=130 && { echo "$server" && workers; } | xargs kill -KILL 2> /dev/null; }
  stop
}
trap stop HUP TERM
trap insist INT
while kill -0 "$server" 2> /dev/null; do wait "$server" 2> /dev/null && code=0 || code=$?; done
wait "$log" || [ -n "$asked" ] || refuse "The server did not start. What it said last is above."
[ -z "$asked" ] || say "The gateway has stopped."
exit "${asked:-$code}"
