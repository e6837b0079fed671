"""Second formulations, one file a system: slow, loop-written, from the specification alone; they import torch only."""
