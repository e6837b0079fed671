from __future__ import annotations

from contextlib import suppress

# a GPU machine may lack hypothesis; none of the tests that run there needs it
with suppress(ImportError):
    from hypothesis import settings

    # the same cases at every commit; no time limit for one of them, since tests share their machine
    settings.register_profile("commit", deadline=None, derandomize=True)
    settings.load_profile("commit")
