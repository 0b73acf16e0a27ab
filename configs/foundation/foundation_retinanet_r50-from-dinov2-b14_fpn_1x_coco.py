r"""Foundation: RetinaNet R-50 (36.5 AP alone) learns from DINOv2 ViT-B/14.

python tools/train.py \
    configs/foundation/foundation_retinanet_r50-from-dinov2-b14_fpn_1x_coco.py

Family: feature, by FoundationTerm.
Published: no pair of MMDetection; the abstract of RT-DETRv4 has 49.7 to 57.0
    AP for its four sizes, which learn from DINOv3.
Trained by us: no.
Read: that abstract (arXiv:2510.25257) and summaries of the paper: a projector
    and a cosine on the deepest map.
Schedule: 12 epochs of 16 images a step (8 GPUs x 2) at learning rate 0.01;
    with another number of images add --auto-scale-lr.
Changed besides model: nothing.
Teacher's weights: none that detects; DINOv2's are fetched by timm in the first
    step (pip install timm). Another model:
    --cfg-options model.terms.dino.model.name=NAME
Notes: the weight 1 is ours and untried. The model sees images at 7/16 of their
    size, one patch for each cell of the backbone's last map; patches=2 shows
    more at four times the cost.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(),
    terms=dict(
        dino=dict(
            type='mmkd.FoundationTerm',
            model=dict(
                type='mmkd.TimmFeatures',
                name='vit_base_patch14_dinov2',
                dynamic_img_size=True,
            ),
            tap='backbone',
            in_channels=2048,
            out_channels=768,
            loss_weight=1.0,
        )
    ),
)
