"""What the operator can set, all of it from the environment: which values work, and a sentence for each that does not.

A new setting is a row in CHECKS (or a variable with a default in run.yaml), and a row in a table of the documents.
"""

import contextlib
import difflib
import os
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

PROJECT = Path(__file__).parents[2]


class Refused(Exception):
    """The gateway cannot start like this. The message is one or more sentences, a line each."""


def without_secrets(url: str) -> str:
    """A URL, or what was meant as one, without a user and a password in it, and without what follows the `?`."""
    return re.sub(r"\?.*", "?...", re.sub(r"^([A-Za-z]*:?//)?.*@", r"\1...@", url))


# --- what a value has to look like: each function returns what is wrong with one, or nothing ---

SWITCH = {"": None, "0": False, "no": False, "false": False, "1": True, "yes": True, "true": True}


def switch(value: str) -> str | None:
    return None if value in SWITCH else "set it to 1, to demand it, or to 0, to do without"


def port(value: str) -> str | None:
    if re.fullmatch(r"\d{1,5}", value, re.ASCII) and 1024 <= int(value) <= 65535:
        return None
    return "it has to be a port from 1024 to 65535. To answer on 80 or 443, put a balancer in front (deploy/README.md)"


def workers(value: str) -> str | None:
    return None if re.fullmatch(r"[1-9]\d{0,2}", value, re.ASCII) else "set it to a number of processes, 1 or more"


def bytes_of_a_body(value: str) -> str | None:
    return None if re.fullmatch(r"[1-9]\d{0,9}", value, re.ASCII) else "set it to a number of bytes"


def url(value: str) -> str | None:
    """A URL that a list such as NO_PROXY can have in it, so that it can be let past the closed door."""
    if re.fullmatch(r"https?://[^/?#\s,\\]+(/[^?#\s]*)?", value):
        with contextlib.suppress(ValueError):  # A port or an IPv6 address that is none.
            if (parts := urlsplit(value)).hostname and parts.port != 0:
                return None
    return "it has to be a URL that starts with https:// or http://, without a query"


def vendor_url(value: str) -> str | None:
    if re.search(r"/v1/*$", value):
        return "leave out the /v1 at its end, which the server adds"
    return url(value)


def collector(value: str) -> str | None:
    # Its exporter matches an address in NO_PROXY without its port only: callers could then name all ports of that address.
    here = re.match(r"https?://(127\.0\.0\.1|\[::1])([:/]|$)", value)
    if not here and re.match(r"https?://([^/]*@)?(\[|[\d.]+([:/]|$))", value):
        return "name the collector's host, if need be in /etc/hosts, instead of its address"
    return url(value)


def origin(value: str) -> str | None:
    """As a browser writes it in `Origin`, because the two are compared letter by letter."""
    usual = r"(?!https://.*:443$|http://.*:80$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+])(:[1-9]\d*)?"
    if value == "none" or re.fullmatch(usual, value, re.ASCII):
        return None
    return "it has to be one origin as browsers write it, such as https://chat.example.com: a scheme and a host, without a slash"


def host_names(value: str) -> str | None:
    return None if re.fullmatch(r"[A-Za-z0-9._-]+([ ,]+[A-Za-z0-9._-]+)*", value) else "set it to names, with spaces between"


def json_alone(value: str) -> str | None:
    return None if value == "json" else "only the lines of json can be cleared of callers' keys and prompts. Unset it"


def no_file(value: str) -> str | None:
    return "callers' keys and prompts would be written there. Unset it"


def no_wildcard(value: str) -> str | None:
    if "*" in [part.strip() for part in value.split(",")]:
        return "a call could then lead the server to any address. Name the hosts that it may reach"
    return None


def anything(value: str) -> str | None:
    return None


Check = Callable[[str], str | None]

# The variables that run.yaml does not give a default to are here as well, so that a misspelt one is noticed.
CHECKS: dict[str, Check] = {
    "LLAMA_STACK_PORT": port,
    "LLAMA_STACK_HOST": anything,
    "LLAMA_STACK_HOSTS": host_names,
    "LLAMA_STACK_WORKERS": workers,
    "LLAMA_STACK_CORS_ORIGIN": origin,
    "LLAMA_STACK_TLS_CERTFILE": anything,
    "LLAMA_STACK_TLS_KEYFILE": anything,
    "LLAMA_STACK_LOG_FORMAT": json_alone,
    "LLAMA_STACK_LOG_FILE": no_file,
    "FRONT": switch,
    "FRONT_BODY_LIMIT": bytes_of_a_body,
    "EGRESS": switch,
    "EGRESS_PORT": port,
    "EGRESS_CA": anything,
    "EGRESS_NAMESERVER": anything,
    "EGRESS_VENDOR_PORT": anything,
    "AUTH_JWKS_URI": url,
    "AUTH_ISSUER": anything,
    "AUTH_AUDIENCE": anything,
    "OTEL_EXPORTER_OTLP_ENDPOINT": collector,
    "FORWARDED_ALLOW_IPS": anything,
    "NO_PROXY": no_wildcard,
    "no_proxy": no_wildcard,
}

# The client's. The start has no use for them, and they resemble its own.
OF_THE_CLIENT = {"LLAMA_STACK_BASE_URL", "LLAMA_STACK_API_KEY"}


@dataclass
class Settings:
    """What the gateway is started with. `environ` is where it comes from, `defaults` what run.yaml has for what is not set."""

    environ: Mapping[str, str]
    defaults: dict[str, str]
    warnings: list[str] = field(default_factory=list)

    def get(self, name: str) -> str:
        """The value of a setting: the environment's, or run.yaml's default, or nothing."""
        return self.environ.get(name) or self.defaults.get(name, "")

    @property
    def host(self) -> str:
        return self.get("LLAMA_STACK_HOST")

    @property
    def port(self) -> int:
        return int(self.get("LLAMA_STACK_PORT"))

    @property
    def egress_port(self) -> int:
        return int(self.environ.get("EGRESS_PORT") or self.port + 1)

    @property
    def workers(self) -> int:
        return int(self.get("LLAMA_STACK_WORKERS"))

    @property
    def certificate(self) -> tuple[str, str] | None:
        """The files of the certificate and of its key, where the gateway speaks HTTPS."""
        pair = self.get("LLAMA_STACK_TLS_CERTFILE"), self.get("LLAMA_STACK_TLS_KEYFILE")
        return pair if all(pair) else None

    @property
    def proxy(self) -> str:
        """The proxy that the environment demands for HTTPS."""
        names = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
        return next(filter(None, (self.environ.get(name) for name in names)), "")

    @property
    def for_this_machine_alone(self) -> bool:
        """Whether callers on other machines cannot reach it."""
        return self.host == "localhost" or self.host.startswith("127.") or self.host == "::1"

    def demanded(self, door: str) -> bool | None:
        """Whether FRONT or EGRESS is demanded (True), done without (False), or left to what is installed (None)."""
        return SWITCH[self.environ.get(door, "")]


def port_of_env_file() -> str:
    """LLAMA_STACK_PORT of `.env`, which moves the client as well. No other line of it is read: keys are there."""
    try:
        text = (PROJECT / ".env").read_text()
    except (OSError, ValueError):
        return ""
    found = re.findall(r"^[ \t]*(?:export[ \t]+)?LLAMA_STACK_PORT[ \t]*=[ \t]*[\"']?([^\s\"'#]*)", text, re.MULTILINE)
    return found[-1] if found else ""


def read(environ: Mapping[str, str], defaults: dict[str, str]) -> Settings:
    """Check all settings. `defaults` has those of run.yaml. Raises Refused with a sentence for each that is wrong."""
    values = dict(environ)
    if not values.get("LLAMA_STACK_PORT") and (port_in_file := port_of_env_file()):
        values["LLAMA_STACK_PORT"] = port_in_file
    settings = Settings(values, defaults)
    wrong = [*of_names(settings), *of_values(settings)]
    if not wrong:
        wrong = [*of_combinations(settings)]
    if wrong:
        raise Refused("\n".join(wrong))
    settings.warnings += [*worth_saying(settings)]
    return settings


def of_names(settings: Settings) -> Iterator[str]:
    """Names that are nearly one of ours, and would silently do nothing."""
    known = {*CHECKS, *settings.defaults, *OF_THE_CLIENT}
    for name in {name for name, value in settings.environ.items() if value} - known:
        if close := difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.9):
            yield f"{name} is not a setting. Is {close[0]} meant?"
        elif name.endswith("_PASSTHROUGH_URL"):
            ours = ", ".join(sorted(each for each in known if each.endswith("_PASSTHROUGH_URL")))
            yield f"{name} is not a setting: no provider in run.yaml reads it. There are {ours}."
        elif re.fullmatch(r"OTEL_EXPORTER_OTLP_(METRICS|TRACES)_ENDPOINT", name):
            yield f"{name} is not a setting: one collector is sent all, OTEL_EXPORTER_OTLP_ENDPOINT."


def of_values(settings: Settings) -> Iterator[str]:
    """Values that cannot work, or would silently do something else than they say."""
    for name in sorted({*CHECKS, *settings.defaults}):
        value = settings.environ.get(name, "")
        check = vendor_url if name.endswith("_PASSTHROUGH_URL") else CHECKS.get(name, anything)
        if re.search(r"[\x00-\x1f\x7f]", value):
            yield f"{name} has a line break or another control character in it. Set it again."
        elif value and (problem := check(value)):
            yield f"{name} is '{without_secrets(value)}': {problem}."


def of_combinations(settings: Settings) -> Iterator[str]:
    """Settings that do not go together."""
    if settings.demanded("EGRESS") is False:
        pass
    elif settings.egress_port == settings.port:
        yield f"EGRESS_PORT and LLAMA_STACK_PORT are both {settings.port}: the egress door needs a port of its own."
    elif settings.egress_port > 65535:
        yield f"No port comes after {settings.port} for the egress door: set EGRESS_PORT."
    if not settings.get("AUTH_JWKS_URI") and (settings.environ.get("AUTH_ISSUER") or settings.environ.get("AUTH_AUDIENCE")):
        yield "Without AUTH_JWKS_URI nobody needs a token: set it, or unset AUTH_ISSUER and AUTH_AUDIENCE."
    if bool(settings.get("LLAMA_STACK_TLS_CERTFILE")) != bool(settings.get("LLAMA_STACK_TLS_KEYFILE")):
        yield "For HTTPS, set both LLAMA_STACK_TLS_CERTFILE and LLAMA_STACK_TLS_KEYFILE."
    elif settings.certificate:
        yield from of_certificate(*settings.certificate)


def of_certificate(certificate: str, key: str) -> Iterator[str]:
    """What is wrong with the files for HTTPS."""

    def ask() -> str:
        raise Refused(f"The key in {key} has a passphrase, for which nobody is asked: give the server a key without.")

    for file in (certificate, key):
        if not os.access(file, os.R_OK):
            yield f"{file} cannot be read: see the LLAMA_STACK_TLS_ settings."
            return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, ask)
    except Refused as refused:
        yield str(refused)
    except (ssl.SSLError, OSError) as error:
        yield f"{certificate} and {key} are no certificate and its key: {error}."


def worth_saying(settings: Settings) -> Iterator[str]:
    """What works as it is set, but should not surprise anybody."""
    if not settings.for_this_machine_alone and not settings.get("AUTH_JWKS_URI"):
        yield "Whoever can reach this machine can use the gateway: no token is demanded (AUTH_JWKS_URI)."
    urls = sorted(name for name in settings.environ if name.endswith("_PASSTHROUGH_URL"))
    for name in ("AUTH_JWKS_URI", "OTEL_EXPORTER_OTLP_ENDPOINT", *urls):
        # httpx, which makes the server's calls, reads a URL without a port in NO_PROXY as one with any port.
        named = urlsplit(settings.environ.get(name, ""))
        if named.hostname and not named.port and not (settings.proxy and named.scheme == "https"):
            yield f"{name} names no port, so calls can lead the server to every port of {named.hostname}."
