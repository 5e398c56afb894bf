"""RepLKNet-31B (ImageNet-1K), FCOS, COCO.

Published: box AP 47.0; 87M parameters.
24 epochs, 2 images per GPU; on how many GPUs was not published. The learning rate of 2e-4 was: scale it with
GPUs x batch (train.py --auto-scale-lr does, taking it for 8 GPUs x 2 images). Weight decay is that of the
Cascade configs.
"""
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_ms-640-800-2x_coco.py'
custom_imports = dict(imports=['segmentation.replknet'], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        type='RepLKNet',
        large_kernel_sizes=[31, 29, 27, 13],
        layers=[2, 2, 18, 2],
        channels=[128, 256, 512, 1024],
        drop_path_rate=0.5,
        small_kernel=5,
        out_indices=(1, 2, 3),  # FCOS has no level of stride 4
        pretrained=None),
    neck=dict(in_channels=[256, 512, 1024], start_level=0))

train_dataloader = dict(batch_size=2)
optim_wrapper = dict(
    _delete_=True,  # else SGD's momentum would stay
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
    clip_grad=dict(max_norm=35, norm_type=2))
