"""The programs that people start: training scripts and the console command."""
