"""Objects on a real S3 server: fetched whole or not at all, resumed, kept in a bounded cache; failures are said in words."""

import hashlib
import json
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from s3_server import Proxy

from bmfm_pipeline.errors import ConfigError, StorageError
from bmfm_pipeline.storage import (
    RemoteError,
    Workspace,
    cache,
    content_hash,
    exists,
    find_artefact,
    list_artefacts,
    load_artefact,
    localise,
    place_copy,
    publish,
    release_copies,
    remote,
    transfer,
)

PART = 64 << 10


@pytest.fixture(autouse=True)
def _small_parts_and_short_waits(monkeypatch):
    monkeypatch.setattr(transfer, "PART_SIZE", PART)
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.02)
    yield
    release_copies()


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def other_machine(monkeypatch, folder: Path) -> None:
    monkeypatch.setenv("BMFM_CACHE_DIR", str(folder))


def test_a_file_is_fetched_once_and_again_when_it_changes(s3, tmp_path):
    uri = s3.put("data/cells.h5ad", noise(3 * PART + 5))
    with Proxy(s3.server) as proxy:
        s3.through(proxy)
        path = localise(uri)
        assert path.name == "cells.h5ad" and path.read_bytes() == noise(3 * PART + 5)
        assert path.is_relative_to(cache.cache_dir()) and not path.stat().st_mode & 0o222
        before = proxy.passed
        assert localise(uri) == path and proxy.passed - before < 4000
    s3.directly()
    s3.put("data/cells.h5ad", b"new")
    assert localise(uri).read_bytes() == b"new" and path.read_bytes() == noise(3 * PART + 5)
    assert localise(s3.put("empty", b"")).read_bytes() == b""


def test_a_folder_is_fetched_as_it_is(s3):
    s3.put("tokenizers/genes/tokenizer.json", b"{}")
    s3.put("tokenizers/genes/special.json", b"[]")
    folder = localise(f"{s3.uri}/tokenizers/")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json")) == [
        "genes/special.json",
        "genes/tokenizer.json",
    ]


def test_cut_connections_are_tried_again_and_counted(s3, caplog):
    uri = s3.put("x.bin", noise(4 * PART))
    with Proxy(s3.server, cut_after=PART // 2, cuts=3) as proxy:
        s3.through(proxy)
        before = remote.retries_made()
        with caplog.at_level("INFO"):
            assert localise(uri).read_bytes() == noise(4 * PART)
        assert proxy.cut == 3 and remote.retries_made() - before == 3
    assert "retry 1 of 5" in caplog.text and "complete after 3 retries" in caplog.text


def test_a_connection_that_keeps_breaking_ends_in_words_and_what_came_is_kept(s3, monkeypatch):
    uri = s3.put("x.bin", noise(12 * PART))
    monkeypatch.setenv("BMFM_RETRIES", "1")
    with Proxy(s3.server, limit=8 * PART) as proxy:
        s3.through(proxy)
        with pytest.raises(
            RemoteError, match=r"x.bin: http://127.0.0.1:\d+ could not be reached, or broke off, in 2 attempts"
        ):
            localise(uri)
        assert not list(cache.cache_dir().rglob("data"))
    done = json.loads(next(cache.cache_dir().rglob("*.parts.json")).read_text())["done"]
    assert 0 < len(done) < 12
    with Proxy(s3.server) as proxy:
        s3.through(proxy)
        assert localise(uri).read_bytes() == noise(12 * PART)
        assert proxy.passed < (12 - len(done)) * PART + 20_000


FETCH = """
import sys
from bmfm_pipeline.storage import localise, transfer
transfer.PART_SIZE = int(sys.argv[2])
print("begins", flush=True)
print(localise(sys.argv[1]), flush=True)
sys.stdin.readline()
"""


def fetching(uri: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, uri, str(PART)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_killed_download_goes_on_where_it_stopped(s3):
    uri = s3.put("x.bin", noise(16 * PART))
    with Proxy(s3.server, pause=0.05) as proxy:
        s3.through(proxy)
        process = fetching(uri)
        while proxy.passed < 8 * PART:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not list(cache.cache_dir().rglob("data"))
        proxy.pause, before = 0, proxy.passed
        assert localise(uri).read_bytes() == noise(16 * PART)
        assert proxy.passed - before < 13 * PART  # four parts at a time may have been under way


def test_an_object_that_changed_meanwhile_is_fetched_from_its_start(s3, monkeypatch):
    uri = s3.put("x.bin", noise(12 * PART))
    monkeypatch.setenv("BMFM_RETRIES", "0")
    with Proxy(s3.server, limit=6 * PART) as proxy:
        s3.through(proxy)
        with pytest.raises(RemoteError):
            localise(uri)
    s3.directly()
    s3.put("x.bin", noise(12 * PART, seed=1))
    assert localise(uri).read_bytes() == noise(12 * PART, seed=1)


def test_an_object_that_changes_during_the_download_is_fetched_anew(s3, monkeypatch):
    uri = s3.put("x.bin", noise(8 * PART))
    read, once = transfer._read_range, []

    def change_half_way(fs, path, start, end):
        if start >= 4 * PART and not once:
            once.append(s3.put("x.bin", noise(5 * PART, seed=2)))
        return read(fs, path, start, end)

    monkeypatch.setattr(transfer, "_read_range", change_half_way)
    assert localise(uri).read_bytes() == noise(5 * PART, seed=2)


def test_two_processes_fetch_an_object_once_and_it_stays_while_one_uses_it(s3, monkeypatch):
    uri = s3.put("x.bin", noise(8 * PART))
    monkeypatch.setenv("BMFM_CACHE_SIZE", f"{10 * PART}")
    with Proxy(s3.server, pause=0.02) as proxy:
        s3.through(proxy)
        both = [fetching(uri) for _ in range(2)]
        paths = [[process.stdout.readline(), process.stdout.readline()][1].strip() for process in both]
    assert paths[0] == paths[1] and Path(paths[0]).read_bytes() == noise(8 * PART)
    assert 8 * PART < proxy.passed < 9 * PART
    s3.directly()
    both[0].communicate("done\n")
    old, again, new = (s3.put(f"{number}.bin", noise(PART, seed=number)) for number in range(3))
    old_copy, again_copy = localise(old), localise(again)
    release_copies()
    localise(again)
    release_copies()
    new_copy = localise(new)
    # x.bin is the oldest but a process uses it, 1.bin was used again: 0.bin goes.
    assert Path(paths[0]).exists() and again_copy.exists() and new_copy.exists() and not old_copy.exists()
    localise(again)
    with pytest.raises(StorageError, match=r"0.bin: 65.5 kB do not fit .* set BMFM_CACHE_SIZE"):
        localise(old)
    both[1].communicate("done\n")
    assert localise(old).exists() and not Path(paths[0]).exists()
    monkeypatch.setenv("BMFM_CACHE_SIZE", "plenty")
    with pytest.raises(ConfigError, match="BMFM_CACHE_SIZE: 'plenty' is not a size; write for example 50GB"):
        cache.cache_limit()


@pytest.mark.parametrize(
    ("text", "size"), [("50GB", 50 * 10**9), ("1.5 GiB", 3 * 2**29), ("800m", 8 * 10**8), ("7", 7)]
)
def test_sizes_of_the_cache(monkeypatch, text, size):
    monkeypatch.setenv("BMFM_CACHE_SIZE", text)
    assert cache.cache_limit() == size


def test_a_damaged_copy_is_replaced(s3):
    uri = s3.put("x.bin", noise(PART))
    path = localise(uri)
    path.chmod(0o644)
    path.write_bytes(b"short")
    assert localise(uri).read_bytes() == noise(PART)


def test_what_is_missing_is_named(s3, monkeypatch):
    for call in (localise, content_hash):
        with pytest.raises(StorageError, match=rf"{s3.uri}/no.h5ad: does not exist; correct the address"):
            call(f"{s3.uri}/no.h5ad")
        with pytest.raises(
            StorageError, match=r"there is no bucket 'no-such-bucket' at http://127.0.0.1.*AWS_ENDPOINT_URL_S3"
        ):
            call("s3://no-such-bucket/x.h5ad")
    with pytest.raises(StorageError, match="there is no bucket 'no-such-bucket'"):
        Workspace("s3://no-such-bucket/w").check_writable()
    assert not exists(f"{s3.uri}/no.h5ad")


def test_wrong_credentials_are_named_and_secrets_are_not(s3, monkeypatch, caplog):
    uri = s3.put("x.h5ad", b"data")
    with s3.server.checking_credentials():
        with pytest.raises(RemoteError, match=r"access refused by http://127.0.0.1.*check AWS_ACCESS_KEY_ID") as caught:
            localise(uri)
        workspace = Workspace(f"{s3.uri}/w")
        with pytest.raises(RemoteError, match="access refused"):  # not taken for an artefact that is not there
            find_artefact(workspace, "preprocess", "k")
        with pytest.raises(RemoteError, match="access refused"):
            workspace.check_writable()
    assert "AKIATEST" not in str(caught.value) and "very-secret" not in str(caught.value) + caplog.text
    assert "retry" not in caplog.text  # trying again would not help


def test_no_credentials_are_named(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(RemoteError, match=r"no usable credentials were found .*set AWS_ACCESS_KEY_ID"):
        localise(f"{s3.uri}/x.h5ad")


def test_a_server_that_does_not_answer_is_named(s3, monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("BMFM_RETRIES", "2")
    with pytest.raises(RemoteError, match=rf"http://127.0.0.1:{port} could not be reached.* in 3 attempts"):
        localise(f"{s3.uri}/x.h5ad")
    assert caplog.text.count("; retry ") == 2
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:very-secret@127.0.0.1:{port}")
    with pytest.raises(RemoteError) as caught:
        localise(f"{s3.uri}/x.h5ad")
    assert "very-secret" not in f"{caught.value} {caught.value.__cause__} {caplog.text}"
    monkeypatch.setenv("BMFM_RETRIES", "often")
    with pytest.raises(ConfigError, match="BMFM_RETRIES must be a whole number"):
        localise(f"{s3.uri}/x.h5ad")


def test_content_is_told_by_etag_and_size(s3):
    one = content_hash(s3.put("a.h5ad", b"same"))
    assert one == content_hash(s3.put("b.h5ad", b"same")) != content_hash(s3.put("a.h5ad", b"other"))
    s3.put("folder/a", b"1")
    folder = content_hash(f"{s3.uri}/folder")
    s3.put("folder/b", b"2")
    assert content_hash(f"{s3.uri}/folder") != folder


def test_etags_of_uploads_in_parts_are_understood(s3, tmp_path):
    body = noise(11 << 20)
    (tmp_path / "x.bin").write_bytes(body)
    upload = s3.client.create_multipart_upload(Bucket=s3.name, Key="x.bin")
    where = {"Bucket": s3.name, "Key": "x.bin", "UploadId": upload["UploadId"]}
    parts = []
    for number in (1, 2, 3):
        piece = body[(number - 1) * (5 << 20) : number * (5 << 20)]
        answer = s3.client.upload_part(**where, PartNumber=number, Body=piece)
        parts.append({"ETag": answer["ETag"], "PartNumber": number})
    s3.client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
    etag = remote.describe(f"{s3.uri}/x.bin").etag
    assert etag.endswith("-3") and transfer.etag_fits(tmp_path / "x.bin", etag) is True
    assert transfer.etag_fits(tmp_path / "x.bin", hashlib.md5(body).hexdigest()) is True
    assert transfer.etag_fits(tmp_path / "x.bin", "0" * 32) is False
    assert transfer.etag_fits(tmp_path / "x.bin", "0" * 32 + "-3") is None
    assert transfer.etag_fits(tmp_path / "x.bin", "no-hash") is None


def test_copies_are_placed_whole_and_never_over_something_else(s3, tmp_path):
    file = tmp_path / "label_dict.json"
    file.write_text("{}")
    for target in (f"{s3.uri}/places/label_dict.json", str(tmp_path / "places" / "label_dict.json")):
        file.write_text("{}")
        assert place_copy(file, target) is True
        assert place_copy(file, target) is False
        file.write_text("[]")
        with pytest.raises(StorageError, match=r"label_dict.json: exists with other content and is not overwritten"):
            place_copy(file, target)
    assert s3.get("places/label_dict.json") == b"{}"
    with pytest.raises(FileExistsError):  # also when it came between the look and the upload
        remote.upload(file, f"{s3.uri}/places/label_dict.json", new=True)


def test_names_that_lead_out_of_the_cache_are_refused(s3, monkeypatch):
    uri = s3.put("folder/x", b"")
    monkeypatch.setattr(
        cache, "objects_at", lambda uri: [remote.RemoteObject("../../evil", 1, "e", f"{uri}/../../evil")]
    )
    with pytest.raises(StorageError, match=r"holds '../../evil', which is no name for a file"):
        localise(uri)


def test_a_cache_that_cannot_be_written_names_what_to_set(s3, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BMFM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"not writable .*choose another place with BMFM_CACHE_DIR"):
        localise(s3.put("x", b"1"))


def _publish(workspace: Workspace, files: dict[str, bytes], key: str = "k1"):
    staging = workspace.run_dir(key) / "artefact"
    for name, body in files.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(body)
    return publish(staging, workspace, "preprocess", key, inputs={}, config={"a": 1}, code_version="c")


@pytest.fixture
def remote_workspace(s3, monkeypatch, tmp_path) -> Workspace:
    monkeypatch.setenv("BMFM_STATE", str(tmp_path / "state"))
    return Workspace(f"{s3.uri}/w")


def test_an_artefact_goes_from_one_machine_to_another(s3, remote_workspace, monkeypatch, tmp_path):
    files = {"processed.h5ad": noise(3 * PART), "sub/a.json": b"{}"}
    made = _publish(remote_workspace, files)
    with Proxy(s3.server) as proxy:
        s3.through(proxy)
        assert (made.local() / "processed.h5ad").read_bytes() == files["processed.h5ad"]
        assert proxy.passed < PART  # what was uploaded is not fetched again
    s3.directly()
    other_machine(monkeypatch, tmp_path / "elsewhere")
    found = find_artefact(remote_workspace, "preprocess", "k1")
    assert found.hash == made.hash and [one.key for one in list_artefacts(remote_workspace, "preprocess")] == ["k1"]
    folder = found.local()
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert folder.is_relative_to(tmp_path / "elsewhere") and (folder / "artefact.json").exists()
    assert _publish(remote_workspace, {"processed.h5ad": b"slower"}).hash == made.hash  # the first one wins
    assert s3.get("w/artefacts/preprocess/k1/processed.h5ad") == files["processed.h5ad"]


def test_half_an_artefact_is_never_seen(s3, remote_workspace, monkeypatch):
    monkeypatch.setenv("BMFM_RETRIES", "0")
    put, names = remote.upload, []

    def break_off(source, uri, **how):
        names.append(Path(uri).name)
        if len(names) == 2:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        put(source, uri, **how)

    monkeypatch.setattr(remote, "upload", break_off)
    with pytest.raises(RemoteError, match="could not be reached"):
        _publish(remote_workspace, {"a": b"1", "b": b"2"})
    s3.directly()
    assert s3.keys() == ["w/artefacts/preprocess/k1/a"]
    assert find_artefact(remote_workspace, "preprocess", "k1") is None
    with pytest.raises(StorageError, match="not an artefact"):
        load_artefact(remote_workspace.artefact_uri("preprocess", "k1"))
    _publish(remote_workspace, {"a": b"1", "b": b"2"})
    assert names[-3:] == ["a", "b", "artefact.json"]


def test_a_damaged_artefact_is_found_out_and_replaced(s3, remote_workspace, monkeypatch, tmp_path):
    key = "w/artefacts/preprocess/k1/a"
    for damage in ("same size", "gone", "manifest"):
        _publish(remote_workspace, {"a": b"right", "b": b""})
        other_machine(monkeypatch, tmp_path / damage)
        if damage == "gone":
            s3.client.delete_object(Bucket=s3.name, Key=key)
        elif damage == "manifest":
            s3.put("w/artefacts/preprocess/k1/artefact.json", b"{")
        else:
            s3.put(key, b"wrong")
        assert find_artefact(remote_workspace, "preprocess", "k1") is None, damage
        with pytest.raises(StorageError, match=r"damaged|manifest"):
            localise(remote_workspace.artefact_uri("preprocess", "k1"))
    _publish(remote_workspace, {"a": b"right", "b": b""})
    assert (find_artefact(remote_workspace, "preprocess", "k1").local() / "a").read_bytes() == b"right"


def test_an_artefact_that_was_copied_by_other_means_is_valid(s3, remote_workspace):
    _publish(remote_workspace, {"a": b"right"})
    manifest = json.loads(s3.get("w/artefacts/preprocess/k1/artefact.json"))
    manifest["files"]["a"]["etag"] = "another server's"
    s3.put("w/artefacts/preprocess/k1/artefact.json", json.dumps(manifest).encode())
    assert find_artefact(remote_workspace, "preprocess", "k1") is not None
