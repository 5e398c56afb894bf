"""RepLKNet-31L (ImageNet-22K), Cascade Mask R-CNN, COCO.

Published: box AP 53.9, mask AP 46.5; 229M parameters.
36 epochs of 1 image per GPU, as RepLKNet_cascade_mask_rcnn_coco.py says.
"""
_base_ = './RepLKNet_cascade_mask_rcnn_coco.py'

model = dict(
    backbone=dict(channels=[192, 384, 768, 1536], drop_path_rate=0.7),
    neck=dict(in_channels=[192, 384, 768, 1536]))
