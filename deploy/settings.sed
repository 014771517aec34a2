# Settings that cannot work, or would without a word do something else than they say, for sed -nE: from what `env` prints, a
# sentence for each.

/^EGRESS=(|0|no|false|1|yes|true)$/! s/^EGRESS=(.*)/EGRESS is '\1': set it to 1 for the egress proxy, or to 0 to do without./p

/^(LLAMA_STACK|EGRESS)_PORT=(|102[4-9]|10[3-9][0-9]|1[1-9][0-9]{2}|[2-9][0-9]{3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])$/! s/^((LLAMA_STACK|EGRESS)_PORT)=(.*)/\1 is '\3': it has to be a port from 1024 to 65535. To answer on 80 or 443, put a balancer in front (deploy\/README.md)./p

/^LLAMA_STACK_WORKERS=([1-9][0-9]{0,2})?$/! s/^LLAMA_STACK_WORKERS=(.*)/LLAMA_STACK_WORKERS is '\1': set it to a number of processes, 1 or more./p

/^[A-Z]+_PASSTHROUGH_URL=(https?:\/\/.+)?$/! s/^([A-Z]+_PASSTHROUGH_URL)=(.*)/\1 is '\2', which is no URL: it starts with https:\/\/ or http:\/\/./p
/^AUTH_JWKS_URI=(https?:\/\/.+)?$/! s/^(AUTH_JWKS_URI)=(.*)/\1 is '\2', which is no URL: it starts with https:\/\/ or http:\/\/./p
/^OTEL_EXPORTER_OTLP_ENDPOINT=(https?:\/\/.+)?$/! s/^(OTEL_EXPORTER_OTLP_ENDPOINT)=(.*)/\1 is '\2', which is no URL: it starts with https:\/\/ or http:\/\/./p

# Its exporter could be let past the closed proxy (deploy/serve.sh) to every port of such an address only, and callers' URLs too.
/^OTEL_EXPORTER_OTLP_ENDPOINT=https?:\/\/(127\.0\.0\.1|\[::1\])([:\/].*)?$/ b
s/^OTEL_EXPORTER_OTLP_ENDPOINT=(https?:\/\/(\[.*|[0-9.]+([:\/].*)?))$/OTEL_EXPORTER_OTLP_ENDPOINT is '\1': name the collector's host, if need be in \/etc\/hosts, instead of its address./p

/^LLAMA_STACK_LOG_FORMAT=(json)?$/! s/^LLAMA_STACK_LOG_FORMAT=(.*)/LLAMA_STACK_LOG_FORMAT is '\1': only the lines of json can be cleared of callers' keys and prompts. Unset it./p
s/^LLAMA_STACK_LOG_FILE=(.+)/LLAMA_STACK_LOG_FILE is '\1': callers' keys and prompts would be written there. Unset it./p
