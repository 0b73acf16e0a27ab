"""Trees, 24 labels, and 213 tiles that nobody labelled.

python tools/prepare_data.py trees
python tools/compare.py configs/laboratory/trees/unlabelled.py
"""

laboratory = dict(
    title='Tree crowns, 24 labels and 213 tiles',
    note='As Tree crowns, but one tile in ten is labelled, another choice '
    'each seed. Half of each batch of the distilled student has no labels: '
    "the teacher's own training tiles, of which the student alone has "
    'nothing.',
    student='demo/configs/student.py',
    teacher='demo/configs/teacher.py',
    methods=('default_predicted',),
    arms=('alone', 'time', 'unlabelled', 'sham'),
    seeds=(0, 1, 2, 3, 4, 5),
    labels=24,
)
