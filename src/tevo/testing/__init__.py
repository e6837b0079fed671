"""The conformance checks, public: what a part's card claims, asked of its code."""

# each adds its checks
from tevo.testing import adapters as adapters
from tevo.testing import declared as declared
from tevo.testing import inference as inference
from tevo.testing import interface as interface
from tevo.testing import mathematics as mathematics
from tevo.testing import numerics as numerics
from tevo.testing import objectives as objectives
from tevo.testing import seams as seams
from tevo.testing import systems as systems
from tevo.testing import trainability as trainability
from tevo.testing.checks import CHECKS, GROUPS, Check, applicable
from tevo.testing.report import (
    Report,
    check_block,
    check_channel,
    check_heads,
    check_mixer,
    check_norm,
    check_normaliser,
    check_part,
    check_position,
    check_residual,
    check_stack,
    examine,
    parametrised,
)
from tevo.testing.subject import SeatedObjective, Subject, subjects
from tevo.testing.tolerances import RUNGS, relative_rms
from tevo.testing.user import UserSubject, user_subject

__all__ = [
    "CHECKS",
    "GROUPS",
    "RUNGS",
    "Check",
    "Report",
    "SeatedObjective",
    "Subject",
    "UserSubject",
    "applicable",
    "check_block",
    "check_channel",
    "check_heads",
    "check_mixer",
    "check_norm",
    "check_normaliser",
    "check_part",
    "check_position",
    "check_residual",
    "check_stack",
    "examine",
    "parametrised",
    "relative_rms",
    "subjects",
    "user_subject",
]
