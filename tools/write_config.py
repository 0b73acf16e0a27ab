"""A config for your data: ``python tools/write_config.py --help``."""

import sys
from pathlib import Path

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmkd.own_config import main

if __name__ == '__main__':
    sys.exit(main())
