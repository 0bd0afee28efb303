"""How long tests wait for a process."""

HANGS_AFTER = 900
"""Seconds after which a process is ended that should have ended by itself.

No run takes a tenth of it on two idle cores: what shares them may slow it down ten times. Less than
``timeout`` of pytest, which shows nothing of the run.
"""
