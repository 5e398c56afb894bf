"""What torch.compile and torch.func need to be told."""
from collections.abc import Callable

import torch
from torch.autograd import forward_ad


def assume_constant_result(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, which imports torch._dynamo, as long an import as the rest of
    torch."""
    function._dynamo_marked_constant = True
    return function


def in_function_transform() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, for which the operators have no
    formulas."""
    return (not torch.compiler.is_compiling()
            and (torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0))


@assume_constant_result
def constants_are_folded() -> bool:
    """Whether the model that is being compiled takes its weights for constants. Ask only where torch.compile
    is at work."""
    return torch._inductor.config.freezing
