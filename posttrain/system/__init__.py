"""Files, processes, interrupts and versions. Read ``processes.py`` first.

All other rooms may import from its modules. It imports only ``errors`` of the package.
"""
