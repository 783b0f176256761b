"""Where a server listens: what `--host` names, and how that is written."""

import socket
from typing import Any


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """(family, address) to bind: of a name that has both families, IPv4's. Raises OSError."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:  # a name that DNS cannot have
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from error
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, address


def listen(host: str, port: int) -> socket.socket:
    """Raises OSError when there is no such address, or it cannot be bound."""
    family, address = resolve(host, port)
    sock = socket.create_server(address, family=family, backlog=2048)
    # Connections inherit it. asyncio sets it only on sockets that were made with IPPROTO_TCP by name, and
    # without it the kernel holds a token back until the client has acknowledged the last one: 40 ms.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def in_url(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
