"""Shapes, 300 labels, and 900 pictures that nobody labelled.

python tools/prepare_data.py shapes
python tools/compare.py configs/laboratory/shapes/unlabelled.py
"""

laboratory = dict(
    title='Shapes, 300 labels and 900 pictures',
    note='As Shapes, quick. Half of each batch of the distilled student has '
    "no labels: the teacher's own training pictures, of which the student "
    'alone has nothing.',
    student='configs/laboratory/shapes/student.py',
    teacher='configs/laboratory/shapes/teacher.py',
    methods=('default_predicted',),
    arms=('alone', 'time', 'unlabelled', 'sham'),
    seeds=(0, 1, 2, 3, 4, 5),
    labels=300,
)
