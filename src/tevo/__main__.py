"""``python -m tevo``."""

from tevo.cli import main

raise SystemExit(main())
