from __future__ import annotations

import sys
from pathlib import Path

# the benchmarks are a package of the repository, not of the wheel
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
