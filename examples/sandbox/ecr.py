#!/usr/bin/env python3
"""Serve moto's ECR API, and tell the registry's proxy which repositories exist: ecr.py API_PORT EXISTS_PORT

On EXISTS_PORT, GET /<repository> returns 204 if the repository exists in ECR, and 403 if it does not.
"""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from moto.ecr.models import ecr_backends
from moto.server import main

ACCOUNT, REGION = "123456789012", "us-east-1"  # moto's defaults


class Exists(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # for keep-alive connections

    def do_GET(self) -> None:
        name = unquote(self.path.lstrip("/"))
        self.send_response(204 if name in ecr_backends[ACCOUNT][REGION].repositories else 403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Exists)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    main(["--host", "127.0.0.1", "--port", sys.argv[1]])
