"""A stage whose workspace is on an S3 server that refuses, dawdles and comes back."""

from pathlib import Path

import pytest
from faulty_s3 import FaultyS3
from running_stages import content

from bmfm_pipeline.storage import Workspace, find_artefact

pytestmark = pytest.mark.slow


@pytest.fixture
def here(s3, tmp_path, monkeypatch) -> dict[str, str]:
    """The environment of this machine; its copies of remote files are kept apart from those of the tests."""
    monkeypatch.setenv("BMFM_STATE", str(tmp_path / "state"))
    return {**s3.environment, "BMFM_STATE": str(tmp_path / "state"), "BMFM_CACHE_DIR": str(tmp_path / "its-cache")}


def test_errors_and_slow_answers_now_and_then_are_waited_out(stages, undisturbed, s3, here):
    uri = f"{s3.uri}/w"
    with FaultyS3(s3.server, lambda number: {0: 500, 5: 503}.get(number % 10), pause=0.02) as proxy:
        made = stages.run(uri, **{**here, "AWS_ENDPOINT_URL_S3": proxy.endpoint})
    assert made.made["cached"] is False
    assert proxy.refused >= 4 and made.log.count("; retry 1 of") == proxy.refused
    found = find_artefact(Workspace(uri), "preprocess", Path(undisturbed["uri"]).name)
    assert content(found.local()) == content(undisturbed["uri"])


def test_a_server_that_is_away_ends_the_stage_in_words_and_when_it_is_back_the_next_run_publishes(
    stages, undisturbed, s3, here
):
    uri, key = f"{s3.uri}/w", Path(undisturbed["uri"]).name
    with FaultyS3(s3.server) as proxy:

        def away_while_files_arrive(number: int) -> int | None:
            return 500 if len(s3.keys()) > 3 else None

        proxy.answer, there = (
            away_while_files_arrive,
            {**here, "AWS_ENDPOINT_URL_S3": proxy.endpoint, "BMFM_RETRIES": "1"},
        )
        broken = stages.run(uri, **there)
        assert broken.result is None and "could not be reached, or broke off, in 2 attempts" in broken.log
        assert "run the same command again" in broken.log
        assert find_artefact(Workspace(uri), "preprocess", key) is None
        refused = stages.run(uri, **there)  # what cannot be seen is not taken for absent
        assert refused.result is None and "could not be reached" in refused.log
        proxy.answer = lambda number: None
        assert stages.run(uri, **there).made["cached"] is False
        assert stages.run(uri, **there).made["cached"] is True
    assert content(find_artefact(Workspace(uri), "preprocess", key).local()) == content(undisturbed["uri"])
