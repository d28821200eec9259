"""Shards on an object store: the same bytes, the same refusals, and no address in what is kept."""

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import torch
import zarr
from obstore import exceptions
from obstore.store import GCSStore, from_url
from test_store import SETTINGS, Data, activations, fill, tree, write
from zarr.storage import ObjectStore

from benchmarks import s3
from pipeline import artifacts, compose, durable, objects, outline, planned, store, verify
from pipeline.artifacts import STAGES
from pipeline.config import Codec, Config, select
from pipeline.errors import ArtifactError, ConfigError, ResourceError
from pipeline.objects import Objects
from pipeline.stages import CAPTURE, DENSE, capture, train
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter

DATA = activations(SETTINGS)
SHARDS = 2 * (3 + 1)


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """moto's on loopback, with an empty bucket; the environment names it."""
    with s3.serve("bucket") as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty prefix of its own, of each kind that is here."""
    if request.param == "file":
        return f"file://{tmp_path}/objects"
    request.getfixturevalue("server")
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store in one folder."""
    path = tmp_path_factory.mktemp("golden") / "layer_0.zarr"
    write(path, DATA)
    return path


@pytest.fixture
def path(tmp_path: Path, url: str) -> Path:
    """A store whose shards lie at `url`."""
    made = tmp_path / "print" / "layer_0.zarr"
    resume(made, url)
    return made


def resume(path: Path, url: str, data: Data = DATA, **changed: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    fill(LayerWriter.open(path, **SETTINGS | changed, store_url=url), data)


def raw(url: str) -> Any:
    """obstore's own store of what belongs to `path`."""
    return from_url(f"{url}/print/layer_0.zarr")


def contents(url: str) -> dict[str, bytes]:
    found = raw(url)
    names = [meta["path"] for page in obstore.list(found) for meta in page]
    return {name: bytes(obstore.get(found, name).bytes()) for name in names}


def is_right(reader: LayerReader) -> bool:
    pairs = [(reader.read(split), DATA[split]) for split in DATA]
    return all(x.equal(y) for found, wanted in pairs for x, y in zip(found, wanted, strict=True))


# The same store


@pytest.mark.parametrize("codec", Codec)
def test_objects_are_the_files_of_a_local_store_and_the_folder_keeps_their_digests(
    tmp_path, url, codec
):
    local, apart = tmp_path / "local" / "layer_0.zarr", tmp_path / "print" / "layer_0.zarr"
    write(local, DATA, codec=codec)
    resume(apart, url, codec=codec)
    assert contents(url) == tree(local)
    kept = {name: content for name, content in tree(local).items() if name.endswith(".json")}
    assert tree(apart) == kept | {"shards.json": b'{\n "below": "print/layer_0.zarr"\n}\n'}
    one, other = LayerReader(local), LayerReader(apart, store_url=url)
    assert one.digest() == other.digest() == store.digest(apart)
    assert one.stored_bytes() == other.stored_bytes() == sum(map(len, tree(local).values()))


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_come_as_from_a_local_store(tmp_path, url, codec, in_memory):
    local, apart = tmp_path / "local" / "layer_0.zarr", tmp_path / "print" / "layer_0.zarr"
    write(local, DATA, codec=codec)
    resume(apart, url, codec=codec)
    readers = [LayerReader(local), LayerReader(apart, store_url=url)]
    for start, stop in [(0, 61), (7, 9), (30, 30), (60, 61)]:
        one, other = (reader.read("train", start, stop) for reader in readers)
        assert all(map(torch.equal, one, other))
    order = {"seed": 3, "epoch": 1, "in_memory": in_memory}
    one, other = (list(reader.batches("train", 8, **order)) for reader in readers)
    assert len(one) == 7
    assert all(map(torch.equal, *([x for pair in pairs for x in pair] for pairs in (one, other))))


def test_zarr_opens_the_objects_as_they_are(path, url):
    group = zarr.open_group(ObjectStore(raw(url), read_only=True), mode="r")
    array = group["train/input"]
    assert isinstance(array, zarr.Array)
    assert np.array_equal(array[:], DATA["train"][0].view(torch.uint16).numpy())


def test_an_index_is_read_once_and_no_byte_twice(path, url, monkeypatch):
    read: list[tuple[str, int]] = []
    original = Objects.read

    def counted(self: Objects, key: str, offset: int, *into: Any) -> None:
        read.append((key, offset))
        original(self, key, offset, *into)

    monkeypatch.setattr(Objects, "read", counted)
    reader = LayerReader(path, store_url=url)
    assert read == [], "opening lists the objects, and reads none"
    list(reader.batches("train", 8, seed=0, epoch=0, in_memory=False))
    chunks = 2 * 8
    assert len(read) == len(set(read)) == chunks + 2 * 3


def test_chunks_are_asked_for_many_at_once(path, url, monkeypatch):
    lock, now, most, original = threading.Lock(), 0, 0, Objects.read

    def counted(*arguments: Any) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        original(*arguments)
        with lock:
            now -= 1

    monkeypatch.setattr(Objects, "read", counted)
    LayerReader(path, store_url=url).read("train")
    assert most == 8 > torch.get_num_threads(), "every chunk of the split"


# Interrupted, moved, shared


class _KilledError(BaseException):
    """Nothing that comes after it is done."""


def test_ended_before_any_put_a_capture_goes_on_to_the_same_objects(tmp_path, url, monkeypatch):
    """Before the n-th PUT, removal or durable file of a writer, for all n."""
    rows = {"train": 29}
    data = {"train": tuple(side[:29] for side in DATA["train"])}
    golden, refused, n, survived = tmp_path / "golden.zarr", 0, 0, False
    write(golden, data, rows=rows)
    while not survived:
        n += 1
        made, at = tmp_path / str(n) / "print" / "layer_0.zarr", f"{url}/{n}"
        made.parent.mkdir(parents=True)

        def go_on(made: Path = made, at: str = at) -> None:
            resume(made, at, data, rows=rows)

        survived = _survives(n, go_on, monkeypatch)
        try:
            found = LayerReader(made, store_url=at).read("train")
            assert all(map(torch.equal, found, data["train"]))
        except ArtifactError:
            refused += 1
        go_on()
        assert contents(at) == tree(golden)
        LayerReader(made, store_url=at).verify()
    assert n > 12
    assert refused >= n - 1, "complete only when the last commit is down"


def _survives(n: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> bool:
    left = n

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                raise _KilledError
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, contextlib.suppress(_KilledError):
        patch.setattr(Objects, "put", counted(Objects.put))
        patch.setattr(Objects, "delete", counted(Objects.delete))
        patch.setattr(os, "replace", counted(os.replace))
        action()
    return left > 0


KILLED = """
import os, signal, sys
from pathlib import Path
from test_objects import Objects, resume
left, put = int(sys.argv[1]), Objects.put
def counted(self, key, content):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, key, content)
Objects.put = counted
resume(Path(sys.argv[2]), sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 8, 12])
def test_kill_in_the_middle(tmp_path, url, golden, n):
    """A process for real: `kill -9` before its n-th PUT."""
    made = tmp_path / "print" / "layer_0.zarr"
    command = [sys.executable, "-c", KILLED, str(n), str(made), url]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    with pytest.raises(ArtifactError):
        LayerReader(made, store_url=url)
    resume(made, url)
    assert contents(url) == tree(golden)


def test_another_machine_goes_on_from_what_lies_there(path, url, tmp_path, monkeypatch):
    """It has no folder and no commit: it reads those of the store, and writes nothing."""
    before = tree(path)
    shutil.rmtree(path)
    monkeypatch.setattr(LayerWriter, "write_shard", None)
    resume(path, url)
    assert tree(path) == before


def test_a_commit_that_only_one_side_has_is_given_to_the_other(path, url, golden):
    obstore.delete(raw(url), "commits/train_00001.json")
    (path / "commits/train_00002.json").unlink()
    before = contents(url)
    writer = LayerWriter.open(path, **SETTINGS, store_url=url)
    assert writer.committed("train") == {0, 1, 2}
    assert contents(url) == tree(golden) != before
    assert is_right(LayerReader(path, store_url=url))


def test_moved_objects_are_read_at_their_new_address_and_the_store_stays_as_it_was(
    path, url, tmp_path
):
    before, other = tree(path), f"{url}/moved"
    for name, content in contents(url).items():
        obstore.put(from_url(f"{other}/print/layer_0.zarr", **_made(other)), name, content)
        obstore.delete(raw(url), name)
    with pytest.raises(ArtifactError, match=r"set capture\.store_url to where they lie"):
        LayerReader(path, store_url=url)
    assert is_right(LayerReader(path, store_url=other))
    assert tree(path) == before


def _made(url: str) -> dict[str, Any]:
    return {"mkdir": True} if url.startswith("file:") else {}


def test_a_store_that_was_begun_with_other_settings_is_refused_by_name(path, url):
    shutil.rmtree(path)
    with pytest.raises(ArtifactError, match=r"begun with other settings.*\n.*codec is compact"):
        LayerWriter.open(path, **SETTINGS | {"codec": Codec.fast}, store_url=url)


# Damaged, missing, foreign


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: None, "it is missing"),
        (lambda content: b"", "it has 0 bytes, "),
        (lambda content: content[:-1], "bytes were committed|bytes, .* were committed"),
        (lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:], "checksum"),
        (lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "index"),
    ],
)
def test_a_damaged_object_is_refused_by_name_and_written_again(path, url, golden, damage, said):
    name = "train/output/c.1.0"
    content = damage(contents(url)[name])
    obstore.delete(raw(url), name)
    if content is not None:
        obstore.put(raw(url), name, content)
    with pytest.raises(ArtifactError, match=said) as caught:
        LayerReader(path, store_url=url).read("train")
    assert f"{url}/print/layer_0.zarr/{name}: " in str(caught.value)
    assert "dvc repro -f -s capture" in caught.value.remedy
    with pytest.raises(ArtifactError, match=r"c\.1\.0"):
        store.verify_apart(path.parent, url)
    resume(path, url)
    assert contents(url) == tree(golden)


@pytest.mark.parametrize("name", ["train/zarr.json", "train/output/zarr.json"])
def test_a_description_that_is_damaged_and_as_long_as_before_is_written_again(
    path, url, golden, name
):
    content = contents(url)[name]
    obstore.put(raw(url), name, content[:20] + bytes([content[20] ^ 1]) + content[21:])
    resume(path, url)
    assert contents(url) == tree(golden)


def test_an_object_in_anothers_place_is_refused(tmp_path, url):
    """Uncompressed shards have equal sizes, and each is sound in itself."""
    path = tmp_path / "print" / "layer_0.zarr"
    resume(path, url, codec=Codec.none)
    found = contents(url)
    obstore.put(raw(url), "train/input/c.0.0", found["train/input/c.1.0"])
    with pytest.raises(ArtifactError, match="does not match its checksum"):
        LayerReader(path, store_url=url).read("train")
    with pytest.raises(ArtifactError, match="it holds the rows of another shard"):
        LayerReader(path, store_url=url).verify()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train/input/c.9.0", "no commit knows it"),
        ("commits/train_00000.json", "it is not the commit of this store"),
        ("zarr.json", "bytes were committed|bytes, .* were committed"),
    ],
)
def test_verify_finds_a_foreign_object(path, url, name, said):
    assert store.verify_apart(path.parent, url) == 1
    obstore.put(raw(url), name, b"{}")
    with pytest.raises(ArtifactError, match=said):
        store.verify_apart(path.parent, url)


def test_an_object_that_shrinks_while_it_is_read_is_refused(path, url):
    reader = LayerReader(path, store_url=url)
    for size in (1, 200):
        obstore.put(raw(url), "train/input/c.0.0", b"x" * size)
        with pytest.raises(ArtifactError, match=r"it ends early|index does not match"):
            reader.read("train")
    obstore.delete(raw(url), "train/input/c.0.0")
    with pytest.raises(ArtifactError, match="it is missing"):
        reader.read("train")


@pytest.mark.parametrize("below", ["../other", "/abs/x", "a", 7, "print/layer_0.zarr/x", "a/.."])
def test_a_store_may_not_lead_out_of_the_address(path, url, below):
    durable.write_json(path / "shards.json", {"below": below})
    with pytest.raises(ArtifactError, match="does not say where the shards lie"):
        LayerReader(path, store_url=url)


def test_without_an_address_a_reader_says_what_is_missing(path):
    with pytest.raises(ConfigError, match=r"set capture\.store_url"):
        LayerReader(path)


# The store itself


def test_a_bucket_that_is_not_there(tmp_path, server):
    with pytest.raises(ResourceError, match="there is no such bucket") as caught:
        resume(tmp_path / "print" / "layer_0.zarr", "s3://nowhere/prefix")
    assert "s3://nowhere/prefix/print/layer_0.zarr/" in str(caught.value)


def test_a_folder_that_is_not_there(path, url):
    if url.startswith("file:"):
        with pytest.raises(ArtifactError, match="it is missing"):
            LayerReader(path, store_url=f"{url}x")
        assert not Path(f"{url}x".removeprefix("file://")).exists()


def test_a_server_that_goes_away_is_asked_again_and_then_refused(tmp_path, monkeypatch):
    """And one that comes back meanwhile is not missed."""
    monkeypatch.setattr(objects, "RETRY", {"max_retries": 3, "retry_timeout": timedelta(minutes=1)})
    path, url = tmp_path / "print" / "layer_0.zarr", "s3://bucket/prefix"
    with s3.serve("bucket") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        resume(path, url)
        reader = LayerReader(path, store_url=url)
    began = time.monotonic()
    with pytest.raises(ResourceError, match="it does not answer") as caught:
        reader.read("train")
    assert time.monotonic() - began > 0.3, "it was tried again"
    assert caught.value.exit_code == 4
    assert s3.CREDENTIALS["AWS_ACCESS_KEY_ID"] not in str(caught.value)


ANSWERS = {
    "access is denied": [
        exceptions.PermissionDeniedError(
            "...status: 403... <AWSAccessKeyId>AKIAX</AWSAccessKeyId>"
        ),
        exceptions.UnauthenticatedError("AKIAX"),
        exceptions.GenericError("<Code>SignatureDoesNotMatch</Code> AKIAX"),
        exceptions.GenericError("status code: 401 Unauthorized AKIAX"),
    ],
    "no credentials were found": [
        exceptions.GenericError("PUT http://169.254.169.254/latest/api/token AKIAX"),
        exceptions.GenericError("Error performing token request: metadata.google.internal AKIAX"),
    ],
    "there is no such bucket": [FileNotFoundError("<Code>NoSuchBucket</Code> AKIAX")],
    "the bucket lies in another region": [exceptions.GenericError("PermanentRedirect AKIAX")],
    "it does not answer": [
        exceptions.GenericError("HTTP error: error sending request, in 403.2ms AKIAX"),
        exceptions.GenericError("operation timed out AKIAX"),
    ],
}


@pytest.mark.parametrize(
    ("said", "error"), [(said, error) for said, errors in ANSWERS.items() for error in errors]
)
def test_errors_are_told_in_words_of_ours_and_never_repeated(path, url, said, error):
    place = objects.place_of(path, url)
    assert isinstance(place, Objects)
    with pytest.raises(ResourceError, match=said) as caught, place.told("train/input/c.0.0"):
        raise error
    told = "".join(traceback.format_exception(caught.value, chain=False)) + caught.value.remedy
    assert "AKIAX" not in told
    assert caught.value.__suppress_context__
    assert f"{url}/print/layer_0.zarr/train/input/c.0.0" in told


def test_a_full_disk_under_an_address_of_a_folder_is_told_as_one(path, url):
    place = objects.place_of(path, url)
    assert isinstance(place, Objects)
    full = exceptions.GenericError("Unable to copy data to file: No space left (os error 28)")
    with pytest.raises(ResourceError, match="room on the disk"), place.told("x"):
        raise full


def test_gs_is_google_cloud_storage():
    place = Objects("gs://bucket/prefix", "print/layer_0.zarr")
    assert isinstance(place.store, GCSStore)
    assert place.store.prefix == "prefix/print/layer_0.zarr"


def test_obstore_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setattr(objects.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sparse-distillation\[objects\]"):
        Objects("s3://bucket", "print/layer_0.zarr")


# The setting


@pytest.mark.parametrize(
    "url",
    ["s3://bucket", "s3://bucket/a/b-c/", "gs://my.bucket-1/x=1", "file:///data/shards"],
)
def test_addresses(url):
    compose.load([f"capture.store_url='{url}'"])


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAX:secret@bucket/a",
        "s3://AKIAX:secret/a",
        "s3://bucket/a?X-Amz-Signature=AKIAX",
        "https://AKIAX@host/bucket",
        "https://host/bucket?sig=AKIAX",
        "file:///data?token=AKIAX",
        "s3://bucket#AKIAX",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(url, project):
    with pytest.raises(ConfigError, match="holds more than an address") as caught:
        compose.load([f"capture.store_url='{url}'"])
    assert "AKIAX" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["", "bucket/a", "/data", "file://data", "http://host/a", "s3://", "s3://b/../c", "s3://B"],
)
def test_what_is_no_address_is_refused(url, project):
    with pytest.raises(ConfigError, match="no address of an object store"):
        compose.load([f"capture.store_url='{url}'"])


def test_verify_reads_the_objects_or_says_that_it_did_not(path, url, project, capsys):
    artifacts.write_manifest(path.parent, {})
    verify.verify(path.parent)
    assert "nothing was read, since capture.store_url is null" in capsys.readouterr().out
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("store_url: null", f"store_url: {url}"))
    verify.verify(path.parent)
    assert f"also the shards of 1 layers on {url}" in capsys.readouterr().out
    content = contents(url)["train/input/c.0.0"]
    obstore.put(raw(url), "train/input/c.0.0", content[:9] + b"?" + content[10:])
    with pytest.raises(ArtifactError, match="1 of 1 artefacts are damaged"):
        verify.verify(path.parent)
    assert "DAMAGED" in capsys.readouterr().out


# The stages


@pytest.mark.slow
def test_capture_and_train_give_the_bytes_of_a_local_run_and_keep_no_address(
    captured_project, url, monkeypatch
):
    monkeypatch.chdir(captured_project)
    cfg = compose.load([])
    layers = cfg.model.layers
    golden = {k: tree(CAPTURE / f"layer_{k}.zarr") for k in layers}
    capture.run(cfg)
    one = trained(cfg)

    cfg.capture.store_url = url
    work = capture.run(cfg, part=(1, 2), published=False)
    shutil.rmtree(work)  # as of a machine that shares no disk with the next
    capture.run(cfg, part=(2, 2), published=False)
    monkeypatch.setattr(LayerWriter, "write_shard", None)
    capture.run(cfg)
    (found,) = from_there(url)
    assert found == {f"layer_{k}.zarr/{key}": v for k in layers for key, v in golden[k].items()}
    sizes = [p.stat().st_size for p in CAPTURE.rglob("*") if p.is_file()]
    plan = planned.make(cfg, outline.record_of(cfg, DENSE))
    assert plan.costs["capture"].files == len(sizes)
    assert plan.costs["capture"].bytes == pytest.approx(sum(sizes), rel=0.05)
    there = sum(len(content) for key, content in found.items() if "/c." in key)
    assert plan.apart == pytest.approx(there, rel=0.05)
    assert trained(cfg) == one

    (before,) = prints()
    other = f"{url}/other"
    for key, content in found.items():
        obstore.put(from_url(f"{other}/{before}", **_made(other)), key, content)
    obstore.delete(from_url(f"{url}/{before}"), list(found))
    cfg.capture.store_url = other
    capture.run(cfg)
    assert prints() == [before]
    assert trained(cfg) == one

    kept = [p for p in Path().rglob("*") if p.is_file() and p.parent.name != "measured"]
    for secret in (*s3.CREDENTIALS.values(), url.partition("://")[2]):
        assert [p for p in kept if secret.encode() in p.read_bytes()] == []


def trained(cfg: Config) -> dict[str, bytes]:
    """Everything that a layer's fit leaves, computed anew."""
    for work in Path(".scratch").glob("train-*"):
        shutil.rmtree(work)
    train.run(cfg, cfg.model.layers[0])
    return tree(Path("stages/train"))


def prints() -> list[str]:
    """Fingerprints of finished captures whose shards lie elsewhere."""
    return [p.parents[1].name for p in Path(".scratch/capture").glob("*/layer_0.zarr/shards.json")]


def from_there(url: str) -> list[dict[str, bytes]]:
    """The objects of each capture below an address."""
    found = []
    for name in prints():
        at = from_url(f"{url}/{name}")
        keys = [meta["path"] for page in obstore.list(at) for meta in page]
        found.append({key: bytes(obstore.get(at, key).bytes()) for key in keys})
    return found


@pytest.mark.parametrize("name", STAGES)
def test_no_stage_has_the_address_in_its_fingerprint(name):
    stage = importlib.import_module(f"pipeline.stages.{name}")
    assert "capture.store_url" not in select(compose.load([]), stage.PARAMS)
