"""Models of other libraries at channel ratio 0.5, with proof: diffusers, MONAI, ultralytics, segmentation
models, open_clip, ...

    pip install --no-deps diffusers monai segmentation_models_pytorch open_clip_torch ultralytics
    ultralytics-thop pytorchvideo
    pip install --no-deps kornia kornia_rs efficientnet_pytorch fvcore iopath yacs parameterized av ftfy
    wcwidth polars scipy
    pip install --no-deps opencv-python-headless requests charset_normalizer urllib3 idna certifi httpx
    httpcore anyio h11
    pip install --no-deps importlib_metadata zipp portalocker termcolor tabulate vit-pytorch
    dynamic_network_architectures torchsr
    pip install --no-deps torch_geometric xxhash aiohttp multidict yarl propcache aiosignal frozenlist attrs
    aiohappyeyeballs
    pip install --no-deps spandrel x-transformers loguru einx frozendict neuraloperator tensorly
    tensorly-torch torch-harmonics
    pip install --no-deps opt-einsum denoising-diffusion-pytorch ema-pytorch performer-pytorch local-attention
    pip install --no-deps axial-positional-embedding hyper-connections torch-einops-utils
    python -m benchmarks.coverage.libraries [--peer] [--filter PATTERN] [--fresh | --retry] [--jobs 2]

The sweep of zoo.py with other names; it writes benchmarks/results/libraries.md (not with --filter).
"""

from __future__ import annotations

import fnmatch

from benchmarks.coverage.zoo import TOOLS, options, summary, sweep, table_of
from benchmarks.lib.results import write_result
from benchmarks.lib.zoo.libraries import NAMES

NOTES = [
    (
        "Channel ratio 0.5 by l1 magnitude, small configurations, random weights, no hints. A row works if the proof passes "
        "(1e-9 in float64), and if the small model runs on another batch size, in training mode and through a backward pass."
    ),
    (
        "LoFTR, Flux, graph networks and SeemoRe are proved alone: LoFTR wants matches to train on, Flux's positions and graphs "
        "have no batch, and SeemoRe itself runs on one image only"
    ),
]


def main() -> None:
    chosen = options(__doc__).parse_args()
    tools = list(TOOLS if chosen.peer else TOOLS[:1])
    found = [name for name in NAMES if not chosen.filter or fnmatch.fnmatch(name, chosen.filter)]
    rows = sweep(found, tools, chosen)
    said = [line for tool in tools for line in summary(found, rows, tool)]
    print("\n".join(said))
    if not chosen.filter:
        print(
            write_result(
                "libraries", "Models of other libraries", table_of(found, rows, tools), [*said, *NOTES]
            )
        )


if __name__ == "__main__":
    main()
