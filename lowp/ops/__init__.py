"""The ops: schema, checks, shapes and registration of each, one file an op.

They have no gradients of their own; layers and optimizers call them from where gradients are
defined. Every op is also reachable as ``torch.ops.lowp.<name>``.
"""

from lowp.ops.library import OPS, Op

__all__ = ["OPS", "Op"]
