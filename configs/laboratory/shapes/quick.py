"""Shapes, quick: what every method must pass on the day it is written.

python tools/prepare_data.py shapes
python tools/compare.py configs/laboratory/shapes/quick.py
"""

laboratory = dict(
    title='Shapes, quick',
    note='Generated pictures of 128 pixels, six classes. The student is '
    'trained from scratch on 300 of the 1200 images that its teacher was '
    'trained on, another choice each seed.',
    student='configs/laboratory/shapes/student.py',
    teacher='configs/laboratory/shapes/teacher.py',
    methods=(
        'default',
        'pkd',
        'mimic',
        'fgd',
        'dist',
        'ld',
        'cwd_scores',
        'affinity',
        'mgd',
        'crosskd',
        'bckd',
        'defeat',
        'maskd',
        'freekd',
        'fgfi',
        'gid',
        'soft_target',
        'at',
        'ssim',
        'fbkd',
        'rkd',
        'dkd',
        'cwd',
        'sp',
        'amd',
        'dmkd',
        'cckd',
        'frs',
        'nkd',
        'reviewkd',
        'pgd',
        'icd',
        'predicted',
    ),
    arms=('alone', 'time', 'distilled', 'sham'),
    seeds=(0, 1, 2),
    labels=300,
)
