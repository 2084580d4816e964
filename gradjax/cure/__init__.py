"""The catalogue of remedies, and the search for those that cure a network."""

from gradjax.core.names import suggest_names
from gradjax.cure.search import Cure as Cure
from gradjax.cure.search import find_cure as find_cure

__getattr__ = suggest_names(__name__)
