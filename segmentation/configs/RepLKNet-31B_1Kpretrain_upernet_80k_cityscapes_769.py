"""RepLKNet-31B (ImageNet-1K), Cityscapes at 769 x 769.

Published: mIoU 83.1 single-scale, 83.5 multi-scale; 110M parameters.
1.28 million images: 20,000 iterations on 32 GPUs x 2 images, as published, or MMSegmentation's 80,000
on 8 x 2. With another GPUs x batch, max_iters is 1,280,000 / (GPUs x batch).
"""
_base_ = ['./RepLKNet_upernet.py', 'mmseg::_base_/datasets/cityscapes_769x769.py']

model = dict(
    data_preprocessor=dict(size=(769, 769)),
    decode_head=dict(num_classes=19, align_corners=True),
    auxiliary_head=dict(num_classes=19, align_corners=True))

max_iters = 20000
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 10)
default_hooks = dict(checkpoint=dict(interval=max_iters // 10))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=400, by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=400, end=max_iters, by_epoch=False)]

# test.py --tta: relative to the test pipeline's scale; MMSegmentation's own is relative to the image
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale=(int(2049 * ratio), int(1025 * ratio)), keep_ratio=True)
    for ratio in _base_.img_ratios]
