"""A port for a server that is started a moment later."""

import random
import socket


def free_port() -> int:
    """One that nobody listens on, below those that the system gives to outgoing connections.

    Of the latter any may be gone again before the server has started.
    """
    draw = random.Random()  # not that of the tests, whose seed is fixed
    for port in draw.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError("none of 100 ports is free")
