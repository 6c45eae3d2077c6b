"""Detections on disk: their columns, files, plots, and the job that writes them."""
