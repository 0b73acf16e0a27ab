"""Import hooks that let stock MMDetection run next to mmkd.

Two modules get what they lack, at the moment somebody imports them:

- ``mmcv._ext``, mmcv's compiled operators: where no compiled extension
  exists, :mod:`mmkd.compat.ops` takes its place. One that exists is loaded
  untouched.
- ``mmengine.config.utils``: its table of packages learns that configs can be
  named ``mmkd::folder/file.py``.

MMDetection's own ``tools/train.py`` needs both before it has read a config
that could import mmkd. So an installed mmkd ships this file a second time, as
the top-level module ``_mmkd_finder``, and a ``.pth`` file that calls
:func:`install` when the interpreter starts. That is why nothing but ``os`` and
``sys``, which are loaded by then, is imported up here; even ``__future__``
would be a file to read.
"""

import os
import sys

EXTENSION = 'mmcv._ext'
CONFIG_UTILS = 'mmengine.config.utils'

_HERE = os.path.dirname(os.path.abspath(__file__))
# The first is the copy inside the package, the second the top-level one.
_OPERATORS = (
    os.path.join(_HERE, 'ops'),
    os.path.join(_HERE, 'mmkd', 'compat', 'ops'),
)


class Finder:
    """Stands first on ``sys.meta_path``, speaks up for two names only."""

    serves = 'mmkd'
    origin = _HERE

    def find_spec(self, name, path=None, target=None):
        """Spec of one of the two modules, else None."""
        if name == EXTENSION:
            spec = self._ordinary(name, path, target)
            return _operators() if spec is None else spec
        if name == CONFIG_UTILS:
            spec = self._ordinary(name, path, target)
            return spec if spec is None else _with_our_configs(spec)
        return None

    def _ordinary(self, name, path, target):
        """What the import system would find without this finder."""
        for finder in sys.meta_path:
            find_spec = getattr(finder, 'find_spec', None)
            if finder is self or find_spec is None:
                continue
            spec = find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


def _operators():
    """Spec that runs mmkd's operators under the name ``mmcv._ext``.

    The files are executed directly: importing them as ``mmkd.compat.ops``
    would import mmkd, and so mmdet, from within the import of ``mmcv.ops``.
    """
    from importlib.util import spec_from_file_location

    for folder in _OPERATORS:
        file = os.path.join(folder, '__init__.py')
        if os.path.isfile(file):
            return spec_from_file_location(
                EXTENSION, file, submodule_search_locations=[folder]
            )
    return None


def _with_our_configs(spec):
    """The same spec, whose module knows mmkd once it has run."""
    loader = spec.loader
    run = loader.exec_module

    def exec_module(module):
        run(module)
        register_configs(module)

    loader.exec_module = exec_module
    return spec


def register_configs(utils) -> None:
    """Let ``mmkd::folder/file.py`` name a config.

    mmengine looks for ``.mim/configs`` beside the file of the module whose
    name stands in its table. ``mmkd`` itself would not do: in an editable
    installation mmengine takes a distribution of this name to lie in
    site-packages.

    Args:
        utils: The module ``mmengine.config.utils``.
    """
    table = getattr(utils, 'MODULE2PACKAGE', None)
    if table is not None:
        table.setdefault('mmkd', 'mmkd.version')


def install() -> None:
    """Put the finder in place; a second call changes nothing."""
    ours = [f for f in sys.meta_path if getattr(f, 'serves', '') == 'mmkd']
    # A clone on the path of an interpreter with an installed mmkd must use
    # its own operators, so a finder from elsewhere gives way.
    for finder in ours:
        if finder.origin != _HERE:
            sys.meta_path.remove(finder)
    if not any(finder.origin == _HERE for finder in ours):
        sys.meta_path.insert(0, Finder())
    if CONFIG_UTILS in sys.modules:
        register_configs(sys.modules[CONFIG_UTILS])
