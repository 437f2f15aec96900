"""Networks and how they are fitted."""

from .cache import Cache
from .fit import FitConfig
from .nets import TimeMLP
from .unet import UNet

__all__ = ["Cache", "FitConfig", "TimeMLP", "UNet"]
