"""Evaluate a checkpoint: ``python tools/test.py CONFIG CHECKPOINT``.

The config may be the distillation config or the plain student's.
"""

import sys
from pathlib import Path

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmkd.cli import run_test

if __name__ == '__main__':
    sys.exit(run_test())
