"""``--log-spectral-metrics`` and ``--log-spectral-criterion``: what is measured while a run trains."""
