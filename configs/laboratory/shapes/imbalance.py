"""Shapes, imbalance: does a teacher help where classes become rare?

python tools/prepare_data.py shapes
python tools/compare.py configs/laboratory/shapes/imbalance.py
"""

laboratory = dict(
    title='Shapes, imbalanced classes',
    note='As Shapes, quick, on all training images, but from class to class '
    "fewer objects are left, a twentieth of the last; the teacher's own, "
    'validation and test are whole.',
    student='configs/laboratory/shapes/imbalanced_student.py',
    teacher='configs/laboratory/shapes/teacher.py',
    methods=(
        *('soft_target', 'mimic', 'at', 'sp', 'rkd'),
        *('configs/fsp/tiny/fsp_tiny.py', 'configs/bss/tiny/bss_tiny.py'),
        'configs/backward-pass/tiny/backward-pass_tiny.py',
    ),
    arms=('alone', 'distilled'),
    seeds=(0, 1, 2),
)
