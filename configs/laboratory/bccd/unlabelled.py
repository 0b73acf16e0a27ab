"""BCCD, 20 labels, and 185 photographs that nobody labelled.

python tools/prepare_data.py bccd --source DIR
python tools/compare.py configs/laboratory/bccd/unlabelled.py
"""

laboratory = dict(
    title='Blood cells, 20 labels and 185 photographs',
    note='As Blood cells, 20 labels, for 1,000 steps. Half of each batch of '
    "the distilled student has no labels: the teacher's own training "
    'photographs, of which the student alone has nothing.',
    student='configs/laboratory/bccd/longer_student.py',
    teacher='configs/laboratory/bccd/teacher.py',
    methods=('default_predicted',),
    arms=('alone', 'time', 'unlabelled', 'sham'),
    seeds=(0, 1, 2, 3, 4, 5),
    labels=20,
)
