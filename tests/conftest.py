from __future__ import annotations

from hypothesis import settings

# the same cases at every commit; no time limit for one of them, since tests share their machine
settings.register_profile("commit", deadline=None, derandomize=True)
settings.load_profile("commit")
