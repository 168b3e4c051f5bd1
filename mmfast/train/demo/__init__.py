"""The demo: a recipe over the layers, one file per stage."""
