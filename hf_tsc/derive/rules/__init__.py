"""What each aten operator asks of the axes of its operands, and which axes its result has.

An operator without a rule freezes everything it touches: sound, and reported.
"""

from hf_tsc.derive.rules import elementwise, indexing, linear, recurrent, reductions, shapes  # noqa: F401  (they register rules)
from hf_tsc.derive.rules.base import RULES, Trace, Use, Value, output_shape, unknown

__all__ = ["RULES", "Trace", "Use", "Value", "output_shape", "unknown"]
