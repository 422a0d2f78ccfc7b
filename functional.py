"""`fullres.functional`: torch.nn.functional's signatures, computed by our operators."""

from .ops.functional import *  # noqa: F403
from .ops.functional import __all__  # noqa: F401
