"""Who started a run, as records name it."""

from types import SimpleNamespace

import pytest

from flows.triggers import in_words


@pytest.mark.parametrize(
    ("run", "deployment", "words"),
    [
        ({"auto_scheduled": True}, "cells", "schedule of reevaluate/cells"),
        ({"by": ("SCHEDULE", "Interval")}, "cells", "schedule of reevaluate/cells"),
        ({"by": ("AUTOMATION", "tell me")}, "cells", "automation (tell me)"),
        ({"parent": "1"}, None, "another flow, as part of reevaluate"),
        ({"by": ("USER", "ada")}, "cells", "person (ada), by hand at reevaluate/cells"),
        ({}, "cells", "person, by hand at reevaluate/cells"),
    ],
)
def test_a_trigger_is_named_in_words(run, deployment, words):
    by = run.get("by")
    found = SimpleNamespace(
        auto_scheduled=run.get("auto_scheduled", False),
        parent_task_run_id=run.get("parent"),
        created_by=SimpleNamespace(type=by[0], display_value=by[1]) if by else None,
    )
    assert in_words(found, "reevaluate", deployment) == words
