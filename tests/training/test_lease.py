"""One trainer at a time on a folder: refused while another lives, taken over when it is dead, fenced off when it comes back."""

import json
import os
import subprocess
import sys
import time

import pytest

from bmfm_pipeline.errors import TrainingError
from bmfm_pipeline.storage.holders import EXPIRES_AFTER
from bmfm_pipeline.training.lease import acquire


def held_by(folder, **changes) -> None:
    file = folder / "lease.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_second_trainer_is_refused_and_told_who_is_there(tmp_path):
    acquire(tmp_path)
    with pytest.raises(TrainingError, match=f"process {os.getpid()} on .* is training here; wait for it"):
        acquire(tmp_path)


def test_a_released_lease_can_be_taken_and_its_number_grows(tmp_path):
    first = acquire(tmp_path)
    first.release()
    assert acquire(tmp_path).number == first.number + 1


def test_the_lease_of_a_dead_process_is_taken_over(tmp_path):
    script = (
        f"from pathlib import Path; from bmfm_pipeline.training.lease import acquire; acquire(Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert acquire(tmp_path).number == 2


def test_a_later_process_with_the_same_number_is_not_the_holder(tmp_path):
    acquire(tmp_path)
    held_by(tmp_path, started="1")  # in a container every first process has the same number
    assert acquire(tmp_path).number == 2
    held_by(tmp_path, boot="another start of the machine")
    assert acquire(tmp_path).number == 3


def test_a_holder_on_another_machine_is_believed_until_it_has_been_silent_for_long(tmp_path):
    acquire(tmp_path)
    held_by(tmp_path, host="elsewhere")
    with pytest.raises(TrainingError, match="on elsewhere is training here"):
        acquire(tmp_path)
    long_ago = time.time() - EXPIRES_AFTER - 1
    os.utime(tmp_path / "lease.json", (long_ago, long_ago))
    assert acquire(tmp_path).number == 2


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_machine_whose_clock_is_wrong_by_hours_judges_a_lease_by_the_clock_of_the_disk(tmp_path, monkeypatch, hours):
    acquire(tmp_path)
    held_by(tmp_path, host="elsewhere")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + hours * 3600)
    with pytest.raises(TrainingError, match="on elsewhere is training here"):
        acquire(tmp_path)
    long_ago = now() - EXPIRES_AFTER - 1
    os.utime(tmp_path / "lease.json", (long_ago, long_ago))
    assert acquire(tmp_path).number == 2


def test_who_has_patience_waits_for_a_holder_that_leaves_and_says_so_once(tmp_path):
    first, told = acquire(tmp_path), []

    def tell(text):
        told.append(text)
        first.release()

    assert acquire(tmp_path, patience=60, tell=tell).number == 2
    assert len(told) == 1 and told[0].startswith(f"waiting for process {os.getpid()} on ")


def test_who_is_asked_to_stop_while_waiting_gets_nothing(tmp_path):
    acquire(tmp_path)
    asked = iter([False, True])
    assert acquire(tmp_path, patience=60, tell=lambda text: None, stopped=lambda: next(asked)) is None


def test_a_silent_holder_on_another_machine_is_waited_for_beyond_that(tmp_path):
    acquire(tmp_path)
    held_by(tmp_path, host="elsewhere")
    almost = time.time() - EXPIRES_AFTER + 1
    os.utime(tmp_path / "lease.json", (almost, almost))
    assert acquire(tmp_path, patience=0.01, tell=lambda text: None).number == 2


def test_a_trainer_that_lost_the_folder_must_stop(tmp_path):
    first = acquire(tmp_path)
    first.renew()
    held_by(tmp_path, host="elsewhere")
    os.utime(tmp_path / "lease.json", (0, 0))
    second = acquire(tmp_path)
    with pytest.raises(TrainingError, match=f"taken over by process {os.getpid()}"):
        first.renew()
    first.release()  # does not touch what is no longer its own
    second.renew()
    (tmp_path / "lease.json").unlink()
    with pytest.raises(TrainingError, match="deleted while training"):
        second.renew()


def test_of_many_that_come_at_once_one_gets_the_folder(tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom bmfm_pipeline.training.lease import acquire\n"
        "from bmfm_pipeline.errors import TrainingError\n"
        "try:\n    acquire(Path(sys.argv[1]))\n    print('taken', flush=True)\nexcept TrainingError:\n    print('refused', flush=True)\n"
        "sys.stdin.read()\n"
    )
    several = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    try:
        said = [process.stdout.readline().strip() for process in several]
    finally:
        for process in several:
            process.communicate("")
    assert sorted(said) == ["refused", "refused", "refused", "taken"]
