"""The permutation symmetries of any model, derived from its `torch.export` graph."""

from hf_tsc.derive import encoder_inputs  # noqa: F401  (it registers its makers)
from hf_tsc.derive.export import fixed_outputs
from hf_tsc.derive.inputs import example_inputs, image_size
from hf_tsc.derive.trace import derive_spec
from hf_tsc.derive.verify import verify

__all__ = ["derive_spec", "example_inputs", "fixed_outputs", "image_size", "verify"]
