"""The recipe of `kvcli compress` where none is given: the best one that the snapshot's statistics allow."""

from .recipe import Recipe
from .snapshot import Snapshot

# Best first, by what they find of facts nobody had asked for yet: the README says how many. All take a budget. The last
# is for models whose output projection is not found, and caches that transformers has filled.
RECIPES = ("kvzip:recent=1+matching", "layer-defensivekv", "snapkv+adakv")


def usual_recipe(snapshot: Snapshot) -> Recipe:
    """The first of RECIPES whose statistics are there, else the last, which says what it lacks."""
    recipes, held = [Recipe.parse(text) for text in RECIPES], snapshot.meta.held
    there = {*snapshot.stats[held[0]].present()} if held else set[str]()
    return next((recipe for recipe in recipes if {*recipe.needs} <= there), recipes[-1])
