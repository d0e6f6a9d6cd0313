"""Convolutions of kernel size 1 over positions that lie anyhow, and the sums of their gradients."""
