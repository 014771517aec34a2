"""Servers that are no vendor: they take connections, and say one thing or nothing."""

import contextlib
import socket
import ssl
import threading
from typing import Self


class Accepts:
    """A server on loopback that takes connections and says `greeting`, through TLS if it has a `context`. A context manager.

    `kept` has the connections that it took.
    """

    def __init__(self, greeting: bytes = b"", context: ssl.SSLContext | None = None) -> None:
        self.greeting, self.context = greeting, context
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.kept: list[socket.socket] = []

    def serve(self) -> None:
        """Take connections until the listening socket is closed."""
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.kept.append(connection)
                with contextlib.suppress(OSError):
                    if self.context:
                        connection = self.context.wrap_socket(connection, server_side=True)
                    if self.greeting:
                        connection.sendall(self.greeting)
                        connection.close()

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone would not wake the thread that waits in accept().
        self.listener.shutdown(socket.SHUT_RDWR)
        for each in (self.listener, *self.kept):
            each.close()
