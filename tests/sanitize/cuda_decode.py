"""A few layers through the CUDA decode kernels, and nothing else on the GPU, for compute-sanitizer to watch.

Run by tests/kernels/test_cuda_sanitizer.py. Between them the cases have codebooks in shared memory once, several times
and not at all, a residual, groups, slices of columns (whose parts a second kernel adds), a permutation, and sizes that
are multiples of nothing. Layers are made on the CPU and copied, so that no kernel of PyTorch runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cuda_layers import decode
from layer_checks import assert_close
from triton_layers import layer_of

from vptq.config import LayerConfig

NORMAL = {"enable_norm": True, "enable_perm": True, "bias": True}
CASES = (
    (LayerConfig(611, 77, 8, 256, num_residual_centroids=256, **NORMAL), (1, 8)),
    (LayerConfig(3 * 350, 45, 6, 4096, num_groups=3, **NORMAL), (1, 3)),
    (LayerConfig(270, 45, 8, 65536, num_residual_centroids=16), (2,)),
    (LayerConfig(28700, 21, 4, 256, **NORMAL), (8,)),
)


def main() -> None:
    for config, tokens in CASES:
        layer, stored = layer_of(config, torch.float16, "cuda")
        for count in tokens:
            x = torch.randn(count, config.in_features, generator=torch.Generator().manual_seed(count)).half()
            y = decode(layer, x)
            assert y is not None, f"the kernel refused {config}"
            assert_close(y, x, config, stored)


if __name__ == "__main__":
    main()
