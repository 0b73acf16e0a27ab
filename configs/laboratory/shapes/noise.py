"""Shapes, noise: does a teacher help a student whose labels are wrong?

python tools/prepare_data.py shapes
python tools/compare.py configs/laboratory/shapes/noise.py
"""

laboratory = dict(
    title='Shapes, noisy labels',
    note='As Shapes, quick, but three of ten training labels are another '
    "class, and boxes are off by up to a tenth of their sides; the teacher's "
    'own, validation and test are right.',
    student='configs/laboratory/shapes/noisy_student.py',
    teacher='configs/laboratory/shapes/teacher.py',
    methods=(
        *('soft_target', 'mimic', 'at', 'sp', 'rkd'),
        *('configs/fsp/tiny/fsp_tiny.py', 'configs/bss/tiny/bss_tiny.py'),
        'configs/backward-pass/tiny/backward-pass_tiny.py',
    ),
    arms=('alone', 'distilled'),
    seeds=(0, 1, 2),
    labels=300,
)
