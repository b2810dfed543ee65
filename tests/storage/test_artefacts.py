"""Publishing is atomic, keys are content, damage is found, and a full or closed disk is said in words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import (
    ContentMemo,
    Workspace,
    content_hash,
    exclusive,
    find_artefact,
    hash_json,
    list_artefacts,
    publish,
    strip_userinfo,
)
from bmfm_pipeline.storage.code import code_version, transitive_imports
from bmfm_pipeline.storage.files import disk_errors


def _publish(workspace: Workspace, key: str = "k1", text: str = "hello"):
    staging = workspace.run_dir(key) / "artefact"
    (staging / "sub").mkdir(parents=True)
    (staging / "a.txt").write_text(text)
    (staging / "sub" / "b.bin").write_bytes(bytes(1000))
    return publish(
        staging,
        workspace,
        "preprocess",
        key,
        inputs={"source": {"id": "x"}},
        config={"a": 1},
        code_version="c",
        summary={"name": "n"},
    )


def test_a_published_artefact_is_found_with_its_manifest(tmp_path):
    workspace = Workspace(tmp_path / "w")
    artefact = _publish(workspace)
    found = find_artefact(workspace, "preprocess", "k1")
    assert found is not None
    assert found.hash == artefact.hash
    assert set(found.files) == {"a.txt", "sub/b.bin"}
    manifest = json.loads((Path(artefact.uri) / "artefact.json").read_text())
    assert manifest["config"] == {"a": 1} and manifest["stage"] == "preprocess"
    assert not (workspace.run_dir("k1") / "artefact").exists()
    assert [entry.key for entry in list_artefacts(workspace, "preprocess")] == ["k1"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_a_damaged_artefact_is_not_found_and_is_replaced_by_a_new_one(tmp_path, damage):
    workspace = Workspace(tmp_path / "w")
    folder = Path(_publish(workspace).uri)
    if damage == "truncate":
        (folder / "sub" / "b.bin").write_bytes(b"")
    elif damage == "flip":
        (folder / "sub" / "b.bin").write_bytes(b"x" + bytes(999))
    elif damage == "delete":
        (folder / "a.txt").unlink()
    else:
        (folder / "artefact.json").write_text("{")
    assert find_artefact(workspace, "preprocess", "k1") is None
    _publish(workspace)
    assert find_artefact(workspace, "preprocess", "k1") is not None


def test_the_first_of_two_publishers_wins(tmp_path):
    workspace = Workspace(tmp_path / "w")
    first = _publish(workspace, text="first")
    second = _publish(workspace, text="second")
    assert second.hash == first.hash
    assert (Path(first.uri) / "a.txt").read_text() == "first"


def test_a_remote_workspace_publishes_the_manifest_last(tmp_path, monkeypatch):
    monkeypatch.setenv("BMFM_STATE", str(tmp_path / "state"))
    workspace = Workspace("memory://bucket/w")
    artefact = _publish(workspace, key="remote")
    assert find_artefact(workspace, "preprocess", "remote").hash == artefact.hash
    import fsspec

    fsspec.filesystem("memory").rm("/bucket/w/artefacts/preprocess/remote/artefact.json")
    assert find_artefact(workspace, "preprocess", "remote") is None


def test_permission_errors_name_the_path(tmp_path):
    with pytest.raises(StorageError, match=r"somewhere.*not writable"), disk_errors("somewhere"):
        raise PermissionError(13, "Permission denied")


def test_a_workspace_that_cannot_be_made_is_refused_before_work(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="not writable"):
        Workspace(tmp_path / "file" / "workspace").check_writable()


def test_the_state_lies_beside_a_local_workspace_unless_told_otherwise(tmp_path, monkeypatch):
    assert Workspace(tmp_path / "w").state_dir == tmp_path / "w.state"
    monkeypatch.setenv("BMFM_STATE", str(tmp_path / "elsewhere"))
    assert Workspace(tmp_path / "w").state_dir == tmp_path / "elsewhere"


def test_a_content_hash_follows_the_bytes_and_not_the_path(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("same")
    memo = ContentMemo(tmp_path / "memo.sqlite")
    assert content_hash(tmp_path / "a", memo) == content_hash(tmp_path / "b", memo)
    (tmp_path / "b" / "x.txt").write_text("diff")
    assert content_hash(tmp_path / "a", memo) != content_hash(tmp_path / "b", memo)


def test_a_remembered_hash_is_dropped_when_the_file_changes(tmp_path):
    memo = ContentMemo(tmp_path / "memo.sqlite")
    file = tmp_path / "x"
    file.write_bytes(b"1" * 10)
    first = content_hash(file, memo)
    stat = file.stat()
    file.write_bytes(b"2" * 10)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert content_hash(file, memo) != first


def test_small_files_are_read_and_remembered_only_among_many(tmp_path):
    place, file = tmp_path / "memo.sqlite", tmp_path / "x"
    file.write_bytes(b"1" * 10)
    first = content_hash(file, ContentMemo(place))
    assert not place.exists()
    with ContentMemo(place).for_many() as memo:
        assert content_hash(file, memo) == first
    stat = file.stat()
    file.write_bytes(b"2" * 10)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk that changes bytes and not their date
    second = ContentMemo(place).hash_anew(file)
    with ContentMemo(place).for_many() as memo:
        assert content_hash(file, memo) == second != first


def test_many_hashes_are_remembered_without_keeping_others_from_the_memo(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).write_text(name * 2**20)
    place = tmp_path / "memo.sqlite"
    with pytest.raises(KeyboardInterrupt), ContentMemo(place).for_many() as memo:
        found = [content_hash(tmp_path / name, memo) for name in "ab"]
        other = ContentMemo(place)
        other.hash_file(tmp_path / "c")  # another process writes meanwhile
        with monkeypatch.context() as patch:
            patch.setattr("bmfm_pipeline.storage.hashing.hash_file", None)
            assert other.hash_file(tmp_path / "c")
        raise KeyboardInterrupt
    monkeypatch.setattr("bmfm_pipeline.storage.hashing.hash_file", None)  # nothing is read again
    assert [content_hash(tmp_path / name, ContentMemo(place)) for name in "ab"] == found


def test_a_missing_input_is_an_error_that_names_it(tmp_path):
    with pytest.raises(StorageError, match=r"nowhere\.h5ad: does not exist"):
        content_hash(tmp_path / "nowhere.h5ad")


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_the_hash_of_a_value_ignores_key_order(value):
    assert hash_json(value) == hash_json(dict(reversed(list(value.items()))))


def test_passwords_in_addresses_are_stripped():
    assert strip_userinfo("https://me:secret@host:5000/x") == "https://host:5000/x"
    assert strip_userinfo("/plain/p@th") == "/plain/p@th"


def test_a_lock_keeps_a_second_process_waiting_until_the_first_dies(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from bmfm_pipeline.storage import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        waited = []

        def kill(message):
            waited.append(message)
            holder.kill()

        with exclusive(tmp_path, on_wait=kill):
            pass
        assert waited and str(tmp_path) in waited[0]
    finally:
        holder.kill()
        holder.communicate()


def test_code_version_follows_lazy_and_transitive_imports():
    modules = transitive_imports("bmfm_pipeline.storage.artefact")
    assert "bmfm_pipeline.storage.hashing" in modules and "bmfm_pipeline.errors" in modules
    assert "bmfm_pipeline.cli" not in modules
    assert code_version("bmfm_pipeline.storage.artefact") != code_version("bmfm_pipeline.storage.locks")
