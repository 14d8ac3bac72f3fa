"""Predicts how much memory a run needs, before anything is allocated."""
