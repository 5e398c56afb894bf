"""Two ways to int8 for RepMLPNet, as its authors advise: after training, or training through quantized FCs.

After: inject, quantize by any method, insert_batchnorms() and finetune, which these let a few steps do.
While training: quantize what convolutions and BatchNorms will amount to, not each of them:

    for block in model.modules():
        if isinstance(block, RepMLPBlock):
            block.forward = functools.partial(fake_quantized_forward, block)   # undone by `del block.forward`
"""
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from repmlpnet import RepMLPBlock


@torch.no_grad()
def insert_batchnorms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Put a BatchNorm behind the FCs of every injected RepMLPBlock in `model`, in place; its outputs stay.

    Each has the mean and variance of its input over `batches` (N, C, H, W), and a weight and a bias that undo
    them. local_inject() folds it into the FCs again: call it before you save weights for other tools, which
    know none with these BatchNorms. Raises ValueError without a batch, and where a block is not injected.
    """
    blocks = [module for module in model.modules() if isinstance(module, RepMLPBlock)]
    if not all(isinstance(block.fc3_bn, nn.Identity) for block in blocks):
        raise ValueError('there are BatchNorms behind the FCs already: call locality_injection() first')
    found = {block: [] for block in blocks}  # (count, mean, mean of squares) of each batch and set
    handles = [block.fc3_bn.register_forward_hook(
        lambda _, __, out, block=block: found[block].append(_moments(out))) for block in blocks]
    training = model.training
    model.eval()
    for batch in batches:
        model(batch)
    model.train(training)
    for handle in handles:
        handle.remove()
    if not all(found.values()):
        raise ValueError('there is no batch to measure the statistics on')
    for block, moments in found.items():
        counts = torch.tensor([count for count, *_ in moments], dtype=torch.float64)
        mean, square = (torch.stack(values).mul(counts[:, None]).sum(0) / counts.sum()
                        for values in list(zip(*moments, strict=True))[1:])
        variance = square - mean ** 2
        norm = nn.BatchNorm2d(block.S).to(block.fc3.weight).train(block.training)
        for tensor, value in ((norm.running_mean, mean), (norm.running_var, variance),
                              (norm.weight, (variance + norm.eps).sqrt()), (norm.bias, mean)):
            tensor.copy_(value)
        block.fc3_bn = norm


def _moments(out: Tensor) -> tuple[int, Tensor, Tensor]:
    values = out.double().cpu()
    return values.numel() // values.shape[1], values.mean((0, 2, 3)), values.square().mean((0, 2, 3))


def fake_quantized_forward(block: RepMLPBlock, x: Tensor) -> Tensor:
    """block(x) with FCs as int8 would have them: symmetric, a scale for each of their S h w rows.

    The FCs are get_equivalent_fc3(), with the BatchNorms' running statistics, which stay as they are.
    Gradients pass through the rounding to FCs, convolutions and BatchNorms. float32.
    """
    weight, bias = block.get_equivalent_fc3()
    scale = weight.detach().abs().amax((1, 2, 3)).clamp(min=1e-12) / 127
    weight = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros_like(scale, dtype=torch.int32),
                                                    0, -127, 127)
    with torch.device('meta'):  # it gets its weights in the call
        injected = RepMLPBlock(block.C, block.O, block.h, block.w, None, 1, block.S, deploy=True)
    injected.gp = block.gp
    return functional_call(injected, {'fc3.weight': weight, 'fc3.bias': bias}, x)
