"""RepMLPNet as a backbone for MMSegmentation 1.x and MMDetection 3.x: importing this registers it.

In a config: custom_imports = dict(imports=['segmentation.repmlpnet'], allow_failed_imports=False)
"""
from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

import repmlpnet
from segmentation.backbone import Backbone


@MODELS.register_module()
class RepMLPNet(Backbone, repmlpnet.RepMLPNet):
    """repmlpnet.RepMLPNet without a head: images (N, in_channels, H, W) to a tuple of out_indices' maps.

    Takes RepMLPNet's arguments but num_class, and:

    pad_to_parts: images of any size, padded with zeros on the right and below to size_multiples; the maps are
    cut to ceil(H / stride) x ceil(W / stride). The gates see the padding. Else such sizes are a ValueError.

    frozen_stages, norm_eval, pretrained, init_cfg: as segmentation.replknet.RepLKNet's. Frozen are the
    embedding of patches, the first n stages and the embeddings between them.
    """
    first = 'conv_embedding.conv.weight'
    merged_part, trained_part, merged_argument = '.fc3.bias', '.fc3_bn.', 'deploy'

    def __init__(self, *, num_class: None = None, out_indices: Sequence[int] = (0, 1, 2, 3),
                 pad_to_parts: bool = True, frozen_stages: int = -1, norm_eval: bool = False,
                 pretrained: str | None = None, init_cfg: dict | list[dict] | None = None, **arguments):
        if num_class is not None:
            raise ValueError(f'num_class is {num_class}, but a backbone has no classifier: leave it out')
        super().__init__(num_class=None, out_indices=out_indices, **arguments)
        self.pad_to_parts = pad_to_parts
        self.set_up(frozen_stages, norm_eval, pretrained, init_cfg)

    def without_gradient(self, last: int) -> list[nn.Module]:
        unused = [*self.stages[last + 1:], *self.embeds[last:]]
        ends_in_norm = self.norm_last_map and last == len(self.stages) - 1
        return unused if ends_in_norm else [*unused, self.head_norm]

    def up_to_stage(self, stages: int) -> list[nn.Module]:
        return [self.conv_embedding, *self.stages[:stages], *self.embeds[:max(stages - 1, 0)]]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.pad_to_parts:
            return super().forward(x)
        below, right = ((-side) % multiple for side, multiple in zip(x.shape[2:], self.size_multiples,
                                                                     strict=True))
        maps = super().forward(F.pad(x, (0, right, 0, below)))
        cut = []
        for i, padded in zip(self.out_indices, maps, strict=True):
            rows, columns = (-(-side // (patch * 2 ** i)) for side, patch in zip(
                x.shape[2:], self.conv_embedding.conv.stride, strict=True))
            cut.append(padded[:, :, :rows, :columns])
        return tuple(cut)
