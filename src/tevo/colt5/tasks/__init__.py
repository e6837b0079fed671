"""Tasks of long inputs: made texts with exact answers, and questions about real Python modules.

Associative recall is :class:`Lookup` with ``hops=1``; copying and sorting are :class:`Rearrange`.
"""

from __future__ import annotations

from tevo.colt5.tasks.code import Code
from tevo.colt5.tasks.contract import LongTask, Oracle, WordTask
from tevo.colt5.tasks.documents import Documents
from tevo.colt5.tasks.listops import ListOps
from tevo.colt5.tasks.lookup import Lookup
from tevo.colt5.tasks.modules import Modules
from tevo.colt5.tasks.passkey import Passkey
from tevo.colt5.tasks.rearrange import Rearrange

__all__ = [
    "Code",
    "Documents",
    "ListOps",
    "LongTask",
    "Lookup",
    "Modules",
    "Oracle",
    "Passkey",
    "Rearrange",
    "WordTask",
]
