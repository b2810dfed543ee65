"""Downloads against a real web server: resumed, tried again, verified, refused."""

import hashlib
import multiprocessing
import random

import pytest
from web_server import serving

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import downloads
from bmfm_pipeline.storage.downloads import fetch

CONTENT = random.Random(0).randbytes(3_000_000)
SUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(downloads, "BACKOFF", 0.001)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with serving() as made:
        yield made


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_with_its_progress_and_leaves_nothing_beside_it(site, tmp_path):
    seen = []
    url = site.put("/a.bin", CONTENT)
    target = fetch(url, tmp_path / "new" / "a.bin", sha256=SUM.upper(), on_progress=lambda *at: seen.append(at))
    assert target.read_bytes() == CONTENT and left(target.parent) == ["a.bin"]
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)
    assert fetch(url, target, sha256=SUM) == target and len(site.asked) == 1


@pytest.mark.parametrize("validator", [{"ETag": '"v1"'}, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}])
def test_a_cut_connection_goes_on_where_it_was_cut(site, tmp_path, validator):
    url = site.put("/a.bin", CONTENT, cuts=[1_000_000, 500_000], validator=validator)
    assert fetch(url, tmp_path / "a.bin", sha256=SUM).read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_later_call_goes_on_and_a_changed_file_starts_again(site, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "TRIES", 1)
    url = site.put("/a.bin", CONTENT, cuts=[1_000_000])
    with pytest.raises(StorageError, match=r"1,000,000 bytes are kept and will not be fetched twice"):
        fetch(url, tmp_path / "a.bin")
    assert left(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    other = CONTENT[::-1]
    site.put("/a.bin", other, validator={"ETag": '"2"'})
    assert fetch(url, tmp_path / "a.bin").read_bytes() == other
    assert site.asked[-1][1] == "bytes=1000000-" and left(tmp_path) == ["a.bin"]


def test_without_ranges_it_starts_again(site, tmp_path):
    url = site.put("/a.bin", CONTENT, ranges=False, cuts=[1_000_000])
    assert fetch(url, tmp_path / "a.bin", sha256=SUM).read_bytes() == CONTENT


@pytest.mark.parametrize("validator", [{}, {"ETag": 'W/"weak"'}])
def test_pieces_are_not_joined_when_nothing_names_their_version(site, tmp_path, validator):
    url = site.put("/a.bin", CONTENT, validator=validator, cuts=[1_000_000])
    assert fetch(url, tmp_path / "a.bin").read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == [None, None]


def test_pieces_that_do_not_add_up_are_fetched_whole_once_more(site, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1_000_000)
    url = site.put("/a.bin", CONTENT, validator={})
    (tmp_path / "a.bin.part.json").write_text(f'{{"url": "{url}", "validator": null}}')
    assert fetch(url, tmp_path / "a.bin", sha256=SUM).read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == ["bytes=1000000-", None]


def test_a_part_that_is_whole_needs_no_byte_more(site, tmp_path):
    url = site.put("/a.bin", CONTENT)
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    (tmp_path / "a.bin.part.json").write_text(f'{{"url": "{url}", "validator": "\\"1\\""}}')
    assert fetch(url, tmp_path / "a.bin", sha256=SUM).read_bytes() == CONTENT


def test_without_a_length_the_file_arrives_and_its_total_is_unknown(site, tmp_path):
    seen = []
    url = site.put("/a.bin", CONTENT, length=False)
    fetch(url, tmp_path / "a.bin", sha256=SUM, on_progress=lambda *at: seen.append(at))
    assert {total for _, total in seen} == {None} and seen[-1][0] == len(CONTENT)


def test_other_content_is_refused_and_kept_aside(site, tmp_path):
    url = site.put("/a.bin", b"<html>please log in</html>")
    with pytest.raises(StorageError, match="was refused") as caught:
        fetch(url, tmp_path / "a.bin", sha256=SUM)
    said = str(caught.value)
    assert SUM in said and hashlib.sha256(b"<html>please log in</html>").hexdigest() in said
    assert left(tmp_path) == ["a.bin.refused"]
    assert (tmp_path / "a.bin.refused").read_bytes() == b"<html>please log in</html>"


def test_a_target_with_other_content_is_not_overwritten(site, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"mine")
    with pytest.raises(StorageError, match="is there already with other content"):
        fetch(site.put("/a.bin", CONTENT), tmp_path / "a.bin", sha256=SUM)
    assert (tmp_path / "a.bin").read_bytes() == b"mine" and site.asked == []


@pytest.mark.parametrize(("status", "said"), [(404, "there is no such file"), (403, "access is refused")])
def test_an_answer_that_will_not_change_is_not_asked_for_again(site, tmp_path, status, said):
    url = site.put("/a.bin", CONTENT, statuses=[status])
    with pytest.raises(StorageError, match=rf"/a\.bin: HTTP {status} .*{said}"):
        fetch(url, tmp_path / "a.bin")
    assert len(site.asked) == 1 and left(tmp_path) == []


def test_a_server_that_is_busy_is_asked_again_and_one_that_stays_so_is_given_up(site, tmp_path):
    url = site.put("/a.bin", CONTENT, statuses=[503, 429, 500], retry_after="0")
    assert fetch(url, tmp_path / "a.bin", sha256=SUM).read_bytes() == CONTENT
    url = site.put("/b.bin", CONTENT, statuses=[503] * 50)
    with pytest.raises(StorageError, match=r"after 5 tries \(HTTP 503"):
        fetch(url, tmp_path / "b.bin")
    assert [path for path, _ in site.asked].count("/b.bin") == 5


def test_nobody_listens(tmp_path, site, monkeypatch):
    monkeypatch.setattr(downloads, "TRIES", 2)
    with pytest.raises(StorageError, match=r"could not be downloaded after 2 tries .*refused.*check the network"):
        fetch("http://127.0.0.1:9/a.bin", tmp_path / "a.bin")


def test_redirects_are_followed_and_counted(site, tmp_path):
    site.put("/end.bin", CONTENT)
    for step in range(8):
        site.put(f"/{step}", redirect="/end.bin" if step == 0 else f"/{step - 1}")
    assert fetch(f"{site.address}/3", tmp_path / "a.bin", sha256=SUM).read_bytes() == CONTENT
    with pytest.raises(StorageError, match="more than 5 redirects"):
        fetch(f"{site.address}/7", tmp_path / "b.bin")


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://127.0.0.1/a"])
def test_a_redirect_leads_to_the_web_only(site, tmp_path, address):
    with pytest.raises(StorageError, match="which is not followed"):
        fetch(site.put("/a.bin", redirect=address), tmp_path / "a.bin")


def test_only_web_and_file_addresses_are_fetched(tmp_path):
    for address in ("ftp://host/a", "s3://bucket/a", "a.bin"):
        with pytest.raises(StorageError, match="use an address that begins with http, https, file"):
            fetch(address, tmp_path / "a.bin")


def test_a_file_address_is_copied_and_verified(tmp_path):
    source = tmp_path / "with space.bin"
    source.write_bytes(CONTENT)
    assert fetch(source.as_uri(), tmp_path / "a.bin", sha256=SUM).read_bytes() == CONTENT
    with pytest.raises(StorageError, match="no such file"):
        fetch((tmp_path / "none.bin").as_uri(), tmp_path / "b.bin")


def test_a_full_disk_is_known_before_the_first_byte(site, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "ROOM_LEFT", 1 << 60)
    with pytest.raises(StorageError, match=r"needs 3 MiB more, and only [\d,]+ MiB are free"):
        fetch(site.put("/a.bin", CONTENT), tmp_path / "a.bin")
    assert not (tmp_path / "a.bin.part").exists()


def test_a_login_goes_to_the_named_host_and_into_no_message_or_file(site, tmp_path):
    sent = []
    site.put("/a.bin", b"", redirect="/b.bin", before=lambda headers: sent.append(headers.get("Authorization")))
    site.put("/b.bin", CONTENT, statuses=[404], before=lambda headers: sent.append(headers.get("Authorization")))
    with pytest.raises(StorageError) as caught:
        fetch(site.address.replace("//", "//me:secret@") + "/a.bin", tmp_path / "a.bin")
    assert sent == ["Basic bWU6c2VjcmV0", None] and "secret" not in str(caught.value)


def test_the_proxy_of_the_environment_is_asked(site, tmp_path, monkeypatch):
    site.put("http://example.invalid/a.bin", CONTENT)  # a proxy is asked for whole addresses
    monkeypatch.setenv("http_proxy", site.address)
    monkeypatch.setenv("no_proxy", "")
    assert fetch("http://example.invalid/a.bin", tmp_path / "a.bin", sha256=SUM).read_bytes() == CONTENT


def _fetch_to(url, target):
    fetch(url, target, sha256=SUM)


def test_two_processes_download_once(site, tmp_path):
    url = site.put("/a.bin", CONTENT)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fetch_to, args=(url, tmp_path / "a.bin")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(site.asked) == 1 and left(tmp_path) == ["a.bin"]
