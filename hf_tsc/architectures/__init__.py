"""The architectures hf_tsc is proven on: tiny models of each, and the table of what was derived and measured."""

from hf_tsc.architectures import classifiers, encoders  # noqa: F401  (they register their variants)
from hf_tsc.architectures.variants import VARIANTS, Variant

__all__ = ["VARIANTS", "Variant"]
