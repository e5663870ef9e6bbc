"""The sockets that a server accepts from, opened before anything is loaded.

Several workers inherit the same ones from their supervisor. With a socket of its own for each
(SO_REUSEPORT) the kernel deals connections out by a hash of their addresses: of few, one worker may
get all, and those dealt to a worker that dies before it accepts them are lost. In a shared queue
they wait for another one.
"""

import errno
import socket

_BACKLOG = 1024
# A name's IPv6 address, where the host has no IPv6: as in many containers.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen at every address of a host, on one port (0: one that is free).

    Of several addresses, those that are not this machine's are left out.

    Raises:
        OSError: the name is unknown or not this machine's, or the port is taken.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    left_out: OSError | None = None
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                sockets.append(_bound(family, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                left_out = error
            else:
                port = sockets[-1].getsockname()[1]
        if left_out is not None and not sockets:
            raise left_out
        for each in sockets:
            each.listen(_BACKLOG)
    except OSError:
        for each in sockets:
            each.close()
        raise
    return sockets


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
