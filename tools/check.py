"""Is a training worth to begin? ``python tools/check.py CONFIG [--help]``."""

import sys
from pathlib import Path

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmkd.cli import run_check

if __name__ == '__main__':
    sys.exit(run_check())
