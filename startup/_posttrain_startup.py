"""Lets ``python recipe.yaml``, and so ``accelerate launch recipe.yaml``, run a recipe.

Before CPython reads a script as source it asks ``sys.path_hooks`` for an importer of the script's path: that is how
``python archive.zip`` runs. ``install`` adds a hook that claims the main script, and only if it is a YAML file.

``posttrain-startup.pth`` calls it when the interpreter starts, so this module imports nothing that ``site`` has not
imported before.
"""

import os
import sys

SUFFIXES = (".yaml", ".yml")

MAIN = """\
import os, sys
if sys.path and sys.path[0] == __file__:  # as for any script, its folder heads sys.path, not the script
    sys.path[0] = os.path.dirname(os.path.abspath(__file__))
from posttrain.commands.cli import main
sys.exit(main(sys.argv))
"""


def install():
    """Adds the hook. A second call is harmless: in a virtual environment ``site`` runs a .pth file twice."""
    if claim not in sys.path_hooks:
        sys.path_hooks.append(claim)


def claim(path):
    """The path hook: returns an importer for the main script if it is a recipe.

    Raises:
        ImportError: for any other path, which Python then handles as usual.
    """
    if not isinstance(path, str) or not path.lower().endswith(SUFFIXES):
        raise ImportError("not a recipe", path=path)
    if _absolute(path) != _absolute(sys.argv[0]) or not os.path.isfile(path):
        raise ImportError("not the main script", path=path)
    return RecipeImporter(path)


def _absolute(path):
    # The hook is given the absolute path, with two slashes if the working directory is "/"; sys.argv[0] is as typed.
    path = os.path.abspath(path)
    return path[1:] if path.startswith("//") else path


class RecipeImporter:
    """Finds and loads one module, ``__main__``, which runs the recipe.

    Since the module's name is ``__main__``, child processes of ``multiprocessing`` do not run it again.
    """

    def __init__(self, path):
        self.path = path

    def find_spec(self, fullname, target=None):
        if fullname != "__main__":
            return None
        from importlib.machinery import ModuleSpec

        # The loader does not derive from importlib.abc.Loader: importing that would slow down every start of Python.
        spec = ModuleSpec("__main__", self, origin=self.path)  # pyright: ignore[reportArgumentType]
        spec.has_location = True
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(self.get_code(module.__name__), module.__dict__)

    def get_code(self, fullname):
        return compile(self.get_source(fullname), f"<posttrain {self.path}>", "exec", dont_inherit=True)

    def get_source(self, fullname):
        return MAIN

    def get_filename(self, fullname):
        return self.path

    def is_package(self, fullname):
        return False
