"""Trees: tree crowns in aerial photographs, the data of `make demo`.

python tools/prepare_data.py trees
python tools/compare.py configs/laboratory/trees/full.py
"""

laboratory = dict(
    title='Tree crowns',
    note='Aerial photographs, one class, tiles of 192 pixels; teacher and '
    'student of the demo, both on all 237 tiles. The teacher starts from '
    'ImageNet weights, the student from scratch.',
    student='demo/configs/student.py',
    teacher='demo/configs/teacher.py',
    methods=(
        'default',
        'configs/laboratory/ablations/default_teacher_head.py',
        'pkd',
        'fgd',
        'affinity',
        'crosskd',
    ),
    seeds=(0, 1, 2, 3, 4, 5),
)
