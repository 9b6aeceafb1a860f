"""build(name) -> (a small transformers model in eval mode with seeded random weights, keyword inputs of batch
2); no downloads.

Every row of `ROWS` is one architecture: the class with its head, the inputs, and the sizes in which it
differs from its kin. The shapes are those of the real models, only smaller: few layers, narrow, and so few
words and classes that the body holds most of the parameters. Sizes that mean different things are different
numbers where the architecture allows it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.zoo.seeded import fill_zero_weights, torchvision_models

BATCH = 2
CLASSES = 10
VOCAB = 300
EOS = VOCAB - 1  # every text ends with it; ids below 3 are left to padding and the like
LENGTH = 12  # of a text
IMAGE = 64  # height and width
FRAMES = 4  # of a video
MELS = 40  # frequencies of a spectrogram
# of the weights; the usual 0.02 is for layers ten times as wide, and would let the signal fade in these
SPREAD = 0.06
Inputs = Callable[[], dict[str, Tensor]]
Options = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One architecture: the name of its class in transformers, what makes its inputs, and the options of its
    config.
    """

    model: str
    inputs: Inputs
    options: Options


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """One model of `NAMES` and keyword inputs for it, both seeded."""
    torchvision_models()  # some files of transformers import torchvision
    transformers = importlib.import_module("transformers")
    row = ROWS[name]
    model_class = getattr(transformers, row.model)
    torch.manual_seed(0)
    model: nn.Module = model_class(model_class.config_class(num_labels=CLASSES, **row.options))
    fill_zero_weights(model)
    _settle_norms(model, row.inputs)
    return model.eval(), row.inputs()


def _settle_norms(model: nn.Module, inputs: Inputs) -> None:
    """Batch norms as after training, with statistics of a few batches: else the signal fades on its way
    through random layers.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the average over all batches
    with torch.no_grad():
        for _ in range(8 if norms else 0):
            model.train()(**inputs())
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


# inputs


def _ids(length: int = LENGTH) -> Tensor:
    ids = torch.randint(3, EOS, (BATCH, length))
    ids[:, -1] = EOS
    return ids


def _pixels(size: int = IMAGE) -> Tensor:
    return torch.randn(BATCH, 3, size, size)


def _text() -> dict[str, Tensor]:
    return {"input_ids": _ids()}


def _text_to_text() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(LENGTH - 4)}


def _text_from_one_word() -> dict[str, Tensor]:
    return {
        "input_ids": _ids(),
        "global_attention_mask": (torch.arange(LENGTH) == 0).long().expand(BATCH, -1).clone(),
    }


def _text_on_page() -> dict[str, Tensor]:
    corner, size = torch.randint(0, 16, (BATCH, LENGTH, 2)), torch.randint(1, 12, (BATCH, LENGTH, 2))
    return {"input_ids": _ids(), "bbox": torch.cat([corner, corner + size], dim=-1)}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": _pixels()}


def _large_image() -> dict[str, Tensor]:
    return {"pixel_values": _pixels(2 * IMAGE)}


def _video() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, FRAMES, 3, IMAGE, IMAGE)}


def _image_and_text() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "pixel_values": _pixels()}


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, 1600)}


def _wave_to_text() -> dict[str, Tensor]:
    return {**_wave(), "decoder_input_ids": _ids(LENGTH - 4)}


def _spectrogram() -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, 50, MELS)}


def _spectrogram_to_text() -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, MELS, 50), "decoder_input_ids": _ids(LENGTH - 4)}


# sizes that rows share

BODY = {
    "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 320,
    "initializer_range": SPREAD,
}  # fmt: skip
WORDS = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
ENCODER = {**BODY, **WORDS}
DECODER = {**ENCODER, "use_cache": False}
GROUPED = {**DECODER, "num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 32}  # the heads together are wider than the hidden size
TWO_STACKS = {
    "d_model": 96, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 320,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 288, "init_std": SPREAD,
}  # fmt: skip
TRANSLATOR = {**WORDS, **TWO_STACKS, "decoder_start_token_id": 0, "use_cache": False}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 96,
    "d_kv": 24,
    "d_ff": 320,
    "num_layers": 2,
    "num_heads": 4,
    "use_cache": False,
}
WAVE = {
    **BODY, "vocab_size": 32, "conv_dim": (48, 48, 48, 48), "conv_stride": (5, 2, 2, 2), "conv_kernel": (10, 3, 3, 2),
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 56,
}  # fmt: skip
PATCHES = {**BODY, "image_size": IMAGE, "patch_size": 8}
WINDOWS = {
    "image_size": IMAGE, "embed_dim": 32, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "window_size": 4,
    "initializer_range": SPREAD,
}  # fmt: skip
PYRAMID = {
    "depths": (1, 1, 2, 1), "hidden_sizes": (24, 48, 80, 128), "num_attention_heads": (1, 2, 5, 8), "initializer_range": SPREAD,
}  # fmt: skip
STAGES = {"depths": (2, 2, 2, 2), "hidden_sizes": (32, 48, 80, 128), "initializer_range": SPREAD}
BOTTLENECKS = {"embedding_size": 32, "depths": (1, 2, 2, 1), "hidden_sizes": (64, 96, 160, 224)}
RESNET_BACKBONE = {"model_type": "resnet", **BOTTLENECKS, "out_features": ["stage4"]}
SWIN_BACKBONE = {
    **WINDOWS, "model_type": "swin", "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "embed_dim": 24,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
SHORT_TEXTS = {**ENCODER, "hidden_size": 72, "num_hidden_layers": 2, "intermediate_size": 224}


def _row(model: str, inputs: Inputs, shared: Options, /, **options: Any) -> Row:
    return Row(model, inputs, {**shared, **options})


ROWS = {
    # text encoders
    "bert": _row("BertForSequenceClassification", _text, ENCODER),
    "roberta": _row("RobertaForSequenceClassification", _text, ENCODER),
    "xlm-roberta": _row("XLMRobertaForTokenClassification", _text, ENCODER),
    "deberta-v2": _row(
        "DebertaV2ForSequenceClassification", _text, ENCODER, relative_attention=True, position_buckets=8, share_att_key=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, norm_rel_ebd="layer_norm",
    ),
    "albert": _row("AlbertForSequenceClassification", _text, ENCODER, embedding_size=40),
    "electra": _row("ElectraForSequenceClassification", _text, ENCODER, embedding_size=40),
    "mpnet": _row("MPNetForSequenceClassification", _text, ENCODER),
    "modernbert": _row(
        "ModernBertForSequenceClassification", _text, ENCODER, local_attention=8, cls_token_id=1, sep_token_id=EOS,
    ),
    "distilbert": _row(
        "DistilBertForSequenceClassification", _text, WORDS, dim=96, n_layers=3, n_heads=4, hidden_dim=320,
        initializer_range=SPREAD,
    ),
    "squeezebert": _row("SqueezeBertForSequenceClassification", _text, ENCODER, embedding_size=96, num_hidden_layers=4),
    "mobilebert": _row(
        "MobileBertForSequenceClassification", _text, ENCODER, embedding_size=40, intra_bottleneck_size=64,
    ),
    "convbert": _row("ConvBertForSequenceClassification", _text, ENCODER, embedding_size=40, conv_kernel_size=5),
    "rembert": _row("RemBertForMaskedLM", _text, ENCODER, input_embedding_size=40, output_embedding_size=112),
    "funnel": _row(
        "FunnelForTokenClassification", _text, {"vocab_size": VOCAB}, block_sizes=(1, 2), num_decoder_layers=1, d_model=96,
        n_head=4, d_head=24, d_inner=320,
    ),
    "longformer": _row("LongformerForTokenClassification", _text_from_one_word, ENCODER, attention_window=4),
    "nystromformer": _row(
        "NystromformerForSequenceClassification", _text, ENCODER, num_landmarks=4, segment_means_seq_len=LENGTH,
        conv_kernel_size=5,
    ),
    "layoutlm": _row("LayoutLMForSequenceClassification", _text_on_page, ENCODER, max_2d_position_embeddings=28),
    # text decoders
    "gpt2": _row(
        "GPT2LMHeadModel", _text, WORDS, n_embd=96, n_layer=3, n_head=4, n_inner=320, initializer_range=SPREAD, use_cache=False,
    ),
    "gpt-neox": _row("GPTNeoXForCausalLM", _text, DECODER),
    "opt": _row("OPTForCausalLM", _text, DECODER, ffn_dim=320, init_std=SPREAD),
    "bloom": _row("BloomForCausalLM", _text, DECODER),
    "falcon": _row("FalconForCausalLM", _text, DECODER, ffn_hidden_size=320),
    "llama": _row("LlamaForCausalLM", _text, GROUPED),
    "mistral": _row("MistralForCausalLM", _text, GROUPED, sliding_window=8),
    "qwen2": _row("Qwen2ForCausalLM", _text, GROUPED),
    "qwen3": _row("Qwen3ForCausalLM", _text, WIDE_HEADS),
    "gemma2": _row("Gemma2ForCausalLM", _text, WIDE_HEADS, sliding_window=8, query_pre_attn_scalar=32),
    "gemma3": _row(
        "Gemma3ForCausalLM", _text, WIDE_HEADS, sliding_window=8, query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "phi3": _row("Phi3ForCausalLM", _text, GROUPED),
    "olmo2": _row("Olmo2ForCausalLM", _text, GROUPED),
    "starcoder2": _row("Starcoder2ForCausalLM", _text, GROUPED),
    "granite": _row("GraniteForCausalLM", _text, GROUPED),
    "cohere": _row("CohereForCausalLM", _text, GROUPED),
    "mixtral": _row("MixtralForCausalLM", _text, GROUPED, intermediate_size=160, num_local_experts=4),
    "qwen2_moe": _row(
        "Qwen2MoeForCausalLM", _text, GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
        shared_expert_intermediate_size=160,
    ),
    "mamba": _row("MambaForCausalLM", _text, DECODER),
    # text to text
    "t5": _row("T5ForConditionalGeneration", _text_to_text, T5),
    "mt5": _row("MT5ForConditionalGeneration", _text_to_text, T5, num_heads=6),
    "bart": _row("BartForConditionalGeneration", _text_to_text, TRANSLATOR),
    "marian": _row("MarianMTModel", _text_to_text, TRANSLATOR, scale_embedding=True),
    "pegasus": _row("PegasusForConditionalGeneration", _text_to_text, TRANSLATOR, scale_embedding=True),
    # audio
    "whisper": _row(
        "WhisperForConditionalGeneration", _spectrogram_to_text, TRANSLATOR, num_mel_bins=MELS, max_source_positions=25,
        max_target_positions=48,
    ),
    "wav2vec2": _row("Wav2Vec2ForCTC", _wave, WAVE),
    "hubert": _row("HubertForSequenceClassification", _wave, WAVE),
    "speecht5": _row("SpeechT5ForSpeechToText", _wave_to_text, {**WAVE, **TRANSLATOR}, max_text_positions=48),
    "ast": _row("ASTForAudioClassification", _spectrogram, BODY, patch_size=8, max_length=50, num_mel_bins=MELS),
    # pictures: transformers
    "vit": _row("ViTForImageClassification", _image, PATCHES),
    "deit": _row("DeiTForImageClassificationWithTeacher", _image, PATCHES),
    "dinov2": _row("Dinov2ForImageClassification", _image, PATCHES, mlp_ratio=3),
    "beit": _row("BeitForImageClassification", _image, PATCHES, use_relative_position_bias=True),
    "videomae": _row("VideoMAEForVideoClassification", _video, PATCHES, num_frames=FRAMES),
    "swin": _row("SwinForImageClassification", _image, WINDOWS),
    "swinv2": _row("Swinv2ForImageClassification", _image, WINDOWS),
    "segformer": _row("SegformerForSemanticSegmentation", _image, PYRAMID, decoder_hidden_size=64),
    "pvt_v2": _row("PvtV2ForImageClassification", _image, PYRAMID, mlp_ratios=(4, 4, 4, 4)),
    "levit": _row(
        "LevitForImageClassificationWithTeacher", _large_image, {}, image_size=2 * IMAGE, hidden_sizes=(64, 96, 144),
        num_attention_heads=(2, 3, 4), depths=(2, 2, 2), initializer_range=SPREAD,
    ),
    "cvt": _row(
        "CvtForImageClassification", _image, {}, embed_dim=(32, 64, 112), num_heads=(1, 2, 4), depth=(1, 2, 3),
        initializer_range=SPREAD,
    ),
    "sam": _row("SamVisionModel", _image, PATCHES, mlp_dim=320, output_channels=56, window_size=3, global_attn_indexes=(2,)),
    "yolos": _row("YolosForObjectDetection", _image, PATCHES, image_size=(IMAGE, IMAGE), num_detection_tokens=14),
    "dpt": _row(
        "DPTForDepthEstimation", _image, PATCHES, num_hidden_layers=4, backbone_out_indices=(0, 1, 2, 3),
        neck_hidden_sizes=(24, 48, 80, 112), fusion_hidden_size=64,
    ),
    "detr": _row("DetrForObjectDetection", _large_image, TWO_STACKS, backbone_config=RESNET_BACKBONE, num_queries=14),
    "mask2former": _row(
        "Mask2FormerForUniversalSegmentation", _large_image, {}, backbone_config=SWIN_BACKBONE, hidden_dim=96, feature_size=96,
        mask_feature_size=56, num_attention_heads=6, encoder_layers=2, encoder_feedforward_dim=320, decoder_layers=3,
        dim_feedforward=288, num_queries=14,
    ),
    # pictures: convolutions
    "resnet": _row("ResNetForImageClassification", _image, BOTTLENECKS),
    "regnet": _row("RegNetForImageClassification", _image, BOTTLENECKS, groups_width=16),
    "convnext": _row("ConvNextForImageClassification", _image, STAGES, layer_scale_init_value=0.5),
    "convnextv2": _row("ConvNextV2ForImageClassification", _image, STAGES),
    "poolformer": _row("PoolFormerForImageClassification", _image, STAGES, layer_scale_init_value=0.5),
    "mobilevit": _row(
        "MobileViTForImageClassification", _large_image, {}, image_size=2 * IMAGE, hidden_sizes=(48, 64, 80),
        neck_hidden_sizes=(16, 24, 32, 48, 56, 72, 160), initializer_range=SPREAD,
    ),
    "mobilenet_v2": _row(
        "MobileNetV2ForImageClassification", _image, {}, image_size=IMAGE, depth_multiplier=0.5, initializer_range=SPREAD,
    ),
    "efficientnet": _row(
        "EfficientNetForImageClassification", _image, {}, image_size=IMAGE, width_coefficient=0.5, depth_coefficient=0.5,
        hidden_dim=640, initializer_range=0.2,
    ),
    # pictures and text
    "clip": _row("CLIPModel", _image_and_text, {}, vision_config=PATCHES, text_config=SHORT_TEXTS, projection_dim=56),
    "siglip": _row(
        "SiglipModel", _image_and_text, {}, vision_config=PATCHES, text_config={**SHORT_TEXTS, "projection_size": 96},
    ),
    "blip": _row("BlipForConditionalGeneration", _image_and_text, {}, vision_config=PATCHES, text_config=SHORT_TEXTS),
}  # fmt: skip
NAMES = tuple(ROWS)
