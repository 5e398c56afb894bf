"""RepLKNet-31B (ImageNet-22K) on ADE20K with layer-wise learning-rate decay.

The stem learns at 0.9 ** 13 of the heads' rate. Ours, to show how; it has not been trained, so it has no
score. The schedule is that of the config it inherits.
"""
_base_ = './RepLKNet-31B_22Kpretrain_upernet_160k_ade20k_640.py'
custom_imports = dict(imports=['segmentation.replknet', 'segmentation.layer_decay'],
                      allow_failed_imports=False)

optim_wrapper = dict(constructor='RepLKNetLayerDecay', paramwise_cfg=dict(_delete_=True, decay_rate=0.9))
