"""The files of a run's folder: written, read, watched and analysed. No Megatron."""
