"""The life of a workspace after its artefacts were made: what is there, what is damaged, what may go."""

from bmfm_pipeline.storage.life.collecting import REMOVED, Plan, Removal, carry_out, plan_removals, read_age
from bmfm_pipeline.storage.life.inventory import Inventory, Name, Stored, artefacts_named_in, take_inventory
from bmfm_pipeline.storage.life.scratch import Scratch, scratch_of
from bmfm_pipeline.storage.life.shared import SharedScratch, shared_runs
from bmfm_pipeline.storage.life.verifying import Finding, repair, verify

__all__ = [
    "REMOVED",
    "Finding",
    "Inventory",
    "Name",
    "Plan",
    "Removal",
    "Scratch",
    "SharedScratch",
    "Stored",
    "artefacts_named_in",
    "carry_out",
    "plan_removals",
    "read_age",
    "repair",
    "scratch_of",
    "shared_runs",
    "take_inventory",
    "verify",
]
