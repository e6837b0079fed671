"""Tasks of long inputs: made texts with exact answers, and questions about real Python modules.

``task("lookup", length=2048)`` makes one by name, as the tasks of the bench are made.
"""

from __future__ import annotations

from tevo.colt5.tasks.code import Code
from tevo.colt5.tasks.contract import LongTask, Oracle, WordTask
from tevo.colt5.tasks.documents import Documents
from tevo.colt5.tasks.lookup import Lookup
from tevo.colt5.tasks.modules import Modules
from tevo.colt5.tasks.passkey import Passkey

__all__ = ["Code", "Documents", "LongTask", "Lookup", "Modules", "Oracle", "Passkey", "WordTask"]
