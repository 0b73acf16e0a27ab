"""Trees, 24 labels and 213 tiles without, for twice as long.

python tools/prepare_data.py trees
python tools/compare.py configs/laboratory/trees/unlabelled_longer.py
"""

_base_ = 'unlabelled.py'

laboratory = dict(
    title='Tree crowns, 24 labels and 213 tiles, 1,200 steps',
    note='As Tree crowns, 24 labels and 213 tiles, for twice the steps, so '
    'that a tile without labels is shown 11 times, as often as a photograph '
    'of the blood cells. Added when the results of 600 steps were known.',
    student='configs/laboratory/trees/longer_student.py',
)
