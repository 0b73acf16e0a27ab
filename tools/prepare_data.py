"""Write a data set in COCO's format: ``prepare_data.py trees [--help]``."""

import sys
from pathlib import Path

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmkd.datasets.prepare import main

if __name__ == '__main__':
    sys.exit(main())
