"""Every model of the repository by torch.hub, through timm, which has to be installed.

    torch.hub.load('.', 'replknet_31b', source='local', pretrained=True, pretrained_cfg='in22k_ft_in1k')

Arguments are those of timm.create_model; pretrained_cfg says which weights, without it the first.
"""
from replknet_zoo.timm_models import ENTRYPOINTS

dependencies = ['torch', 'timm', 'numpy', 'safetensors']
globals().update(ENTRYPOINTS)
