"""Every setting: its default and the reason for it. Read once at start-up; a wrong or unknown one stops it."""

import base64
import ipaddress
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, DirectoryPath, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "DARKROOM_"
FROM_THE_CLIENT_SIDE = {"DARKROOM_URL", "DARKROOM_API_KEY"}  # read by the client, not by the service


def seconds(value: object) -> object:
    """A number of seconds that came as text; of text, pydantic reads ISO 8601 only."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Duration = Annotated[timedelta, BeforeValidator(seconds)]
Names = Annotated[tuple[str, ...], NoDecode]
Keys = Annotated[tuple[tuple[str, str], ...], NoDecode]

SECOND = timedelta(seconds=1)


class Settings(BaseSettings):
    """Names are upper-cased and prefixed: `host` is read from `DARKROOM_HOST`. Durations are seconds or ISO 8601."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, env_ignore_empty=True, populate_by_name=True, allow_inf_nan=False
    )

    # Where things are
    redis_url: str | None = Field(None, validation_alias="REDIS_URL")  # none: an embedded Valkey: `up` needs no server
    data_dir: Path = Path("data")  # the embedded server's files, the default blob store and the metrics' files
    blob_url: str | None = None  # none: `<data_dir>/blobs`; `s3://bucket/prefix` when there is more than one machine
    fsync: str = Field("everysec", pattern="^(everysec|always)$")  # only a crash of the machine may lose a second
    cards_dir: DirectoryPath | None = None  # more model cards (*.toml), for models of your own

    # What is served
    models: Names = (  # the first is the default; all that ship
        "emoji-sd",
        "emoji-unclip",
        "emoji-classes",
        "emoji-glide",
        "emoji-imagen",
        "emoji-dalle",
        "emoji-parti",
    )
    pinned_models: Names = ()  # never leave memory, whatever else is asked for
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")  # auto: cuda where there is one, else cpu
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16|float16)$")  # auto: the card's; one for mixed machines
    memory_mib: int = Field(0, ge=0)  # budget for resident models; 0: 80 % of the device, the rest is for activations
    graphs: bool = True  # on a GPU, replay each pass as a CUDA graph; off: less memory, as diffusers would run it
    torch_threads: int = Field(0, ge=0)  # 0: torch's own choice; set it when several workers share the cores

    # HTTP
    host: str = "127.0.0.1"  # nobody but this machine, until API keys or a proxy are in place
    port: int = Field(8000, ge=0, le=65535)  # where tools for development expect one; 0: any free port
    api_processes: int = Field(1, ge=1)  # that share the port; the kernel spreads connections over them
    api_keys: Keys = ()  # name=sha256-of-key,…; none: open, for a single user
    max_body_mib: float = Field(25, gt=0)  # two 4-megapixel PNGs as base64 fit
    max_image_pixels: int = Field(16_777_216, gt=0)  # 4096 × 4096: decoding more would take the API's memory
    max_wait: Duration = Field(timedelta(seconds=60), ge=timedelta(0))  # never outlasts the usual proxy timeout
    max_listeners: int = Field(1000, ge=1)  # streams and waits at once in one API; each has a connection to Redis
    max_decodes: int = Field(4, ge=1)  # pictures decoded at once in one API process: 16 megapixels take 100 MB
    client_timeout: Duration = Field(timedelta(seconds=30), ge=SECOND)  # silence in mid-request, as nginx has it
    redis_timeout: float = Field(0.8, gt=0)  # to connect and to be silent end within the 2 s until clients are told 503

    # Jobs
    max_queued: int = Field(1000, ge=1)  # per model; beyond it clients are told when to come back
    max_queued_seconds: Duration = Field(timedelta(hours=1), ge=SECOND)  # per model, as measured; who waits longer?
    job_timeout: Duration = Field(timedelta(minutes=30), ge=SECOND)  # the longest a generation may run once started
    result_ttl: Duration = Field(timedelta(hours=1), ge=SECOND)  # clients poll for minutes
    max_attempts: int = Field(3, ge=1)  # one for the request, two for workers that die drawing it alone
    journal_interval: float = Field(2, ge=0)  # seconds of denoising that a kill may cost; 0: no journals
    journal_mib: float = Field(64, gt=0)  # of a picture's journal; then no more is kept. Stable Diffusion: 500 steps

    # Webhooks
    webhook_secret: str | None = None  # whsec_ and base64; none: one is made, and kept in Redis, where all find it
    webhook_allow: Names = ()  # networks, addresses and host names that are not public, and may be told all the same

    # Evaluations
    judge: DirectoryPath | None = None  # folder of the CLIP that judges; none: the one that ships, of emoji scenes

    # Workers
    lease: int = Field(30, ge=2)  # seconds without a sign of life until another takes over; more than the slowest step
    stop_grace: float = Field(25, ge=0)  # seconds to finish in after SIGTERM, then handed over; orchestrators wait 30
    step_timeout: float = Field(0, ge=0)  # seconds after which a pass hangs; 0: from the slowest measured, 60 or more
    warm_bonus: float = Field(10, ge=0)  # seconds that a job may overtake one whose model must be loaded first
    max_rows: int = Field(0, ge=0)  # widest forward pass tried at warm-up; 0: the card's figure
    overbooking: float = Field(2, ge=1, le=8)  # passes' rows held at once, so that short requests overtake long ones
    preview_size: int = Field(256, ge=16)  # longest side in pixels: enough to judge by, a few KiB to send
    worker_port: int = Field(0, ge=0, le=65535)  # a worker's /livez, /readyz, /metrics; 0: none (`up` shares the API's)

    # Logs
    log_format: str = Field("auto", pattern="^(auto|json|console)$")  # auto: json unless a person is watching
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")  # one line for each thing that happens

    @field_validator("models", "pinned_models", "webhook_allow", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @field_validator("models")
    @classmethod
    def _at_least_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one model")
        return value

    @field_validator("pinned_models")
    @classmethod
    def _served(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if strangers := [name for name in value if name not in info.data.get("models", value)]:
            raise ValueError(f"{', '.join(strangers)} is not among the models")
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _signs(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                enough = 24 <= len(base64.b64decode(value.removeprefix("whsec_"), validate=True)) <= 64
            except ValueError:
                enough = False
            if not enough or not value.startswith("whsec_"):
                raise ValueError("whsec_ and the base64 of 24 to 64 random bytes")
        return value

    @field_validator("webhook_allow")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if re.fullmatch(r"(?=.*[a-z])[a-z0-9.-]+", entry):  # a host's name
                continue
            try:
                ipaddress.ip_network(entry)
            except ValueError:
                raise ValueError(f"{entry} is neither a network, such as 10.0.0.0/8, nor a host's name") from None
        return value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _key_hashes(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [tuple(part.strip() for part in entry.split("=", 1)) for entry in value.split(",") if entry.strip()]
        for pair in pairs:
            if len(pair) != 2 or not pair[0] or len(pair[1]) != 64 or set(pair[1].lower()) - set("0123456789abcdef"):
                raise ValueError("each key is name=<64 hex digits>, the SHA-256 of the key (never the key itself)")
        return tuple((name, digest.lower()) for name, digest in pairs)

    def environment(self) -> dict[str, str]:
        """What was set, as variables for another process."""
        written = {name: as_text(getattr(self, name)) for name in self.model_fields_set - {"redis_url"}}
        return {f"{PREFIX}{name.upper()}": text for name, text in written.items() if text is not None}

    @property
    def blobs(self) -> str:
        """The blob store's URL."""
        return self.blob_url or (self.data_dir / "blobs").absolute().as_uri()


def as_text(value: Any) -> str | None:
    """A setting's value as its variable would hold it."""
    match value:
        case None:
            return None
        case timedelta():
            return str(value.total_seconds())
        case tuple():
            return ",".join("=".join(entry) if isinstance(entry, tuple) else entry for entry in value)
        case _:
            return str(value)


def variable(name: str) -> str:
    """Where a setting is read from."""
    return "REDIS_URL" if name == "redis_url" else f"{PREFIX}{name.upper()}"


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """The `DARKROOM_*` variables that no setting reads: a typing error must not keep a default in silence."""
    known = {variable(name) for name in Settings.model_fields} | FROM_THE_CLIENT_SIDE
    return sorted(name for name in environment if name.upper().startswith(PREFIX) and name not in known)


def read_settings(**given: Any) -> Settings:
    """The settings of this process: what is given here, then the environment, then the defaults.

    Raises:
        SystemExit: a variable is unknown or a value is wrong; the message names it, and not the value: it may be a key.
    """
    if unknown := unknown_variables(os.environ):
        raise SystemExit(f"unknown setting: {', '.join(unknown)}")
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        wrong = "; ".join(
            f"{variable(str(entry['loc'][0]))}: {entry['msg'].removeprefix('Value error, ')}"
            for entry in error.errors()
        )
        raise SystemExit(f"wrong setting: {wrong}") from None
