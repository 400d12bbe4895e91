"""Feature-level reverse propagation: which input should a module have had?

Source: Ding, He, Li, Li, "Hierarchical Feature-level Reverse Propagation for Post-Training Neural
Networks", arXiv 2506.07188. Needs PyTorch alone.
"""

from fmce_ops.reverse.engine import propagate, reverse
from fmce_ops.reverse.logits import nearest_logits
from fmce_ops.reverse.result import Propagation, Reversal, Status

__all__ = ["Propagation", "Reversal", "Status", "nearest_logits", "propagate", "reverse"]
