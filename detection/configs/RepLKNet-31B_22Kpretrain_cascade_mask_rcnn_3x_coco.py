"""RepLKNet-31B (ImageNet-22K), Cascade Mask R-CNN, COCO.

Published: box AP 53.0, mask AP 46.0; 137M parameters.
36 epochs of 1 image per GPU, as RepLKNet_cascade_mask_rcnn_coco.py says.
"""
_base_ = './RepLKNet_cascade_mask_rcnn_coco.py'

model = dict(backbone=dict(drop_path_rate=0.4))
