"""Blobs in a directory or in S3: the pictures that clients sent, the previews and the results."""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import GenericError
from obstore.store import LocalStore, ObjectStore, S3Store

from app.schemas import OutputFormat

UNFINISHED = re.compile(r"#\d+$")  # obstore's name for a file that it has not renamed yet
AWS_ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


@dataclass(frozen=True)
class BlobStore:
    """Blobs by key, written whole or not at all. Safe to share between threads.

    Methods raise `obstore.exceptions.BaseError` when the store does not answer or refuses.
    """

    store: ObjectStore

    def save(self, key: str, data: bytes) -> None:
        """Write the blob, replacing what was there.

        In a directory obstore writes `<key>#1` and renames it (seen with strace; no fsync), so a reader has the old
        bytes or the new. In S3 it is one PUT: of a multipart upload whose writer is killed, parts stay and cost.
        """
        obstore.put(self.store, key, data, use_multipart=False)

    def open(self, key: str) -> bytes:
        """The blob.

        Raises:
            FileNotFoundError: there is none.
        """
        try:
            return obstore.get(self.store, key).bytes().to_bytes()
        except FileNotFoundError:
            self.check()  # it may be the store that is not there
            raise

    def list(self, prefix: str) -> Iterator[str]:
        """The keys of all blobs below `prefix`, a folder: `a/b` covers `a/b/c` but not `a/bc`. In order, in S3."""
        for found in obstore.list(self.store, prefix, chunk_size=1000):
            yield from (blob["path"] for blob in found)

    def folders(self, prefix: str) -> Iterator[str]:
        """The names of the folders right in `prefix`, in order; who has enough of them may stop."""
        if self.directory:  # obstore would walk the whole tree
            inside = obstore.list_with_delimiter(self.store, prefix)["common_prefixes"]
            yield from sorted(path.rpartition("/")[2] for path in inside)
            return
        last = None
        for key in self.list(prefix):
            name, is_folder, _ = key.removeprefix(f"{prefix}/").partition("/")
            if is_folder and name != last:
                yield name
                last = name

    def delete(self, prefix: str) -> None:
        """Remove every blob below `prefix`, a folder, and what a killed writer left there. None there is no error."""
        for found in obstore.list(self.store, prefix, chunk_size=1000):
            obstore.delete(self.store, [blob["path"] for blob in found])
        if self.directory and (folder := self.directory / prefix).is_dir():  # so there was a half-written one in it
            shutil.rmtree(folder)

    def delete_unfinished(self, older_than: timedelta) -> int:
        """Remove what killed writers left of blobs, and nobody else is going to finish. Returns how many there were.

        In S3 there are none: `save` is one PUT.
        """
        walk = os.walk(self.directory) if self.directory else ()
        strays = [Path(folder) / name for folder, _, names in walk for name in names if UNFINISHED.search(name)]
        old = [path for path in strays if age_of_file(path) > older_than.total_seconds()]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)

    def check(self) -> None:
        """List the store's topmost folders, one cheap request: returns if the store answers, raises if not."""
        if self.directory and not self.directory.is_dir():  # to obstore, that would be an empty one
            raise GenericError(f"{self.directory} is not there")
        obstore.list_with_delimiter(self.store)

    @property
    def directory(self) -> Path | None:
        return Path(self.store.prefix) if isinstance(self.store, LocalStore) and self.store.prefix else None


def age_of_file(path: Path) -> float:
    """Seconds since it was last written to; zero if it has gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def open_store(url: str) -> BlobStore:
    """The store at `file:///directory`, made if missing, or `s3://bucket/prefix`.

    S3 takes its credentials, region and endpoint from the usual `AWS_*` variables.

    Raises:
        ValueError: the URL is neither.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc:
        return BlobStore(LocalStore(Path(unquote(parts.path)), mkdir=True, automatic_cleanup=True))
    if parts.scheme == "s3" and parts.netloc:
        plain_http = any(os.environ.get(name, "").startswith("http://") for name in AWS_ENDPOINTS)
        store = S3Store.from_url(
            url,
            # A dead store is noticed within 10 s, not after obstore's 3 minutes; a refused connection within 0.3 s.
            client_options={
                "connect_timeout": timedelta(seconds=2),
                "timeout": timedelta(seconds=10),
                "allow_http": plain_http,
            },
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=10)},
        )
        return BlobStore(store)
    raise ValueError(f"a blob store is file:///directory or s3://bucket/prefix, not {url!r}")


def generation_folder(generation_id: str) -> str:
    """What `BlobStore.delete` takes to forget a generation."""
    return f"generations/{generation_id}"


def evaluation_folder(evaluation_id: str) -> str:
    return f"evaluations/{evaluation_id}"


def upload_key(owner: str, id: str) -> str:
    """Of a file that a client sent ahead of its request: owners cannot read each other's."""
    return f"uploads/{id}/{hashlib.sha256(owner.encode()).hexdigest()}"


def image_key(generation_id: str, index: int, output_format: OutputFormat) -> str:
    return f"{generation_folder(generation_id)}/images/{index}.{output_format}"


def input_key(generation_id: str, field: str) -> str:
    """Where the picture that came in `field` is kept: always as a PNG, whatever it came as."""
    return f"{generation_folder(generation_id)}/inputs/{field}.png"


def journal_folder(generation_id: str) -> str:
    return f"{generation_folder(generation_id)}/journal"


def page_key(generation_id: str, index: int, attempt: int, number: int) -> str:
    """Of a page of a picture's journal. Sorted by name, they are sorted by attempt and by the first call they hold."""
    return f"{journal_folder(generation_id)}/{index}/{attempt:03}-{number:05}"


def preview_folder(generation_id: str) -> str:
    return f"{generation_folder(generation_id)}/previews"


def preview_key(generation_id: str, index: int, step: int) -> str:
    return f"{preview_folder(generation_id)}/{index}/{step}"
