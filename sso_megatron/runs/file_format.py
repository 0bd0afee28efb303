"""The format of a run's folder, which ``--spectral-run-dir`` names: its files and what stands in them.

The records are plain text, and a file of lines can be read while the run appends to it:

- ``run.json``, an object: what is trained how. Written when training starts, and again after a resume.
- ``metrics.jsonl``, an object a line and iteration: ``iteration``, ``time`` (seconds since 1970) and
  ``loss``; at ``--log-interval`` also ``lr`` and ``grad_norm``; where the model was measured also
  ``headlines`` (a few numbers by name) and ``alarms`` (texts), and at ``--log-spectral-criterion``
  ``criterion`` (numbers by weight).
- ``measures.jsonl``, everything measured, in two kinds of lines. ``{"tables": {table: [row, ...]}}`` names
  the rows of each table, and holds until the next such line. ``{"iteration": ..., "time": ..., "lr": ...,
  table: {column: [number, ...]}}`` is a measurement, with a number (or a list, for ``load``) for each row.
- ``summary.json``, an object: how the run ended. Written at the end; a resume leaves the old one there
  until it ends itself.

A number is written by ``json_numbers``: null where it is not known or NaN, 1e999 where it is infinite.

A run may be killed while it writes, so that a line or an object is unfinished; ``json_lines`` passes over
it. A resumed run appends to the files of lines. Its first iteration may have been done before, and a line
whose iteration is not beyond that of the line before begins a resumed part. This part replaces its first
iteration and all later ones.

Any file may be missing: only measured runs have ``measures.jsonl``, and a run that still goes on has no
``summary.json``.
"""

DESCRIPTION = "run.json"
METRICS = "metrics.jsonl"
MEASURES = "measures.jsonl"
SUMMARY = "summary.json"

CRITERION_PICTURE = "criterion.png"
"""Heat map of the criterion, drawn when a run with ``--log-spectral-criterion`` ends."""
RUN_PICTURE = "run.png"
"""Loss and spectral norms, drawn when ``sso-megatron first-run`` ends."""
LOG = "train.log"
"""All output of the training processes of ``sso-megatron first-run``."""
CHECKPOINT = "checkpoint"
"""Folder of checkpoints that ``sso-megatron first-run`` saves, and where others look first."""
