"""The names that ``--optimizer`` takes, their flags, and which command lines are refused."""
