"""The conformance checks, public: what a part's card claims, asked of its code."""

from tevo.testing import objectives as objectives  # adds the checks of its seat
from tevo.testing.checks import CHECKS, Check, applicable
from tevo.testing.subject import SeatedObjective, Subject, subjects
from tevo.testing.tolerances import RUNGS, relative_rms

__all__ = ["CHECKS", "RUNGS", "Check", "SeatedObjective", "Subject", "applicable", "relative_rms", "subjects"]
