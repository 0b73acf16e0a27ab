"""The default recipe, and the teacher's head for the student to start from.

What the head gives as a start is the distance to ``default``. For the students
of the blood cells and of the tree crowns, whose heads are their teachers'.
"""

_levels = (0, 1, 2)
_term = dict(
    type='mmkd.FeatureTerm',
    teacher='teacher',
    levels=_levels,
    teacher_levels=_levels,
)

model = dict(
    type='mmkd.Distiller',
    student='GFL',
    teachers=dict(
        teacher=dict(
            config='configs/laboratory/bccd/teacher.py',  # or that of trees
            inherit=('bbox_head',),
        )
    ),
    terms=dict(
        default=dict(
            type='mmkd.BalancedTerm',
            share=dict(pkd=1.0, cwd_scores=0.5),
            terms=dict(
                pkd=dict(
                    **_term,
                    tap='neck',
                    loss=dict(type='mmkd.PKDLoss', loss_weight=10.0),
                ),
                cwd_scores=dict(
                    **_term,
                    tap='bbox_head',
                    output=0,
                    loss=dict(type='mmkd.CWDLoss', loss_weight=5.0),
                ),
            ),
        )
    ),
)
