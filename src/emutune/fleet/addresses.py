"""Hosts and addresses: in URLs, and where connections are counted."""

from __future__ import annotations

import ipaddress

# What one subscriber has in IPv6, who may use any address of it.
_NETWORK_BITS = 64


def url_of(host: str, port: int) -> str:
    """Where a fleet's server is; an IPv6 address stands in brackets."""
    return f"https://{bracketed(host)}:{port}"


def bracketed(host: str) -> str:
    """A host as it stands before a colon and a port."""
    return f"[{host}]" if ":" in host else host


def same_host(host: str) -> str:
    """One spelling of all that name the same host: of a name without its case, of an address the shortest."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower()


def place_of(address: str) -> str:
    """What counts as one place on the network: an IPv4 address, or an IPv6 network of 64 bits."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    if parsed.is_loopback:
        return address
    return str(ipaddress.ip_network((parsed.packed, _NETWORK_BITS), strict=False))
