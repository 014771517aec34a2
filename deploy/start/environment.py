"""The environment of the server and of HAProxy: who may be reached, what is measured, and what is not theirs to have."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from doors import Doors
from run_yaml import Vendor, address
from settings import Settings

# A port on which nobody listens: what goes to it as a proxy fails at once.
CLOSED_DOOR = "http://127.0.0.1:9"

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")

# OpenSSL's folders of CAs, in which each has the hash of its name. Debian's, Fedora's.
HASHED_CAS = ("/etc/ssl/certs", "/etc/pki/ca-trust/extracted/pem/directory-hash")
BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def for_server(settings: Settings, vendors: list[Vendor], doors: Doors, store: Path) -> dict[str, str]:
    """All variables of the server."""
    environ = {name: value for name, value in settings.environ.items() if not is_the_callers(name)}
    # In the default format a wrong key is rendered as a rich traceback: seconds in which nobody is served.
    environ["LLAMA_STACK_LOG_FORMAT"] = "json"
    # Otherwise only a llama-stack-client of the server's own release is let in.
    environ["LLAMA_STACK_DISABLE_VERSION_CHECK"] = "1"
    # uvicorn would believe X-Forwarded-For of every caller on this machine.
    environ.setdefault("FORWARDED_ALLOW_IPS", "")
    environ["SQLITE_STORE_DIR"] = str(store)
    environ["LLAMA_STACK_HOST"], environ["LLAMA_STACK_PORT"] = doors.server_host, str(doors.server_port)
    for name in ("LLAMA_STACK_TLS_CERTFILE", "LLAMA_STACK_TLS_KEYFILE"):
        if file := environ.pop(name, None):  # It runs in another folder, perhaps.
            environ |= {} if doors.front else {name: os.path.abspath(file)}
    environ |= through_egress(settings, vendors, doors)
    environ |= certificates(settings)
    environ |= telemetry(settings)
    return without_proxies(environ) | proxies(settings, vendors, environ)


def is_the_callers(name: str) -> bool:
    """Whether a variable would add to the calls what is the caller's to choose, or tell others what the caller said.

    The server's OpenAI SDK sends what it finds in OPENAI_… to every vendor. OpenTelemetry's put headers, keys among them, into
    spans, or override what is set here; FastAPI's adds exporters of its own.
    """
    if name.endswith("_PASSTHROUGH_URL"):
        return False
    told = ("OTEL_CONFIG_FILE", "OTEL_EXPERIMENTAL_CONFIG_FILE", "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS", "FASTAPI_OTEL_")
    return name.endswith("_API_KEY") or name.startswith(("OPENAI_", *told))


def through_egress(settings: Settings, vendors: list[Vendor], doors: Doors) -> dict[str, str]:
    """The URLs that lead the server through the egress door, for the vendors that it knows and that are where they were."""
    if not doors.egress:
        return {}
    urls = {vendor.setting: f"{doors.egress.url}/{vendor.name}{urlsplit(vendor.url).path}" for vendor in vendors}
    known = {vendor.setting for vendor in vendors if vendor.name in doors.vendors}
    return {setting: url for setting, url in urls.items() if setting in known and not settings.environ.get(setting)}


def certificates(settings: Settings) -> dict[str, str]:
    """Where the CAs are, unless the operator says so.

    The server makes a TLS context for every call. A bundle of CAs is loaded whole each time, a folder of hashed ones is not.
    """
    if settings.environ.get("SSL_CERT_FILE") or settings.environ.get("SSL_CERT_DIR"):
        return {}
    return next(({"SSL_CERT_DIR": folder} for folder in HASHED_CAS if any(Path(folder).glob("*.0"))), {})


def telemetry(settings: Settings) -> dict[str, str]:
    """OpenTelemetry: metrics for the collector that the operator names. Traces if they are asked for, and never logs."""
    endpoint = settings.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not endpoint:
        return {}
    usual = {
        # Model names, which callers make up, are labels. As differences, series that have ended can be forgotten.
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_SERVICE_NAME": "lls-openai",
        # What of_traces() in __main__.py says.
        "OTEL_TRACES_EXPORTER": "none",
    }
    chosen = {name: settings.environ.get(name) or value for name, value in usual.items()}
    # The exporter knows neither a scheme nor a port in NO_PROXY with an address.
    endpoint = re.sub(r"//(127\.0\.0\.1|\[::1])", "//localhost", endpoint)
    # Logs quote keys and prompts.
    return chosen | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_LOGS_EXPORTER": "none"}


def without_proxies(environ: dict[str, str]) -> dict[str, str]:
    """The same without what says which proxy is used."""
    return {name: value for name, value in environ.items() if name not in PROXIES}


def proxies(settings: Settings, vendors: list[Vendor], environ: dict[str, str]) -> dict[str, str]:
    """The variables by which the server reaches the vendors and whom the operator names, and nobody else.

    A call can name URLs, such as an MCP server's, that the server would fetch. All that is not in NO_PROXY goes to a closed door.
    A proxy that the operator demands decides about HTTPS instead.
    """
    named = [settings.environ.get("no_proxy") or settings.environ.get("NO_PROXY") or ""]
    urls = [vendor.url for vendor in vendors] + [environ.get(vendor.setting, "") for vendor in vendors]
    urls += [environ.get("AUTH_JWKS_URI", ""), collector := environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")]
    named += [address(url) for url in urls if url and not (settings.proxy and url.startswith("https:"))]
    if collector:  # requests, by which metrics are exported, knows no schemes there.
        named.append(urlsplit(collector).netloc.rpartition("@")[2])
    allowed = {"ALL_PROXY": CLOSED_DOOR, "NO_PROXY": ",".join(dict.fromkeys(filter(None, named)))}
    return allowed | ({"HTTPS_PROXY": settings.proxy} if settings.proxy else {})


def for_haproxy(settings: Settings, doors: Doors) -> dict[str, str]:
    """The variables that HAProxy's configuration reads. Nothing else of the environment is handed to it."""
    passed = ("LLAMA_STACK_CORS_ORIGIN", "AUTH_JWKS_URI", "FRONT_BODY_LIMIT", "EGRESS_NAMESERVER", "EGRESS_VENDOR_PORT")
    environ = {name: value for name in passed if (value := settings.environ.get(name))}
    environ |= {name: value for name, value in settings.environ.items() if name.endswith("_PASSTHROUGH_URL") and value}
    environ["LLAMA_STACK_HOSTS"] = settings.get("LLAMA_STACK_HOSTS").replace(",", " ") or "localhost"
    if trusted := settings.get("EGRESS_CA") or cas_for_haproxy(settings):
        environ["EGRESS_CA"] = os.path.abspath(trusted)
    return environ | doors.environ | {"PATH": os.defpath}


def cas_for_haproxy(settings: Settings) -> str:
    """The CAs that the server is told to trust, or else the system's, wherever it keeps a bundle of them."""
    told = settings.environ.get("SSL_CERT_FILE") or settings.environ.get("SSL_CERT_DIR")
    return told or next((bundle for bundle in BUNDLES if Path(bundle).exists()), "")
