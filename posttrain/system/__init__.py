"""System: files, processes, interrupts, versions. Imports only ``errors`` of the package.

Everything to the right may import from its modules.
"""
