"""Is a run over-optimizing its reward? Gold on held-out prompts says so, and since when.

Gold is a reward that training never sees, asked on prompts that it never draws, always from the
same noise. ``rule.py`` is the verdict, ``distances.py`` how the samples change, ``monitor.py`` what
keeps both beside a run.
"""

from .distances import Change, Reference
from .monitor import Monitor
from .rule import Reading, Verdict, verdict

__all__ = ["Change", "Monitor", "Reading", "Reference", "Verdict", "verdict"]
