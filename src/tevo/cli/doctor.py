"""``tevo doctor``: versions, devices and extras, each with a remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

HELP = "versions, devices, extras, and what to do about what is missing"
EXAMPLES = ("tevo doctor", "tevo doctor --json")

# extra -> the import names that show it is there
EXTRAS = {
    "train": ("accelerate",),
    "report": ("matplotlib", "jinja2", "latex2mathml", "PIL"),
    "tasks": ("scipy", "sklearn"),
    "hf": ("transformers", "tokenizers"),
    "track": ("tensorboard",),
}


def main(argv: list[str]) -> int:
    """Print the state of this machine as far as tevo cares."""
    import json

    from tevo.cli._parser import Parser

    parser = Parser("doctor", "Look at this machine.", EXAMPLES)
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(argv)
    import torch

    from tevo import __version__
    from tevo.catalogue.rows import list_systems

    found: dict[str, object] = {
        "tevo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "verified": sum(row.status == "verified" for row in list_systems()),
        "extras": {name: not missing(name) for name in EXTRAS},
        "compiler": shutil.which("g++") or shutil.which("c++"),
    }
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    for name in ("tevo", "python", "torch", "numpy", "cores", "threads"):
        print(f"{name:<10} {found[name]}")
    print(f"{'device':<10} {found['cuda'] or 'CPU (no CUDA device visible to torch)'}")
    print(f"{'systems':<10} {found['verified']} of {len(list_systems())} verified")
    print(f"{'compiler':<10} {found['compiler'] or 'none: torch.compile needs g++ on this machine'}")
    for name in EXTRAS:
        lacking = missing(name)
        remedy = f"missing {', '.join(lacking)}: pip install -e '.[{name}]'" if lacking else "there"
        print(f"extra {name:<10} {remedy}")
    return 0


def missing(extra: str) -> list[str]:
    """What of an extra cannot be imported."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
