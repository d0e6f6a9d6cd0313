"""Scaled scores without a softmax, divided by the number of keys: kind "dot_product"."""
