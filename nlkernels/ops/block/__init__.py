"""What a non-local block does before and after its attention, in few passes."""
