"""How the objectives' losses and gradients become one."""

from lowp.hybrid.mixing.gradnorm import GradNorm
from lowp.hybrid.mixing.mixing import Mixing
from lowp.hybrid.mixing.pcgrad import without_conflicts
from lowp.hybrid.mixing.uncertainty import Uncertainty

__all__ = ["GradNorm", "Mixing", "Uncertainty", "without_conflicts"]
