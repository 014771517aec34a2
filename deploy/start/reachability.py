"""Who cannot be reached, and why: one sentence for each vendor, collector and identity provider, on the side of the start."""

import http.client
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import unquote, urlsplit
from urllib.request import proxy_bypass_environment

from run_yaml import address
from settings import Settings

SECONDS = 10


def check(urls: Iterable[str], settings: Settings, environ: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Connect to each host, as the server with `environ` would, without a request. Says what fails, later, and holds nothing up."""
    for url in dict.fromkeys(map(address, urls)):
        parts = urlsplit(url)
        direct = parts.scheme != "https" or proxy_bypass_environment(parts.hostname or "", {"no": environ.get("NO_PROXY", "")})
        threading.Thread(target=check_one, args=(url, "" if direct else settings.proxy, environ, say), daemon=True).start()


def check_one(url: str, proxy: str, environ: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Connect to the host of `url`, through the proxy that is demanded for HTTPS."""
    if reason := why_not(url, proxy, environ):
        say(f"Calls to {urlsplit(url).hostname} will fail: {reason}.")


def why_not(url: str, proxy: str, environ: Mapping[str, str]) -> str:
    """Why no connection can be made to the host of `url`, in fixed words, or nothing."""
    target = urlsplit(url)
    try:
        port = target.port or (443 if target.scheme == "https" else 80)
        if target.scheme != "https":
            socket.create_connection((target.hostname, port), SECONDS).close()
            return ""
        through = urlsplit(proxy if "//" in proxy else f"http://{proxy}") if proxy else None
        if through and through.scheme != "http":
            return ""  # Python's library cannot go that way, though the server can.
        try:
            trust = ssl.create_default_context(cafile=environ.get("SSL_CERT_FILE"), capath=environ.get("SSL_CERT_DIR"))
        except OSError:
            return "the CAs in SSL_CERT_FILE or SSL_CERT_DIR cannot be read"
        host, at = (through.hostname, through.port or 80) if through else (target.hostname, port)
        connection = http.client.HTTPSConnection(host or "", at, timeout=SECONDS, context=trust)
        if through:
            connection.set_tunnel(target.hostname or "", port, headers_of(through.username, through.password))
        connection.connect()
        connection.close()
        return ""
    except socket.gaierror:
        return "no name server knows its name" if not proxy else "no name server knows the proxy's name"
    except TimeoutError:
        return "it timed out"
    except ConnectionRefusedError:
        return "the connection was refused" if not proxy else "the proxy of HTTPS_PROXY refused the connection"
    except ssl.SSLCertVerificationError:
        return "its certificate is not trusted. If a proxy inspects TLS here, name its CA in SSL_CERT_FILE"
    except ssl.SSLError:
        return "it does not speak TLS"
    except ConnectionError:
        return "the connection broke off"
    except (OSError, ValueError):  # Of set_tunnel: the proxy's answer.
        return "there is no way to it" if not proxy else "the proxy of HTTPS_PROXY does not let it through"


def headers_of(user: str | None, password: str | None) -> dict[str, str]:
    """What the proxy wants for its user and password."""
    if not user:
        return {}
    return {"Proxy-Authorization": "Basic " + b64encode(f"{unquote(user)}:{unquote(password or '')}".encode()).decode()}
