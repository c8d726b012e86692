"""The names of the shipped recipes; imports nothing heavy, so that a wrong --precision is refused at once."""

from importlib.resources import files

RECIPES = files("sana_calibration") / "recipes"


def recipe_names() -> tuple[str, ...]:
    """The shipped recipes."""
    return tuple(sorted(entry.name[:-5] for entry in RECIPES.iterdir() if entry.name.endswith(".yaml")))
