"""Remove backdoors from Hugging Face vision models with Two-stage Symmetry Connectivity (hf.co/papers/2506.07467)."""

from hf_tsc.derive import derive_spec, verify
from hf_tsc.errors import AccuracyBudgetError, HfTscError, PurificationError, UsageError
from hf_tsc.evaluation import Attack, evaluate_model
from hf_tsc.metrics import AttackSuccessRate, CleanAccuracy, RobustAccuracy
from hf_tsc.permutation import PermutationSpec
from hf_tsc.purify import purify
from hf_tsc.report import PurificationReport
from hf_tsc.signatures import register_spec, spec_from_signatures
from hf_tsc.triggers import BadNets, Blended
from hf_tsc.tsc_config import TSCConfig
from hf_tsc.tsc_trainer import TSCTrainer

__version__ = "0.1.0"

__all__ = [
    "AccuracyBudgetError",
    "Attack",
    "AttackSuccessRate",
    "BadNets",
    "Blended",
    "CleanAccuracy",
    "HfTscError",
    "PermutationSpec",
    "PurificationError",
    "PurificationReport",
    "RobustAccuracy",
    "TSCConfig",
    "TSCTrainer",
    "UsageError",
    "derive_spec",
    "evaluate_model",
    "purify",
    "register_spec",
    "spec_from_signatures",
    "verify",
]
