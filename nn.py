"""`fullres.nn`: layers that take the place of torch.nn's."""

from .ops.modules import *  # noqa: F403
from .ops.modules import __all__  # noqa: F401
