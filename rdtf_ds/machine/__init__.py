"""What a machine and its installed packages can train: read from files, judged by pure functions."""
