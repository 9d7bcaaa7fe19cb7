"""Recipes: how a YAML file becomes typed settings and parts. Read ``sections.py`` and ``part.py`` first.

Other rooms load files with ``loading`` (``load_as``, ``run_file``), and use ``sections``, ``part``, ``resolve`` and
``yaml_reader.suggestion``. May import only errors, option_types and system.
"""
