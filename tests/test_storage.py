"""The same behaviour from a directory and from S3 (moto's server, over HTTP)."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import boto3
import pytest
from moto.server import ThreadedMotoServer
from obstore.exceptions import BaseError

from app.storage import BlobStore, generation_folder, image_key, input_key, open_store, preview_key


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of this test's own, with `AWS_*` set to reach it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    name = f"bucket-{uuid4()}"
    s3().create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    return name


def s3():
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT"], region_name="eu-central-1")


def keys_in(bucket: str) -> list[str]:
    return [found["Key"] for found in s3().list_objects_v2(Bucket=bucket).get("Contents", [])]


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "directory":
        return open_store((tmp_path / "blobs").as_uri())
    return open_store(f"s3://{request.getfixturevalue('bucket')}/some/prefix")


@pytest.mark.parametrize(
    "data", [b"", b"\x00\xff picture \x00", os.urandom(12_000_000)], ids=["empty", "small", "12 MB"]
)
def test_what_is_saved_opens_again(store: BlobStore, data: bytes):
    store.save(image_key("g1", 0, "png"), data)
    opened = store.open(image_key("g1", 0, "png"))
    assert type(opened) is bytes
    assert opened == data


def test_saving_again_replaces(store: BlobStore):
    store.save("a", b"a longer blob")
    store.save("a", b"b")
    assert store.open("a") == b"b"


def test_a_missing_blob_is_a_file_not_found(store: BlobStore):
    store.save(image_key("g1", 0, "png"), b"x")
    with pytest.raises(FileNotFoundError):
        store.open(image_key("g1", 1, "png"))
    with pytest.raises(FileNotFoundError):
        store.open(image_key("g2", 0, "png"))


def test_deleting_a_generation_takes_all_of_it_and_nothing_of_its_neighbours(store: BlobStore):
    mine = [image_key("g1", 0, "png"), image_key("g1", 1, "avif"), input_key("g1", "mask"), preview_key("g1", 0, 5)]
    others = [image_key("g10", 0, "png"), image_key("g", 0, "png")]
    for key in mine + others:
        store.save(key, key.encode())
    store.delete(generation_folder("g1"))
    for key in mine:
        with pytest.raises(FileNotFoundError):
            store.open(key)
    assert [store.open(key) for key in others] == [key.encode() for key in others]


def test_deleting_what_is_not_there_is_no_error(store: BlobStore):
    store.delete(generation_folder("nobody"))
    store.save("generations/g1/a", b"x")
    store.delete(generation_folder("g1"))
    store.delete(generation_folder("g1"))


def test_a_folder_is_listed_with_what_is_below_it(store: BlobStore):
    keys = [image_key("g1", 0, "png"), image_key("g1", 1, "png"), preview_key("g1", 0, 5), "generations/g1/journal/0"]
    for key in [*keys, image_key("g10", 0, "png"), image_key("g", 0, "png"), "generations/readme", "g1/a"]:
        store.save(key, b"x")
    assert sorted(store.list(generation_folder("g1"))) == sorted(keys)
    assert list(store.list(generation_folder("g2"))) == []
    assert list(store.folders("generations")) == ["g", "g1", "g10"]
    assert list(store.folders("nothing")) == []


def test_a_store_that_answers_passes_its_check_empty_or_not(store: BlobStore):
    store.check()
    store.save(image_key("g1", 0, "png"), b"x")
    store.check()


def test_a_key_cannot_leave_the_store(store: BlobStore):
    with pytest.raises(ValueError, match="elsewhere"):
        store.save("generations/../../elsewhere", b"x")
    with pytest.raises(ValueError, match="elsewhere"):
        store.open("../elsewhere")


def test_keys_tell_what_they_hold():
    assert image_key("g1", 2, "webp") == "generations/g1/images/2.webp"
    assert input_key("g1", "mask") == "generations/g1/inputs/mask.png"
    assert preview_key("g1", 2, 10) == "generations/g1/previews/2/10"


# A directory


def test_the_directory_is_made_whatever_its_name(tmp_path: Path):
    directory = tmp_path / "a folder" / "Bildér 100%" / "blobs"
    open_store(directory.as_uri()).save("generations/g1/a", b"x")
    assert (directory / "generations" / "g1" / "a").read_bytes() == b"x"


def test_more_blobs_than_one_page_of_a_listing_holds_are_all_deleted(tmp_path: Path):
    store = open_store(tmp_path.as_uri())
    keys = [preview_key("g1", index, step) for index in range(4) for step in range(300)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: store.save(key, b"x"), keys))
    store.delete(generation_folder("g1"))
    for key in keys:
        with pytest.raises(FileNotFoundError):
            store.open(key)


def test_deleting_leaves_no_empty_folders(tmp_path: Path):
    store = open_store(tmp_path.as_uri())
    store.save(image_key("g1", 0, "png"), b"x")
    store.save(image_key("g2", 0, "png"), b"x")
    store.delete(generation_folder("g1"))
    assert [path.name for path in (tmp_path / "generations").iterdir()] == ["g2"]
    store.delete(generation_folder("g2"))
    assert tmp_path.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_reader_never_sees_half_a_blob(tmp_path: Path):
    store = open_store(tmp_path.as_uri())
    blobs = [bytes([letter]) * 2_000_000 for letter in b"ab"]
    store.save("a", blobs[0])
    stop = threading.Event()

    def write_on():
        while not stop.is_set():
            for blob in blobs:
                store.save("a", blob)

    writer = threading.Thread(target=write_on)
    writer.start()
    seen = [store.open("a") for _ in range(200)]
    stop.set()
    writer.join()
    assert set(seen) == set(blobs)


def test_what_a_killed_writer_left_behind_is_no_blob(tmp_path: Path):
    store = open_store(tmp_path.as_uri())
    store.save("generations/g1/a", b"whole")
    (tmp_path / "generations" / "g1" / "b#1").write_bytes(b"hal")  # obstore's name for a blob that is being written
    with pytest.raises(FileNotFoundError):
        store.open("generations/g1/b")
    store.save("generations/g1/b", b"whole")
    assert store.open("generations/g1/b") == b"whole"


def test_deleting_takes_what_a_killed_writer_left_too(tmp_path: Path):
    store = open_store(tmp_path.as_uri())
    (tmp_path / "generations" / "g1" / "images").mkdir(parents=True)
    (tmp_path / "generations" / "g1" / "images" / "0.png#1").write_bytes(b"hal")
    store.save("generations/g2/a#1.png", b"a whole one")
    store.delete(generation_folder("g1"))
    assert not (tmp_path / "generations" / "g1").exists()
    assert store.open("generations/g2/a#1.png") == b"a whole one"


def test_a_directory_that_is_not_there_is_no_empty_one(tmp_path: Path):
    store = open_store((tmp_path / "blobs").as_uri())
    (tmp_path / "blobs").rename(tmp_path / "away")
    with pytest.raises(BaseError, match="is not there"):
        store.check()
    with pytest.raises(BaseError, match="is not there"):
        store.open("a")
    (tmp_path / "away").rename(tmp_path / "blobs")
    store.check()
    with pytest.raises(FileNotFoundError):
        store.open("a")


# S3


def test_a_prefix_keeps_stores_in_one_bucket_apart(bucket: str):
    one, other = open_store(f"s3://{bucket}/one"), open_store(f"s3://{bucket}/one/other/")
    one.save("a", b"1")
    other.save("a", b"2")
    assert keys_in(bucket) == ["one/a", "one/other/a"]
    assert (one.open("a"), other.open("a")) == (b"1", b"2")
    whole = open_store(f"s3://{bucket}")
    whole.save("b", b"3")
    assert "b" in keys_in(bucket)


def test_a_large_blob_is_one_put_that_leaves_no_parts_when_its_writer_dies(bucket: str):
    open_store(f"s3://{bucket}").save("a", bytes(12_000_000))
    etag = s3().head_object(Bucket=bucket, Key="a")["ETag"]
    assert "-" not in etag  # a multipart upload's ends in "-" and the number of parts


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_endpoint_may_have_the_names_that_other_tools_use(bucket: str, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, os.environ["AWS_ENDPOINT"])
    client = s3()
    monkeypatch.delenv("AWS_ENDPOINT")
    open_store(f"s3://{bucket}").save("a", b"1")
    assert client.get_object(Bucket=bucket, Key="a")["Body"].read() == b"1"


def test_a_missing_bucket_fails_the_check(bucket: str):
    with pytest.raises(BaseError):
        open_store("s3://another-bucket").check()


def test_a_dead_store_is_noticed_at_once(bucket: str, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        store = open_store(f"s3://{bucket}")
        begun = time.monotonic()
        with pytest.raises(BaseError):
            store.check()
        with pytest.raises(BaseError):
            store.save("a", b"x")
        assert time.monotonic() - begun < 4


def test_a_store_that_hangs_is_given_up_after_ten_seconds(bucket: str, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(BaseError):
            open_store(f"s3://{bucket}").save("a", b"x")
        assert 9 < time.monotonic() - begun < 15


def test_other_urls_are_no_blob_stores():
    for url in ("", "data/blobs", "/data/blobs", "http://example.com/a", "gs://bucket/a", "s3://", "file://host/a"):
        with pytest.raises(ValueError, match="file:///directory or s3://bucket/prefix"):
            open_store(url)
