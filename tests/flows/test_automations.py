"""Which automations the catalogue asks for, and what `bmfm deploy` says where it cannot begin."""

import json

import pytest

from bmfm_pipeline import cli
from bmfm_pipeline.config.catalogue import DatasetEntry
from bmfm_pipeline.errors import ConfigError, PipelineError
from flows import automations
from flows.automations import CRASH, NOTIFY, RUN

LAB = {"name": "lab", "title": "cells of our own", "source": {"file": "lab.h5ad"}, "transforms": []}
NAMES = ["finetune/lab", "evaluate/lab", "finetune/other"]


def wanted(deployed: bool = True, **chosen):
    entry = DatasetEntry.model_validate({**LAB, "deployed": deployed, "automations": chosen})
    return automations.automations([entry], NAMES)


def test_unless_the_yaml_says_so_a_server_only_ends_runs_whose_process_is_gone():
    (only,) = wanted()
    assert (only.action, only.silence) == (CRASH, 1200)
    assert only.silence > 5 * 180  # a run tells every three minutes that it lives


def test_outcomes_of_a_re_evaluation_start_a_fine_tuning_of_that_dataset():
    _, made = wanted(finetune_on=["regressed", "drifted"])
    assert (made.action, made.deployment, made.resource) == (RUN, "finetune/lab", "bmfm.dataset.lab")
    assert made.events == ("bmfm.reevaluate.drifted", "bmfm.reevaluate.regressed")


def test_outcomes_and_failed_runs_are_told_apart():
    _, outcome, failure = wanted(notify_on=["failed", "improved"], webhook_env="LAB_HOOK")
    assert (outcome.action, outcome.events, outcome.runs_of) == (NOTIFY, ("bmfm.reevaluate.improved",), ())
    assert failure.runs_of == ("finetune/lab", "evaluate/lab")
    assert outcome.block == failure.block == "bmfm-managed-lab-hook"


def test_only_the_webhooks_of_deployed_datasets_are_asked_for():
    told = DatasetEntry.model_validate({**LAB, "deployed": True, "automations": {"notify_on": ["held"]}})
    silent = DatasetEntry.model_validate({**LAB, "deployed": True})
    assert automations.webhooks([told, silent]) == {"bmfm-managed-bmfm-notify-url": "BMFM_NOTIFY_URL"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"deployed": False, "automations": {"finetune_on": ["regressed"]}},
        {"deployed": True, "automations": {"finetune_on": ["held"]}},
        {"deployed": True, "automations": {"webhook_env": "https://example.org/secret"}},
        {"deployed": True, "automations": {"notify": ["held"]}},
    ],
    ids=["nothing is deployed", "no such outcome", "an address for a name", "unknown key"],
)
def test_automations_that_could_never_do_anything_are_refused(wrong):
    with pytest.raises(ValueError, match=r"automations|deployed"):
        DatasetEntry.model_validate(LAB | wrong)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pool", "gpu=docker-swarm"], "write it as --pool NAME=TYPE, TYPE one of process, docker, kubernetes"),
        (["--gpus", "0"], "--gpus 0: must be 1 or more"),
    ],
)
def test_wrong_words_are_refused(words, said, capsys):
    assert cli.main(["deploy", "--json", *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert said in json.loads(printed.out)["error"]


def test_without_a_server_it_says_how_to_start_one(unused_port):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import deploying

    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ConfigError, match="none is named") as none,
    ):
        deploying.deploy()
    address = f"http://127.0.0.1:{unused_port}/api"
    with temporary_settings({PREFECT_API_URL: address}), pytest.raises(PipelineError, match="answers at") as silent:
        deploying.deploy(dry_run=True)
    assert address in str(silent.value)
    for error in (none, silent):
        assert "bmfm ui" in str(error.value) and "export PREFECT_API_URL=" in str(error.value)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
