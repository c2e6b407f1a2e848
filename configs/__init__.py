"""The recipe schema and its loader, and the shipped recipes."""

from .loader import list_recipes as list_recipes
from .loader import load_recipe as load_recipe
from .loader import recipe_from_dict as recipe_from_dict
from .loader import resolved as resolved
from .loader import shipped_text as shipped_text
from .recipe import Recipe as Recipe
from .recipe import StageEntry as StageEntry
