"""Tests, in the rooms of the package; made/ makes the models, weights, plans and commands that they share."""
