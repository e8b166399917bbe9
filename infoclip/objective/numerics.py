"""The objective's terms use the same numerics as the ops on sample sets."""

from infoclip.kernels.numerics import check_samples, full_precision, unit, widened

__all__ = ["check_samples", "full_precision", "unit", "widened"]
