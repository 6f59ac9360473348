"""One profile of Hypothesis for all tests, in three sizes: scripts/test.py takes fast with --fast and thorough with --all.

A test has its own max_examples only where one example takes long. In CI, Hypothesis' own profile for CI is below ours:
there the examples are always the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings

for name, examples in {"fast": 10, "normal": 50, "thorough": 300}.items():
    # Nothing may depend on how busy the machine is.
    settings.register_profile(name, deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=examples)
# for scripts/mutate.py: that a test fails is enough, no smaller example is looked for
settings.register_profile("mutate", settings.get_profile("normal"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("normal")

# pytest put this folder on the path for this file; there its comfy/ would become part of ComfyUI's namespace package.
sys.path.remove(str(Path(__file__).parent))
