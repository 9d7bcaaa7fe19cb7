"""Commands: what ``posttrain COMMAND FILE`` does, a module for each command. Read ``cli.py`` first.

``cli.main`` is the console script. May import from all rooms but the quickstart; each command is imported only when it
runs, so that ``posttrain --help`` needs no torch.
"""
