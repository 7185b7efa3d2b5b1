"""Sources under their former name: see `sources`."""

from .sources import FORMS as FORM
from .sources import files, load

__all__ = ["FORM", "files", "load"]
