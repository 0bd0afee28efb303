"""What people start: training scripts and the console command."""
