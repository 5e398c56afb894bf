"""RepLKNet-31B (ImageNet-1K), Cascade Mask R-CNN, COCO.

Published: box AP 52.2, mask AP 45.2; 137M parameters.
36 epochs of 1 image per GPU, as RepLKNet_cascade_mask_rcnn_coco.py says.
"""
_base_ = './RepLKNet_cascade_mask_rcnn_coco.py'

model = dict(backbone=dict(drop_path_rate=0.6))
