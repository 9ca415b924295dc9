"""Tiny image classifiers: one of every type of transformers, and of every setting that changes its symmetry."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from hf_tsc.architectures.variants import variant

# Sizes differ wherever they can, so that an axis taken for another one does not fit.
PICTURE = {"image_size": 16, "patch_size": 4}
WIDTH = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
VISION = {**WIDTH, **PICTURE, "intermediate_size": 48}
DINO = {**WIDTH, **PICTURE, "mlp_ratio": 4}  # these have no intermediate_size
WINDOWS = {
    # 16, 8 and 4 patches wide: the first two stages shift their windows, the last one is a single window
    "image_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [2, 2, 2],
    "num_heads": [2, 4, 4],
}
FOUR_STAGES = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1]}
PYRAMID = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 2, 1, 1],
    "num_attention_heads": [1, 2, 3, 4],
    "mlp_ratios": [2, 2, 2, 2],
}
REGNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "groups_width": 8}
BIT = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "num_groups": 2}
FOCAL = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 2, 1],
    "focal_levels": [2, 2, 2],
    "focal_windows": [3, 3, 3],
}
HGNET = {
    "stem_channels": [3, 8, 12],
    "hidden_sizes": [16, 24],
    "depths": [1, 2],  # only their number is read: that of the stages
    "stage_in_channels": [12, 16],
    "stage_mid_channels": [8, 10],
    "stage_out_channels": [16, 24],
    "stage_num_blocks": [1, 2],  # the second block of a stage is residual
    "stage_downsample": [False, True],
    "stage_downsample_strides": [2, 2],
    "stage_light_block": [False, True],
    "stage_kernel_size": [3, 5],
    "stage_numb_of_layers": [3, 2],
}
LEVIT = {
    "image_size": 128,  # at 64 the last stage has one token: its attention does nothing
    "hidden_sizes": [16, 24, 32],
    "num_attention_heads": [2, 3, 4],
    "depths": [1, 2, 1],
    "key_dim": [4, 4, 4],
}
PERCEIVER = {
    "num_latents": 6,
    "d_latents": 16,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,  # the cross attention is as wide as the inputs: 261 channels in `fourier`
}


def _classifier(model_type: str, architecture: str | None = None, /, **settings: Any) -> PreTrainedModel:
    """The classifier of a model type; `architecture` is the class, which must be named where the type has several."""
    if architecture is not None:
        settings["architectures"] = [architecture]
    config = AutoConfig.for_model(model_type, num_labels=10, **settings)
    return AutoModelForImageClassification.from_config(config)


# Plain vision transformers


@variant("vit")
def vit() -> PreTrainedModel:
    return _classifier("vit", **VISION)


@variant("deit")
def deit() -> PreTrainedModel:
    return _classifier("deit", "DeiTForImageClassification", **VISION)


@variant("deit-teacher")
def deit_teacher() -> PreTrainedModel:
    return _classifier("deit", "DeiTForImageClassificationWithTeacher", **VISION)


@variant("vit_msn")
def vit_msn() -> PreTrainedModel:
    return _classifier("vit_msn", **VISION)


@variant("ijepa")
def ijepa() -> PreTrainedModel:
    return _classifier("ijepa", **VISION)


@variant("beit(abs)")
def beit_absolute() -> PreTrainedModel:
    return _classifier("beit", use_absolute_position_embeddings=True, **VISION)


@variant("beit(relpos)")
def beit_relative() -> PreTrainedModel:
    return _classifier("beit", use_relative_position_bias=True, **VISION)


@variant("beit(shared-relpos)")
def beit_shared() -> PreTrainedModel:
    return _classifier("beit", use_shared_relative_position_bias=True, **VISION)


@variant("data2vec-vision")
def data2vec_vision() -> PreTrainedModel:
    return _classifier("data2vec-vision", use_relative_position_bias=True, **VISION)


@variant("dinov2")
def dinov2() -> PreTrainedModel:
    return _classifier("dinov2", **DINO)


@variant("dinov2(swiglu)")
def dinov2_swiglu() -> PreTrainedModel:
    return _classifier("dinov2", use_swiglu_ffn=True, **DINO)


@variant("dinov2_with_registers")
def dinov2_with_registers() -> PreTrainedModel:
    return _classifier("dinov2_with_registers", **DINO)


@variant("imagegpt")
def imagegpt() -> PreTrainedModel:
    return _classifier("imagegpt", vocab_size=20, n_positions=16, n_embd=32, n_layer=2, n_head=4)


# The vision halves of dual encoders


@variant("clip(img-cls)")
def clip() -> PreTrainedModel:
    return _classifier("clip", vision_config=VISION)


@variant("metaclip_2(img-cls)")
def metaclip_2() -> PreTrainedModel:
    return _classifier("metaclip_2", vision_config=VISION)


@variant("siglip(img-cls)")
def siglip() -> PreTrainedModel:
    return _classifier("siglip", vision_config=VISION)


@variant("siglip2(img-cls)")
def siglip2() -> PreTrainedModel:
    return _classifier("siglip2", vision_config={**WIDTH, "intermediate_size": 48, "patch_size": 4, "num_patches": 16})


# Vision transformers in stages


@variant("swin")
def swin() -> PreTrainedModel:
    return _classifier("swin", **WINDOWS)


@variant("swinv2")
def swinv2() -> PreTrainedModel:
    return _classifier("swinv2", **WINDOWS)


@variant("donut-swin")
def donut_swin() -> PreTrainedModel:
    return _classifier("donut-swin", **WINDOWS)


@variant("hiera")
def hiera() -> PreTrainedModel:
    # 64 pixels are 16 by 16 patches: four masked units, which the first two stages attend within
    return _classifier(
        "hiera", image_size=[64, 64], embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], mlp_ratio=2.0
    )


@variant("cvt")
def cvt() -> PreTrainedModel:
    # stage s reads its drop path rates at the index s, so that it must have more than s layers
    return _classifier("cvt", embed_dim=[8, 16, 24], num_heads=[1, 2, 3], depth=[1, 2, 3])


@variant("pvt")
def pvt() -> PreTrainedModel:
    return _classifier("pvt", image_size=64, **PYRAMID)


@variant("pvt_v2")
def pvt_v2() -> PreTrainedModel:
    return _classifier("pvt_v2", image_size=64, **PYRAMID)


@variant("pvt_v2(linear)")
def pvt_v2_linear() -> PreTrainedModel:
    return _classifier("pvt_v2", image_size=64, linear_attention=True, **PYRAMID)


@variant("segformer")
def segformer() -> PreTrainedModel:
    return _classifier("segformer", **PYRAMID)


@variant("levit")
def levit() -> PreTrainedModel:
    return _classifier("levit", "LevitForImageClassification", **LEVIT)


@variant("levit-teacher")
def levit_teacher() -> PreTrainedModel:
    return _classifier("levit", "LevitForImageClassificationWithTeacher", **LEVIT)


@variant("mobilevit")
def mobilevit() -> PreTrainedModel:
    # at 64 pixels the last stage has one patch: its attention does nothing
    return _classifier(
        "mobilevit", image_size=128, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 12, 12, 16, 16, 24]
    )


@variant("mobilevitv2")
def mobilevitv2() -> PreTrainedModel:
    # the attention widths are multiplied too: 8, 16, 24
    return _classifier(
        "mobilevitv2",
        image_size=128,
        width_multiplier=0.25,
        n_attn_blocks=[1, 2, 1],
        base_attn_unit_dims=[32, 64, 96],
    )


@variant("swiftformer")
def swiftformer() -> PreTrainedModel:
    # the last layer of a stage attends, those before are convolutional
    return _classifier("swiftformer", image_size=64, embed_dims=[8, 12, 16, 20], depths=[2, 1, 2, 1], mlp_ratio=2)


@variant("focalnet")
def focalnet() -> PreTrainedModel:
    return _classifier("focalnet", **FOCAL)


@variant("focalnet(full)")
def focalnet_full() -> PreTrainedModel:
    return _classifier(
        "focalnet",
        use_conv_embed=True,
        use_layerscale=True,
        use_post_layernorm=True,
        use_post_layernorm_in_modulation=True,
        normalize_modulator=True,
        **FOCAL,
    )


@variant("poolformer")
def poolformer() -> PreTrainedModel:
    return _classifier("poolformer", **FOUR_STAGES)


@variant("perceiver(learned)")
def perceiver_learned() -> PreTrainedModel:
    return _classifier("perceiver", "PerceiverForImageClassificationLearned", image_size=8, **PERCEIVER)


@variant("perceiver(fourier)")
def perceiver_fourier() -> PreTrainedModel:
    return _classifier("perceiver", "PerceiverForImageClassificationFourier", image_size=8, **PERCEIVER)


@variant("perceiver(conv)")
def perceiver_conv() -> PreTrainedModel:
    # the convolution makes 32 pixels 8
    return _classifier("perceiver", "PerceiverForImageClassificationConvProcessing", image_size=32, **PERCEIVER)


# Convolutional networks


@variant("resnet(bottleneck)")
def resnet_bottleneck() -> PreTrainedModel:
    return _classifier("resnet", embedding_size=8, hidden_sizes=[16, 24, 32], depths=[1, 2, 2])


@variant("resnet(basic)")
def resnet_basic() -> PreTrainedModel:
    # the first stage is as wide as the stem and has no shortcut, as in ResNet-18: the two are one stream
    return _classifier("resnet", layer_type="basic", embedding_size=8, hidden_sizes=[8, 16, 24], depths=[2, 2, 2])


@variant("regnet(x)")
def regnet_x() -> PreTrainedModel:
    return _classifier("regnet", layer_type="x", **REGNET)


@variant("regnet(y)")
def regnet_y() -> PreTrainedModel:
    return _classifier("regnet", layer_type="y", **REGNET)


@variant("bit(preact)")
def bit_preactivation() -> PreTrainedModel:
    return _classifier("bit", layer_type="preactivation", **BIT)


@variant("bit(bottleneck)")
def bit_bottleneck() -> PreTrainedModel:
    return _classifier("bit", layer_type="bottleneck", **BIT)


@variant("convnext")
def convnext() -> PreTrainedModel:
    return _classifier("convnext", image_size=64, **FOUR_STAGES)


@variant("convnextv2")
def convnextv2() -> PreTrainedModel:
    return _classifier("convnextv2", image_size=64, **FOUR_STAGES)


@variant("efficientnet")
def efficientnet() -> PreTrainedModel:
    return _classifier(
        "efficientnet",
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=1.0,
        in_channels=[32, 32, 64],
        out_channels=[32, 64, 96],
        kernel_sizes=[3, 3, 5],
        strides=[1, 2, 2],
        num_block_repeats=[1, 2, 2],
        expand_ratios=[1, 4, 4],
        hidden_dim=320,  # must be 1280 times the width coefficient: the last convolution is
    )


@variant("mobilenet_v1")
def mobilenet_v1() -> PreTrainedModel:
    return _classifier("mobilenet_v1", image_size=64, depth_multiplier=0.25)


@variant("mobilenet_v2")
def mobilenet_v2() -> PreTrainedModel:
    return _classifier("mobilenet_v2", image_size=64, depth_multiplier=0.25, depth_divisible_by=4, min_depth=4)


@variant("pp_lcnet")
def pp_lcnet() -> PreTrainedModel:
    return _classifier("pp_lcnet", scale=0.25, class_expand=32)


@variant("hgnet_v2")
def hgnet_v2() -> PreTrainedModel:
    return _classifier("hgnet_v2", **HGNET)


@variant("hgnet_v2(lab)")
def hgnet_v2_affine() -> PreTrainedModel:
    return _classifier("hgnet_v2", use_learnable_affine_block=True, **HGNET)


@variant("textnet")
def textnet() -> PreTrainedModel:
    # a kernel that is 1 high or wide has one branch less; a layer of stride 1 that keeps the width adds its input
    return _classifier(
        "textnet",
        image_size=[64, 64],
        stem_out_channels=8,
        hidden_sizes=[8, 8, 12, 16, 20],
        conv_layer_kernel_sizes=[[[3, 3], [3, 3]], [[3, 3], [1, 3]], [[3, 3], [3, 1]], [[3, 3], [3, 3]]],
        conv_layer_strides=[[1, 2], [2, 1], [2, 1], [2, 1]],
    )
