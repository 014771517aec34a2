"""Who cannot be reached is told while the gateway starts, with the reason, and holds nothing up."""

import ssl
from pathlib import Path

import psutil
import trustme
from support.bare_servers import Accepts
from support.gateway import ALONE, Gateway, free_port, wait_for
from support.vendors import Vendors


def told(home: Path, *expected: str, **settings: str) -> str:
    """The log of a start that says all of these sentences. Its server is held up, because nobody calls it."""
    gateway = Gateway(home, **ALONE | settings)
    gateway.launch()
    try:
        wait_for(gateway.servers, seen=lambda: gateway.log)
        psutil.Process(gateway.server).suspend()
        for sentence in expected:
            wait_for(lambda s=sentence: s in gateway.log, 60, seen=lambda s=sentence: f"not {s!r} in {gateway.log}")
    finally:
        gateway.stop(3)
    return gateway.log


def test_each_reason_has_its_words(tmp_path: Path) -> None:
    """Of vendors, a collector and an identity provider."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with Accepts(b"x", context) as untrusted, Accepts(b"220 mail.example ESMTP\r\n") as no_tls, Accepts() as silent:
        said = told(
            tmp_path,
            "Calls to 127.0.0.1 will fail: its certificate is not trusted. If a proxy inspects TLS here, name its CA in SSL_CERT_FILE.",
            "Calls to vendor.invalid will fail: no name server knows its name.",
            "Calls to 127.0.0.2 will fail: the connection was refused.",
            "Calls to localhost will fail: it does not speak TLS.",
            OPENAI_PASSTHROUGH_URL=f"https://ann:fake-secret@127.0.0.1:{untrusted.port}",
            GEMINI_PASSTHROUGH_URL="https://vendor.invalid",
            ANTHROPIC_PASSTHROUGH_URL=f"http://127.0.0.2:{free_port()}",
            AUTH_JWKS_URI=f"https://localhost:{no_tls.port}",
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{silent.port}",
        )
        assert "fake-secret" not in said
        assert "api.openai.com" not in said, "who has been replaced is not asked for"
        silence = "Calls to 127.0.0.1 will fail: it timed out."
        assert "localhost" not in told(tmp_path, silence, OPENAI_PASSTHROUGH_URL=f"https://127.0.0.1:{silent.port}")


def test_the_way_is_the_servers_own(tmp_path: Path, vendors: Vendors) -> None:
    """Through the proxy that is demanded, but for whom NO_PROXY names, and with the CAs that it trusts."""
    proxy = vendors.environ()
    refuses = f"127.0.0.1:{free_port()}"  # Which is http:// to the server too.
    said = told(
        tmp_path,
        "Calls to id.example.com will fail: the proxy of HTTPS_PROXY does not let it through.",
        "Calls to a.invalid will fail: no name server knows its name.",
        AUTH_JWKS_URI="https://id.example.com:444/jwks",
        OPENAI_PASSTHROUGH_URL="https://a.invalid",
        NO_PROXY=".invalid",
        **proxy,
    )
    assert "anthropic" not in said
    told(tmp_path, "Calls to api.openai.com will fail: the proxy of HTTPS_PROXY refused the connection.", HTTPS_PROXY=refuses)
    lost = proxy | {"SSL_CERT_FILE": "/no/such"}
    told(tmp_path, "Calls to api.openai.com will fail: the CAs in SSL_CERT_FILE or SSL_CERT_DIR cannot be read.", **lost)
