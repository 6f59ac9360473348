"""The checks of scripts/gpu_check.py: each takes its options and gives what it measured; "passed" is False, or it raises, if
something is not as it must be."""
