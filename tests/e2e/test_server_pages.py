"""What a person sees and clicks on Prefect's pages, in a real browser: the form of a deployment, a run, its tables."""

import contextlib
import shutil
import time
from pathlib import Path

import pytest

DRIVER = shutil.which("chromedriver")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (DRIVER and CHROMIUM),
        reason="no Chromium with chromedriver; install both with `apt-get install chromium chromium-driver`",
    ),
]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1400,2400"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory, server):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    # In the environment of the server's machine, so that nothing of it can be left behind.
    service = webdriver.ChromeService(DRIVER, env=server.machine.environment)
    opened = webdriver.Chrome(options=options, service=service)
    try:
        yield opened
    finally:
        opened.quit()


def text_of(browser) -> str:
    return browser.find_element("tag name", "body").text


def click(browser, wait_for, words: str, kind: str = "*") -> None:
    """Click what carries exactly these words."""
    path = f"//{kind}[normalize-space(.)='{words}'][not(.//{kind}[normalize-space(.)='{words}'])]"

    def clicked() -> bool:
        from selenium.common.exceptions import WebDriverException

        for element in browser.find_elements("xpath", path):
            try:
                element.click()
                return True
            except WebDriverException:  # not there yet, or covered
                continue
        return False

    wait_for(clicked, 30, f"'{words}' to click on a page that says:\n{text_of(browser)}")


def input_under(browser, title: str):
    """The input of the form that stands under a title."""
    path = f"(//label[starts-with(normalize-space(.), '{title}')]/following::*[self::input or self::textarea])[1]"
    return browser.find_element("xpath", path)


def form_of(server, browser, wait_for, deployment: str) -> str:
    """Open a deployment's page, press Run, choose a custom run; returns what the form says."""
    found = server.ask(f"deployments/name/{deployment}")
    browser.get(f"{server.page}/deployments/deployment/{found['id']}")
    click(browser, wait_for, "Run", "button")
    click(browser, wait_for, "Custom run")
    wait_for(lambda: "Validate parameters" in text_of(browser), 30, "the form")
    return text_of(browser)


def submit_until(browser, wait_for, started, title: str, value: str):
    """Fill in one input and submit, again where a busy server refused it and the form stayed, until `started` returns something."""
    from selenium.common.exceptions import WebDriverException

    last_press, presses = 0.0, 0

    def pressed_and_started():
        nonlocal last_press, presses
        if found := started():
            return found
        if time.monotonic() - last_press > 15 and presses < 4:
            last_press, presses = time.monotonic(), presses + 1
            with contextlib.suppress(WebDriverException):  # the form is gone: it was taken
                field = input_under(browser, title)
                if field.get_attribute("value") != value:
                    field.clear()
                    field.send_keys(value)
                click(browser, wait_for, "Submit", "button")
        return None

    try:
        return wait_for(pressed_and_started, 75, f"a run with {title} = {value} from the form", every=0.5)
    except BaseException:
        print(f"the page after {presses} presses of Submit:\n{text_of(browser)}")
        raise


@pytest.mark.parametrize(
    ("deployment", "titles"),
    [
        (
            "pretrain/zheng68k",
            ["Pretraining", "Dataset", "Epochs", "Steps", "Batch size", "Learning rate", "Start from"],
        ),
        ("evaluate/zheng68k", ["Evaluation", "Dataset", "Model", "Interval method", "Bootstrap runs", "Controls"]),
        ("pipeline/zheng68k-mini", ["The whole chain", "Dataset", "Label column", "Seed", "One worker per stage"]),
    ],
)
def test_a_form_has_titles_and_descriptions_that_a_person_understands(server, browser, wait_for, deployment, titles):
    shown = form_of(server, browser, wait_for, deployment)
    lines = [line.removesuffix(" (Optional)") for line in shown.splitlines()]
    positions = [lines.index(title) for title in titles]
    assert positions == sorted(positions)
    assert lines.index("Overrides") > positions[-1]
    assert "Empty: the dataset this deployment is named after." in shown
    assert 'Property is type "None"' not in shown
    assert input_under(browser, "Dataset").get_attribute("value") == deployment.split("/")[1]


def test_a_run_started_from_the_form_completes_and_shows_its_tables(server, browser, wait_for):
    form_of(server, browser, wait_for, "preprocess/zheng68k-mini")

    def started() -> list[dict]:
        runs = server.ask("flow_runs/filter", {"flows": {"name": {"any_": ["preprocess"]}}})
        return [run for run in runs if run["parameters"].get("parameters", {}).get("seed") == 77]

    run = submit_until(browser, wait_for, started, "Seed", "77")[0]
    assert server.wait_until_final(run["id"], 180)["state_name"] == "Completed"
    browser.get(f"{server.page}/flow-runs/flow-run/{run['id']}")  # the address that is recorded in MLflow
    name = server.flow_run(run["id"])["name"]
    wait_for(lambda: name in text_of(browser) and "Completed" in text_of(browser), 30, "the page of the run")
    wait_for(lambda: "preprocess: transform" in text_of(browser), 30, "the tasks of the run")
    click(browser, wait_for, "Artifacts")
    wait_for(lambda: "preprocess-split" in text_of(browser).lower(), 30, "the tables of the run")
    assert list(Path(server.machine.workspace / "artefacts" / "preprocess").glob(f"{name.rsplit('-', 1)[1]}*"))
