"""Models of torchvision and timm: their names, and `build(library, name)`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.zoo.seeded import torchvision_models

NAMES = (
    "resnet50 mobilenet_v2 mobilenet_v3_large vgg16_bn densenet121 efficientnet_b0 inception_v3 googlenet squeezenet1_0 "
    "shufflenet_v2_x1_0 resnext50_32x4d regnet_y_400mf convnext_tiny vit_b_32 swin_t"
).split()

TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet1_0 mobilenet_v2 "
    "mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x1_0 squeezenet1_1 swin_t "
    "swin_v2_t vgg11 vgg11_bn vit_b_32 wide_resnet50_2 "
    "deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large "
    "mc3_18 mvit_v1_b mvit_v2_s r2plus1d_18 r3d_18 s3d swin3d_t "
    "fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn keypointrcnn_resnet50_fpn "
    "maskrcnn_resnet50_fpn retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 ssd300_vgg16 ssdlite320_mobilenet_v3_large "
    "raft_small raft_large"
).split()
"""The smallest model of each family."""

TIMM = (
    "beit_base_patch16_224 halonet_h1 mobileone_s1 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_atto_rms "
    "cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 "
    "densenet121 dla34 dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientvim_m1 "
    "efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny "
    "gemma4_vit_167m ghostnet_100 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t "
    "inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 mambaout_femto "
    "maxvit_pico_rw_256 poolformerv2_s12 gmlp_ti16_224 mobilenetv3_large_100 mobilenetv5_base mobilevit_xxs mvitv2_tiny "
    "naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 pit_ti_224 pnasnet5large pvt_v2_b0 "
    "qwen3_vit_88m rdnet_tiny regnetx_008 repghostnet_100 repvit_m1 res2next50 resnest14d resnet18 resnetv2_18 rexnet_100 "
    "selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224 "
    "swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 "
    "visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224 samvit_base_patch16_224 "
    "vitamin_small_224 volo_d1_224 ese_vovnet19b_dw legacy_xception xception41p xcit_nano_12_p8_224"
).split()
"""One small model of each of timm's module files."""

CLASSES = 1000
_DETECTORS = ("rcnn", "fcos", "retinanet", "ssd")
_REGIONS = {f"rpn_{when}_nms_top_n_{mode}": 40 for when in ("pre", "post") for mode in ("train", "test")}
_FEW = {  # candidates of random weights are many, and suppressing them in Python is slow
    "rcnn": {**_REGIONS, "box_detections_per_img": 10},
    **{kind: {"topk_candidates": 40, "detections_per_img": 20} for kind in ("fcos", "retinanet", "ssd")},
}
_VIDEOS = ("mc3", "mvit", "r2plus1d", "r3d", "s3d", "swin3d")
_UNINITIALISED = ("inception_v3", "googlenet")  # their own initialisation takes a minute
_SMALLER = {
    "gemma4_vit_167m": 192,
    "qwen3_vit_88m": 192,
    "deepseek_vit_412m": 224,
}  # pictures of 768 pixels take minutes


def build(library: str, name: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """One model and inputs for it; `options` go to torchvision's constructor."""
    return _timm(name) if library == "timm" else _torchvision(name, options)


def _torchvision(name: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    models = torchvision_models()
    builder = models.get_model_builder(name)
    if name in _UNINITIALISED:
        options = {"init_weights": False, **options}
    known = inspect.signature(builder).parameters
    options |= {key: None for key in ("weights", "weights_backbone") if key in known}
    options |= next((few for kind, few in _FEW.items() if kind in name), {})
    model: nn.Module = builder(**options)
    if any(kind in name for kind in _DETECTORS):
        size = 320 if "320" in name else 300
        for part in model.modules():
            if hasattr(part, "score_thresh"):
                part.score_thresh = (
                    0.0  # random weights are sure of nothing; a detector that finds nothing hides its heads
                )
            if hasattr(part, "min_size") and hasattr(part, "max_size"):
                part.min_size, part.max_size = (size,), size
        return model, ([torch.rand(3, size, size)],)
    if "raft" in name:
        return model, tuple(torch.rand(1, 3, 128, 128) for _ in range(2))
    if name.startswith(_VIDEOS):
        frames = 14 if name == "s3d" else 16 if name.startswith("mvit") else 8
        return model, torch.randn(1, 3, frames, *(2 * (224 if name.startswith(("mvit", "s3d")) else 112,)))
    size = 299 if name == "inception_v3" else 224
    return model, torch.randn(1, 3, size, size)


def _timm(name: str) -> tuple[nn.Module, Tensor]:
    torchvision_models()  # timm imports torchvision
    timm = importlib.import_module("timm")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES)
    size = model.pretrained_cfg["input_size"]
    if name in _SMALLER:
        size = (3, _SMALLER[name], _SMALLER[name])
    return model, torch.randn(1, *size)
