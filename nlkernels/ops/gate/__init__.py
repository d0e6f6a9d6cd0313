"""Context pooling of the channel gate: one softmax over all positions."""
