"""python -m large_kernel_conv: where the stand-in for the extension is, what is compiled, what runs here."""
import torch

from large_kernel_conv import cpu, implementation
from large_kernel_conv.layers import EXTENSION


def main() -> None:
    """Print it; compile the CPU kernels if need be."""
    print(f'for code that imports depthwise_conv2d_implicit_gemm:\n  export PYTHONPATH={EXTENSION}')
    problem = cpu.load()
    print(f'CPU kernels: {problem or cpu.library_file()}')
    devices = ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]
    for device in devices:
        name = 'cpu' if device == 'cpu' else f'{device} ({torch.cuda.get_device_name(device)})'
        for kernel, side in ((31, 56), (7, 14)):
            x = torch.zeros(1, 64, side, side, device=device)
            weight = torch.zeros(64, 1, kernel, kernel, device=device)
            print(f'{name}, {kernel} x {kernel} on {side} x {side}: {": ".join(implementation(x, weight))}')


if __name__ == '__main__':
    main()
