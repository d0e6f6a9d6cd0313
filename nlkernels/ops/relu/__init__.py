"""Rectified scaled scores, divided by the number of keys: kind "relu"."""
