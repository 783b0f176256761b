"""What `--host` names, and how it is written."""

import socket

import pytest

from jaxserve.server.address import in_url, resolve

IPV4, IPV6 = ("127.0.0.1", 80), ("::1", 80, 0, 0)


@pytest.mark.parametrize(
    "found, expected",
    [
        ([(socket.AF_INET6, IPV6), (socket.AF_INET, IPV4)], (socket.AF_INET, IPV4)),
        ([(socket.AF_INET6, IPV6)], (socket.AF_INET6, IPV6)),
    ],
)
def test_name_is_looked_up_in_both_families_and_ipv4_goes_first(monkeypatch, found, expected):
    rows = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **how: rows)
    assert resolve("ip6-localhost", 80) == expected


@pytest.mark.parametrize(
    "host, family, address",
    [
        ("0.0.0.0", socket.AF_INET, ("0.0.0.0", 80)),
        ("", socket.AF_INET, ("0.0.0.0", 80)),
        ("127.0.0.1", socket.AF_INET, IPV4),
        ("::1", socket.AF_INET6, IPV6),
        ("::", socket.AF_INET6, ("::", 80, 0, 0)),
    ],
)
def test_address_is_itself(host, family, address):
    assert resolve(host, 80) == (family, address)


@pytest.mark.parametrize("host, text", [("0.0.0.0", "0.0.0.0:80"), ("::", "[::]:80"), ("a.b", "a.b:80")])
def test_address_of_ipv6_has_brackets_in_a_url(host, text):
    assert in_url(host, 80) == text
