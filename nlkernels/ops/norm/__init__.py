"""Batch norms behind a product: statistics with it, norm and residual in one pass, gradients."""
