"""mmcv's operators for detectors, on torchvision and torch.

``mmcv.ops`` asks ``mmcv._ext``, which has to be compiled, for every operator.
Where it is missing, this package takes its place (see
:mod:`mmkd.compat.finder`): same names, same arguments, results written into
the same buffers, on the CPU and on CUDA alike. torchvision, whose wheels are
compiled for both, does the heavy part.

Half precision is computed in float32 and rounded at the end. An operator that
is not covered can be looked up, since mmcv does so for all of them while it is
imported, and raises when it is called.

Imports in this package are relative: it runs under the name ``mmcv._ext``, and
must not pull in mmkd, which imports mmcv.
"""

from __future__ import annotations

from functools import partial
from typing import NoReturn

from .attention import ms_deform_attn_backward, ms_deform_attn_forward
from .boxes import bbox_overlaps, nms, nms_match, softnms
from .convolution import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    masked_col2im_forward,
    masked_im2col_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)
from .focal import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from .pooling import (
    border_align_backward,
    border_align_forward,
    deform_roi_pool_backward,
    deform_roi_pool_forward,
    roi_align_backward,
    roi_align_forward,
    roi_pool_backward,
    roi_pool_forward,
)
from .sync_bn import (
    sync_bn_backward_data,
    sync_bn_backward_param,
    sync_bn_forward_mean,
    sync_bn_forward_output,
    sync_bn_forward_var,
)
from .upsampling import (
    carafe_backward,
    carafe_forward,
    carafe_naive_backward,
    carafe_naive_forward,
)

__all__ = [
    'bbox_overlaps',
    'border_align_backward',
    'border_align_forward',
    'carafe_backward',
    'carafe_forward',
    'carafe_naive_backward',
    'carafe_naive_forward',
    'deform_conv_backward_input',
    'deform_conv_backward_parameters',
    'deform_conv_forward',
    'deform_roi_pool_backward',
    'deform_roi_pool_forward',
    'get_compiler_version',
    'get_compiling_cuda_version',
    'masked_col2im_forward',
    'masked_im2col_forward',
    'modulated_deform_conv_backward',
    'modulated_deform_conv_forward',
    'ms_deform_attn_backward',
    'ms_deform_attn_forward',
    'nms',
    'nms_match',
    'roi_align_backward',
    'roi_align_forward',
    'roi_pool_backward',
    'roi_pool_forward',
    'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward',
    'softmax_focal_loss_backward',
    'softmax_focal_loss_forward',
    'softnms',
    'sync_bn_backward_data',
    'sync_bn_backward_param',
    'sync_bn_forward_mean',
    'sync_bn_forward_output',
    'sync_bn_forward_var',
]


def get_compiler_version() -> str:
    """What ``mmcv.utils.collect_env`` prints as mmcv's compiler."""
    return "n/a (mmkd runs mmcv's operators on torchvision)"


def get_compiling_cuda_version() -> str:
    """What ``mmcv.utils.collect_env`` prints as mmcv's CUDA compiler."""
    return 'not available'


def _not_covered(name: str, *args: object, **kwargs: object) -> NoReturn:
    raise NotImplementedError(
        f"mmcv's operator '{name}' needs a compiled mmcv. This one is not "
        'compiled, and mmkd, which runs the operators of detectors on '
        f"torchvision in its place, does not cover '{name}'. Build mmcv with "
        'its operators: pip uninstall -y mmcv-lite && MMCV_WITH_OPS=1 pip '
        'install --no-build-isolation --no-cache-dir mmcv==2.1.0 (needs a '
        'C++17 compiler and a torch whose headers it can compile), or take a '
        'prebuilt wheel: pip install openmim && mim install '
        '"mmcv>=2.0.0,<2.2.0". For the onedl stack: pip install '
        '--no-build-isolation --no-deps --force-reinstall onedl-mmcv==2.3.6. '
        'mmkd then leaves it alone.'
    )


def __getattr__(name: str) -> partial[NoReturn]:
    # Modules are asked for many private names (__path__, __wrapped__, …),
    # operators have none.
    if name.startswith('_'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return partial(_not_covered, name)
