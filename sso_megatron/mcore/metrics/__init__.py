"""The measurements of ``--log-spectral-metrics`` and ``--log-spectral-criterion`` while a run trains."""
