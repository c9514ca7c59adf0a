"""Requests to addresses that clients name, and never to our own network.

The name is resolved, every address that it has is judged, and one of those very addresses is connected to: a name that
is resolved again after it was judged may by then mean another machine. TLS and `Host` keep the name. Redirects, proxies
of the environment, cookies and compression are not refused but absent: httpcore has none.
"""

import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import httpcore2
import httpx2

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str], Sequence[Address]]

PORTS = (80, 443)  # and those from 1024 on: below are mail, shells and the like
MOST_TRIED = 4  # addresses of a name
LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")  # of a host's name

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
UNICAST = ipaddress.IPv6Network("2000::/3")  # all of IPv6 that is given to anybody
SHARED = ipaddress.IPv4Network("100.64.0.0/10")
RESERVED: tuple[Network, ...] = tuple(  # which not every Python's `is_global` knows of
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "3fff::/20"))
)
METADATA = frozenset(  # of clouds: they hand credentials to whoever asks from inside. The last but one is a public one
    map(
        ipaddress.ip_address,
        ("169.254.169.254", "169.254.170.2", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
    )
)


class Forbidden(Exception):
    """We do not ask there."""


class NoAnswer(Exception):
    """There is nobody, or nobody who speaks HTTP in time."""


class Allowed:
    """What may be asked although it is not public: networks, addresses and host names, as a setting lists them."""

    def __init__(self, entries: Iterable[str] = ()):
        self.networks, self.names = list[Network](), set[str]()
        for entry in entries:
            try:
                self.networks.append(ipaddress.ip_network(entry))
            except ValueError:
                self.names.add(plain(entry))

    def objection(self, address: Address) -> str | None:
        """What an address is that keeps us from it."""
        meant = embedded(address)
        if meant in METADATA and not any(network.num_addresses == 1 and meant in network for network in self.networks):
            return kind_of(meant)  # a network that holds one was not meant to open it
        if any(one in network for network in self.networks for one in (address, meant)):
            return None
        return kind_of(meant)


def kind_of(address: Address) -> str | None:
    """What an address is, if it is not one of a public host."""
    kinds = {
        "a cloud's metadata service": address in METADATA,
        "a loopback address": address.is_loopback,
        "a link-local address": address.is_link_local,
        "a multicast address": address.is_multicast,
        "an address behind a carrier's NAT": address in SHARED,
        "a private address": address.is_private and not address.is_reserved and not address.is_unspecified,
        "a reserved address": not address.is_global
        or (address.version == 6 and address not in UNICAST)
        or any(address in network for network in RESERVED),
    }
    return next((kind for kind, holds in kinds.items() if holds), None)


def embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 one leads to: mapped, 6to4 or NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(address.packed[-4:])
    return address.ipv4_mapped or address.sixtofour or address


def plain(name: str) -> str:
    return name.lower().rstrip(".")


def resolved(name: str, flags: int = 0) -> list[Address]:
    """The addresses of a name, or of an address however it is written.

    Raises:
        NoAnswer: it has none.
    """
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError) as error:
        raise NoAnswer(f"{name} cannot be resolved: {error}") from None
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]


def permitted(name: str, allowed: Allowed, resolve: Resolve = resolved) -> Sequence[Address]:
    """The addresses of a name, if all of them may be asked.

    Raises:
        Forbidden: one of them may not.
        NoAnswer: it has none.
    """
    addresses = resolve(name)
    if plain(name) not in allowed.names:
        for address in addresses:
            if objection := allowed.objection(address):
                meant = "is" if str(address) == name else f"has {address},"
                raise Forbidden(f"{name} {meant} {objection}")
    return addresses


def read_url(url: str, allowed: Allowed) -> httpx2.URL:
    """A URL of which all is right that can be told without resolving its name.

    Raises:
        Forbidden: its scheme, port or address is not allowed.
    """
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise Forbidden(f"is no URL: {error}") from None
    if parsed.scheme not in ("http", "https"):
        raise Forbidden("must begin with https:// or http://")
    host = parsed.raw_host.decode("ascii")
    if not is_name(host) and not is_address(host):
        raise Forbidden("names no host")
    if parsed.userinfo:
        raise Forbidden("must have no user name or password in it")
    if parsed.port is not None and parsed.port not in PORTS and not 1024 <= parsed.port <= 65535:
        raise Forbidden(f"port {parsed.port} is not allowed: 80, 443 and those from 1024 on are")
    if is_address(host):
        permitted(host, allowed)
    return parsed


def is_name(host: str) -> bool:
    return len(host) <= 253 and all(LABEL.fullmatch(label) for label in plain(host).split("."))


def is_address(host: str) -> bool:
    """Whether it stands for an address by itself, as 127.1 does."""
    try:
        return "%" not in host and bool(resolved(host, socket.AI_NUMERICHOST))
    except NoAnswer:
        return False


class Answer(NamedTuple):
    status: int
    body: bytes
    whole: bool


def send(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    content: bytes = b"",
    allowed: Allowed,
    seconds: float,
    most: int = 0,
    resolve: Resolve = resolved,
) -> Answer:
    """One request, and the answer that it is given, be it a redirect.

    Args:
        seconds: for all of it, once the name has been resolved.
        most: bytes of the answer that are read.

    Raises:
        Forbidden: nothing was sent.
        NoAnswer: or none in time.
    """
    target = read_url(url, allowed)
    port = target.port or (443 if target.scheme == "https" else 80)
    written = httpcore2.URL(scheme=target.raw_scheme, host=target.raw_host, port=port, target=target.raw_path)
    backend = Pinned(allowed, seconds, resolve)
    said = {"Host": target.netloc.decode("ascii"), "Connection": "close", **headers}
    try:
        with (
            httpcore2.ConnectionPool(tls(), network_backend=backend) as pool,
            pool.stream(method, written, headers=[*said.items()], content=content) as response,
        ):
            body = b""
            for part in response.iter_stream() if most else ():
                body += part
                if len(body) > most:
                    break
            return Answer(response.status, body[:most], 0 < len(body) <= most)
    except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        raise NoAnswer(f"{type(error).__name__}: {error}".rstrip(": ")) from None


@cache
def tls() -> ssl.SSLContext:
    """Trusts what the system trusts, or `SSL_CERT_FILE`; reading that takes longer than a request."""
    return httpx2.create_ssl_context()


class Pinned(httpcore2.NetworkBackend):
    """Connects to an address that was judged, and to no other; all of it within so many seconds."""

    def __init__(self, allowed: Allowed, seconds: float, resolve: Resolve):
        self.allowed, self.seconds, self.resolve = allowed, seconds, resolve

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore2.NetworkStream:
        addresses = permitted(host, self.allowed, self.resolve)[:MOST_TRIED]
        end = time.monotonic() + self.seconds
        for i, address in enumerate(addresses):
            share = max(0.01, (end - time.monotonic()) / (len(addresses) - i))
            try:
                return Timed(httpcore2.SyncBackend().connect_tcp(str(address), port, share), end)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if address is addresses[-1]:
                    raise
        raise NoAnswer(f"{host} has no address")


class Timed(httpcore2.NetworkStream):
    """A stream that ends at a time, whatever the other side does meanwhile: httpcore's limits are for each read."""

    def __init__(self, stream: httpcore2.NetworkStream, end: float):
        self.stream, self.end = stream, end

    def left(self) -> float:
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise httpcore2.ReadTimeout("the time was up")
        return seconds

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, self.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for i in range(0, len(buffer), 65536):  # httpcore's own limit is for each of the pieces that the kernel takes
            self.stream.write(buffer[i : i + 65536], self.left())

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return Timed(self.stream.start_tls(ssl_context, server_hostname, self.left()), self.end)

    def close(self) -> None:
        self.stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)
