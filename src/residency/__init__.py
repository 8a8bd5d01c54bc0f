"""Residency: from a general model, a few labelled examples and open data to a small, fast, evaluated specialist.

Importing this package imports nothing heavy. The library's doors:

    residency.recipe.load(file) · residency.plan.make(recipe) · residency.run.execute(recipe, folder)
    residency.catalog.METHODS   · one row per method; `row.load()` gives its class
    residency.testing.check_method(name)
"""

__version__ = "0.1.0"
