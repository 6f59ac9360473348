"""Scores of whole benchmarks, their tables and figures, and how evenly a gate controls.

    python -m flexip_core.evaluation generate|score|compare|plot

`score` writes one file of scores per method and setting (measuring/scores_file.py); everything after it reads only that.
"""
