"""What can be said of a model, and of two, without a trigger: evidence before and after, never a verdict."""
