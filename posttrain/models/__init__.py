"""Models: policies, value models, their adapters, and how they are loaded and saved.

Read ``policy.py`` first, then ``value.py``; all other rooms to the right may import from every module here.
Imports from ``parts`` (how values are backed up), ``recipe`` (the sections of a recipe) and the rooms to their left.
"""
