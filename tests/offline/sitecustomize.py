"""Refuses network connections in every Python process that has this folder on its PYTHONPATH.

It protects against a chapter that fetches something while it runs. Each attempt is also written to
`$QFT_OFFLINE_LOG`, so that code which swallows the exception is found too. Blind to sockets that are
opened outside Python (libraries in Rust or C++) and to `python -I`.
"""

import ipaddress
import os
import sys

_ADDRESSED = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1}  # event: where its address stands
_NAMED = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


class NetworkBlocked(RuntimeError):
    """Something tried to reach the network while a chapter ran."""


def _target(event, args):
    """The remote host that an audit event is about, or None."""
    if event == "urllib.Request":
        return None if args[0].startswith(("file:", "data:")) else args[0].split("://")[-1]
    if event in _NAMED:
        return args[0]
    address = args[_ADDRESSED[event]]
    return address[0] if isinstance(address, tuple) else None  # Unix and netlink sockets have no host


def _is_here(host):
    """Whether a name or an address is this machine's own."""
    if host in ("", "localhost", os.uname().nodename):
        return True
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False  # another name
    return address.is_loopback or bool(getattr(address, "ipv4_mapped", None) and address.ipv4_mapped.is_loopback)


def _guard(event, args):
    if event not in _ADDRESSED and event not in _NAMED and event != "urllib.Request":
        return
    host = _target(event, args)
    host = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if not isinstance(host, str) or _is_here(host):
        return
    log = os.environ.get("QFT_OFFLINE_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{event} {host}\n")
    raise NetworkBlocked(f"{event} to {host}: chapters run offline; bring files with qft_utils.assets first")


sys.addaudithook(_guard)
