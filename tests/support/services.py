"""What a team has beside the gateway: an identity provider and a collector of metrics and traces."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

ISSUER = "https://id.example.com"


class Services:
    """What a team has already: an identity provider's JWKS, and a collector for OTLP over HTTP. A context manager.

    `received` holds the collector's requests as (path, body).
    """

    def __init__(self) -> None:
        self.received: list[tuple[str, bytes]] = []
        self.signing_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        public = jwt.algorithms.RSAAlgorithm.to_jwk(self.signing_key.public_key(), as_dict=True)
        jwks = json.dumps({"keys": [public | {"kid": "key-1", "use": "sig", "alg": "RS256"}]}).encode()
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(jwks)

            def do_POST(self) -> None:
                received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
                self.answer(b"")

            def answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def token(self, key: rsa.RSAPrivateKey | None = None, kid: str = "key-1", **claims: object) -> str:
        """A token that the gateway accepts, but for what the arguments change about it."""
        usual = {"sub": "alice", "iss": ISSUER, "aud": "lls-openai", "exp": int(time.time()) + 600}
        return jwt.encode(usual | claims, key or self.signing_key, "RS256", headers={"kid": kid})

    def spans(self) -> list[str]:
        """The names of the spans received so far."""
        requests = [ExportTraceServiceRequest.FromString(body) for path, body in self.received if path == "/v1/traces"]
        scopes = [scope for request in requests for resource in request.resource_spans for scope in resource.scope_spans]
        return [span.name for scope in scopes for span in scope.spans]

    def metrics(self) -> dict[str, list[dict]]:
        """The metrics received so far, by name: the attributes and the count or sum of each point, oldest first."""
        found: dict[str, list[dict]] = {}
        for path, body in self.received:
            if path != "/v1/metrics":
                continue
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                of = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
                for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
                    for point in metric.sum.data_points or metric.histogram.data_points:
                        value = getattr(point, "count", 0) or getattr(point, "as_int", 0)
                        names = {attribute.key: attribute.value.string_value for attribute in point.attributes}
                        found.setdefault(metric.name, []).append(of | names | {"value": value})
        return found
