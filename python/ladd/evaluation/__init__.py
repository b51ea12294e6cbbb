"""Measuring a model: the feature network (classifier), the numbers taken in its features (metrics) and the whole table
(evaluate)."""
