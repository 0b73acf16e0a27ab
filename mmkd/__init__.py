"""mmkd: knowledge distillation for MMDetection."""

from mmkd.compat import check_stack, install
from mmkd.version import __version__

check_stack()
install()

from mmkd.compat.checkpoint import allow_checkpoints  # noqa: E402
from mmkd.registry import MODELS  # noqa: E402

allow_checkpoints()
MODELS.import_from_location()

__all__ = ['__version__']
