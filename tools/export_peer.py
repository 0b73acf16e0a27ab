"""Export a student: ``python tools/export_peer.py CHECKPOINT OUT``."""

import sys
from pathlib import Path

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mmkd  # noqa: F401
from mmkd.detectors.peer_ensemble import main

if __name__ == '__main__':
    sys.exit(main())
