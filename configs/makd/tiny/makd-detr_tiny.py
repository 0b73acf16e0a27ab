"""MaKD-DETR: a tiny Deformable DETR, factorized, learns from the whole."""

_base_ = '../../_base_/tiny/deformable_detr_lowrank.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        whole=dict(
            _base_.teacher,
            inherit=(
                *('backbone', 'neck', 'encoder', 'decoder', 'bbox_head'),
                *('query_embedding', 'reference_points_fc', 'level_embed'),
            ),
        )
    ),
    terms=dict(
        aspects=dict(
            type='mmkd.MultiAspectTerm',
            teacher='whole',
            parts=('encoder', 'decoder'),
        ),
        scores=dict(
            type='mmkd.SharedQueryTerm',
            teacher='whole',
            general=0,
            schedule=dict(type='mmkd.Between', begin=0.5),
        ),
    ),
)
