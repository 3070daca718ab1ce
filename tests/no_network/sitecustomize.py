"""On PYTHONPATH it keeps a Python process and its children off the network, and writes down what they try.

An audit hook sees every connection and every look-up of a name that is made through Python's sockets.
"""

import errno
import os
import socket
import sys

_HERE = {None, "", "localhost", "::1", "0.0.0.0", "::", socket.gethostname()}
_NAMES = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
_ADDRESSES = ("socket.connect", "socket.sendto", "socket.sendmsg")


def _watch(event, arguments):
    if event in _NAMES:
        host = arguments[0]
    elif event in _ADDRESSES:
        address = arguments[1]
        # Others are paths, of sockets in this machine.
        host = address[0] if isinstance(address, tuple) else None
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host in _HERE or str(host).startswith("127."):
        return
    with open(os.environ["NETWORK_ATTEMPTS"], "a") as attempts:
        attempts.write(f"{event} {host} {os.path.basename(sys.argv[0] if hasattr(sys, 'argv') else '')}\n")
    raise OSError(errno.ENETUNREACH, "no network here")


sys.addaudithook(_watch)
