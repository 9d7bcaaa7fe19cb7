"""The machine below a run: files, processes, interrupts, versions. Imports ``errors`` alone of the package.

Everything to the right may import from its modules.
"""
