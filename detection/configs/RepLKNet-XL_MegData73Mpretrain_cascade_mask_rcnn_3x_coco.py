"""RepLKNet-XL (MegData73M), Cascade Mask R-CNN, COCO.

Published: box AP 55.5, mask AP 48.0; 392M parameters.
36 epochs of 4 images per GPU, at the learning rate of RepLKNet_cascade_mask_rcnn_coco.py. Pixels
become -1 ... 1, in training, validation and testing, as in the pretraining.
"""
_base_ = './RepLKNet_cascade_mask_rcnn_coco.py'

model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        large_kernel_sizes=[27, 27, 27, 13],
        channels=[256, 512, 1024, 2048],
        drop_path_rate=0.5,
        small_kernel=None,
        dw_ratio=1.5,
        norm_intermediate_features=True),
    neck=dict(in_channels=[256, 512, 1024, 2048]))

train_dataloader = dict(batch_size=4)
