"""The network that other tests break does what they think it does."""

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.proxy import Proxy


class Echo(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while line := self.rfile.readline():
            self.wfile.write(line)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Proxy(f"127.0.0.1:{server.server_address[1]}") as proxy:
            yield proxy
        server.shutdown()


def dial(proxy: Proxy) -> socket.socket:
    there = socket.create_connection((proxy.host, proxy.port), timeout=0.5)
    there.settimeout(0.5)
    return there


def said(there: socket.socket, line: bytes = b"hello\n") -> bytes:
    there.sendall(line)
    return there.recv(100)


def test_what_is_sent_arrives(proxy: Proxy):
    with dial(proxy) as there:
        assert said(there) == b"hello\n"


def test_cut_resets_connections_and_refuses_new_ones_until_it_is_healed(proxy: Proxy):
    with dial(proxy) as there:
        said(there)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            there.recv(100)
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            dial(proxy)
    proxy.heal()
    with dial(proxy) as there:
        assert said(there) == b"hello\n"


def test_a_black_hole_accepts_and_never_answers(proxy: Proxy):
    with dial(proxy) as before:
        said(before)
        proxy.black_hole()
        with dial(proxy) as after:
            for there in (before, after):
                with pytest.raises(TimeoutError):
                    said(there)
            proxy.heal()
            for there in (before, after):
                with pytest.raises(ConnectionResetError):
                    there.recv(100)
    with dial(proxy) as there:
        assert said(there) == b"hello\n"


def test_delay_holds_what_is_sent_back_and_forth(proxy: Proxy):
    with dial(proxy) as there:
        proxy.delay(0.1)
        began = time.monotonic()
        assert said(there) == b"hello\n"
        assert time.monotonic() - began >= 0.2
        proxy.heal()
        assert said(there, b"again\n") == b"again\n"


def test_a_server_that_is_not_there_looks_like_one_that_hangs_up():
    with Proxy("/no/such.sock") as proxy, dial(proxy) as there:
        assert there.recv(100) == b""


def test_it_is_cut_at_a_word(proxy: Proxy):
    proxy.cut_at(b"bang")
    with dial(proxy) as there:
        assert said(there) == b"hello\n"
        with pytest.raises(ConnectionResetError):
            said(there, b"bang\n")
    with pytest.raises(ConnectionRefusedError):
        dial(proxy)


def test_an_answer_is_lost_once(proxy: Proxy):
    proxy.lose_answer_to(b"bang")
    with dial(proxy) as there, pytest.raises(ConnectionResetError):
        said(there, b"bang\n")
    with dial(proxy) as there:
        assert said(there, b"bang\n") == b"bang\n"
