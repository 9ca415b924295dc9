"""Derive and verify the symmetries of timm's architectures, at least one of every module of timm.

    pip install timm
    python recipes/timm_architectures.py --output docs/timm_architectures

Each one is built with random weights through `TimmWrapperForImageClassification`, as small as its family has it; of
some only the first blocks, or with smaller images. Nothing is downloaded. Verified means: in float64, with all weights
random and all spaces moved at once, the logits change by less than what `hf_tsc.derive.verify` allows, and by less
than a thousandth of the control: the change with one axis of one tensor left behind, the first of the network. (Where
many layers follow, hardly anything of that arrives at the logits.)
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torchvision_operators  # noqa: F401  (before transformers, which imports torchvision)

# isort: split
import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from hf_tsc.axes import is_frozen
from hf_tsc.derive import derive_spec, example_inputs, verify
from hf_tsc.errors import PurificationError
from hf_tsc.permutation import PermutationSpec

LABELS = 10
CONTRAST = 1000  # of the control to the error
WHOLE = """
    botnet26t_256 halonet_h1 lambda_resnet26t haloregnetz_b
    bat_resnext26ts eca_resnext26ts gcresnext26ts mobileone_s1 repvgg_a0 regnetz_d8_evos resnet50_clip
    coat_tiny coat_lite_tiny convit_tiny convnext_atto convnextv2_atto convnext_zepto_rms cpubone_nano
    crossvit_tiny_240 crossvit_9_dagger_240 cs3darknet_focus_s cspresnet50 darknet53 cspnext_tiny davit_tiny
    densenet121 dla46x_c dla60_res2next dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
    efficientnet_b0 efficientnet_b0_g8_gn efficientnet_cc_b0_4e mobilenetv2_050 mixnet_s mnasnet_small tinynet_e
    efficientvim_m1 efficientvit_b0 efficientvit_m0 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
    ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hieradet_small
    hrnet_w18_small iformer_t inception_next_atto lcnetv2_small levit_128s levit_conv_128s lowformer_b0
    mambaout_femto maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256 coatnet_nano_rw_224 coatnext_nano_rw_224
    poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18
    gmlp_ti16_224 gmixer_12_224 resmlp_12_224 mixer_s32_224 sequencer2d_s
    mobilenetv3_small_050 lcnet_035 fbnetv3_b mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium
    mobilevit_xxs mobilevitv2_050 mvitv2_tiny mvitv2_small_cls nest_tiny nextvit_small
    nf_regnet_b0 nf_resnet26 eca_nfnet_l0 pit_ti_224 pit_ti_distilled_224 pvt_v2_b0 pvt_v2_b2_li rdnet_tiny
    regnetx_002 regnety_002 repghostnet_050 repvit_m0_9 res2net50_48w_2s res2next50 resnest14d
    resnet18 resnet50 resnet50_gn resnext50_32x4d seresnet50 ecaresnet26t resnetv2_18 resnetv2_50x1_bit
    rexnet_100 selecsls42 legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 swiftformer_xs
    swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224
    tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_svt_small twins_pcpvt_small visformer_tiny
    vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw eca_vovnet39b xception41p
    xcit_nano_12_p16_224
"""
FIRST_BLOCKS = """
    beit_base_patch16_224 beitv2_base_patch16_224 beit3_base_patch16_224 vit_tiny_patch16_224 flexivit_small
    vit_small_patch14_dinov2 vit_base_patch32_clip_224 vit_base_patch16_siglip_224 deit3_small_patch16_224
    deit_tiny_distilled_patch16_224 eva02_tiny_patch14_224 vit_tiny_patch16_dinov3_qkvb vit_small_patch16_rope_224
    vit_small_patch16_rope_mixed_224 naflexvit_base_patch16_gap naflexvit_base_patch16_map
    vit_srelpos_small_patch16_224 vit_relpos_small_patch16_rpn_224 samvit_base_patch16_224 cait_xxs24_224
"""
SMALL_IMAGES = """
    csatv2 convmixer_768_32 dm_nfnet_f0 inception_v3 inception_v4 inception_resnet_v2 legacy_xception mobilenetv5_base
    nasnetalarge pnasnet5large vgg11_bn
"""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{name: {} for name in WHOLE.split()},
    **{name: {"depth": 2} for name in FIRST_BLOCKS.split()},
    **{name: {"pretrained_cfg_overlay": {"input_size": [3, 96, 96]}} for name in SMALL_IMAGES.split()},
    "deepseek_vit_412m": {"depth": 1, "img_size": 168},
    "gemma4_vit_167m": {"depth": 2, "img_size": 192},
    "qwen3_vit_88m": {"depth": 2, "img_size": 192},
}

COLUMNS = ("architecture", "family", "spaces", "error", "control", "operators without a rule", "moved", "seconds")
HEAD = """\
# Architectures of timm

Written by `recipes/timm_architectures.py` (see there what is measured), {date}: timm {timm}, transformers
{transformers}, torch {torch}, one thread of a CPU. **{verified} of {all} architectures verify**, of {families} of the
{modules} modules of timm (the column "family"). "Moved" is the share of the parameters that lie in a tensor that some
space acts on. An error above 1e-10 is that of a network that casts to float32 inside. A star marks those of which only
the first blocks were built, or that were given smaller images.

"""


def measure(name: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """One architecture: what was derived and how it was verified, or why not."""
    config = TimmWrapperConfig(architecture=name, num_labels=LABELS, model_args=model_args)
    model = TimmWrapperForImageClassification(config).eval()
    record = {"architecture": name, "model_args": model_args, "parameters": model.num_parameters()}
    inputs, start = example_inputs(model, batch_size=2), time.perf_counter()
    try:
        spec = derive_spec(model, inputs)
        record |= {"spaces": len(spec.spaces), "unknown_ops": spec.unknown_ops, "casts": spec.casts}
        record["moved"] = moved_share(model, spec)
        verification = verify(model, spec, inputs)
        record |= {"error": verification.error, "control": verification.control}
        if not verification.control or verification.control < CONTRAST * verification.error:
            record["failure"] = f"the control is not {CONTRAST} times the error: a mistake might not be seen"
    except PurificationError as error:
        record["failure"] = str(error)
    return record | {"seconds": time.perf_counter() - start}


def moved_share(model: torch.nn.Module, spec: PermutationSpec) -> float:
    """Share of the parameters in tensors of which some axis moves."""
    moved = sum(p.numel() for name, p in model.named_parameters() if not all(map(is_frozen, spec.axes[name])))
    return moved / sum(p.numel() for p in model.parameters())


def table(result: dict[str, Any]) -> str:
    """The Markdown of a result."""
    records = result["architectures"]
    verified = [record for record in records if "failure" not in record]
    counts = {"verified": len(verified), "all": len(records), "families": len({r["family"] for r in verified})}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---:|---:|---:|---|---:|---:|"]
    for record in sorted(records, key=lambda record: (record["family"], record["architecture"])):
        name = record["architecture"] + ("*" if record["model_args"] else "")
        measured = [f"{record[key]:.0e}" if key in record else "" for key in ("error", "control")]
        cells = [name, record["family"], str(record.get("spaces", "")), *measured]
        cells += [
            ", ".join(record.get("unknown_ops", [])),
            f"{record.get('moved', 0):.3f}",
            f"{record['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    failures = [f"- {record['architecture']}: {record['failure']}" for record in records if "failure" in record]
    closing = ["", "Not verified:", "", *failures] if failures else []
    return HEAD.format(**result["environment"], **counts) + "\n".join([*lines, *closing]) + "\n"


def families() -> dict[str, str]:
    """Architecture -> the module of timm that defines it."""
    import timm  # noqa: PLC0415  (an extra)

    return {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="path of the files, without .json and .md")
    parser.add_argument("--only", nargs="*", default=list(ARCHITECTURES), metavar="NAME", help="these architectures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    modules, records = families(), []
    for name in options.only:
        record = measure(name, ARCHITECTURES[name]) | {"family": modules[name]}
        records.append(record)
        print(f"{name}: {record.get('failure', 'verified')} ({record['seconds']:.0f} s)", flush=True)
    versions = {package: importlib.metadata.version(package) for package in ("timm", "transformers", "torch")}
    environment = {"date": datetime.date.today().isoformat(), **versions, "modules": len(set(modules.values()))}
    result = {"environment": environment, "architectures": records}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
