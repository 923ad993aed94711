"""The host of silva-networks, by which its configs take strategies by name."""

from .host import Silva
from .mode import Extras, Mode

__all__ = ["Extras", "Mode", "Silva"]
