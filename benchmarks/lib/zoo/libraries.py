"""Models of libraries beyond torchvision, timm and transformers: small configurations, random weights,
nothing is downloaded.

`NAMES`: `diffusers/NAME`, `monai/NAME`, ...; `build(name)` -> (a model in eval mode, example inputs).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.zoo.seeded import fill_zero_weights, torchvision_models

Built = tuple[nn.Module, Any]


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


# -- diffusers -----------------------------------------------------------------------------------------------

_STEPS = {"timestep": torch.tensor([3, 7])}
_TOKENS = {"encoder_hidden_states": (2, 7, 32)}
_AUTOENCODER = {
    "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 8,
}  # fmt: skip
_CROSS = {
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "block_out_channels": (32, 64),
}
_HEADS = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 2,
    "in_channels": 4,
    "sample_size": 16,
}

_DIFFUSERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "UNet2DModel": (
        {"sample_size": 32, "block_out_channels": (32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8,
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")},
        {"sample": (2, 3, 32, 32), **_STEPS},
    ),
    "UNet2DConditionModel": (
        {**_CROSS, "sample_size": 16, "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        {"sample": (2, 4, 16, 16), **_STEPS, **_TOKENS},
    ),
    "ControlNetModel": (
        {**_CROSS, "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "conditioning_embedding_out_channels": (16, 32)},
        {"sample": (2, 4, 16, 16), **_STEPS, **_TOKENS, "controlnet_cond": (2, 3, 32, 32)},
    ),
    "AutoencoderKL": ({**_AUTOENCODER, "latent_channels": 4}, {"sample": (2, 3, 32, 32)}),
    "VQModel": ({**_AUTOENCODER, "latent_channels": 3}, {"sample": (2, 3, 32, 32)}),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}, {"sample": (2, 3, 32, 32)}
    ),
    "DiTTransformer2DModel": (
        {**_HEADS, "num_embeds_ada_norm": 10, "norm_num_groups": 8},
        {"hidden_states": (2, 4, 16, 16), **_STEPS, "class_labels": torch.tensor([1, 2])},
    ),
    "PixArtTransformer2DModel": (
        {**_HEADS, "out_channels": 8, "cross_attention_dim": 64, "caption_channels": 32},
        {"hidden_states": (2, 4, 16, 16), **_STEPS, **_TOKENS, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "SD3Transformer2DModel": (
        {**_HEADS, "patch_size": 2, "joint_attention_dim": 32, "caption_projection_dim": 64, "pooled_projection_dim": 32,
         "out_channels": 4},
        {"hidden_states": (2, 4, 16, 16), **_TOKENS, "pooled_projections": (2, 32), "timestep": torch.tensor([3.0, 7.0])},
    ),
    "FluxTransformer2DModel": (
        {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)},
        {"hidden_states": (2, 16, 4), **_TOKENS, "pooled_projections": (2, 32), "timestep": torch.tensor([0.3, 0.7]),
         "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(7, 3)},
    ),
}  # fmt: skip


def _diffusers(name: str) -> Built:
    options, inputs = _DIFFUSERS[name]
    model: nn.Module = getattr(importlib.import_module("diffusers"), name)(**options)
    return model, {
        key: _noise(*value) if isinstance(value, tuple) else value for key, value in inputs.items()
    }


# -- monai ---------------------------------------------------------------------------------------------------

_VOLUME, _SLICE = (1, 1, 32, 32, 32), (1, 1, 64, 64)
_SCAN = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
_FLAT = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_FEATURES = {"features": (8, 8, 16, 32, 64, 8)}
_MONAI: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "UNet": ({**_SCAN, "channels": (8, 16, 32, 64), "strides": (2, 2, 2), "num_res_units": 2}, _VOLUME),
    "BasicUNet": ({**_SCAN, **_FEATURES}, _VOLUME),
    "BasicUNetPlusPlus": ({**_FLAT, **_FEATURES}, _SLICE),
    "DynUNet": ({**_SCAN, "kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
                 "filters": [8, 16, 32]}, _VOLUME),
    "SegResNet": ({**_SCAN, "init_filters": 8}, _VOLUME),
    "UNETR": ({"in_channels": 1, "out_channels": 2, "img_size": (32, 32, 32), "feature_size": 8, "hidden_size": 48,
               "mlp_dim": 96, "num_heads": 4}, _VOLUME),
    "SwinUNETR": ({"in_channels": 1, "out_channels": 2, "feature_size": 12}, (1, 1, 64, 64, 64)),
    "VNet": ({}, _VOLUME),
    "AttentionUnet": ({**_FLAT, "channels": (8, 16, 32), "strides": (2, 2)}, _SLICE),
    "HighResNet": (_SCAN, _VOLUME),
    "FlexibleUNet": ({"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0"}, (1, 3, 64, 64)),
    "SEResNet50": ({"spatial_dims": 2, "in_channels": 3, "num_classes": 3}, (1, 3, 64, 64)),
    "AutoEncoder": ({**_FLAT, "channels": (8, 16, 32), "strides": (2, 2, 2)}, _SLICE),
    "ViT": ({"in_channels": 1, "img_size": (32, 32), "patch_size": (8, 8), "hidden_size": 48, "mlp_dim": 96, "num_layers": 2,
             "num_heads": 4, "classification": True, "spatial_dims": 2}, (1, 1, 32, 32)),
    "MedNeXt": ({**_FLAT, "init_filters": 8}, _SLICE),
    "DiffusionModelUNet": ({**_FLAT, "out_channels": 1, "channels": (16, 32), "attention_levels": (False, True),
                            "num_res_blocks": 1, "num_head_channels": 8, "norm_num_groups": 8}, (2, 1, 32, 32)),
    "RegUNet": ({"spatial_dims": 2, "in_channels": 1, "num_channel_initial": 8, "depth": 2, "out_channels": 2}, (1, 1, 32, 32)),
    "DAF3D": ({"in_channels": 1, "out_channels": 2}, (1, 1, 64, 64, 64)),
}  # fmt: skip


def _monai(name: str) -> Built:
    options, shape = _MONAI[name]
    model: nn.Module = getattr(importlib.import_module("monai.networks.nets"), name)(**options)
    return model, (_noise(*shape), torch.tensor([3, 7])) if name == "DiffusionModelUNet" else _noise(*shape)


# -- segmentation_models_pytorch -----------------------------------------------------------------------------

_DECODERS = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer".split()
_ENCODERS = "mobilenet_v2 mit_b0 timm-efficientnet-b0 se_resnet50 xception dpn68 vgg11_bn densenet121 tu-convnext_atto".split()
_SEGMENTATION = [
    *(f"{decoder}-resnet18" for decoder in _DECODERS),
    *(f"Unet-{encoder}" for encoder in _ENCODERS),
]


def _segmentation(name: str) -> Built:
    decoder, _, encoder = name.partition("-")
    kind = getattr(importlib.import_module("segmentation_models_pytorch"), decoder)
    return kind(encoder_name=encoder, encoder_weights=None, classes=5), _noise(2, 3, 128, 128)


# -- open_clip, ultralytics, pytorchvideo, kornia, efficientnet_pytorch --------------------------------------

_CLIP = "RN50 ViT-B-32 coca_ViT-B-32 convnext_base ViT-B-32-SigLIP2-256 MobileCLIP-S1 EVA02-B-16".split()
_YOLO = (
    "yolov3-tiny yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n yolo26n yolov8n-seg yolov8n-pose yolov8n-obb "
    "yolov8n-cls yolo11n-seg yolov8-world yolov8-rtdetr rtdetr-resnet50"
).split()
_TASKS = {"seg": "Segmentation", "pose": "Pose", "obb": "OBB", "cls": "Classification", "world": "World"}
_CLIPS: dict[str, tuple[int, ...]] = {
    "slow_r50": (1, 3, 8, 224, 224), "x3d_xs": (1, 3, 4, 160, 160), "csn_r101": (1, 3, 32, 224, 224),
    "r2plus1d_r50": (1, 3, 16, 224, 224), "c2d_r50": (1, 3, 8, 224, 224), "mvit_base_16x4": (1, 3, 16, 224, 224),
}  # fmt: skip


def _open_clip(name: str) -> Built:
    model = importlib.import_module("open_clip").create_model(name, pretrained=None)
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    words = torch.randint(1, 400, (1, getattr(model, "context_length", None) or 77))
    return model, {"image": _noise(1, 3, height, width), "text": words}


def _ultralytics(name: str) -> Built:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    last = name.rpartition("-")[2]
    kind = "RTDETRDetection" if "rtdetr" in name else _TASKS.get(last, "Detection")
    return getattr(tasks, f"{kind}Model")(f"{name}.yaml", verbose=False), _noise(1, 3, 128, 128)


def _pytorchvideo(name: str) -> Built:
    model: nn.Module = getattr(importlib.import_module("pytorchvideo.models.hub"), name)()
    if name == "slowfast_r50":
        return model, ([_noise(1, 3, 8, 224, 224), _noise(1, 3, 32, 224, 224)],)
    return model, _noise(*_CLIPS[name])


def _kornia(name: str) -> Built:
    feature = importlib.import_module("kornia.feature")
    if name == "LoFTR":
        return feature.LoFTR(pretrained=None), ({f"image{i}": torch.rand(1, 1, 64, 64) for i in range(2)},)
    return feature.HardNet(pretrained=False), _noise(3, 1, 32, 32)


def _efficientnet(name: str) -> Built:
    return importlib.import_module("efficientnet_pytorch").EfficientNet.from_name(name), _noise(
        2, 3, 224, 224
    )


# -- vit_pytorch, dynamic_network_architectures (nnU-Net), torchsr, torch_geometric --------------------------

_PLAIN = {
    "image_size": 64,
    "patch_size": 16,
    "num_classes": 10,
    "dim": 64,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 128,
}
_STAGES = {"num_classes": 10, "depth": (1, 1, 1, 1), "window_size": 7}
_VIT: dict[str, dict[str, Any]] = {
    "vit.ViT": _PLAIN, "simple_vit.SimpleViT": _PLAIN, "deepvit.DeepViT": _PLAIN, "cait.CaiT": {**_PLAIN, "cls_depth": 1},
    "cct.CCT": {"img_size": (64, 64), "embedding_dim": 64, "n_conv_layers": 2, "num_layers": 2, "num_heads": 4, "mlp_ratio": 2,
                "num_classes": 10},
    "pit.PiT": {**_PLAIN, "patch_size": 8, "depth": (1, 1)},
    "levit.LeViT": {"image_size": 64, "num_classes": 10, "stages": 3, "dim": (32, 48, 64), "depth": 1, "heads": (2, 3, 4),
                    "mlp_mult": 2},
    "cvt.CvT": {"num_classes": 10},
    "nest.NesT": {"image_size": 64, "patch_size": 4, "dim": 32, "heads": 2, "num_hierarchies": 3, "block_repeats": (1, 1, 1),
                  "num_classes": 10},
    "mobile_vit.MobileViT": {"image_size": (64, 64), "dims": [48, 64, 80], "num_classes": 10,
                             "channels": [16, 16, 24, 24, 32, 32, 40, 40, 48, 48, 64]},
    "xcit.XCiT": {**_PLAIN, "cls_depth": 1, "local_patch_kernel_size": 3},
    "regionvit.RegionViT": {**_STAGES, "dim": (16, 32, 64, 128)},
    "sep_vit.SepViT": {**_STAGES, "dim": 32, "dim_head": 16, "heads": (1, 2, 2, 4)},
    "max_vit.MaxViT": {**_STAGES, "dim_conv_stem": 16, "dim": 16, "dim_head": 8},
    "rvt.RvT": _PLAIN, "parallel_vit.ViT": {**_PLAIN, "num_parallel_branches": 2}, "vit_for_small_dataset.ViT": _PLAIN,
    "normalized_vit.nViT": _PLAIN,
}  # fmt: skip
_UNETS = "PlainConvUNet ResidualEncoderUNet".split()
_GRAPHS = "GCN GAT GIN GraphSAGE".split()
_RESOLUTION = "edsr_baseline rcan rdn ninasr_b0 carn_m vdsr".split()


def _vit_pytorch(name: str) -> Built:
    module, _, kind = name.partition(".")
    size = 224 if "window_size" in _VIT[name] else 64
    return getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)(**_VIT[name]), _noise(
        2, 3, size, size
    )


def _nnunet(name: str) -> Built:
    kind = getattr(importlib.import_module("dynamic_network_architectures.architectures.unet"), name)
    norm = {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU}
    return kind(1, 3, (8, 16, 32), nn.Conv3d, 3, (1, 2, 2), (1, 1, 1), 2, (1, 1), **norm), _noise(
        1, 1, 16, 16, 16
    )


def _torchsr(name: str) -> Built:
    return getattr(importlib.import_module("torchsr.models"), name)(scale=2, pretrained=False), _noise(
        1, 3, 16, 16
    )


def _torch_geometric(name: str) -> Built:
    heads = {"heads": 4} if name == "GAT" else {}
    model = getattr(importlib.import_module("torch_geometric.nn"), name)(10, 32, 2, 3, **heads)
    return model, (_noise(6, 10), torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]]))


# -- spandrel (image restoration), x_transformers, neuralop, denoising_diffusion_pytorch, performer_pytorch --

_IMAGES, _HEADED = {"img_size": 32, "embed_dim": 32}, {"num_heads": [2, 2]}
_SHIFTED = {**_IMAGES, **_HEADED, "depths": [2, 2], "window_size": 4}
_SPLIT = {**_IMAGES, **_HEADED, "depth": [2, 2], "split_size": [4, 8]}
_RESTORATION: dict[str, dict[str, Any]] = {
    "ATD": {**_SHIFTED, "category_size": 64, "num_tokens": 16}, "Compact": {}, "DAT": _SPLIT, "DCTLSA": {}, "DITN": {},
    "DRCT": {**_SHIFTED, "upsampler": "pixelshuffle"}, "DRUNet": {"in_nc": 3, "out_nc": 3, "nc": [16, 32, 32, 64], "nb": 1},
    "DnCNN": {"in_nc": 3, "out_nc": 3, "nc": 16, "nb": 6}, "ESRGAN": {"num_blocks": 2}, "FBCNN": {"nb": 1}, "FDAT": {},
    "FFTformer": {},
    "GRL": {**_IMAGES, "depths": [2, 2], "window_size": 8, "num_heads_window": [2, 2], "num_heads_stripe": [2, 2]},
    "HAT": _SHIFTED, "HVICIDNet": {}, "KBNet": {}, "MMRealSR": {"num_in_ch": 3, "num_out_ch": 3, "num_block": 2},
    "MixDehazeNet": {}, "MoESR": {}, "MoSR": {}, "NAFNet": {}, "OmniSR": {}, "PLKSR": {},
    "RCAN": {"n_resgroups": 2, "n_resblocks": 2}, "RGT": _SPLIT, "RealCUGAN": {}, "RestoreFormer": {}, "RetinexFormer": {},
    "SAFMN": {"dim": 36}, "SAFMNBCIE": {"dim": 36}, "SCUNet": {"dim": 64, "config": [1] * 7},
    "SPAN": {"num_in_ch": 3, "num_out_ch": 3}, "SeemoRe": {}, "SwiftSRGAN": {}, "Swin2SR": _SHIFTED, "SwinIR": _SHIFTED,
    "Uformer": {"img_size": 64, "embed_dim": 16},
}  # fmt: skip
_DECODERS: dict[str, dict[str, Any]] = {
    "plain": {}, "rotary": {"rotary_pos_emb": True}, "grouped-queries": {"heads": 8, "attn_kv_heads": 2},
    "alibi": {"alibi_pos_bias": True}, "glu-rmsnorm": {"ff_glu": True, "use_rmsnorm": True}, "macaron": {"macaron": True},
    "talking-heads": {"attn_pre_talking_heads": True},
    "qk-norm": {"attn_qk_norm": True}, "hyper-connections": {"num_residual_streams": 2},
}  # fmt: skip


def _spandrel(name: str) -> Built:
    found = vars(importlib.import_module(f"spandrel.architectures.{name}"))
    kind: Any = (
        next(v for k, v in found.items() if k.endswith("Arch") and isinstance(v, type))
        .__orig_bases__[0]
        .__args__[0]
    )
    kind = getattr(kind, "__args__", (kind,))[0]  # of a union, the first
    size = 64 if name in ("RealCUGAN", "Uformer", "SCUNet", "FBCNN", "MixDehazeNet") else 32
    batch = 1 if name == "SeemoRe" else 2  # more it cannot run itself
    return kind(**_RESTORATION[name]), torch.rand(batch, 3, size, size)


def _x_transformers(name: str) -> Built:
    library: Any = importlib.import_module("x_transformers")
    layers = library.Decoder(**{"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 32, **_DECODERS[name]})
    return library.TransformerWrapper(num_tokens=100, max_seq_len=32, attn_layers=layers), torch.randint(
        0, 100, (2, 16)
    )


def _neuralop(name: str) -> Built:
    kind = getattr(importlib.import_module("neuralop.models"), name)
    return kind(n_modes=(6, 6), hidden_channels=16, in_channels=1, out_channels=1), _noise(2, 1, 16, 16)


def _denoising(name: str) -> Built:
    kind = getattr(importlib.import_module("denoising_diffusion_pytorch"), name)
    if name == "KarrasUnet":
        return kind(image_size=32, dim=32, dim_max=64, num_downsamples=1), (
            _noise(2, 4, 32, 32),
            torch.rand(2),
        )
    more = {"channels": 3} if name == "Unet1D" else {}
    return kind(dim=16, dim_mults=(1, 2), **more), (
        _noise(2, 3, *(32,) * (1 if more else 2)),
        torch.tensor([3, 4]),
    )


def _performer(name: str) -> Built:
    kind = getattr(importlib.import_module("performer_pytorch"), name)
    return kind(num_tokens=100, max_seq_len=32, dim=64, depth=2, heads=4, dim_head=16), torch.randint(
        0, 100, (2, 32)
    )


_LIBRARIES: dict[str, tuple[list[str], Callable[[str], Built]]] = {
    "diffusers": ([*_DIFFUSERS], _diffusers),
    "monai": ([*_MONAI], _monai),
    "segmentation_models_pytorch": (_SEGMENTATION, _segmentation),
    "open_clip": (_CLIP, _open_clip),
    "ultralytics": (_YOLO, _ultralytics),
    "pytorchvideo": ([*_CLIPS, "slowfast_r50"], _pytorchvideo),
    "kornia": (["LoFTR", "HardNet"], _kornia),
    "vit_pytorch": ([*_VIT], _vit_pytorch),
    "dynamic_network_architectures": (_UNETS, _nnunet),
    "torchsr": (_RESOLUTION, _torchsr),
    "torch_geometric": (_GRAPHS, _torch_geometric),
    "efficientnet_pytorch": (["efficientnet-b0"], _efficientnet),
    "spandrel": ([*_RESTORATION], _spandrel),
    "x_transformers": ([*_DECODERS], _x_transformers),
    "neuralop": (["FNO"], _neuralop),
    "denoising_diffusion_pytorch": (["Unet", "Unet1D", "KarrasUnet"], _denoising),
    "performer_pytorch": (["PerformerLM"], _performer),
}
NAMES = [f"{library}/{name}" for library, (names, _) in _LIBRARIES.items() for name in names]


def build(name: str) -> Built:
    """One model and inputs for it (a tensor, a tuple or a dict), both seeded."""
    torchvision_models()  # some of the libraries import torchvision
    library, _, name = name.partition("/")
    torch.manual_seed(0)
    model, inputs = _LIBRARIES[library][1](name)
    fill_zero_weights(model)
    return model.eval(), inputs
