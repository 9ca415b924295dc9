"""Triggers, picture in and picture out, and how attacks poison training images with them.

A trigger acts on uint8 pixels at the model's input size, after resizing and before any normalisation, and is the same
in training and test unless its attack says otherwise. It is a frozen dataclass of a few numbers: written as JSON
beside a suspect, it is enough to measure the suspect's attack success rate again. One that is learnt has a file beside
that.
"""

from hf_tsc.triggers.base import MAX_SEED, NEXT, Poisoning, TargetLabel, Trigger
from hf_tsc.triggers.blending import SIG, AdaptiveBlend, Blended, LowFrequency
from hf_tsc.triggers.frequency import CTRL, FTrojan
from hf_tsc.triggers.generated import TRIGGER_FILE, InputAware, PatternNets
from hf_tsc.triggers.patches import BadNets, LabelConsistent, Square
from hf_tsc.triggers.poisoning import Attack, Poison, draw_poison, poison_indices
from hf_tsc.triggers.quantisation import BPP
from hf_tsc.triggers.registry import TRIGGERS, read_trigger, trigger_from_dict, trigger_to_dict
from hf_tsc.triggers.warping import WaNet

__all__ = [
    "BPP",
    "CTRL",
    "MAX_SEED",
    "NEXT",
    "SIG",
    "TRIGGERS",
    "TRIGGER_FILE",
    "AdaptiveBlend",
    "Attack",
    "BadNets",
    "Blended",
    "FTrojan",
    "InputAware",
    "LabelConsistent",
    "LowFrequency",
    "PatternNets",
    "Poison",
    "Poisoning",
    "Square",
    "TargetLabel",
    "Trigger",
    "WaNet",
    "draw_poison",
    "poison_indices",
    "read_trigger",
    "trigger_from_dict",
    "trigger_to_dict",
]
