"""Measured tables against predictions: how far what is predicted agrees with what was measured."""
