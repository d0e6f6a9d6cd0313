"""Rectified sums of two scores, divided by the number of keys: kind "concat"."""
