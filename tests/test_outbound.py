"""Requests to addresses that clients name: never to our own network, never longer or larger than they may be."""

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest
import trustme

from app import outbound
from app.outbound import Allowed, Forbidden, NoAnswer, embedded, kind_of, permitted, read_url, resolved, send

HERE = Allowed(["127.0.0.1/32"])
ONE = ipaddress.ip_address("127.0.0.1")
PUBLIC = ipaddress.ip_address("93.184.216.34")


class Receiver(BaseHTTPRequestHandler):
    """Says what it was asked, or misbehaves as the path wants it."""

    seen: list[tuple[str, dict[str, str], bytes]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        if self.path.startswith("/to="):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/huge":
            with_pauses(self.wfile.write, [b"x" * 65536] * 1000, 0)
        elif self.path == "/drip":
            with_pauses(self.wfile.write, [b"x"] * 100, 0.1)
        else:
            self.wfile.write(b"well")

    def log_message(self, format: str, *args: Any) -> None: ...


def with_pauses(write: Callable[[bytes], object], parts: list[bytes], seconds: float) -> None:
    try:
        for part in parts:
            write(part)
            time.sleep(seconds)
    except OSError:
        pass  # cut


@pytest.fixture
def port() -> Iterator[int]:
    Receiver.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@contextmanager
def raw(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that speaks no HTTP but what the test has it say."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            try:
                connection, _ = server.accept()
                with connection:
                    answer(connection)
            except OSError:
                pass  # cut

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]


def post(url: str, **given: Any) -> outbound.Answer:
    return send("POST", url, **{"headers": {}, "content": b"{}", "allowed": HERE, "seconds": 5} | given)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "a loopback address"),
        ("127.9.9.9", "a loopback address"),
        ("::1", "a loopback address"),
        ("10.1.2.3", "a private address"),
        ("172.16.0.1", "a private address"),
        ("192.168.1.1", "a private address"),
        ("fd12:3456::1", "a private address"),
        ("169.254.1.1", "a link-local address"),
        ("fe80::1", "a link-local address"),
        ("169.254.169.254", "a cloud's metadata service"),
        ("fd00:ec2::254", "a cloud's metadata service"),
        ("100.100.100.200", "a cloud's metadata service"),
        ("168.63.129.16", "a cloud's metadata service"),
        ("100.64.0.1", "an address behind a carrier's NAT"),
        ("224.0.0.1", "a multicast address"),
        ("ff02::1", "a multicast address"),
        ("0.0.0.0", "a reserved address"),
        ("::", "a reserved address"),
        ("255.255.255.255", "a reserved address"),
        ("240.0.0.1", "a reserved address"),
        ("192.0.0.8", "a reserved address"),
        ("192.88.99.1", "a reserved address"),
        ("64:ff9b:1::1", "a reserved address"),
        ("4000::1", "a reserved address"),
        ("3fff::1", "a reserved address"),
        ("::ffff:127.0.0.1", "a loopback address"),
        ("::ffff:169.254.169.254", "a cloud's metadata service"),
        ("64:ff9b::a00:1", "a private address"),
        ("2002:a00:1::1", "a private address"),
        ("2002:c0a8:101::", "a private address"),
    ],
)
def test_an_address_that_is_not_public_is_refused_whatever_it_is_wrapped_in(address: str, kind: str):
    assert kind_of(embedded(ipaddress.ip_address(address))) == kind


@pytest.mark.parametrize("address", ["::127.0.0.1", "2001:0:7f00:1::", "2001:db8::1", "192.0.2.1", "198.18.0.1"])
def test_neither_are_addresses_of_tunnels_and_of_examples(address: str):
    assert Allowed().objection(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_not_refused(address: str):
    assert Allowed().objection(ipaddress.ip_address(address)) is None


@pytest.mark.parametrize("entry", ["10.0.0.0/8", "10.1.2.3", "10.1.0.0/16"])
def test_a_network_may_be_allowed_and_no_more_than_that(entry: str):
    for written in ("10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::a01:203"):
        assert Allowed([entry]).objection(ipaddress.ip_address(written)) is None
    assert Allowed([entry]).objection(ipaddress.ip_address("172.16.0.1"))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://example.com/", "must begin with https:// or http://"),
        ("file:///etc/passwd", "must begin with"),
        ("example.com", "must begin with"),
        ("https:///nowhere", "names no host"),
        ("http://exa mple.com/", "names no host"),
        ("http://[fe80::1%25eth0]/", "names no host"),
        ("http://ann:secret@example.com/", "must have no user name or password"),
        ("http://example.com:22/", "port 22 is not allowed"),
        ("http://example.com:70000/", "port 70000 is not allowed"),
        ("http://[::1", "is no URL"),
        ("http://127.0.0.1/", "127.0.0.1 is a loopback address"),
        ("http://127.1:8080/", "127.1 has 127.0.0.1, a loopback address"),
        ("http://2130706433/", "2130706433 has 127.0.0.1, a loopback address"),
        ("http://0x7f.1/", "a loopback address"),
        ("http://0177.0.0.1/", "is no URL"),
        ("http://[::ffff:10.0.0.1]/", "a private address"),
        ("http://0/", "a reserved address"),
    ],
)
def test_what_is_wrong_with_a_url_is_said_before_anything_is_resolved(url: str, why: str):
    with pytest.raises(Forbidden) as refused:
        read_url(url, Allowed())
    assert why in str(refused.value)


@pytest.mark.parametrize("url", ["https://example.com/a?b=c", "http://[2606:4700::1]:8080/", "https://bücher.example/"])
def test_other_urls_are_fine(url: str):
    read_url(url, Allowed())


def test_one_bad_address_of_a_name_is_enough():
    with pytest.raises(Forbidden, match=r"two\.example has 127\.0\.0\.1, a loopback address"):
        permitted("two.example", Allowed(), lambda _: [PUBLIC, ONE])


def test_a_name_that_means_this_machine_is_refused_unless_its_network_or_itself_is_allowed(port: int):
    url = f"http://localhost:{port}/"
    with pytest.raises(Forbidden, match=r"localhost has (127\.0\.0\.1|::1), a loopback address"):
        post(url, allowed=Allowed())
    assert Receiver.seen == []
    assert post(url, allowed=Allowed(["127.0.0.0/8", "::1"]), most=9) == (200, b"well", True)
    assert post(url, allowed=Allowed(["LocalHost."])).status == 200
    assert [headers["host"] for _, headers, _ in Receiver.seen] == [f"localhost:{port}"] * 2


def test_a_name_is_resolved_once_and_what_was_judged_is_what_is_asked(port: int):
    asked: list[str] = []

    def rebinding(name: str) -> list[outbound.Address]:
        asked.append(name)
        return [ONE] if len(asked) == 1 else [ipaddress.ip_address("127.0.0.2")]

    assert post(f"http://turning.example:{port}/", resolve=rebinding).status == 200
    assert asked == ["turning.example"]
    with pytest.raises(Forbidden, match=r"127\.0\.0\.2"):
        post(f"http://turning.example:{port}/", resolve=rebinding)
    assert len(Receiver.seen) == 1


def test_if_one_address_does_not_answer_the_next_is_asked(port: int):
    dead = ipaddress.ip_address("127.0.0.3")
    allowed = Allowed(["127.0.0.0/8"])
    assert post(f"http://two.example:{port}/", allowed=allowed, resolve=lambda _: [dead, ONE]).status == 200
    with pytest.raises(NoAnswer, match="ConnectError"):
        post(f"http://one.example:{port}/", allowed=allowed, resolve=lambda _: [dead])
    with pytest.raises(NoAnswer, match="has no address"):
        post(f"http://none.example:{port}/", allowed=allowed, resolve=lambda _: [])


def test_redirects_are_not_followed_and_the_proxy_of_the_environment_is_not_used(
    port: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{port}")
    assert post(f"http://127.0.0.1:{port}/to=http://127.0.0.1:{port}/secret").status == 302
    assert [path.partition("=")[0] for path, _, _ in Receiver.seen] == ["/to"]
    with pytest.raises(NoAnswer):
        post("http://127.0.0.1:1024/")


def test_of_an_answer_no_more_is_read_than_is_wanted(port: int):
    assert post(f"http://127.0.0.1:{port}/huge", most=1000) == (200, b"x" * 1000, False)
    assert post(f"http://127.0.0.1:{port}/huge") == (200, b"", False)


def test_who_answers_slowly_is_cut_however_steadily_the_bytes_come(port: int):
    began = time.monotonic()
    with pytest.raises(NoAnswer, match=r"Read(Timeout|Error)"):
        post(f"http://127.0.0.1:{port}/drip", most=1000, seconds=0.5)

    def trickles(connection: socket.socket) -> None:
        with_pauses(connection.sendall, [b"H", *[b"x"] * 200], 0.1)

    with raw(trickles) as slow, pytest.raises(NoAnswer, match="ReadTimeout"):
        post(f"http://127.0.0.1:{slow}/", seconds=0.5)
    with raw(lambda _: time.sleep(2)) as silent, pytest.raises(NoAnswer, match="Timeout"):
        post(f"https://127.0.0.1:{silent}/", seconds=0.5)  # in the middle of TLS's greeting
    with raw(lambda _: time.sleep(2)) as deaf, pytest.raises(NoAnswer, match="Timeout"):
        post(f"http://127.0.0.1:{deaf}/", content=b"x" * 50_000_000, seconds=0.5)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("said", [b"220 smtp.example\r\n", b"", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100_000])
def test_what_is_no_answer_is_said(said: bytes):
    def speaks(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(said)

    with raw(speaks) as port, pytest.raises(NoAnswer):
        post(f"http://127.0.0.1:{port}/")


def test_tls_is_checked_against_the_name_and_not_the_address(port: int, monkeypatch: pytest.MonkeyPatch):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hooks.example").configure_cert(context)
    trusting = httpx2.create_ssl_context()
    authority.configure_trust(trusting)
    monkeypatch.setattr(outbound, "tls", lambda: trusting)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        assert post(f"https://hooks.example:{server.server_port}/", resolve=lambda _: [ONE]).status == 200
        with pytest.raises(NoAnswer, match="certificate"):
            post(f"https://other.example:{server.server_port}/", resolve=lambda _: [ONE])
    finally:
        server.shutdown()
        server.server_close()


def test_a_name_that_nobody_has_is_no_answer():
    for name in ("no-such-name.invalid", "a" * 64 + ".example"):
        with pytest.raises(NoAnswer, match="cannot be resolved"):
            resolved(name)
