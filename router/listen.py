"""Whether the gateway can listen where it is told to, found out before anything is started."""

import errno
import socket

from router.config import ConfigError


def resolve(host: str, port: int) -> list[tuple]:
    """`socket.getaddrinfo` of what a server binds, IPv4 first. Raises gaierror or UnicodeError."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return sorted(found, key=lambda entry: entry[0] != socket.AF_INET)


def check_address(host_key: str, host: str, port_key: str, port: int) -> None:
    """Bind every address of `host`, as a server will, and let go of it again. Raises ConfigError.

    Processes that share a port would not notice another gateway's that do so too: this does.
    """
    try:
        found = resolve(host, port)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else error
        raise ConfigError(f"{host_key}={host!r} does not resolve: {reason}") from error
    problem, bound = None, False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
            bound = True
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                where = f"{port_key}={port} cannot be listened on at {address[0]}"
                raise ConfigError(f"{where}: {error.strerror}") from error
            problem = error  # such as no IPv6 here: one address is enough
    if not bound:
        reason = problem.strerror if problem is not None else "it has no address"
        raise ConfigError(f"{host_key}={host!r} is no address to listen on: {reason}")
