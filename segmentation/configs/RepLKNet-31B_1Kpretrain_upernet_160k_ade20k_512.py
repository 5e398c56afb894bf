"""RepLKNet-31B (ImageNet-1K), ADE20K at 512 x 512.

Published: mIoU 49.9 single-scale, 50.6 multi-scale; 112M parameters.
5.12 million images: 40,000 iterations on 64 GPUs x 2 images, as published, or MMSegmentation's 160,000
on 8 x 4. With another GPUs x batch, max_iters is 5,120,000 / (GPUs x batch).
"""
_base_ = ['./RepLKNet_upernet.py', 'mmseg::_base_/datasets/ade20k.py']

model = dict(data_preprocessor=dict(size=(512, 512)), backbone=dict(drop_path_rate=0.5))

train_dataloader = dict(batch_size=2)

# test.py --tta: relative to the test pipeline's scale; MMSegmentation's own is relative to the image
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale=(int(2048 * ratio), int(512 * ratio)), keep_ratio=True)
    for ratio in _base_.img_ratios]
