import numpy as np
from mmcv.transforms import Compose
from mmengine.registry import init_default_scope

from mmkd.datasets.kept import KeepForTeacher


def image(seed=0):
    return np.random.RandomState(seed).randint(0, 256, (8, 9, 3), np.uint8)


def test_what_comes_behind_is_not_in_what_is_kept():
    results = KeepForTeacher()(dict(img=image()))
    results['img'] += 1  # in place
    np.testing.assert_array_equal(results['teacher_img'], image())


def test_a_sample_carries_it_if_it_is_asked_for():
    init_default_scope('mmdet')
    for keys, carried in ((('img_id', 'teacher_img'), True), ((), False)):
        sample = Compose(
            [
                dict(type='mmkd.KeepForTeacher'),
                dict(type='PackDetInputs', meta_keys=keys),
            ]
        )(dict(img=image(), img_id=3))['data_samples']
        assert ('teacher_img' in sample.metainfo) == carried
