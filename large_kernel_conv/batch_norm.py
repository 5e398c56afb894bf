"""What a BatchNorm does in evaluation, for folding it into a convolution."""
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def scale_and_shift(bn: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The affine map x * scale + shift of a BatchNorm in evaluation, each (C,) in float64; else None."""
    if not isinstance(bn, _BatchNorm):
        return None
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    return scale, bn.bias.double() - bn.running_mean.double() * scale
