"""firebuild against its peers and its limits: `python -m benchmarks`, which `make bench` calls."""

import sys
from pathlib import Path

# The servers and tools of the tests are those of the benchmarks.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
