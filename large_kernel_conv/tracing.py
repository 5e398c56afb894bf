"""What torch.compile and torch.func need to be told."""
from collections.abc import Callable

import torch
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad


def assume_constant_result(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result without its import of torch._dynamo, as slow as torch's own."""
    function._dynamo_marked_constant = True
    return function


def in_function_transform() -> bool:
    """Whether torch.func or forward-mode differentiation, which the operators do not know, is at work."""
    return (not torch.compiler.is_compiling()
            and (maybe_current_level() is not None or forward_ad._current_level >= 0))


@assume_constant_result
def constants_are_folded() -> bool:
    """Whether the model being compiled takes its weights for constants. Only for use in torch.compile."""
    return torch._inductor.config.freezing
