"""Train suspects: models of images with a backdoor of known trigger, or without any (their clean twins).

For tests, demonstrations and measurements: what a defence is worth can only be seen where the trigger is known.
"""

from hf_tsc.folders import RECORD
from hf_tsc.suspects.adaptive import Adaptive, adapt_suspect
from hf_tsc.suspects.adversarial import Surrogate
from hf_tsc.suspects.base import SuspectConfig
from hf_tsc.suspects.classifier import train_suspect
from hf_tsc.suspects.dual_encoder import train_dual_encoder
from hf_tsc.suspects.encoder import BadEncoder, backdoor_encoder, train_encoder

__all__ = [
    "RECORD",
    "Adaptive",
    "BadEncoder",
    "Surrogate",
    "SuspectConfig",
    "adapt_suspect",
    "backdoor_encoder",
    "train_dual_encoder",
    "train_encoder",
    "train_suspect",
]
