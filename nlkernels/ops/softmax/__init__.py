"""Row softmax of scale * query.key^T, times value: kinds "softmax" and "gaussian"."""
