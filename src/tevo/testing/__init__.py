"""The conformance checks, public: what a part's card claims, asked of its code."""

# each adds its checks
from tevo.testing import declared as declared
from tevo.testing import inference as inference
from tevo.testing import interface as interface
from tevo.testing import mathematics as mathematics
from tevo.testing import numerics as numerics
from tevo.testing import objectives as objectives
from tevo.testing import seams as seams
from tevo.testing import systems as systems
from tevo.testing.checks import CHECKS, Check, applicable
from tevo.testing.subject import SeatedObjective, Subject, subjects
from tevo.testing.tolerances import RUNGS, relative_rms

__all__ = ["CHECKS", "RUNGS", "Check", "SeatedObjective", "Subject", "applicable", "relative_rms", "subjects"]
