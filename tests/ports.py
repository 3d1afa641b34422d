"""Ports of this machine, for servers that the tests start."""

import socket

RESERVED: list[socket.socket] = []


def reserve_port() -> int:
    """A port for one server, or several in turn, that no other program gets while this process runs.

    A socket stays open for it. It does not listen, so that a server with SO_REUSEADDR can.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    RESERVED.append(reserved)
    return reserved.getsockname()[1]
