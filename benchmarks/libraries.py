"""Models of other libraries at channel ratio 0.5, with proof: diffusers, MONAI, ultralytics, segmentation models, open_clip, ...

    pip install --no-deps diffusers monai segmentation_models_pytorch open_clip_torch ultralytics ultralytics-thop pytorchvideo
    pip install --no-deps kornia kornia_rs efficientnet_pytorch fvcore iopath yacs parameterized av ftfy wcwidth polars scipy
    pip install --no-deps opencv-python-headless requests charset_normalizer urllib3 idna certifi httpx httpcore anyio h11
    pip install --no-deps importlib_metadata zipp portalocker termcolor tabulate vit-pytorch dynamic_network_architectures torchsr
    pip install --no-deps torch_geometric xxhash aiohttp multidict yarl propcache aiosignal frozenlist attrs aiohappyeyeballs
    python benchmarks/libraries.py [--peer] [--filter PATTERN] [--fresh | --retry] [--jobs 2]

The sweep of zoo.py with other names; it writes benchmarks/results/libraries.md (not with --filter).
"""

from __future__ import annotations

import argparse
import fnmatch

from results import markdown, write_result
from zoo import HEADER, TOOLS, cells, summary, sweep
from zoo_libraries import NAMES

NOTES = [
    (
        "Channel ratio 0.5 by l1 magnitude, small configurations, random weights, no hints. A row works if the proof passes "
        "(1e-9 in float64), and if the small model runs on another batch size, in training mode and through a backward pass."
    ),
    "LoFTR, Flux and graph networks are proved alone: LoFTR wants matches to train on, Flux's positions and graphs have no batch",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="torch-pruning as well")
    parser.add_argument("--filter", default="", metavar="PATTERN", help="only names that match; writes no document")
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache holds")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    chosen = parser.parse_args()
    tools = list(TOOLS if chosen.peer else TOOLS[:1])
    found = [name for name in NAMES if not chosen.filter or fnmatch.fnmatch(name, chosen.filter)]
    rows = sweep(found, tools, chosen.jobs, lambda row: chosen.fresh or not row or (chosen.retry and "failed" in row))
    said = [line for tool in tools for line in summary(found, rows, tool)]
    print("\n".join(said))
    if chosen.filter:
        return
    header, table = list(HEADER), []
    for name in found:
        row = cells(name, rows[f"surgeon {name}"])
        if chosen.peer:
            peer = rows[f"torch-pruning {name}"]
            row.append(peer["failed"][:80] if "failed" in peer else f"{peer['left']:.1%} left, {peer['seconds']:.1f} s")
        table.append(row)
    if chosen.peer:
        header.append("torch-pruning")
    print(write_result("libraries", "Models of other libraries", markdown(header, table), [*said, *NOTES]))


if __name__ == "__main__":
    main()
