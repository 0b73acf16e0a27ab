"""BCCD with 20 labels: blood cells, a teacher that has seen ten times more.

python tools/prepare_data.py bccd --source DIR
python tools/compare.py configs/laboratory/bccd/full.py
"""

laboratory = dict(
    title='Blood cells, 20 labels',
    note='BCCD, photographs of 320×240, three classes. The student is trained '
    'from scratch on 20 of the 205 photographs that its teacher was trained '
    'on, another choice each seed; the teacher starts from ImageNet weights.',
    student='configs/laboratory/bccd/student.py',
    teacher='configs/laboratory/bccd/teacher.py',
    methods=(
        'default',
        'configs/laboratory/ablations/default_teacher_head.py',
        'inherit',
        'pkd',
        'fgd',
        'affinity',
        'crosskd',
    ),
    seeds=(0, 1, 2, 3, 4, 5),
    labels=20,
)
