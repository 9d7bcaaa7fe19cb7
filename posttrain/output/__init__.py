"""Output: what a run leaves behind and what it shows. Read ``run_folder.py`` first, then ``tracking.py``.

``RunFolder``, ``Trackers``, ``read_metrics`` and ``Progress`` are for other rooms. May import from ``data``, ``system``
and ``errors``.
"""
