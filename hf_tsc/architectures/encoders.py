"""Tiny backbones and dual encoders of images (or videos) and texts."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel

from hf_tsc.architectures.variants import variant

PICTURE: dict[str, Any] = {"image_size": 16, "patch_size": 4}
TOKENS: dict[str, Any] = {
    **{"vocab_size": 40, "max_position_embeddings": 12},
    **{"pad_token_id": 1, "bos_token_id": 38, "eos_token_id": 39, "sep_token_id": 39},
}
WIDE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}

VISION = {**PICTURE, **WIDE, "intermediate_size": 48}
TEXT = {**TOKENS, **NARROW, "intermediate_size": 40}
WIDE_TEXT = {**TOKENS, **WIDE, "intermediate_size": 40}  # where a text is compared with an image without projections
JOINT: dict[str, Any] = {"vision_config": VISION, "text_config": TEXT, "projection_dim": 20}


@variant("vit+pool")
def vit_pool() -> PreTrainedModel:
    return transformers.ViTModel(transformers.ViTConfig(**VISION))


@variant("vit_mae")
def vit_mae() -> PreTrainedModel:
    return transformers.ViTMAEModel(transformers.ViTMAEConfig(**VISION))


@variant("dinov3_vit")
def dinov3_vit() -> PreTrainedModel:
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VISION, num_register_tokens=2))


@variant("dinov3_vit(gated)")
def dinov3_vit_gated() -> PreTrainedModel:
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VISION, use_gated_mlp=True))


@variant("pixio")
def pixio() -> PreTrainedModel:
    return transformers.PixioModel(transformers.PixioConfig(**PICTURE, **WIDE, n_cls_tokens=3))


@variant("aimv2_vision_model")
def aimv2_vision_model() -> PreTrainedModel:
    return transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**VISION))


@variant("mlcd")
def mlcd() -> PreTrainedModel:
    return transformers.MLCDVisionModel(transformers.MLCDVisionConfig(**VISION))


@variant("vitpose_backbone")
def vitpose_backbone() -> PreTrainedModel:
    # the patch convolution pads by 2: patches above 4 pixels, or there are more of them than positions
    config = transformers.VitPoseBackboneConfig(**WIDE, image_size=(32, 24), patch_size=(8, 8))
    return transformers.VitPoseBackbone(config)


@variant("clip(cls)")
def clip_vision() -> PreTrainedModel:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))


@variant("siglip_vision_model")
def siglip_vision_model() -> PreTrainedModel:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))


@variant("shieldgemma2(vision)")
def shieldgemma2_vision() -> PreTrainedModel:
    config = transformers.ShieldGemma2Config(vision_config={"model_type": "siglip_vision_model", **VISION})
    return transformers.AutoModel.from_config(config.vision_config)


@variant("dinov3_convnext")
def dinov3_convnext() -> PreTrainedModel:
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 2, 1], image_size=64)
    return transformers.DINOv3ConvNextModel(config)


@variant("clip")
def clip() -> PreTrainedModel:
    return transformers.CLIPModel(transformers.CLIPConfig(**JOINT))


@variant("metaclip_2")
def metaclip_2() -> PreTrainedModel:
    return transformers.MetaClip2Model(transformers.MetaClip2Config(**JOINT))


@variant("altclip")
def altclip() -> PreTrainedModel:
    text = {**TEXT, "project_dim": 28}
    config = transformers.AltCLIPConfig(vision_config=VISION, text_config=text, projection_dim=20)
    return transformers.AltCLIPModel(config)


@variant("chinese_clip")
def chinese_clip() -> PreTrainedModel:
    return transformers.ChineseCLIPModel(transformers.ChineseCLIPConfig(**JOINT))


@variant("clipseg")
def clipseg() -> PreTrainedModel:
    return transformers.CLIPSegModel(transformers.CLIPSegConfig(**JOINT))


@variant("clipseg(decoder)")
def clipseg_decoder() -> PreTrainedModel:
    decoder: dict[str, Any] = {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 12}
    config = transformers.CLIPSegConfig(**JOINT, **decoder, reduce_dim=8, extract_layers=[0, 1])
    return transformers.CLIPSegForImageSegmentation(config)


@variant("siglip")
def siglip() -> PreTrainedModel:
    # no visual projection: the text head makes vectors as wide as the image tower
    text = {**TEXT, "projection_size": VISION["hidden_size"]}
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=text))


@variant("siglip2")
def siglip2() -> PreTrainedModel:
    vision = {**VISION, "num_patches": 16}
    text = {**TEXT, "projection_size": VISION["hidden_size"]}
    return transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=text))


@variant("align")
def align() -> PreTrainedModel:
    vision = {
        **{"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 1.0},
        **{"in_channels": [32, 32, 64], "out_channels": [32, 64, 96], "kernel_sizes": [3, 3, 5]},
        **{"strides": [1, 2, 2], "num_block_repeats": [1, 2, 2], "expand_ratios": [1, 4, 4]},
        "hidden_dim": 16,  # the window of the final pooling: at least as large as the last feature map
    }
    # no visual projection: the joint space is the last stage, a quarter of 96 channels wide
    config = transformers.AlignConfig(vision_config=vision, text_config=TEXT, projection_dim=24)
    return transformers.AlignModel(config)


@variant("blip")
def blip() -> PreTrainedModel:
    return transformers.BlipModel(transformers.BlipConfig(**JOINT))


@variant("blip(itm)")
def blip_itm() -> PreTrainedModel:
    return transformers.BlipForImageTextRetrieval(transformers.BlipConfig(**JOINT, image_text_hidden_size=16))


@variant("blip-2")
def blip_2() -> PreTrainedModel:
    queries = {**TEXT, "use_qformer_text_input": True}
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=queries, num_query_tokens=5, image_text_hidden_size=16
    )
    return transformers.Blip2ForImageTextRetrieval(config)


@variant("tipsv2")
def tipsv2() -> PreTrainedModel:
    config = transformers.Tipsv2Config(vision_config={**PICTURE, **WIDE}, text_config=WIDE_TEXT)
    return transformers.Tipsv2Model(config)


@variant("videoprism")
def videoprism() -> PreTrainedModel:
    layers = {"num_spatial_layers": 1, "num_temporal_layers": 1, "num_auxiliary_layers": 1}
    vision = {**VISION, **layers, "num_frames": 3, "tubelet_size": (1, 4, 4)}
    config = transformers.VideoPrismConfig(vision_config=vision, text_config=WIDE_TEXT)
    return transformers.VideoPrismClipModel(config)


@variant("aimv2")  # RMSNorm in float32
def aimv2() -> PreTrainedModel:
    return transformers.Aimv2Model(transformers.Aimv2Config(**JOINT))


@variant("owlvit")
def owlvit() -> PreTrainedModel:
    return transformers.OwlViTModel(transformers.OwlViTConfig(**JOINT))


@variant("x_clip")
def x_clip() -> PreTrainedModel:
    integration = {"mit_hidden_size": 32, "mit_num_attention_heads": 4, "mit_intermediate_size": 40}
    vision = {**VISION, **integration, "num_frames": 3}
    config = transformers.XCLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=32)
    return transformers.XCLIPModel(config)


@variant("vision_text_dual_encoder")
def vision_text_dual_encoder() -> PreTrainedModel:
    vision, text = transformers.ViTConfig(**VISION), transformers.BertConfig(**TEXT)
    config = transformers.VisionTextDualEncoderConfig(vision_config=vision, text_config=text, projection_dim=20)
    return transformers.VisionTextDualEncoderModel(config)
