"""The catalogue: 144 published systems and the baselines as data; lists, loading and creation of parts.

Nothing here imports torch until a part is loaded.
"""

from tevo.catalogue.create import Part, create, load, parse_part
from tevo.catalogue.rows import Row, find, list_systems, rows, suggest

__all__ = ["Part", "Row", "create", "find", "list_systems", "load", "parse_part", "rows", "suggest"]
