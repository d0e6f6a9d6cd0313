"""Depthwise 3-D correlation of a region's features: region-based non-local blocks."""
