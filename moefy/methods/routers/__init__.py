"""Routers score the experts of a layer for every token: one file each; `tables.py` has the table."""
